"""Write a random checkpoint in Meta's format, for the tests and the benchmarks.

python benchmarks/make_checkpoint.py --folder build/demo --shape demo
python benchmarks/make_checkpoint.py --folder /tmp/1.5b --shape 1.5b --mp 2
"""

import base64
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
import torch
from torch import Tensor

from llama import ModelArgs
from llama.parallel import shard_dim

DEMO_RANKS = 384  # of the demo tokenizer: every byte, then words and their beginnings

SHAPES: dict[str, dict[str, Any]] = {
    "demo": dict(
        dim=256, n_layers=4, n_heads=8, n_kv_heads=4, vocab_size=DEMO_RANKS + 256,
        multiple_of=32, norm_eps=1e-5, rope_theta=500000.0,
    ),
    "110m": dict(
        dim=768, n_layers=12, n_heads=12, n_kv_heads=12, vocab_size=32000,
        multiple_of=256, norm_eps=1e-5, rope_theta=10000.0,
    ),
    "1.5b": dict(
        dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=128256,
        multiple_of=256, ffn_dim_multiplier=1.5, norm_eps=1e-5, rope_theta=500000.0,
        use_scaled_rope=True,
    ),
    "8b": dict(
        dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128256,
        multiple_of=1024, ffn_dim_multiplier=1.3, norm_eps=1e-5, rope_theta=500000.0,
        use_scaled_rope=True,
    ),
}  # fmt: skip

# The words that the demo model generates. A merge joins two tokens, so a word can be a token of
# Meta's vocabulary format only if shorter byte strings that make it up are tokens too. Therefore
# all beginnings of each word are in the vocabulary.
WORDS = """
    the of and a to in is you that it he was for on are as with his they at be this have from or
    one had by word but not what all were we when your can said there use an each which she do how
    their if will up other about out many then them these so some her would make like him into time
""".split()

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random numbers that depend only on name, shape and seed, not on the rest of the model."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    weight = torch.empty(shape).normal_(std=0.02, generator=generator)
    return weight + 1 if len(shape) == 1 else weight  # norms have a mean of 1


def shard_of(name: str, weight: Tensor, mp_rank: int, mp_size: int, embedding_dim: int) -> Tensor:
    """One rank's part of a whole weight. embedding_dim: the dim that splits tok_embeddings."""
    dim = shard_dim(name, embedding_dim)
    if dim is None:
        return weight
    if weight.shape[dim] % mp_size:
        raise SystemExit(f"error: {name} {tuple(weight.shape)} does not split into {mp_size}")
    return weight.chunk(mp_size, dim)[mp_rank]


def make_checkpoint(
    folder: str | Path,
    params: dict[str, Any],
    mp_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    embedding_dim: int = 0,
    spoken: Sequence[int] = (),
) -> None:
    """Write params.json and `mp_size` random shards. Memory holds one shard and one whole tensor at
    most.

    Args:
        params: the content of params.json, with Meta's keys.
        embedding_dim: the dim on which tok_embeddings is split, 0 as in Llama 3 or 1 as in Llama 2.
        spoken: if given, the ids of the tokens that the model generates. The logits of all other
            tokens are 0.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("consolidated.*.pth")):  # they may be real weights
        raise SystemExit(f"error: {folder} already holds shards; remove them first")
    for mp_rank in range(mp_size):
        shard = {}
        for name, shape in ModelArgs(**params).whole_shapes().items():
            weight = random_weight(name, shape, seed)
            if spoken and name == "output.weight":
                kept = torch.zeros_like(weight)
                kept[list(spoken)] = 10 * weight[list(spoken)]
                weight = kept
            piece = shard_of(name, weight, mp_rank, mp_size, embedding_dim)
            # A copy, because torch.save would write the whole storage of a view.
            shard[name] = piece.to(dtype, copy=True).contiguous()
        torch.save(shard, folder / f"consolidated.{mp_rank:02d}.pth")
    (folder / "params.json").write_text(
        json.dumps(params) + "\n"
    )  # last, so that a folder with params.json is complete


def demo_pieces() -> list[bytes]:
    """The demo tokenizer's byte strings, by rank: 256 bytes, then words and their beginnings."""
    pieces = dict.fromkeys(bytes([i]) for i in range(256))
    for word in WORDS:
        spaced = b" " + word.encode()
        pieces |= dict.fromkeys(spaced[:end] for end in range(2, len(spaced) + 1))
    return list(pieces)[:DEMO_RANKS]


def write_tokenizer(path: str | Path, pieces: Sequence[bytes]) -> None:
    """Write a tokenizer file in the format of Llama 3: lines of base64 and rank."""
    lines = [f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces)]
    Path(path).write_text("".join(lines))


def main(
    folder: str, shape: str = "demo", mp: int = 1, dtype: str = "bfloat16", seed: int = 0
) -> None:
    """Write a random checkpoint in Meta's format. The demo shape also gets a tokenizer.

    Args:
        folder: the folder to write.
        shape: demo (3 million parameters), 110m or 1.5b.
        mp: number of shards.
        dtype: bfloat16, float16 or float32.
        seed: seed of the weights.
    """
    if str(shape) not in SHAPES:
        raise SystemExit(f"error: shape is {shape!r}, must be one of {', '.join(SHAPES)}")
    if dtype not in DTYPES:
        raise SystemExit(f"error: dtype is {dtype!r}, must be one of {', '.join(DTYPES)}")
    if shape != "demo":
        return make_checkpoint(folder, SHAPES[shape], mp, DTYPES[dtype], seed)
    pieces = demo_pieces()
    words = [rank for rank, piece in enumerate(pieces) if piece[1:].decode() in WORDS]
    make_checkpoint(folder, SHAPES[shape], mp, DTYPES[dtype], seed, spoken=words)
    write_tokenizer(Path(folder, "tokenizer.model"), pieces)


if __name__ == "__main__":
    fire.Fire(main)
