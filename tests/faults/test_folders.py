"""A damaged or hostile folder gives an error of one line: no crash, no hang, no other model.

The cases run in a forked child; a failure names the case.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.isolated import Cases, isolated
from make_checkpoint import demo_pieces, make_checkpoint, write_tokenizer
from safetensors.torch import load_file, save_file

from llama import Llama, ModelArgs
from llama.checkpoints.convert import convert
from llama.checkpoints.inspect import describe
from llama.checkpoints.verify import CHECKLIST, MANIFEST, verify
from llama.errors import CheckpointError, ConfigError, DataError, LlamaError

VOCAB = len(demo_pieces()) + 256
PARAMS: dict[str, Any] = dict(
    dim=8, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=VOCAB, multiple_of=8,
    norm_eps=1e-5, rope_theta=500000.0, use_scaled_rope=True,
)  # fmt: skip


def build(folder: Path) -> tuple[str, dict[str, Any]]:
    """Build a model from the folder. Returns a digest of all weights, and the ModelArgs."""
    model = Llama.build(folder, device="cpu").model  # a forked child cannot use a GPU
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest(), asdict(model.params)


def build_with(folder: Path, file: str, content: bytes) -> Callable[[], object]:
    """A call that builds from the folder while one of its files has another content."""
    return with_content(folder / file, content, partial(build, folder))


def with_content(path: Path, content: bytes, call: Callable[[], object]) -> Callable[[], object]:
    """The given call while a file has another content. The file is restored afterwards."""

    def changed() -> object:
        original = path.read_bytes()
        path.write_bytes(content)
        try:
            return call()
        finally:
            path.write_bytes(original)

    return changed


def test_what_ends_a_child_is_named() -> None:
    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def panic() -> None:
        raise BaseException("panic")

    def two_lines() -> None:
        error = LlamaError("")
        error.args = ("one\ntwo",)
        raise error

    assert isolated({"first": lambda: 1}) == {"first": ("ok", 1)}
    with pytest.raises(AssertionError, match="second ended the process: -9"):
        isolated({"first": lambda: 1, "second": killed})
    for wrong in (panic, two_lines):
        with pytest.raises(AssertionError, match="second: "):
            isolated({"first": lambda: 1, "second": wrong})


# ---- the folders ------------------------------------------------------------------------------

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layouts of one model: `meta`, `hf` with one file, `index` with several."""
    root = tmp_path_factory.mktemp("pristine")
    make_checkpoint(root / "meta", PARAMS, dtype=torch.bfloat16)
    write_tokenizer(root / "meta" / "tokenizer.model", demo_pieces())
    convert(root / "meta", root / "hf", "hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama.checkpoints.convert.HF_FILE_BYTES", 11_000)
        convert(root / "meta", root / "index", "hf")
    return root


@pytest.fixture
def folders(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the layouts, which the test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


@pytest.mark.parametrize(("layout", "file"), [("meta", "consolidated.00.pth"), ("hf", ONE_FILE)])
def test_a_file_cut_anywhere(folders: Path, layout: str, file: str) -> None:
    whole = (folders / layout / file).read_bytes()
    ends = [len(whole) * i // 32 for i in range(32)]
    cases = {str(end): build_with(folders / layout, file, whole[:end]) for end in ends}
    for kind, _, message in isolated(cases).values():
        assert kind == "error"
        assert file in message


# ---- mutations --------------------------------------------------------------------------------

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e-320, 1e300, 10**9, 10**12, 10**15, 10**30,
    float("nan"), float("inf"), "", "8", "a\nb", "\x1b[2J", "\ud800", "../x", [], [1], {}, {"a": 1},
]  # fmt: skip


JSON_BYTES = b'09-e{}[]",\\\xff'


def spoil_bytes(draw: random.Random, data: bytes) -> bytes:
    """Change the data in one to three places: flip a bit, or delete, insert or repeat bytes."""
    spoiled = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(spoiled))
        match draw.randrange(4):
            case 0:
                spoiled[at] ^= 1 << draw.randrange(8)
            case 1:
                del spoiled[at : at + draw.choice((1, 1, 8, 64))]
            case 2:
                spoiled[at:at] = bytes([draw.choice(JSON_BYTES)])
            case 3:
                spoiled[at:at] = spoiled[at : at + draw.choice((1, 8, 64))]
        if not spoiled:
            break
    return bytes(spoiled)


def spoil_json(draw: random.Random, data: bytes) -> bytes:
    """Change one entry of JSON data: replace its value, rename its key, or delete it."""
    content = json.loads(data)
    node, key = draw.choice(list(places(content)))
    match draw.randrange(6):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[str(draw.choice(VALUES))] = node.pop(key)
        case _:
            node[key] = draw.choice(VALUES)
    return json.dumps(content).encode()


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every value of nested dicts and lists, as its container and its key or index."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from places(node[key])


