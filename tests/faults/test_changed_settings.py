"""Changed params.json, config.json, index and tokenizer files: one error, or the same model."""

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.damaged import (
    INDEX,
    PARAMS,
    UNSEEN,
    WIDER,
    build,
    build_with,
    spoil_bytes,
    spoil_json,
    with_content,
    write_folder,
)
from helpers.fault_plan import Trials
from helpers.isolated import Cases, isolated
from helpers.texts import sentencepiece_model
from make_checkpoint import demo_pieces, write_tokenizer

from llama import Llama, Tokenizer
from llama.checkpoints.convert import convert
from llama.checkpoints.inspect import describe
from llama.checkpoints.verify import verify
from llama.errors import ConfigError

SAMPLE = "A king's 3 sons said: [INST]  d\u00e9j\u00e0 vu \U0001f600\n"


def use(path: Path) -> object:
    """Open a tokenizer, and encode and decode a text."""
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode(SAMPLE, bos=True, eos=True)
    assert max(ids) < tokenizer.n_words
    return tokenizer.decode(ids), "".join(tokenizer.token_texts(ids))


# ---- any change of a settings file --------------------------------------------------------------


@pytest.mark.fault(7)
@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("meta", "params.json"),
        ("hf", "config.json"),
        ("hf", "generation_config.json"),
        ("hf", "tokenizer_config.json"),
        ("index", INDEX),
    ],
)
def test_a_changed_settings_file(folders: Path, layout: str, file: str, trials: Trials) -> None:
    digest, args = build(folders / layout)
    data = (folders / layout / file).read_bytes()
    cases: Cases = {}
    for seed in range(trials.number(few=60, all=300)):
        draw = random.Random(seed)
        content = draw.choice((spoil_bytes, spoil_json))(draw, data)
        name = f"seed {seed}: {content[:2000]!r}"
        cases[name] = build_with(folders / layout, file, content)
    for name, (kind, *found) in isolated(cases).items():
        with trials.trial(name):
            if kind == "ok":
                assert found[0][0] == digest
                changed = {key for key in args if found[0][1][key] != args[key]}
                assert changed <= UNSEEN


@pytest.mark.fault(7)
@pytest.mark.parametrize("width", ["int8", "int4"])
def test_a_changed_params_json_of_a_quantized_folder(
    width: Any, tmp_path: Path, trials: Trials
) -> None:
    source = write_folder(tmp_path / "floats", WIDER)
    folder = convert(source, tmp_path / width, quantize=width)
    data = (folder / "params.json").read_bytes()

    def opened() -> Any:
        model = Llama.build(folder, mode="fast", device="cpu").model
        return [model.params.whole_shapes(), model.norm.weight.tolist()]

    expected = opened()
    cases: Cases = {}
    for seed in range(trials.number(few=20, all=300)):
        draw = random.Random(seed)
        content = draw.choice((spoil_bytes, spoil_json))(draw, data)
        cases[f"seed {seed}: {content!r}"] = with_content(folder / "params.json", content, opened)
    for name, (kind, *found) in isolated(cases).items():
        with trials.trial(name):
            assert kind == "error" or found[0] == expected


# ---- numbers that no machine can have -----------------------------------------------------------

ABSURD: list[dict[str, Any]] = [
    {"n_layers": 10**9},
    {"n_layers": 2**31 - 1},
    {"n_layers": 10**12},
    {"dim": 10**12},
    {"dim": 2**31 - 2},
    {"vocab_size": 10**15},
    {"vocab_size": 2**31 - 1},
    {"dim": 2**31 - 2**10, "n_heads": 2**20, "n_kv_heads": 2**20, "vocab_size": 2**30},
    {"dim": 2 * 10**12, "n_heads": 10**12, "n_kv_heads": 10**12, "vocab_size": 10**12},
    {"multiple_of": 10**12},
    {"multiple_of": 2**31 - 1},
    {"ffn_dim_multiplier": 1e300},
    {"ffn_dim_multiplier": 1e-300},
    {"norm_eps": 10**30},
    {"rope_theta": 1e300},
    {"context_length": 10**12},
    {"rope_scaling": {"original_context_length": 10**30}},
    {"use_scaled_rope": "no"},
]


