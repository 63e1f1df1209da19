"""The numbers of /metrics, in Prometheus' text format. `llama serve --metrics` shows them."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llama.server.security import App, Receive, Scope, Send
from llama.server.service import Service

KNOWN_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize")


class Metrics(Collector):
    """An ASGI middleware that counts answers, and the collector of all numbers."""

    def __init__(self, app: App, service: Service) -> None:
        self._app, self._service = app, service
        self._answers: Counter[tuple[str, str]] = Counter()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["method"], scope["path"]) == ("GET", "/metrics"):
            body = generate_latest(self._registry)
            headers = [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return

        async def counted(message: dict[str, object]) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in KNOWN_PATHS else "other"
                self._answers[path, str(message["status"])] += 1
            await send(message)

        await self._app(scope, receive, counted)  # type: ignore[arg-type]

    def collect(self) -> Iterator[Metric]:
        answers = CounterMetricFamily("llama_answers", "Answers by path and status.",
                                      labels=["path", "status"])  # fmt: skip
        for (path, status), count in self._answers.items():
            answers.add_metric([path, status], count)
        yield answers
        service = self._service
        yield GaugeMetricFamily("llama_open_requests", "Requests that run or wait.", service.n_open)
        for name, text in (
            ("prompt", "Tokens of the prompts of ended requests."),
            ("cached", "Of these, tokens that were in the KV cache already."),
            ("generated", "Tokens that ended requests generated."),
        ):
            yield CounterMetricFamily(f"llama_{name}_tokens", text, service.tokens[name])
