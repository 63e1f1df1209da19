"""Measure one implementation of the network, in a process of its own.

benchmarks/peers.py starts this script for each implementation and width. Each line on standard
input is an order in JSON, such as {"measure": "decode", "rows": 1, "tokens": 64}. The answer is a
line of JSON on standard output. Everything else that the process prints goes to standard error.
"""

import ctypes
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast

import fire
import numpy as np
import torch
from torch import Tensor

from llama import parallel
from llama.checkpoints.folder import open_checkpoint
from llama.checkpoints.load import load_weights
from llama.fast.cpu.transformer import FastTransformer
from llama.fast.quantize import Width
from llama.fast.quantizers import QUANTIZERS
from llama.model import Transformer

PROMPT = 16  # tokens of the prompts that are decoded
ROWS = 8


class Network(Protocol):
    """The interface of an implementation."""

    versions: list[str]  # names of the packages whose versions are reported

    def start(self) -> None:
        """Empty the KV cache."""

    def forward(self, tokens: Tensor, position: int) -> Tensor:
        """Token ids (B, S), the first at `position` in each row -> logits of the last, (B, V)."""


class Ours:
    """This library: reference mode, or fast mode in a width."""

    def __init__(self, work: Path, width: str, context: int) -> None:
        self.versions = ["torch", "numba"]
        opened = open_checkpoint(work / (width if width in QUANTIZERS else "meta"))
        opened.args.set_limits(context, ROWS)
        with torch.device("meta"):
            model = Transformer(opened.args)
        quantize = cast(Width, width) if width in QUANTIZERS else None
        load_weights(model, opened, torch.device("cpu"), None, quantize)
        self.network = model if width == "reference" else FastTransformer(model)
        self.cache = self.network.make_cache(ROWS, context)

    def start(self) -> None:
        pass

    def forward(self, tokens: Tensor, position: int) -> Tensor:
        rows, seqlen = tokens.shape
        cache = self.cache.part(0, rows, position + seqlen)
        features = self.network.features(tokens, position, cache)
        return self.network.logits(features[:, -1:])[:, -1]


class Metas:
    """Meta's own code, llama-models."""

    def __init__(self, work: Path, width: str, context: int) -> None:
        from llama_models.llama3.args import ModelArgs
        from llama_models.llama3.model import Transformer as MetaTransformer

        self.versions = ["torch", "llama-models"]
        parallel.initialize()
        opened = open_checkpoint(work / "meta")
        params = json.loads((work / "meta" / "params.json").read_text())
        params.pop("rope_scaling", None)  # Meta's code has no such argument, but constants
        with parallel.on_meta_device():
            self.model = MetaTransformer(
                ModelArgs(**params, max_batch_size=ROWS, max_seq_len=context)
            )
        state = {name: opened.part(name, 1, 0) for name in opened.args.whole_shapes()}
        self.model.load_state_dict(state, strict=True, assign=True)
        self._make_buffers(context)

    def _make_buffers(self, context: int) -> None:
        """Make the table of RoPE and the caches anew. The constructor has made them on the meta
        device, and they are not in the state dict."""
        from llama_models.llama3.model import precompute_freqs_cis

        args = self.model.params
        self.model.freqs_cis = precompute_freqs_cis(
            args.dim // args.n_heads, context * 2, args.rope_theta, args.use_scaled_rope
        )
        for layer in self.model.layers:
            attention = layer.attention
            attention.cache_k = torch.zeros(attention.cache_k.shape, dtype=torch.bfloat16)
            attention.cache_v = torch.zeros(attention.cache_v.shape, dtype=torch.bfloat16)

    def start(self) -> None:
        pass

    def forward(self, tokens: Tensor, position: int) -> Tensor:
        return self.model(tokens, position)[:, -1]


class HuggingFace:
    """transformers' LlamaForCausalLM."""

    def __init__(self, work: Path, width: str, context: int) -> None:
        from transformers import AutoModelForCausalLM

        self.versions = ["torch", "transformers"]
        self.model = AutoModelForCausalLM.from_pretrained(work / "hf", dtype=torch.bfloat16)
        self.start()

    def start(self) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)

    def forward(self, tokens: Tensor, position: int) -> Tensor:
        out = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]


class LlamaCpp:
    """llama.cpp through the low-level interface of llama-cpp-python."""

    def __init__(self, work: Path, width: str, context: int) -> None:
        import llama_cpp

        self.versions = ["llama-cpp-python", "gguf"]
        self.c = llama_cpp
        self.system = llama_cpp.llama_print_system_info().decode()
        llama_cpp.llama_backend_init()
        path = str(work / f"{width}.gguf").encode()
        self.model = llama_cpp.llama_model_load_from_file(
            path, llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = ROWS * context
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = ROWS
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"error: llama.cpp cannot load {work / width}.gguf")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def start(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)

    def forward(self, tokens: Tensor, position: int) -> Tensor:
        rows, seqlen = tokens.shape
        batch = self.batch
        batch.n_tokens = rows * seqlen
        for i, token in enumerate(tokens.flatten().tolist()):
            batch.token[i] = token
            batch.pos[i] = position + i % seqlen
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = i // seqlen
            batch.logits[i] = i % seqlen == seqlen - 1
        if failed := self.c.llama_decode(self.context, batch):
            raise SystemExit(f"error: llama_decode gives {failed}")
        logits = torch.empty(rows, self.vocab_size)
        for row in range(rows):  # a copy, because the next call overwrites llama.cpp's buffer
            at = self.c.llama_get_logits_ith(self.context, (row + 1) * seqlen - 1)
            ctypes.memmove(logits[row].data_ptr(), at, 4 * self.vocab_size)
        return logits


PEERS: dict[str, Any] = {
    "llama-reference": Ours,
    "llama-models": Metas,
    "transformers": HuggingFace,
    "llama.cpp": LlamaCpp,
}


def token_ids(rows: int, seqlen: int, vocab_size: int) -> Tensor:
    """Random token ids, the same for every peer."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocab_size, (rows, seqlen), generator=generator)


def measure(network: Network, order: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Execute an order and return the answer."""
    if order["measure"] == "logits":
        network.start()
        logits = network.forward(token_ids(1, 64, vocab_size), 0)
        np.save(order["out"], logits.float().numpy())
        versions = {name: version(name) for name in network.versions}
        return {"versions": versions, "system": getattr(network, "system", "")}
    rows, n_tokens = order["rows"], order["tokens"]
    network.start()
    if order["measure"] == "prefill":
        tokens = token_ids(rows, n_tokens, vocab_size)
        start = time.perf_counter()
        network.forward(tokens, 0)
    else:
        tokens = token_ids(rows, PROMPT + n_tokens, vocab_size)
        network.forward(tokens[:, :PROMPT], 0)
        start = time.perf_counter()
        for position in range(PROMPT, PROMPT + n_tokens):
            network.forward(tokens[:, position : position + 1], position)
    return {"tokens_per_second": rows * n_tokens / (time.perf_counter() - start)}


@torch.inference_mode()
def main(name: str, width: str, work: str, context: int) -> None:
    """Load the weights, then answer orders until standard input ends.

    Args:
        name: one of PEERS.
        width: width of the weights, as that peer names it.
        work: folder with the weights in all formats, which peers.py writes.
        context: most tokens of a row.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    folder = Path(work)
    vocab_size = json.loads((folder / "meta" / "params.json").read_text())["vocab_size"]
    network = PEERS[name](folder, width, context)
    for line in sys.stdin:
        print(json.dumps(measure(network, json.loads(line), vocab_size)), file=answers)


if __name__ == "__main__":
    fire.Fire(main)
