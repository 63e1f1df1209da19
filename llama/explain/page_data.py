"""The numbers of the explain page: tensors, tokens, predictions and costs, as JSON."""

import base64
import math
from typing import Any

import torch
from torch import Tensor

from llama.checkpoints.inspect import cache_bytes, flops_per_token
from llama.config import ModelArgs
from llama.errors import ExplainError
from llama.explain import tensors
from llama.explain.trace import Step, Trace, logit_lens
from llama.generation import Llama
from llama.sampling import hide_unknown

# About how many numbers the page holds, besides those of attention, at two bytes each. If a trace
# has more, the page has every n-th feature only.
MOST_NUMBERS = 1_500_000
MOST_ATTENTION = 1_050_000  # weights of all heads together: 32 tokens of Llama 3 8B
MOST_TOKENS = 256
N_BINS = 24  # of a histogram
N_PREDICTIONS = 10  # likeliest tokens that are shown after each token
N_CANDIDATES = 64  # likeliest tokens that are shown where a token is sampled


def page_data(llama: Llama, trace: Trace, mp_size: int) -> dict[str, Any]:
    """All that the page shows. trace: of the prompt, with at least one decode step.

    mp_size: the number of ranks whose parts are drawn. The model can be split over so many.
    """
    args = trace.params
    stride = _stride(trace)
    lens_ids, lens_probs = logit_lens(llama.model, trace, k=3)
    logits = hide_unknown(trace["output"][0].float(), trace.tokenizer.n_words)  # (S, V)
    if logits.isnan().any() or (logits == math.inf).any():
        raise ExplainError("the model's logits are not finite: llama verify looks for the cause")
    predictions = logits.softmax(-1).topk(N_PREDICTIONS)
    candidates = logits[-1].topk(N_CANDIDATES).indices
    shown = [*trace.tokens, *trace.generated, *candidates.tolist()]
    shown += [*lens_ids.flatten().tolist(), *predictions.indices.flatten().tolist()]
    return {
        "model": _model(args, llama.model.norm.weight.dtype),
        "mp": mp_size,
        "stride": stride,
        "tokens": trace.tokens,
        "generated": trace.generated,
        "vocabulary": {i: _token(llama, i) for i in dict.fromkeys(shown)},
        "kinds": {kind.name: _kind(kind, args, mp_size) for kind in tensors.KINDS},
        "steps": [_step(step, stride) for step in trace.steps[:2]],
        "lens": {"ids": lens_ids.tolist(), "probs": _rounded(lens_probs)},
        "predictions": {
            "ids": predictions.indices.tolist(),
            "probs": _rounded(predictions.values),
        },
        "candidates": candidates.tolist(),
        "logits": _base64(logits[-1].cpu()),
        "residual": _residual(trace),
        "frequencies": llama.model.freqs_cis[1].angle().tolist(),  # radians per position
        "costs": _costs(args, len(trace.tokens), llama.model.norm.weight.dtype),
    }