@pytest.mark.fault(7)
def test_absurd_numbers_are_refused_at_once(folders: Path, trials: Trials) -> None:
    commands: dict[str, Callable[[Path], object]] = {
        "build": build,
        "inspect": lambda folder: describe(str(folder)),
        "verify": lambda folder: verify(folder)[1],
        "convert": lambda folder: convert(folder, folders / "new", "hf"),
    }
    cases: Cases = {}
    for i, changes in enumerate(ABSURD):
        folder = Path(shutil.copytree(folders / "meta", folders / str(i)))
        (folder / "params.json").write_text(json.dumps(PARAMS | changes))
        for name, command in commands.items():
            cases[f"{name} {changes}"] = partial(command, folder)
    for name, (kind, *found) in isolated(cases).items():
        with trials.trial(name):
            if name.startswith("verify"):
                assert kind == "error" or found[0]
            elif not name.startswith("inspect"):  # it describes params.json and reads no weights
                assert kind == "error"


def test_a_cache_for_a_trillion_tokens_is_refused(folders: Path) -> None:
    with pytest.raises(ConfigError, match="max_seq_len is 1000000000000: it must be at most"):
        Llama.build(folders / "meta", max_seq_len=10**12)


@pytest.mark.fault(7)
def test_stop_tokens_that_are_no_ids(folders: Path, trials: Trials) -> None:
    path = folders / "hf" / "generation_config.json"
    for token in (-1, 2**63, 1.5, "2", True, [2, None], {}):
        path.write_text(json.dumps({"eos_token_id": token}))
        with (
            trials.trial(repr(token)),
            pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id is"),
        ):
            Llama.build(folders / "hf")


# ---- text that is hardly JSON -------------------------------------------------------------------

DEEP = 10**5


def with_value(text: bytes, value: bytes) -> bytes:
    """The object with one more key, which has this value."""
    return text.rstrip()[:-1] + b', "rope_scaling": ' + value + b"}"


# Each way to write a file wrongly, as a function of its content.
WRONG_TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "a blank": lambda text: b" ",
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "UTF-16 without a mark": lambda text: text.decode().encode("utf-16-le"),
    "UTF-32": lambda text: text.decode().encode("utf-32"),
    "Latin-1": lambda text: with_value(text, b'"\xe9"'),
    "a null byte": lambda text: text + b"\0",
    "two objects": lambda text: text + text,
    "every key twice": lambda text: b"{" + text.strip()[1:-1] + b"," + text.strip()[1:],
    "lists in lists": lambda text: b"[" * DEEP + b"]" * DEEP,
    "objects in objects": lambda text: b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a deep value": lambda text: with_value(text, b"[" * DEEP + b"]" * DEEP),
    "a deep value that is not closed": lambda text: with_value(text, b'{"a":' * DEEP),
    "a number of a million digits": lambda text: with_value(text, b"9" * 10**6),
    "a list": lambda text: b"[1]",
    "a number": lambda text: b"3",
    "null": lambda text: b"null",
    "a text": lambda text: b'"dim"',
}
SETTINGS = [
    ("meta", "params.json"),
    ("hf", "config.json"),
    ("hf", "generation_config.json"),
    ("hf", "tokenizer.json"),
    ("index", INDEX),
]


def opening(path: Path) -> Callable[[], object]:
    """A call that opens this file, alone or with its folder."""
    return partial(use, path) if path.name == "tokenizer.json" else partial(build, path.parent)


@pytest.mark.fault(7)
def test_text_that_is_hardly_json(folders: Path, trials: Trials) -> None:
    cases: Cases = {}
    for layout, file in SETTINGS:
        path = folders / layout / file
        text = path.read_bytes()
        for name, change in WRONG_TEXTS.items():
            cases[f"{name}: {file}"] = with_content(path, change(text), opening(path))
    for name, (kind, *found) in isolated(cases).items():
        with trials.trial(name):
            assert kind == "error"
            assert name.split(": ")[1] in found[1]


