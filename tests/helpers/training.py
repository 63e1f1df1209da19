"""A small model to train, random rows to train it on, and the same model of transformers."""

from typing import Any

import torch
from make_checkpoint import demo_pieces
from torch import Tensor

from llama import ModelArgs, Transformer

BOS = 0
VOCAB = len(demo_pieces()) + 256
ARGS: dict[str, Any] = dict(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, hidden_dim=64,
    max_seq_len=64, rope_theta=10000.0, norm_eps=1e-5, context_length=64,
)  # fmt: skip


def make_model(seed: int = 1, **more: Any) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(ModelArgs(**{**ARGS, **more}))
    with torch.no_grad():  # larger than initial weights, so that mistakes show
        for weight in model.parameters():
            weight.mul_(3 if weight.dim() == 2 else 1)
    return model


class Rows:
    """A loader of random rows with several documents. A step has `rows` rows on all ranks
    together."""

    def __init__(self, rows: int, length: int, rank: int = 0, ranks: int = 1) -> None:
        self.rows, self.length, self.rank, self.ranks = rows, length, rank, ranks
        self.step = 0

    def next_batch(self) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(self.step)
        self.step += 1
        tokens = torch.randint(1, VOCAB, (self.rows, self.length + 1), generator=draw)
        tokens[torch.rand(tokens.shape, generator=draw) < 0.1] = BOS
        mine = tokens.chunk(self.ranks)[self.rank]
        return mine[:, :-1], mine[:, 1:]

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def huggingface(model: Transformer) -> Any:
    """transformers' model with the same weights. Its rows of Q and K have another order."""
    # Imported here, because processes that tests start import this file without transformers.
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, intermediate_size=64, rms_norm_eps=1e-5, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False,
        attn_implementation="eager",
    )  # fmt: skip
    other = LlamaForCausalLM(config)
    other.load_state_dict({new: halves(old, w) for old, new, w in renamed(model.state_dict())})
    return other


def halves(name: str, weight: Tensor) -> Tensor:
    if "wq" in name or "wk" in name:
        return weight.view(-1, 4, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    return weight


def renamed(state: dict[str, Tensor]) -> list[tuple[str, str, Tensor]]:
    names = {
        "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
        "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj",
        "wo": "self_attn.o_proj", "w1": "mlp.gate_proj", "w2": "mlp.down_proj",
        "w3": "mlp.up_proj", "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    found = []
    for name, weight in state.items():
        parts = name.split(".")
        layer = f"model.layers.{parts[1]}." if parts[0] == "layers" else ""
        found.append((name, f"{layer}{names[parts[-2]]}.weight", weight))
    return found
