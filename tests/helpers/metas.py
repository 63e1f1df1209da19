"""Pairs of our model and Meta's: configurations, equal weights, the same calls."""

from typing import Any

import torch

from llama.model import ModelArgs, Transformer

# Arguments of a small model. A configuration replaces some of them.
SMALL = dict(dim=64, n_layers=2, n_heads=4, vocab_size=160, multiple_of=32)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa-2": dict(n_kv_heads=2),
    "mqa": dict(n_kv_heads=1),
    "gqa-8": dict(dim=128, n_heads=16, n_kv_heads=8),
    "one-head": dict(n_heads=1),
    "one-layer": dict(n_layers=1),
    "deep": dict(n_layers=5),
    "theta-1e4": dict(rope_theta=1e4),
    "theta-1e4-gqa": dict(rope_theta=1e4, n_kv_heads=2),
    "scaled-rope": dict(use_scaled_rope=True),
    "scaled-rope-gqa": dict(use_scaled_rope=True, n_kv_heads=2),
    "scaled-rope-long": dict(use_scaled_rope=True, max_seq_len=12000, n_layers=1),
    "ffn-1.3": dict(ffn_dim_multiplier=1.3, multiple_of=1),
    "ffn-1.5": dict(ffn_dim_multiplier=1.5, multiple_of=256),
    "ffn-0.7-rounded": dict(ffn_dim_multiplier=0.7, multiple_of=96),
    "odd-vocab": dict(vocab_size=131),
    "odd-sizes": dict(dim=78, n_heads=3, vocab_size=97, multiple_of=7),
    "odd-gqa": dict(dim=90, n_heads=9, n_kv_heads=3, multiple_of=5, ffn_dim_multiplier=1.1),
    "eps-1e-6": dict(norm_eps=1e-6),
    "wide-heads": dict(dim=256, n_heads=2, n_kv_heads=1),
}
# Start and end of each forward: prefill, a second chunk, two decode steps, a chunk after decode.
STEPS = [(0, 17), (17, 30), (30, 31), (31, 32), (32, 40)]


def both_models(
    oracle: Any, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Transformer, Any]:
    """Our model and Meta's with the same random weights. The norms' weights are random too."""
    params = {**SMALL, "max_batch_size": 3, "max_seq_len": 64, **changes}
    torch.manual_seed(0)
    ours = Transformer(ModelArgs(**params))
    for weight in ours.parameters():
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, 1.0, 0.2)
        else:  # larger than initial weights, so that attention is not almost uniform
            torch.nn.init.normal_(weight, 0.0, 0.3)
    metas = oracle.model.Transformer(oracle.args.ModelArgs(**params))
    metas.load_state_dict(ours.state_dict(), strict=True)
    return ours.to(dtype), metas.to(dtype)


def logits_of(model: Any, tokens: torch.Tensor, offset: int = 0) -> list[torch.Tensor]:
    """The logits of each forward in STEPS. offset: position of the first token."""
    with torch.no_grad():
        return [model(tokens[:, start:end], start + offset).clone() for start, end in STEPS]
