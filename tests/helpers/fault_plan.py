"""The fault plan: its lines, and the count of the trials that were made for each.

A test of a line has the mark `@pytest.mark.fault(NUMBER)` and counts with the fixture `trials`.
`make test` makes few trials, `make faults` makes all of them and writes their counts to the file
that LLAMA_FAULTS names. `scripts/reliability.py` puts these counts into docs/reliability.md.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Line(NamedTuple):
    """fault: what is done. expected: what must happen then."""

    fault: str
    expected: str


LINES = {
    1: Line(
        "a weight file is cut: .pth, .safetensors, sharded, .bin",
        "one error within 2 seconds, at most 64 MB more memory",
    ),
    2: Line(
        "the header of a .safetensors file is changed",
        "an error, or the same weights; no crash, no hang",
    ),
    3: Line("a bit of the weights is flipped", "`verify` finds it by the checksum"),
    4: Line(
        "a tensor is missing, added, present twice, of another shape or dtype",
        "one error, which names at most ten tensors",
    ),
    5: Line(
        "a shard is missing or present twice; ranks have different folders, flags or versions",
        "the same message on every rank within 10 seconds",
    ),
    6: Line(
        "NaN or infinity in weights or logits",
        "`verify` names the tensor; that row fails, the others are unchanged, its slot is clean",
    ),
    7: Line("params.json, config.json, tokenizer files or the index are changed", "one error"),
    8: Line(
        "a malicious pickle, a path out of the folder, a pipe, a device, a loop of links, a shape "
        "of 1 TB",
        "no code runs; refused before memory is allocated",
    ),
    9: Line(
        "ids out of range, prompts at and over the limit or empty, options of wrong types",
        "one error",
    ),
    10: Line(
        "the text of a message holds the 256 special tokens, in every role and chat format",
        "no special id comes from a message's text",
    ),
    11: Line(
        "random text, lone surrogates, a million repeats of a character",
        "the ids of the oracle, within 2 seconds",
    ),
    12: Line(
        "a full disk, kill -9 or Ctrl-C during convert, train or batch",
        "no final file or a whole one; a rerun succeeds; each line of a batch has one answer",
    ),
    13: Line(
        "kill -9 of one rank: while it loads, in prefill, in decode, idle",
        "all ranks end within 5 seconds; the rank is named; no process, port or shared memory is "
        "left",
    ),
    14: Line(
        "SIGSTOP of a rank, an exception on one rank, a rank that never starts",
        "all ranks end at the timeout plus 5 seconds, and say which rank it was",
    ),
    15: Line(
        "the network to another machine: the link goes down, 5% of packets are lost, 100 ms delay",
        "the run ends at the timeout, or goes on with the right result",
    ),
    16: Line("a weight file is cut or replaced while it is mapped", "an error of one line"),
    17: Line(
        "no memory is left: at load, in prefill, in decode",
        "one error before or at the allocation, which names sizes that fit",
    ),
    18: Line(
        "two processes with one batch output, one run folder, one cache of kernels",
        "the second is refused or waits; nothing is mixed",
    ),
    19: Line(
        "the server gets malformed requests, slow sockets, a full queue, clients that leave",
        "no answer of 5xx but a full queue's; every accepted call ends; the texts stay right",
    ),
    20: Line(
        "chat, batch and server run for ten minutes each",
        "memory grows by at most 2% after the warm-up, the open files not at all; texts are those "
        "of calls alone",
    ),
    21: Line(
        "control characters in names, texts, errors and the model's output",
        "none of them reaches the terminal",
    ),
}

RESULTS = Path(os.environ["LLAMA_FAULTS"]) if "LLAMA_FAULTS" in os.environ else None


class Trials:
    """Counts the trials of one test."""

    def __init__(self) -> None:
        self.made = 0
        self.failures: list[str] = []

    def number(self, few: int, all: int) -> int:
        """How many trials the test makes: `few` in `make test`, `all` in `make faults`."""
        return all if RESULTS else few

    @contextmanager
    def trial(self, name: str) -> Iterator[None]:
        """One trial. It passes if the body raises nothing. A failure does not end the test."""
        self.made += 1
        try:
            yield
        except Exception as error:
            self.failures.append(f"{name}: {type(error).__name__}: {error}")


def write(test: str, line: int, trials: Trials) -> None:
    """Write the counts of one test into the results."""
    assert RESULTS is not None
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[test] = {
        "line": line, "trials": trials.made, "passed": trials.made - len(trials.failures)
    }  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