def check_length(args: ModelArgs, n_tokens: int) -> None:
    """Raise ExplainError if a prompt has too many tokens for the page."""
    n_heads = args.n_layers * args.n_heads
    most = min(MOST_TOKENS, math.isqrt(MOST_ATTENTION // n_heads), args.max_seq_len - 1)
    if n_tokens > most:
        raise ExplainError(
            f"the prompt has {n_tokens} tokens: for this model the page has room for {most}"
        )


def _stride(trace: Trace) -> int:
    """n, where the page has every n-th feature of each token."""
    of_attention = ("scores", "weights")
    n_numbers = sum(
        tensor.numel()
        for step in trace.steps[:2]
        for name, tensor in step.tensors.items()
        if not name.endswith(of_attention)
    )
    return math.ceil(n_numbers / MOST_NUMBERS)


def _model(args: ModelArgs, dtype: torch.dtype) -> dict[str, Any]:
    scaling = args.rope_scaling
    return {
        "name": next(iter(args.published()), "Llama"),
        "dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads,
        "n_kv_heads": args.local_kv_heads(1), "head_dim": args.head_dim, "ffn_dim": args.ffn_dim,
        "vocab_size": args.vocab_size, "rope_theta": args.rope_theta,
        "rope_factor": scaling.factor if scaling else None,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(torch.Size(s).numel() for s in args.parameter_shapes().values()),
    }  # fmt: skip


def _token(llama: Llama, token_id: int) -> dict[str, Any]:
    """A token's text and bytes. An id that the tokenizer lacks has neither, and a special token has
    its name as the text."""
    tokenizer = llama.tokenizer
    if token_id >= tokenizer.n_words:
        return {"text": "", "bytes": "", "special": True}
    for name, special_id in tokenizer.special_tokens.items():
        if token_id == special_id:
            return {"text": name, "bytes": "", "special": True}
    data = tokenizer.token_bytes(token_id)
    return {"text": data.decode(errors="replace"), "bytes": data.hex(" "), "special": False}


def _kind(kind: tensors.Kind, args: ModelArgs, mp_size: int) -> dict[str, Any]:
    exchange = kind.exchange
    if kind.name == "tok_embeddings" and args.embedding_shard_dim == 1:
        exchange = "all-gather"
    return {
        "shape": kind.shape, "formula": kind.formula, "meaning": kind.meaning,
        "place": kind.place, "exchange": exchange,
        "owners": tensors.owners(kind, args, mp_size),
    }  # fmt: skip


def _step(step: Step, stride: int) -> dict[str, Any]:
    found = {name: _tensor(name, tensor, stride) for name, tensor in step.tensors.items()}
    return {"start_pos": step.start_pos, "tokens": list(step.tokens), "tensors": found}


def _tensor(name: str, tensor: Tensor, stride: int) -> dict[str, Any]:
    """Shape, dtype, statistics and values of a tensor.

    The values are float16, divided by a power of two near the largest one. So each has three right
    digits, unless it is far smaller than the largest one. They are (rows, columns). A row is a
    token, with every stride-th feature. For the weights and scores of attention, a row is one head
    and one token, and a column is a visible token.
    """
    whole = tensor.float().cpu()
    seen = whole[whole.isfinite()]  # the scores of later tokens are minus infinity
    if name.endswith((".scores", ".weights")):
        rows = whole.flatten(0, 2)
    elif name == "freqs_cis":  # has no batch dimension
        rows = whole.flatten(1)[:, ::stride]
    else:
        rows = whole.flatten(0, 1).flatten(1)[:, ::stride]
    largest = seen.abs().max().item() if seen.numel() else 0.0
    scale = math.ldexp(1.0, math.frexp(largest)[1] - 15)  # half has numbers up to 2^16
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        **_statistics(seen),
        "columns": rows.shape[1], "scale": scale, "values": _base64((rows / scale).half()),
    }  # fmt: skip


def _statistics(seen: Tensor) -> dict[str, Any]:
    """Of the finite numbers of a tensor. Without such numbers they are null."""
    if not seen.numel():
        return {"min": None, "max": None, "mean": None, "rms": None, "histogram": [0] * N_BINS}
    low, high = seen.min().item(), seen.max().item()
    return {
        "min": low, "max": high, "mean": seen.mean().item(),
        "rms": seen.square().mean().sqrt().item(),
        "histogram": torch.histc(seen, N_BINS, low, high).int().tolist(),
    }  # fmt: skip


def _residual(trace: Trace) -> dict[str, Any]:
    """The root mean square of each token's vector in the residual stream: after the embedding, and
    after attention and the feed-forward of each layer."""
    layers = range(trace.params.n_layers)
    names = ["tok_embeddings"]
    names += [name for i in layers for name in (f"layers.{i}.after_attention", f"layers.{i}")]
    sizes = [trace[name][0].float().square().mean(-1).sqrt() for name in names]
    return {"names": names, "rms": _rounded(torch.stack(sizes))}


def _costs(args: ModelArgs, n_prompt: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the decode step after the prompt costs, with the KV cache and without it."""
    n_tokens = n_prompt + 1
    per_token = cache_bytes(args, 1, dtype)
    return {
        "flops_with_cache": flops_per_token(args, n_tokens),
        "flops_without_cache": sum(flops_per_token(args, n) for n in range(1, n_tokens + 1)),
        "cache_bytes_per_token": per_token,
        "cache_bytes": per_token * n_tokens,
    }


def _rounded(values: Tensor) -> Any:
    """A nested list of the numbers, rounded to six digits, so that the page is smaller."""
    if values.dim() > 1:
        return [_rounded(row) for row in values]
    return [float(f"{number:.6g}") for number in values.tolist()]


def _base64(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()
