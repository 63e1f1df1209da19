"""A checkpoint as a GGUF file, the format of llama.cpp, with the `gguf` package's writer.

The names and keys are those of ggml's specification of the architecture "llama".
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llama.checkpoints.shards import Checkpoint
from llama.config import ModelArgs, RopeScaling
from llama.model import apply_scaling

TYPES = {
    "BF16": gguf.GGMLQuantizationType.BF16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "Q4_0": gguf.GGMLQuantizationType.Q4_0,
}
FILE_TYPES = {
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor: layers.3.attention.wq.weight is blk.3.attn_q.weight."""
    words = name.removesuffix(".weight").split(".")
    if words[0] != "layers":
        return f"{NAMES[words[0]]}.weight"
    return f"blk.{words[1]}.{NAMES['.'.join(words[2:])]}.weight"


def rope_divisors(args: ModelArgs, scaling: RopeScaling) -> np.ndarray:
    """What llama.cpp divides the frequencies of RoPE by: float32 (hd / 2,)."""
    freqs = 1.0 / args.rope_theta ** (torch.arange(0, args.head_dim, 2).float() / args.head_dim)
    return (freqs / apply_scaling(freqs, scaling)).numpy()


def pack(weight: Tensor, width: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """Its numbers in a file of that width: norms stay float32, matrices take the width."""
    if weight.ndim == 1:
        return weight.float().numpy(), gguf.GGMLQuantizationType.F32
    kind = TYPES[width]
    return gguf.quants.quantize(weight.float().numpy(), kind), kind


def write_gguf(path: Path, source: Checkpoint, width: str, context: int) -> None:
    """Write all weights in a width: BF16, Q8_0 or Q4_0. Without a tokenizer: token ids go in.

    Meta's and GGUF's rotary layouts are the same, pairs of neighbours: nothing is permuted.
    """
    args = source.args
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_file_type(FILE_TYPES[width])
    writer.add_context_length(context)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.ffn_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads or args.n_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_vocab_size(args.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if args.rope_scaling is not None:
        writer.add_tensor("rope_freqs.weight", rope_divisors(args, args.rope_scaling))
    for name in tqdm(args.whole_shapes(), f"Writing {path.name}", unit="tensor"):
        numbers, kind = pack(source.part(name, 1, 0), width)
        writer.add_tensor(gguf_name(name), numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)  # now it is complete
