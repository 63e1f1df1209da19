"""Random and hostile texts have the ids of the oracles, and long ones are encoded in time."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.fault_plan import Trials
from helpers.texts import repaired

from llama.tokenizer import Tokenizer

SECONDS = 2  # limit of the plan for one text
MILLION = 10**6
NAMES = ("<|begin_of_text|>", "<|eot_id|>", "<s>", "</s>", "<unk>", "<0x0A>", "[INST]", "<<SYS>>")
# Ranges of characters from which the texts are drawn, first and last.
RANGES = [
    (0x20, 0x7E), (0x61, 0x7A), (0x30, 0x39), (0x00, 0x1F), (0x7F, 0xFF), (0x300, 0x36F),
    (0x400, 0x4FF), (0x590, 0x6FF), (0x900, 0x97F), (0x1100, 0x11FF), (0x2000, 0x206F),
    (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xD800, 0xDFFF), (0xE000, 0xF8FF),
    (0xFE00, 0xFEFF), (0xFFF0, 0xFFFF), (0x1F300, 0x1FAFF), (0x0, 0x10FFFF),
]  # fmt: skip


def random_text(rng: random.Random) -> str:
    """Runs of characters of some ranges, of blanks, of one character, and names of tokens."""
    parts: list[str] = []
    for _ in range(rng.randint(0, 12)):
        kind = rng.random()
        first, last = rng.choice(RANGES)
        if kind < 0.65:
            parts += [chr(rng.randint(first, last)) for _ in range(rng.randint(1, 20))]
        elif kind < 0.8:
            parts += rng.choices(" \n\t\r\u00a0\u3000", k=rng.randint(1, 9))
        elif kind < 0.9:
            parts.append(chr(rng.randint(first, last)) * rng.randint(2, 60))
        else:
            parts.append(rng.choice(NAMES))
    return "".join(parts)


def make_trials(
    trials: Trials, number: int, seed: int, ours: Tokenizer, oracle: Callable[[str], list[int]]
) -> None:
    rng = random.Random(seed)
    for i in range(number):
        text = random_text(rng)
        with trials.trial(f"text {i}, {text!r:.200}"):
            ids = ours.encode(text, bos=False, eos=False)
            assert ids == oracle(text)
            assert ours.decode(ids) == repaired(text)


def transformers_ids(file: Path) -> Callable[[str], list[int]]:
    """transformers with a tokenizer.json. Names of special tokens are plain text."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(file))
    return lambda text: theirs.encode(
        repaired(text), add_special_tokens=False, split_special_tokens=True
    )


@pytest.fixture(scope="module")
def llama3(llama3_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(llama3_tokenizer_path)


@pytest.fixture(scope="module")
def llama3_json(llama3: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.json"
    path.write_text(json.dumps(llama3.as_json()))
    return path


@pytest.mark.fault(11)
def test_llama_3_as_metas_code(
    trials: Trials, llama3: Tokenizer, oracle: SimpleNamespace, llama3_tokenizer_path: Path
) -> None:
    meta = oracle.tokenizer.Tokenizer(llama3_tokenizer_path)
    make_trials(
        trials, trials.number(few=500, all=6000), 1, llama3,
        lambda text: meta.encode(text, bos=False, eos=False),
    )  # fmt: skip


@pytest.mark.fault(11)
def test_a_tokenizer_json_of_llama_3_as_transformers(trials: Trials, llama3_json: Path) -> None:
    ours, oracle = Tokenizer(llama3_json), transformers_ids(llama3_json)
    make_trials(trials, trials.number(few=200, all=2000), 2, ours, oracle)


@pytest.mark.fault(11)
def test_llama_2_as_transformers(
    trials: Trials, llama2_tokenizer_path: Path, tmp_path: Path
) -> None:
    ours = Tokenizer(llama2_tokenizer_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(ours.as_json()))
    oracle = transformers_ids(tmp_path / "tokenizer.json")
    make_trials(trials, trials.number(few=200, all=2000), 3, ours, oracle)


REPEATED = [
    "a",
    " ",
    "\n",
    "0",
    "!",
    "\u3000",
    "é",
    "字",
    "\ud800",
    "\U0001f600",
    "ab ",
    "<|eot_id|>",
]


@pytest.mark.fault(11)
@pytest.mark.parametrize("kind", ["llama3", "llama3 json", "llama2"])
def test_a_million_characters_in_time(
    kind: str,
    trials: Trials,
    oracle: SimpleNamespace,
    llama3_tokenizer_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """The text is one piece of text, repeated. The time is that of the processor."""
    files = {"llama3": "llama3_tokenizer_path", "llama2": "llama2_tokenizer_path"}
    ours = Tokenizer(request.getfixturevalue(files.get(kind, "llama3_json")))
    meta = oracle.tokenizer.Tokenizer(llama3_tokenizer_path)
    for piece in REPEATED[: trials.number(few=2, all=len(REPEATED))]:
        with trials.trial(f"{piece!r}, {kind}"):
            text = piece * (MILLION // len(piece))
            start = time.process_time()
            ids = ours.encode(text, bos=False, eos=False)
            took = time.process_time() - start
            assert ours.decode(ids) == repaired(text)
            if kind != "llama2":
                assert ids == meta.encode(text, bos=False, eos=False)
            assert took <= SECONDS, f"{took:.1f} s"
