"""The terminal: show texts while they are generated, and their speed, on the first rank alone."""

import contextlib
import itertools
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, replace
from enum import IntEnum
from typing import Any, TextIO

import torch

from llama import parallel
from llama.chat_format import Dialog
from llama.engine.request import Event, Request
from llama.errors import GenerationError
from llama.generation import Llama
from llama.sampling import SamplingParams

# Flags that are options of `Llama.build`. The seed is one of them and not a sampling option: so the
# same command gives the same texts, but a repeated question in one chat gets another answer.
BUILD_FLAGS = (
    "ckpt_dir", "tokenizer_path", "max_seq_len", "seed", "mode", "quantize", "kv_cache", "device",
    "dtype", "rope_factor", "format", "draft", "lookup",
)  # fmt: skip
KEEP_ALIVE = parallel.TIMEOUT.total_seconds() / 5  # seconds between messages to waiting ranks

# Control characters of a model's text must not reach the terminal.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def read_flags(
    words: Collection[str], flags: Mapping[str, Any]
) -> tuple[dict[str, Any], SamplingParams]:
    """The flags as options of `Llama.build` and as `SamplingParams`.

    words: surplus words of the command line. Raises GenerationError for the first of them.
    """
    if words:
        raise GenerationError(f"unexpected {next(iter(words))!r}: put a text in quotes")
    sampling = {field.name for field in fields(SamplingParams)} - {"seed"}
    options = {name: value for name, value in flags.items() if name in sampling}
    if "stop" in options:
        options["stop"] = [options["stop"]]
    SamplingParams(seed=flags.get("seed"))  # for its check
    build = {name: value for name, value in flags.items() if name in BUILD_FLAGS}
    return {"mode": "fast", **build}, SamplingParams(**options)


def suggested(llama: Llama, params: SamplingParams, flags: Mapping[str, Any]) -> SamplingParams:
    """The options with the folder's own temperature and top_p, where no flag names them."""
    chosen = {name: v for name, v in llama.suggested_sampling.items() if name not in flags}
    if chosen and parallel.is_main_rank():
        shown = ", ".join(f"{name} {value}" for name, value in chosen.items())
        note(f"{shown}, as the folder's generation_config.json says")
    return replace(params, **chosen)  # type: ignore[arg-type]


def complete(llama: Llama, prompt: str | None, params: SamplingParams) -> None:
    """Print the continuation of the prompt while it is generated. prompt None: read it from
    standard input."""
    with owned(llama) as is_ours:
        if not is_ours:
            return
        prompt = read_input() if prompt is None else prompt
        requests: set[Request] = set()
        n_tokens, start = 0, time.perf_counter()
        try:
            with stream(llama, prompt, params) as events:
                for row, of_row in in_turn(events):
                    print("\n" * (row > 0), end=dim(prompt, sys.stdout) * sys.stdout.isatty())
                    for event in of_row:
                        show(event.text)
                        requests.add(event.request)
                        n_tokens += event.token is not None
                    print()
        except KeyboardInterrupt:
            print()
            raise
        finally:
            note(speed(n_tokens, start) + accepted_text(requests))


def read_input() -> str:
    """All of standard input, without the newline at its end."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise GenerationError(
            f"the input is not UTF-8 text: byte {error.start} is wrong"
        ) from error


# ---- what is shown ------------------------------------------------------------------------------


def in_turn(events: Iterator[Event]) -> Iterator[tuple[int, Iterator[Event]]]:
    """Each row and its events, one row after the other.

    The first row's events come at once. Events of a later row are held back until the rows before
    it have ended.
    """

    def ordered() -> Iterator[Event]:
        held: defaultdict[int, deque[Event]] = defaultdict(deque)
        turn = 0
        for event in events:
            held[event.row].append(event)
            while held[turn]:
                yield (first := held[turn].popleft())
                turn += first.finish_reason is not None

    return itertools.groupby(ordered(), key=lambda event: event.row)


def show(text: str) -> None:
    """Print a part of a text without waiting for a newline."""
    if sys.stdout.isatty():
        text = text.translate(_CONTROLS)
    print(text, end="", flush=True)


def note(text: str) -> None:
    """Print a dim line on stderr, apart from the generated text."""
    print(dim(text, sys.stderr), file=sys.stderr, flush=True)


def speed(n_tokens: int, start: float) -> str:
    """The number and speed of tokens since `start`, a time of perf_counter, as text."""
    return f"{n_tokens} tokens, {n_tokens / (time.perf_counter() - start):.1f} a second"


def accepted_text(requests: Collection[Request]) -> str:
    """How many proposals were accepted, as text; empty where no token was proposed."""
    proposed = sum(request.proposed for request in requests)
    accepted = sum(request.accepted for request in requests)
    return f", {accepted} of {proposed} proposals accepted" if proposed else ""


def dim(text: str, file: TextIO) -> str:
    return f"\033[2m{text}\033[0m" if file.isatty() else text


# ---- the rank that has the terminal -------------------------------------------------------------


class _Signal(IntEnum):
    """Messages of the rank with the terminal to the others."""

    WAIT = 0
    STREAM = 1
    DONE = 2


@contextlib.contextmanager
def owned(llama: Llama) -> Iterator[bool]:
    """Yields True on the first rank, which has the terminal and calls `stream`.

    The other ranks compute their part until the first rank leaves its block, and then get False.
    """
    if parallel.mp_rank() > 0:
        while (signal := _receive(llama)) is not _Signal.DONE:
            if signal is _Signal.STREAM:
                llama.engine.follow()
        yield False
        return
    try:
        yield True
    finally:
        _send(llama, _Signal.DONE)


def stream(
    llama: Llama, prompt: str | list[int] | Dialog, params: SamplingParams
) -> contextlib.AbstractContextManager[Iterator[Event]]:
    """`llama.stream` of a prompt that only this rank has. Leaving the block cancels it."""
    events = llama.stream(prompt, **vars(params))  # raises before the other ranks follow
    _send(llama, _Signal.STREAM)
    return contextlib.closing(events)


def read_line(llama: Llama, prompt: str) -> str:
    """Read a typed line, without a time limit. Raises EOFError at the end of the input."""
    prompt = prompt if sys.stdin.isatty() and sys.stdout.isatty() else ""
    if parallel.mp_size() == 1:
        return input(prompt)
    over = threading.Event()

    def keep_waiting() -> None:
        while not over.wait(KEEP_ALIVE):
            _send(llama, _Signal.WAIT)

    thread = threading.Thread(target=keep_waiting, daemon=True)
    thread.start()
    try:
        return input(prompt)
    finally:
        over.set()
        thread.join()


def _send(llama: Llama, signal: _Signal) -> None:
    parallel.broadcast_numbers([signal], torch.int64, llama.model.device)


def _receive(llama: Llama) -> _Signal:
    return _Signal(parallel.broadcast_numbers(None, torch.int64, llama.model.device)[0])
