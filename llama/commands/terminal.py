"""The terminal: show texts while they are generated, and read lines.

Only the first rank reads and writes. The other ranks follow it.
"""

import contextlib
import itertools
import os
import signal
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
from llama.errors import ConfigError, GenerationError, ParallelError
from llama.generation import Llama
from llama.lost_ranks import timeout
from llama.sampling import SamplingParams
from llama.terminal_text import printable, without_controls

# Flags that go to `Llama.build`. The seed goes there, and not to the SamplingParams of a request.
# So the same command gives the same texts, but a question that is asked twice in one chat gets two
# different answers. So does the adapter, which SamplingParams names only where a model has several.
BUILD_FLAGS = (
    "ckpt_dir", "tokenizer_path", "max_seq_len", "seed", "mode", "quantize", "kv_cache", "device",
    "dtype", "rope_factor", "format", "adapter", "draft", "lookup",
)  # fmt: skip
DIM, YELLOW, MAGENTA = 2, 33, 35  # styles of ECMA-48


def read_flags(
    words: Collection[str], flags: Mapping[str, Any]
) -> tuple[dict[str, Any], SamplingParams]:
    """Split the flags into arguments of `Llama.build` and SamplingParams.

    words: arguments that the command does not take. Raises GenerationError if there are any, and
    for a value that SamplingParams refuses.
    """
    if words:
        raise GenerationError(f"unexpected {next(iter(words))!r}: put a text in quotes")
    sampling = {field.name for field in fields(SamplingParams)} - {"seed", "adapter"}
    options = {name: value for name, value in flags.items() if name in sampling}
    if "stop" in options:
        options["stop"] = [options["stop"]]
    SamplingParams(seed=flags.get("seed"))  # raises for a wrong seed
    build = {name: value for name, value in flags.items() if name in BUILD_FLAGS}
    return {"mode": "fast", **build}, SamplingParams(**options)


def name_model(model: str | None, flags: dict[str, Any]) -> None:
    """Put the model that a command names as its argument among the flags, as `ckpt_dir`. Raises
    GenerationError if --ckpt_dir is there already."""
    if model is None:
        return
    if "ckpt_dir" in flags:
        raise GenerationError(f"two models: {model} and --ckpt_dir {flags['ckpt_dir']}")
    flags["ckpt_dir"] = model


def read_adapters(text: str | None) -> dict[str, str]:
    """The adapters in a text such as "pirate=tuned,poet=owner/name": folders or ids, by name."""
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    for name, _, place in pairs:
        if not name or not place:
            raise ConfigError(f"adapters is {text!r}: it must be NAME=FOLDER,NAME=FOLDER")
    return {name.strip(): place.strip() for name, _, place in pairs}


def suggested(llama: Llama, params: SamplingParams, flags: Mapping[str, Any]) -> SamplingParams:
    """The options. The folder's temperature and top_p are used unless a flag sets them."""
    chosen = {name: v for name, v in llama.suggested_sampling.items() if name not in flags}
    if chosen and parallel.is_main_rank():
        shown = ", ".join(f"{name} {value}" for name, value in chosen.items())
        note(f"{shown}, as the folder's generation_config.json says")
    return replace(params, **chosen)  # type: ignore[arg-type]


def complete(llama: Llama, prompt: str | None, params: SamplingParams) -> None:
    """Print the continuations of a prompt while they are generated.

    prompt: the text; None: it is read from standard input.
    """
    with on_first_rank(llama) as is_first_rank:
        if not is_first_rank:
            return
        prompt = read_input() if prompt is None else prompt
        requests: set[Request] = set()
        n_tokens, start = 0, time.perf_counter()
        try:
            with stream(llama, prompt, params) as events:
                for row, of_row in in_turn(events):
                    shown = dim(without_controls(prompt), sys.stdout) * sys.stdout.isatty()
                    print("\n" * (row > 0), end=shown)
                    for event in of_row:
                        show(event.text)
                        requests.add(event.request)
                        n_tokens += event.token is not None
                    print()
        except KeyboardInterrupt:
            print()
            raise
        finally:
            note(speed(n_tokens, start) + acceptance(requests))


