"""Write and open checkpoint folders of small random models."""

from pathlib import Path
from typing import Any

import torch
from make_checkpoint import demo_pieces, shard_of, write_tokenizer

from llama import Llama, ModelArgs, Transformer
from llama.checkpoints.folder import open_checkpoint
from llama.checkpoints.params import write_params
from llama.checkpoints.setup import Setup
from llama.checkpoints.shards import shard_name, write_shard

CPU = torch.device("cpu")

VOCAB = len(demo_pieces()) + 256  # 640: the demo tokenizer's tokens and 256 special tokens
BASE: dict[str, Any] = dict(dim=128, n_layers=2, n_heads=16, vocab_size=VOCAB, hidden_dim=320)
MODELS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa-2": dict(n_kv_heads=2),
    "gqa-8": dict(n_kv_heads=8, use_scaled_rope=True),
    "llama-2": dict(rope_theta=10000.0, embedding_shard_dim=1),
    "tied": dict(n_kv_heads=4, tied=True),
}
TOKENS = torch.arange(3, 43).view(2, 20)


def make_model(**changes: Any) -> Transformer:
    """A random model. changes: arguments of ModelArgs that replace those of BASE."""
    torch.manual_seed(4)
    model = Transformer(ModelArgs(**BASE | changes))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, float(weight.dim() == 1), 0.08)
    return model


def write_meta(folder: Path, model: Transformer, n_shards: int) -> Path:
    """Write the model as a Meta folder of `n_shards` shards, with the demo tokenizer."""
    folder.mkdir(parents=True)
    embedding_dim = model.params.embedding_shard_dim
    for i in range(n_shards):
        shard = {}
        for name, weight in model.state_dict().items():
            if name != "output.weight" or not model.params.tied:
                shard[name] = shard_of(name, weight, i, n_shards, embedding_dim).clone()
        if model.params.tied:
            shard["output.weight"] = shard["tok_embeddings.weight"]
        write_shard(folder / shard_name(i), shard)
    write_params(folder / "params.json", model.params)
    write_tokenizer(folder / "tokenizer.model", demo_pieces())
    return folder


def logits_of(folder: Path) -> torch.Tensor:
    """The logits of TOKENS by the model in the folder."""
    with torch.inference_mode():
        return Llama.build(folder, max_seq_len=64).model(TOKENS, 0).clone()


def make_setup(
    folder: Path, mp: int = 1, dtype: str | None = None, rows: int = 4, **options: Any
) -> Setup:
    """The setup that `Llama.build` makes for this folder, on mp ranks with `rows` cache rows."""
    opened = open_checkpoint(folder)
    return Setup.make(opened, mp, mp, 128, rows, CPU, dtype, **options)
