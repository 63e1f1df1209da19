"""Write a checkpoint as a GGUF file, the format of llama.cpp, with the writer of package `gguf`.

Names and keys follow ggml's specification of the architecture "llama".
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llama.checkpoints.shards import Checkpoint
from llama.config import ModelArgs
from llama.model import apply_scaling
from llama.rope_scaling import RopeScaling

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
    """The numbers by which llama.cpp divides the frequencies of RoPE: float32 (hd / 2,)."""
    freqs = 1.0 / args.rope_theta ** (torch.arange(0, args.head_dim, 2).float() / args.head_dim)
    return (freqs / apply_scaling(freqs, scaling)).numpy()


def pack(weight: Tensor, width: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """The data and the GGUF type of a weight. Matrices get the given width. Norms are float32."""
    if weight.ndim == 1:
        return weight.float().numpy(), gguf.GGMLQuantizationType.F32
    kind = TYPES[width]
    return gguf.quants.quantize(weight.float().numpy(), kind), kind


def add_words(writer: gguf.GGUFWriter, n_words: int) -> None:
    """Add a made-up vocabulary: three special tokens, the bytes, and words. A server needs one to
    write its answers."""
    kinds = gguf.TokenType
    special = ["<unk>", "<s>", "</s>"]
    tokens = special + [f"<0x{i:02X}>" for i in range(256)]
    tokens += [f"▁w{i}" for i in range(n_words - len(tokens))]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * 256
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(n_words)])
    writer.add_token_types(types + [kinds.NORMAL] * (n_words - len(types)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_gguf(
    path: Path, source: Checkpoint, width: str, context: int, has_words: bool = False
) -> None:
    """Write all weights in a width: BF16, Q8_0 or Q4_0.

    has_words: add a made-up vocabulary. Without it the file has none, because the benchmark feeds
    token ids.

    Meta's and GGUF's rotary layouts both pair neighbouring rows, so nothing is permuted.
    """
    args = source.args
    partial = path.with_suffix(".partial")
    # Tensors wait in a temporary file, because all of them may not fit into memory.
    writer = gguf.GGUFWriter(partial, "llama", use_temp_file=True)
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
    if has_words:
        add_words(writer, args.vocab_size)
    else:
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
    partial.rename(path)  # after everything is written, so that `path` is always complete