def read_input() -> str:
    """Standard input up to its end, without a last newline. Raises GenerationError if it is not
    UTF-8."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise GenerationError(
            f"the input is not UTF-8 text: byte {error.start} is wrong"
        ) from error


# ---- output --------------------------------------------------------------------------------------


def in_turn(events: Iterator[Event]) -> Iterator[tuple[int, Iterator[Event]]]:
    """Group the events of all rows by row. Yields each row's number and its events.

    Rows are generated together, but printed one after the other. The events of the first row are
    yielded at once. Those of a later row are held until the rows before it have ended.
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
    """Print a part of a generated text at once, without a newline."""
    if sys.stdout.isatty():
        text = without_controls(text)
    print(text, end="", flush=True)


def note(text: str) -> None:
    """Print a dim line on standard error."""
    print(dim(printable(text, keep="\n"), sys.stderr), file=sys.stderr, flush=True)


def speed(n_tokens: int, start: float) -> str:
    """The number of tokens, and the tokens a second since `start`, a value of perf_counter."""
    return f"{n_tokens} tokens, {n_tokens / (time.perf_counter() - start):.1f} a second"


def acceptance(requests: Collection[Request]) -> str:
    """How many proposals of speculation were accepted. It is "" if there were no proposals."""
    proposed = sum(request.proposed for request in requests)
    accepted = sum(request.accepted for request in requests)
    return f", {accepted} of {proposed} proposals accepted" if proposed else ""


def dim(text: str, file: TextIO) -> str:
    """The text in dim letters, if the file is a terminal."""
    return styled(text, DIM, file)


def styled(text: str, style: int, file: TextIO) -> str:
    """The text in a style of ECMA-48, if the file is a terminal and NO_COLOR is not set; see
    https://no-color.org."""
    has_style = file.isatty() and not os.environ.get("NO_COLOR")
    return f"\033[{style}m{text}\033[0m" if has_style else text


# ---- ranks ---------------------------------------------------------------------------------------


class _Signal(IntEnum):
    """Messages of the first rank to the others."""

    WAIT = 0  # wait for the next message
    STREAM = 1  # follow the engine's plans until a stream ends
    DONE = 2  # return


@contextlib.contextmanager
def on_first_rank(llama: Llama) -> Iterator[bool]:
    """A block in which only the first rank of the model calls `stream`.

    Yields True on the first rank. Each other rank follows the streams of the first rank until the
    block there ends, and only then yields False.
    """
    if parallel.mp_rank() > 0:
        while (message := _receive(llama)) is not _Signal.DONE:
            if message is _Signal.STREAM:
                llama.engine.follow()
        yield False
        return
    is_connected = True
    try:
        yield True
    except ParallelError:  # a rank is lost, so the others have this error too
        is_connected = False
        raise
    finally:
        if is_connected:
            _send(llama, _Signal.DONE)


def stream(
    llama: Llama, prompt: str | list[int] | Dialog, params: SamplingParams
) -> contextlib.AbstractContextManager[Iterator[Event]]:
    """Call `llama.stream` on the first rank, with a prompt that only this rank knows. Leaving the
    block cancels the stream. Raises what `llama.stream` raises."""
    # A wrong prompt raises here, before the other ranks begin to follow.
    events = llama.stream(prompt, **vars(params))
    _send(llama, _Signal.STREAM)
    return contextlib.closing(events)


def read_line(llama: Llama, prompt: str) -> str:
    """Read a line from standard input. There is no time limit. The newline is removed.

    prompt: shown before the line, if input and output are a terminal.
    Raises EOFError at the end of the input. Other ranks are told to wait meanwhile.
    """
    prompt = prompt if sys.stdin.isatty() and sys.stdout.isatty() else ""
    if parallel.mp_size() == 1:
        return input(prompt)
    is_read = threading.Event()
    interval = timeout().total_seconds() / 5  # the others wait for a message, up to the timeout
    lost: list[ParallelError] = []

    def keep_waiting() -> None:
        try:
            while not is_read.wait(interval):
                _send(llama, _Signal.WAIT)
        except ParallelError as error:
            lost.append(error)
            signal.pthread_kill(reader, signal.SIGINT)  # ends `input`

    reader = threading.get_ident()
    thread = threading.Thread(target=keep_waiting, daemon=True)
    thread.start()
    try:
        return input(prompt)
    except KeyboardInterrupt:
        if lost:
            raise lost[0] from None
        raise
    finally:
        is_read.set()
        thread.join()


def _send(llama: Llama, signal: _Signal) -> None:
    parallel.broadcast_numbers([signal], torch.int64, llama.model.device)


def _receive(llama: Llama) -> _Signal:
    return _Signal(parallel.broadcast_numbers(None, torch.int64, llama.model.device)[0])