def spoil_header(draw: random.Random, data: bytes) -> bytes:
    """Change the header of a `.safetensors` file and adapt its length, or change any byte before
    the tensors."""
    end = 8 + int.from_bytes(data[:8], "little")
    if draw.randrange(4) == 0:
        return spoil_bytes(draw, data[:end]) + data[end:]
    header = draw.choice((spoil_bytes, spoil_json))(draw, data[8:end])
    return len(header).to_bytes(8, "little") + header + data[end:]


# Keys whose values do not show in the weights. A file with another value of them is valid too.
UNSEEN = {
    "norm_eps", "rope_theta", "rope_scaling", "use_scaled_rope", "context_length",
    "max_seq_len", "embedding_shard_dim",
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "file", "count"),
    [
        ("meta", "params.json", 1000),
        ("hf", "config.json", 1000),
        ("index", INDEX, 1000),
        ("hf", ONE_FILE, 2000),
    ],
)
def test_mutations_are_an_error_or_load_the_same(
    folders: Path, layout: str, file: str, count: int
) -> None:
    """Two changes cannot be detected in these formats. A file that calls bfloat16 float16 is
    skipped. Two tensors of the same shape that are exchanged do not occur in these cases."""
    digest, args = build(folders / layout)
    data = (folders / layout / file).read_bytes()
    cases: Cases = {}
    for seed in range(count):
        draw = random.Random(seed)
        spoil = spoil_header if file == ONE_FILE else draw.choice((spoil_bytes, spoil_json))
        content = spoil(draw, data)
        if b'"F16"' not in content:
            cases[f"seed {seed}: {content[:2000]!r}"] = build_with(folders / layout, file, content)
    for name, (kind, *found) in isolated(cases).items():
        if kind == "ok":
            assert found[0][0] == digest, name
            changed = {key for key in args if found[0][1][key] != args[key]}
            assert changed <= UNSEEN, name


def test_mutations_of_a_pickle_do_no_harm(folders: Path) -> None:
    """A changed pickle may load. It may name the data of another tensor, which nothing detects."""
    file = "consolidated.00.pth"
    data = (folders / "meta" / file).read_bytes()
    with zipfile.ZipFile(folders / "meta" / file) as archive:
        pickled = archive.read("consolidated.00/data.pkl")
    start = data.index(pickled)
    end = start + len(pickled)
    cases: Cases = {}
    for seed in range(500):
        spoiled = spoil_bytes(random.Random(seed), pickled)
        spoiled = spoiled[: len(pickled)].ljust(len(pickled), b".")
        content = data[:start] + spoiled + data[end:]
        cases[f"seed {seed}"] = build_with(folders / "meta", file, content)
    kinds = {outcome[0] for outcome in isolated(cases).values()}
    assert kinds == {"ok", "error"}


# ---- quantized folders --------------------------------------------------------------------------

QUANTIZED = "consolidated.00.safetensors"


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quantized")
    make_checkpoint(root / "floats", PARAMS | dict(dim=64, multiple_of=64), dtype=torch.bfloat16)
    write_tokenizer(root / "floats" / "tokenizer.model", demo_pieces())
    return convert(root / "floats", root / request.param, quantize=request.param)


