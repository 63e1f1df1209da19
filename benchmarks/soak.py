"""Load `llama serve` for minutes, and watch its memory and its open files.

python benchmarks/soak.py --out benchmarks/results/soak.json

Clients stream, leave, chat, ask for JSON, and make mistakes, in a random order. The script raises
an error if an answer is wrong, if a greedy text is not that of a call that runs alone, if the
resident memory grows by more than `growth` after the warm-up, or if the server ends with more open
files than it had after the warm-up. Linux only.
"""

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import fire
import httpx
from processor import processor
from serve import server
from serve_faults import MODEL, PATHS, USER, malformed, wait_until_idle
from tqdm import tqdm

from llama.errors import BenchmarkError

WORDS = "king fox cat witch miller goose tailor frog wolf bear hare prince".split()
PROMPTS = [f"Once upon a time there was a {word} who" for word in WORDS]
WARM_UP = 0.25  # of the whole time
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["fox", "king"]}, "age": {"enum": [1, 2, 3]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Client:
    """One client. `texts` has the greedy text of each prompt of a call that ran alone."""

    def __init__(self, http: httpx.AsyncClient, rng: random.Random, texts: dict[str, str]) -> None:
        self.http, self.rng, self.texts = http, rng, texts
        self.calls = [self.complete, self.stream, self.leave, self.chat, self.json, self.mistake]

    async def one(self) -> None:
        await self.rng.choice(self.calls)()

    async def post(self, path: str, **body: Any) -> Any:
        response = await self.http.post(path, json={"model": MODEL, **body})
        if response.status_code != 200:
            raise BenchmarkError(f"{path} got status {response.status_code}: {response.text:.200}")
        return response.json()

    def check(self, prompt: str, text: str) -> None:
        """Compare a greedy text with that of a call that ran alone."""
        if self.texts[prompt] != text:
            raise BenchmarkError(f"{prompt!r} got {text!r}, but alone {self.texts[prompt]!r}")

    def body(self) -> dict[str, Any]:
        prompt = self.rng.choice(PROMPTS)
        return {"prompt": prompt, "max_tokens": 32, "temperature": 0}

    async def alone(self) -> None:
        """Fill `texts`, with one call at a time."""
        for prompt in PROMPTS:
            answer = await self.post("/v1/completions", prompt=prompt, max_tokens=32, temperature=0)
            self.texts[prompt] = answer["choices"][0]["text"]

    async def complete(self) -> None:
        body = self.body()
        answer = await self.post("/v1/completions", **body)
        self.check(body["prompt"], answer["choices"][0]["text"])

    async def stream(self, n_lines: int | None = None) -> None:
        body, text = self.body(), ""
        sent = {"model": MODEL, "stream": True, **body}
        async with self.http.stream("POST", "/v1/completions", json=sent) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                if n_lines is not None:
                    n_lines -= 1
                    if n_lines == 0:
                        return
        self.check(body["prompt"], text)

    async def leave(self) -> None:
        await self.stream(n_lines=self.rng.randrange(1, 12))

    async def chat(self) -> None:
        n = self.rng.randrange(1, 4)
        answer = await self.post("/v1/chat/completions", messages=[USER], max_tokens=16, n=n)
        if len(answer["choices"]) != n:
            raise BenchmarkError(f"{n} samples were asked for, {len(answer['choices'])} came")

    async def json(self) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
        answer = await self.post(
            "/v1/chat/completions", messages=[USER], max_tokens=100, response_format=form
        )
        json.loads(answer["choices"][0]["message"]["content"])

    async def mistake(self) -> None:
        path = self.rng.choice(PATHS)
        headers = {"content-type": "application/json"}
        response = await self.http.post(path, content=malformed(self.rng, path), headers=headers)
        if response.status_code >= 500:
            raise BenchmarkError(f"a mistake got status {response.status_code}")


def resident_kib(process_id: int) -> int:
    """The resident memory of a process, in KiB."""
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise BenchmarkError("the server's memory cannot be read")


def open_files(process_id: int) -> int:
    return len(list(Path(f"/proc/{process_id}/fd").iterdir()))


async def soak(url: str, process_id: int, seconds: float, clients: int) -> dict[str, Any]:
    """Load the server. Returns the figures."""
    texts: dict[str, str] = {}
    n_calls = 0

    async def load(until: float, seed: int) -> None:
        nonlocal n_calls
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            client = Client(http, random.Random(seed), texts)
            while time.perf_counter() - start < until:
                await client.one()
                n_calls += 1

    async def settled() -> None:
        async with httpx.AsyncClient(base_url=url) as http:
            await wait_until_idle(http)
        await asyncio.sleep(0.5)  # the server closes its sides of the connections

    async def watch(until: float) -> list[int]:
        samples = []
        with tqdm(total=round(until), desc="Seconds", unit="s") as bar:
            while (now := time.perf_counter() - start) < until:
                samples.append(resident_kib(process_id))
                bar.update(round(now) - bar.n)
                await asyncio.sleep(1)
        return samples

    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        await Client(http, random.Random(0), texts).alone()
    start = time.perf_counter()
    await asyncio.gather(*(load(WARM_UP * seconds, seed) for seed in range(clients)))
    await settled()
    files = open_files(process_id)
    memory = resident_kib(process_id)
    done = await asyncio.gather(
        watch(seconds), *(load(seconds, clients + seed) for seed in range(clients))
    )
    await settled()
    return {
        "seconds": seconds,
        "clients": clients,
        "calls": n_calls,
        "resident_mib_after_warm_up": memory / 1024,
        "resident_mib_at_end": resident_kib(process_id) / 1024,
        "resident_mib_highest": max(done[0] or [memory]) / 1024,
        "open_files_after_warm_up": files,
        "open_files_at_end": open_files(process_id),
    }


def main(
    ckpt_dir: str = "llama/bundled",
    seconds: float = 300.0,
    clients: int = 8,
    growth: float = 0.02,
    out: str | None = None,
) -> None:
    """Run the load on a server of its own, and print the figures.

    Args:
        ckpt_dir: a checkpoint folder.
        seconds: how long, a quarter of it for the warm-up.
        clients: calls at a time.
        growth: the largest growth of the memory after the warm-up, as a fraction of it.
        out: file for the figures as JSON.
    """
    with server(ckpt_dir, 8, ["--max_seq_len", "256"]) as served:
        figures = asyncio.run(soak(served.url, served.process_id, seconds, clients))
    figures["growth"] = figures["resident_mib_at_end"] / figures["resident_mib_after_warm_up"] - 1
    report = {"processor": processor(), **figures}
    print(*(f"{name}: {value}" for name, value in report.items()), sep="\n")
    if out is not None:
        Path(out).write_text(json.dumps(report, indent=2) + "\n")
    if figures["growth"] > growth:
        raise BenchmarkError(f"the memory grew by {figures['growth']:.1%}: at most {growth:.1%}")
    if figures["open_files_at_end"] > figures["open_files_after_warm_up"]:
        raise BenchmarkError("the server has more open files than after the warm-up")


if __name__ == "__main__":
    fire.Fire(main)