@pytest.mark.fault(7)
def test_a_byte_order_mark(folders: Path, trials: Trials) -> None:
    for layout, file in SETTINGS:
        path = folders / layout / file
        expected = opening(path)()
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        with trials.trial(file):
            assert opening(path)() == expected


# ---- tokenizer files ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabularies(layouts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer file of each kind."""
    root = tmp_path_factory.mktemp("vocabularies")
    ranks, pieces = root / "ranks.model", root / "pieces.model"
    write_tokenizer(ranks, demo_pieces())
    pieces.write_bytes(sentencepiece_model())
    found = {"ranks": ranks, "pieces": pieces}
    for kind, path in list(found.items()):
        found[f"{kind} as JSON"] = root / f"{kind}.json"
        content = Tokenizer(path).as_json()
        found[f"{kind} as JSON"].write_text(json.dumps(content))
    other = json.loads(found["ranks as JSON"].read_text())
    other["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    found["another kind"] = root / "other.json"
    found["another kind"].write_text(json.dumps(other))
    return found


KINDS = ["ranks", "pieces", "ranks as JSON", "pieces as JSON", "another kind"]


@pytest.mark.fault(7)
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_tokenizer_file(vocabularies: dict[str, Path], kind: str, trials: Trials) -> None:
    """A changed file may open: nothing detects another piece or another score of it."""
    path = vocabularies[kind]
    data = path.read_bytes()
    spoils = [spoil_bytes, spoil_json] if path.suffix == ".json" else [spoil_bytes]
    cases: Cases = {}
    for seed in range(trials.number(few=40, all=300)):
        draw = random.Random(seed)
        content = draw.choice(spoils)(draw, data)
        cases[f"seed {seed}"] = with_content(path, content, partial(use, path))
    for name, outcome in isolated(cases).items():
        with trials.trial(f"{kind}: {name}"):
            assert outcome[0] in ("ok", "error")


WRONG_RANKS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "a byte-order mark": lambda data: b"\xef\xbb\xbf" + data,
    "every line twice": lambda data: data + data,
    "a rank of a million digits": lambda data: data + b"YWJj " + b"9" * 10**6 + b"\n",
    "a negative rank": lambda data: data + b"YWJj -1\n",
    "a rank that is no number": lambda data: data + b"YWJj 1e3\n",
    "a rank above all": lambda data: data + b"YWJj 1000000000000\n",
    "no base64": lambda data: data + b"YWJ 384\n",
    "an empty token": lambda data: data + b"== 384\n",
    "without the last byte": lambda data: data.split(b"\n", 1)[1],
    "a line of ten megabytes": lambda data: b"A" * (10 << 20) + data,
}


@pytest.mark.fault(7)
def test_ranks_that_are_no_vocabulary(vocabularies: dict[str, Path], trials: Trials) -> None:
    path = vocabularies["ranks"]
    data = path.read_bytes()
    cases: Cases = {
        name: with_content(path, change(data), partial(use, path))
        for name, change in WRONG_RANKS.items()
    }
    for name, (kind, *found) in isolated(cases).items():
        with trials.trial(name):
            assert kind == "error"
            assert found[0] == "TokenizerError"


@pytest.mark.fault(7)
@pytest.mark.parametrize("kind", ["pieces", "ranks"])
def test_a_cut_tokenizer_file(vocabularies: dict[str, Path], kind: str, trials: Trials) -> None:
    """A SentencePiece model that ends between two fields is whole, and opens with fewer pieces."""
    path = vocabularies[kind]
    data = path.read_bytes()
    number = trials.number(few=16, all=64)
    cases: Cases = {
        str(len(data) * i // number): with_content(
            path, data[: len(data) * i // number], partial(use, path)
        )
        for i in range(number)
    }
    for end, outcome in isolated(cases).items():
        with trials.trial(f"{kind} cut at {end}"):
            assert outcome[0] in ("ok", "error")
