"""llama serve: OpenAI's API and a chat page for one model."""

from contextlib import nullcontext
from typing import Any

from llama.commands.flags import MODEL, SPECULATION, as_text, takes
from llama.errors import GenerationError


@as_text
@takes(MODEL, SPECULATION)
def serve(
    model: str | None = None,
    *words: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    name: str | None = None,
    adapters: str | None = None,
    max_batch_size: int = 8,
    max_waiting: int = 64,
    timeout: float = 600.0,
    allow_origin: str = "",
    metrics: bool = False,
    log_calls: bool = False,
    date: str | None = None,
    **flags: Any,
) -> None:
    """Serve a model to OpenAI's clients, and a chat page to browsers.

    The chat page is at http://127.0.0.1:8000, the API under /v1. Calls that come together run in
    one batch. Under torchrun the ranks share the model. Ctrl-C or SIGTERM lets running calls finish
    within 25 seconds. A second one ends them.

    Reads:
        Calls of OpenAI's API. The body of a call to /v1/chat/completions is JSON, such as
            {"model": "bundled", "messages": [{"role": "user", "content": "Tell me a tale."}]}

    Writes:
        Answers in the form of OpenAI's API.
        Standard error: the address, warnings, and with --log_calls a line for each call, such as
            {"time": "…", "method": "POST", "path": "/v1/chat/completions", "status": 200, …}

    Examples:
        llama serve --port 8080
        llama serve HuggingFaceTB/SmolLM2-360M-Instruct --max_seq_len 4096 --max_batch_size 16

    Exit codes:
        0: stopped by Ctrl-C or SIGTERM
        3: the engine or a rank failed
        130: stopped by Ctrl-C before it served

    Args:
        model: a checkpoint folder, GGUF file or id on the Hub; by default --ckpt_dir.
        host: address to serve on; one that other machines reach needs --api_key.
        port: port to serve on; 0: any free one.
        api_key: key that callers must send as "Authorization: Bearer KEY"; by default the
            environment variable LLAMA_API_KEY, or none.
        name: the model's name in the API; by default that of its folder.
        adapters: NAME=FOLDER,NAME=FOLDER, LoRA adapters of the model; a call may name one as its
            model.
        max_batch_size (calls): calls that are computed at the same time.
        max_waiting (calls): calls that may wait; one more gets status 429.
        timeout (seconds): longest time of a call.
        allow_origin: origins of other pages that may call, with commas between.
        metrics: give Prometheus its numbers at /metrics.
        log_calls: write a line of JSON for each call to standard error, without any text of it.
        date: date in the system message of chats, such as "26 Jul 2024", or today; with it chats
            are written as the chat template in Meta's Hugging Face folders writes them.
    """
    import os

    from llama.commands import terminal
    from llama.generation import Llama
    from llama.parallel import is_main_rank
    from llama.server.run import bound_socket, check_access, check_limits, exit_with, model_name
    from llama.server.run import serve as run

    if words:
        raise GenerationError(f"unexpected {words[0]!r}: one model is served")
    terminal.name_model(model, flags)
    api_key = api_key or os.environ.get("LLAMA_API_KEY") or None
    check_access(host, api_key)
    build, _ = terminal.read_flags(words, flags)
    origins = tuple(origin.strip() for origin in allow_origin.split(",") if origin.strip())
    check_limits(port, max_waiting, timeout, origins)
    served, beside = name or model_name(build.get("ckpt_dir")), terminal.read_adapters(adapters)
    if served in beside:
        raise GenerationError(f"the model and an adapter have the name {served}: give another one")
    # An address in use is told before the model is loaded.
    with bound_socket(host, port) if is_main_rank() else nullcontext() as bound:
        llama = Llama.build(**build, adapters=beside, max_batch_size=max_batch_size)
        code = run(
            llama, served, host, bound, api_key, max_waiting, timeout, origins, metrics, log_calls,
            date,
        )  # fmt: skip
    exit_with(code)
