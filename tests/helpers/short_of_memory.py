"""A process of its own that runs short of memory: `python -m helpers.short_of_memory LIMIT`.

LIMIT is AS, DATA (of `setrlimit`) or cgroup. Each trial sets the limit to what the process uses
plus some room, and makes a call. A line of JSON says how it ended: [trial, error type, message].
The trial's name begins with the phase, and ends with the room.
"""

import contextlib
import io
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from helpers.models import SHAPE, make_sharp_model

from llama import Llama
from llama.__main__ import dispatch
from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.errors import one_line
from llama.sampling import SamplingParams

MIB = 1 << 20
GROUPS = Path("/sys/fs/cgroup/memory")  # of version 1
LONG = [5] * 500
ROWS = 8
GREEDY = SamplingParams(temperature=0, max_gen_len=8)


def can_limit(kind: str) -> bool:
    """Whether this process may set the limit."""
    return kind != "cgroup" or os.access(own_group() / "cgroup.procs", os.W_OK)


def own_group() -> Path:
    """The control group of this process."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    paths = [line.split(":", 2)[2] for line in lines if ":memory:" in line]
    return GROUPS / paths[0].lstrip("/") if paths else Path("/nowhere")


@contextlib.contextmanager
def room(kind: str, n_bytes: int) -> Iterator[None]:
    """Leave so many bytes free in the block."""
    if kind == "cgroup":
        outer = own_group()
        inner = outer / f"short-{os.getpid()}"
        inner.mkdir()
        try:
            (inner / "memory.limit_in_bytes").write_text(str(n_bytes))
            (inner / "cgroup.procs").write_text(str(os.getpid()))
            yield
        finally:
            (outer / "cgroup.procs").write_text(str(os.getpid()))
            inner.rmdir()
        return
    number = {"AS": resource.RLIMIT_AS, "DATA": resource.RLIMIT_DATA}[kind]
    field = {"AS": "VmSize:", "DATA": "VmData:"}[kind]
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    used = next(int(words[1]) * 1024 for words in lines if words[0] == field)
    resource.setrlimit(number, (used + n_bytes, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(number, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def report(name: str, call: Callable[[], object]) -> None:
    """Make the call, and print how it ended."""
    ended = ["none", ""]
    try:
        call()
    except BaseException as error:
        ended = [type(error).__name__, str(error)]
    print(json.dumps([name, *ended]), flush=True)


def raise_error(request: Request) -> None:
    if request.error is not None:
        raise request.error


def loads(kind: str) -> None:
    for mib in (64, 100, 300):
        with room(kind, mib * MIB):
            report(f"load with {mib} MiB", lambda: Llama.build(max_batch_size=500))


def mapped_file(kind: str) -> None:
    with room(kind, 0):
        report("load with 0 MiB", Llama.build)


def command_line(kind: str) -> None:
    """The command ends with code 2 and one line."""
    words = "batch prompts.jsonl texts.jsonl --max_batch_size 500".split()
    printed = io.StringIO()

    def call() -> None:
        Path("prompts.jsonl").write_text('{"prompt": "Once"}\n')
        with contextlib.redirect_stderr(printed), one_line():
            dispatch(words)

    with room(kind, 64 * MIB):
        try:
            call()
            ended = ["none", ""]
        except SystemExit as error:
            ended = [f"code {error.code}", printed.getvalue().removesuffix("\n")]
    print(json.dumps(["load by the command line", *ended]), flush=True)


def prefills(kind: str, llama: Llama) -> None:
    """A prompt in reference mode that does not fit, and one that fits then."""
    for mib in (2, 4, 6):
        with room(kind, mib * MIB):
            report(f"prefill with {mib} MiB", lambda: llama.generate([LONG], 4, temperature=0))
    before = llama.generate([LONG], 4, temperature=0)[0]
    assert llama.generate([LONG], 4, temperature=0)[0] == before


def in_company(kind: str) -> None:
    """One row's prefill does not fit, or no row's decode step. The other rows and the next calls
    get the tokens that they get alone."""
    # The vocabulary is so large that the logits of eight rows have 37 MiB. The C library asks the
    # system for as much, while it may keep and reuse less.
    shape = SHAPE | {"dim": 8, "n_heads": 2, "vocab_size": 1_200_000}
    engine = Engine(make_sharp_model(**shape, max_seq_len=96), ROWS, 96)

    def run(requests: list[Request]) -> list[list[int]]:
        while engine.has_work:
            engine.step()
        return [request.tokens for request in requests]

    prompts = [[i, i + 1, i + 2] for i in range(1, ROWS + 1)]
    alone = [run([engine.submit(prompt, GREEDY)])[0] for prompt in prompts]

    requests = [engine.submit(prompt, GREEDY) for prompt in prompts[:2]]
    engine.step()
    scored = SamplingParams(temperature=0, max_gen_len=8, prompt_logprobs=True)
    large = engine.submit(list(range(1, 91)), scored)
    with room(kind, 100 * MIB):  # less than the logits of 90 tokens, 412 MiB
        tokens = run(requests)
    assert tokens == alone[:2]
    report("prefill of one row beside others", lambda: raise_error(large))

    requests = [engine.submit(prompt, GREEDY, row) for row, prompt in enumerate(prompts)]
    while any(not request.tokens for request in requests):
        engine.step()
    with room(kind, 16 * MIB):
        run(requests)
    for request in requests:
        report(f"decode of row {request.row}", lambda request=request: raise_error(request))
    requests = [engine.submit(prompt, GREEDY) for prompt in prompts]
    assert run(requests) == alone


def run_all(kind: str) -> None:
    llama = Llama.build(max_seq_len=512, max_batch_size=1)
    llama.generate([LONG], 4, temperature=0)  # what the first call allocates is there
    loads(kind)
    command_line(kind)
    prefills(kind, llama)
    if kind != "cgroup":  # there the system kills the process at the first page above the limit
        mapped_file(kind)
        in_company(kind)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_all(sys.argv[1])
