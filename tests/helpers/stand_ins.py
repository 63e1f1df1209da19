"""Small random checkpoints under the names of Meta's folders, as the documentation uses them."""

import shutil
from pathlib import Path
from typing import Any

import torch
from helpers.folders import make_model, write_meta
from helpers.texts import sentencepiece_model
from make_checkpoint import demo_pieces, write_tokenizer

from llama import Tokenizer
from llama.checkpoints.adapter import write_adapter
from llama.checkpoints.params import read_params
from llama.tokenizer_files.meta import INFILLING_TOKENS

# The folder that holds params.json, and the number of its shards.
LLAMA_3 = {
    "Meta-Llama-3-8B": 1,
    "Meta-Llama-3-8B-Instruct/original": 1,
    "Llama-3-8B": 1,
    "Llama3.1-8B-Instruct": 1,
    "Llama3.2-1B": 1,
    "Llama3.2-1B-Instruct": 1,
    "Llama-3.3-70B-Instruct": 8,
}
ADAPTERS = ("my-adapter", "pirate", "poet")  # of Llama3.2-1B-Instruct
OF_LLAMA_2: dict[str, Any] = dict(rope_theta=10000.0, embedding_shard_dim=1)


def write_stand_ins(place: Path) -> None:
    """Write all folders. Llama 2's tokenizer.model lies beside its folder, as Meta ships it."""
    llama_3 = place / "llama_3_tokenizer.model"
    write_tokenizer(llama_3, demo_pieces())
    for name, n_shards in LLAMA_3.items():
        write_stand_in(place / name, llama_3, n_shards, n_kv_heads=8)
    llama_2 = place / "tokenizer.model"
    llama_2.write_bytes(sentencepiece_model())
    write_stand_in(place / "llama-2-7b-chat", llama_2, 1, **OF_LLAMA_2)
    (place / "llama-2-7b-chat" / "tokenizer.model").unlink()
    for name in ADAPTERS:
        write_stand_in_adapter(place / name, place / "Llama3.2-1B-Instruct")
    code_llama = place / "code_llama_tokenizer.model"
    code_llama.write_bytes(
        sentencepiece_model(vocab_size=400, user_defined_symbols=",".join(INFILLING_TOKENS))
    )
    write_stand_in(place / "CodeLlama-7b", code_llama, 1, **OF_LLAMA_2)


def write_stand_in(folder: Path, tokenizer_path: Path, n_shards: int, **shape: Any) -> None:
    """Write a random model that ends its texts soon, so that none fills the whole context."""
    tokenizer = Tokenizer(tokenizer_path)
    model = make_model(vocab_size=tokenizer.n_words, **shape)
    with torch.no_grad():  # the first feature of every token makes the stop tokens likely
        model.tok_embeddings.weight[:, 0] = 10
        model.output.weight[list(tokenizer.stop_tokens), 0] = 2
    write_meta(folder, model, n_shards)
    shutil.copyfile(tokenizer_path, folder / "tokenizer.model")


def write_stand_in_adapter(folder: Path, base: Path) -> None:
    """Write a LoRA adapter of rank 2 with random changes of the queries' matrices."""
    folder.mkdir()
    args = read_params(base / "params.json")
    args.vocab_size = Tokenizer(base / "tokenizer.model").n_words
    matrices = {
        name: (0.01 * torch.randn(2, shape[1]), 0.01 * torch.randn(shape[0], 2))
        for name, shape in args.whole_shapes().items()
        if name.endswith("wq.weight")
    }
    write_adapter(folder, matrices, args, r=2, alpha=4, dropout=0.0, base=base.name)
