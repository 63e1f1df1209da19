"""Damaged checkpoint folders: small models in each layout, and ways to spoil their files."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from make_checkpoint import demo_pieces, make_checkpoint, write_tokenizer

from llama import Llama
from llama.checkpoints.convert import convert

VOCAB = len(demo_pieces()) + 256
PARAMS: dict[str, Any] = dict(
    dim=8, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=VOCAB, multiple_of=8,
    norm_eps=1e-5, rope_theta=500000.0, use_scaled_rope=True,
)  # fmt: skip
# It can be split in two, quantized, and written as GGUF.
WIDER = PARAMS | dict(dim=64, n_kv_heads=2, multiple_of=64)


# ---- the folders ------------------------------------------------------------------------------

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def write_folder(folder: Path, params: dict[str, Any], n_shards: int = 1) -> Path:
    """Write a random model in Meta's layout, with a tokenizer."""
    make_checkpoint(folder, params, n_shards, torch.bfloat16)
    write_tokenizer(folder / "tokenizer.model", demo_pieces())
    return folder


def write_layouts(root: Path) -> Path:
    """Write one small model in three layouts: `meta`, `hf` with one file, `index` with several."""
    write_folder(root / "meta", PARAMS)
    convert(root / "meta", root / "hf", "hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama.checkpoints.convert.HF_FILE_BYTES", 11_000)
        convert(root / "meta", root / "index", "hf")
    return root


# ---- calls on a damaged folder ----------------------------------------------------------------


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


# ---- ways to spoil a file ---------------------------------------------------------------------

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


# Settings whose values do not show in the weights. A file with another value of them is valid too.
UNSEEN = {
    "norm_eps", "rope_theta", "rope_scaling", "use_scaled_rope", "context_length",
    "max_seq_len", "embedding_shard_dim",
}  # fmt: skip