def build_quantized(folder: Path) -> str:
    model = Llama.build(folder, mode="fast", device="cpu").model
    digest = hashlib.sha256()
    for module in model.modules():
        weight = getattr(module, "weight", ())
        for tensor in weight if isinstance(weight, tuple) else (weight,):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_a_quantized_file_cut_anywhere(quantized: Path) -> None:
    whole = (quantized / QUANTIZED).read_bytes()
    build = partial(build_quantized, quantized)
    ends = [len(whole) * i // 16 for i in range(16)]
    cases = {str(end): with_content(quantized / QUANTIZED, whole[:end], build) for end in ends}
    for kind, _, message in isolated(cases).values():
        assert kind == "error"
        assert QUANTIZED in message


@pytest.mark.parametrize("file", ["params.json", QUANTIZED])
def test_mutations_of_a_quantized_folder(quantized: Path, file: str) -> None:
    digest = build_quantized(quantized)
    data = (quantized / file).read_bytes()
    cases: Cases = {}
    for seed in range(300):
        draw = random.Random(seed)
        spoil = spoil_header if file == QUANTIZED else draw.choice((spoil_bytes, spoil_json))
        content = spoil(draw, data)
        build = partial(build_quantized, quantized)
        if b'"F16"' not in content:
            case = f"seed {seed}: {content[:2000]!r}"
            cases[case] = with_content(quantized / file, content, build)
    for name, (kind, *found) in isolated(cases).items():
        assert kind == "error" or found[0] == digest, name


# ---- sizes that no machine has ------------------------------------------------------------------


def header_of(entries: dict[str, Any], numbers: bytes) -> bytes:
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + numbers


def test_a_declared_terabyte_is_not_allocated(folders: Path) -> None:
    data = (folders / "hf" / ONE_FILE).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    cases: Cases = {}
    for size in (22064, 1 << 40, 1 << 64):
        entries = json.loads(data[8:end])
        entries["lm_head.weight"] |= {"shape": [1 << 20, 1 << 19], "data_offsets": [0, size]}
        content = header_of(entries, data[end:])
        cases[f"safetensors, {size} bytes"] = build_with(folders / "hf", ONE_FILE, content)
    for dtype in ("F4", "F8_E8M0", "F8_E4M3", "C64", "U16", "BOOL", "I64"):
        entries = json.loads(data[8:end])
        entries["lm_head.weight"]["dtype"] = dtype
        content = header_of(entries, data[end:])
        cases[f"safetensors of {dtype}"] = build_with(folders / "hf", ONE_FILE, content)

    huge = PARAMS | dict(dim=1 << 19, vocab_size=1 << 20)
    shapes = ModelArgs(**huge).whole_shapes()
    one = torch.zeros(1)
    for name, make in {
        "strides of zero": lambda shape: one.expand(shape),
        "sparse": lambda shape: torch.sparse_coo_tensor(size=shape, check_invariants=True),
        "no storage": lambda shape: torch.empty(shape, device="meta"),
    }.items():
        folder = Path(shutil.copytree(folders / "meta", folders / name))
        torch.save({n: make(shape) for n, shape in shapes.items()}, folder / "consolidated.00.pth")
        (folder / "params.json").write_text(json.dumps(huge))
        cases[name] = partial(build, folder)
        cases[f"{name}, verify"] = partial(verify, folder)
    for name, (kind, *found) in isolated(cases).items():
        assert kind == "error", name
        assert name.startswith("safetensors") or "has fewer numbers than its shape" in found[1]


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


def test_absurd_numbers_are_refused_at_once(folders: Path) -> None:
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
        if name.startswith("verify"):
            assert kind == "error" or found[0], name
        elif not name.startswith("inspect"):  # it describes params.json and reads no weights
            assert kind == "error", name


def test_a_cache_for_a_trillion_tokens_is_refused(folders: Path) -> None:
    with pytest.raises(ConfigError, match="max_seq_len is 1000000000000: it must be at most"):
        Llama.build(folders / "meta", max_seq_len=10**12)


# ---- no regular files ---------------------------------------------------------------------------


NO_FILES: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to a folder": lambda path: path.symlink_to(path.parent),
    "a link to a pipe": lambda path: path.symlink_to(path.parent.parent / "pipe"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
}
FILES = {
    "meta": ("params.json", "consolidated.00.pth", "tokenizer.model"),
    "hf": ("config.json", ONE_FILE, "generation_config.json"),
    "index": (INDEX, "model-00001-of-00003.safetensors", "tokenizer.model"),
}


def in_place_of(path: Path, make: Callable[[Path], None], call: Callable[[], object]) -> object:
    """Make the call while something else replaces a file. The file is restored afterwards."""
    aside = path.with_name("aside")
    if path.exists():
        path.rename(aside)
    make(path)
    try:
        return call()
    finally:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        if aside.exists():
            aside.rename(path)


def test_what_is_no_regular_file_is_refused(folders: Path) -> None:
    os.mkfifo(folders / "pipe")
    cases: Cases = {}
    for kind, make in NO_FILES.items():
        for layout, names in FILES.items():
            for name in names:
                call = partial(build, folders / layout)
                path = folders / layout / name
                cases[f"{name} is {kind}"] = partial(in_place_of, path, make, call)
        for name in (CHECKLIST, MANIFEST):
            call = partial(verify, folders / "meta")
            path = folders / "meta" / name
            cases[f"{name} is {kind}"] = partial(in_place_of, path, make, call)
        call = partial(Llama.build, folders / "meta", folders / "other.model", device="cpu")
        cases[f"tokenizer_path is {kind}"] = partial(
            in_place_of, folders / "other.model", make, call
        )
    for name, (kind, *found) in isolated(cases).items():
        assert kind == "error", name
        assert name.split(" is ")[0].replace("tokenizer_path", "other.model") in found[1], name


@pytest.mark.parametrize("layout", FILES)
def test_links_to_files_are_followed(folders: Path, layout: str) -> None:
    """Hugging Face's cache consists of links: snapshots/ABC/config.json -> ../../blobs/123."""
    snapshot = folders / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folders / layout).rename(folders / "blobs")
    for path in (folders / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs", path.name))
    assert build(snapshot)[0] == build(folders / "blobs")[0]
    assert verify(snapshot)[1] == []


# ---- an index, shards, sums ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "../hf/model.safetensors", "/etc/passwd", "..", ".", "", "a/../b", "a" * 300, "nul\0",
        "tokenizer.model", "missing.safetensors", 7, None, ["model.safetensors"],
    ],
)  # fmt: skip
def test_an_index_that_points_elsewhere(folders: Path, place: Any) -> None:
    index = json.loads((folders / "index" / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = place
    content = json.dumps(index).encode()
    outcomes = isolated({"index": build_with(folders / "index", INDEX, content)})
    assert outcomes["index"][:2] == ("error", "CheckpointError")


def test_a_place_that_cannot_be_written(folders: Path) -> None:
    (folders / "file").write_text("")
    for place in (folders / "file" / "new", folders / ("long" * 100)):
        with pytest.raises(CheckpointError, match="cannot write"):
            convert(folders / "meta", place, "hf")


def test_a_name_that_no_folder_can_have() -> None:
    for name in ("long" * 100, "nul\0"):
        with pytest.raises(CheckpointError, match="no such checkpoint folder"):
            Llama.build(name)
        with pytest.raises(ConfigError, match="no folder, no GGUF file and no preset"):
            describe(name)


def test_a_tensor_under_two_names_and_a_false_tie(folders: Path) -> None:
    tensors = load_file(folders / "hf" / ONE_FILE)
    config = json.loads((folders / "hf" / "config.json").read_text())
    (folders / "hf" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to the embedding, but"):
        Llama.build(folders / "hf")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folders / "hf" / ONE_FILE)
    assert Llama.build(folders / "hf").model.params.tied
    save_file(tensors | {"norm.weight": torch.ones(8)}, folders / "hf" / ONE_FILE)
    with pytest.raises(CheckpointError, match=r"norm\.weight twice, under two names"):
        Llama.build(folders / "hf")


@pytest.mark.parametrize("token", [-1, 2**63, 1.5, "2", True, [2, None], {}])
def test_stop_tokens_that_are_no_ids(folders: Path, token: Any) -> None:
    path = folders / "hf" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": token}))
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id is"):
        Llama.build(folders / "hf")


def test_names_out_of_a_file_stay_on_one_line(folders: Path) -> None:
    path = folders / "meta" / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    for name in ("two\nlines", "\x1b[2J", "long" * 10**6, 7, (1, 2)):
        torch.save(state | {name: torch.ones(1)}, path)
        with pytest.raises(CheckpointError) as caught:
            Llama.build(folders / "meta")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 2100


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    folder = tmp_path / "two"
    make_checkpoint(folder, PARAMS | {"n_kv_heads": 2}, 2, torch.bfloat16)
    write_tokenizer(folder / "tokenizer.model", demo_pieces())
    return folder


def test_a_missing_shard(two_shards: Path) -> None:
    (two_shards / "consolidated.01.pth").unlink()
    with pytest.raises(
        CheckpointError, match=r"tok_embeddings\.weight \(320, 8\) instead of \(640"
    ):
        Llama.build(two_shards)


def test_a_shard_that_is_a_copy_of_another(two_shards: Path) -> None:
    shutil.copy(two_shards / "consolidated.00.pth", two_shards / "consolidated.01.pth")
    assert verify(two_shards)[1] == [
        f"{two_shards}/consolidated.01.pth is a copy of consolidated.00.pth"
    ]


def test_shards_in_the_wrong_order_do_not_pass_metas_checklist(two_shards: Path) -> None:
    first, second = (two_shards / f"consolidated.0{i}.pth" for i in range(2))
    sums = [f"{hashlib.md5(p.read_bytes()).hexdigest()}  {p.name}\n" for p in (first, second)]
    (two_shards / CHECKLIST).write_text("".join(sums))
    first.rename(two_shards / "aside")
    second.rename(first)
    (two_shards / "aside").rename(second)
    assert verify(two_shards)[1] == [
        f"{path} does not have the md5 checksum in checklist.chk" for path in (first, second)
    ]


def test_a_checklist_that_is_no_text(two_shards: Path) -> None:
    (two_shards / CHECKLIST).write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"checklist\.chk is not UTF-8 text"):
        verify(two_shards)
