"""The tensors of one forward pass, for the pictures."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llama import Llama
from llama.model import TransformerBlock, apply_rotary_emb, causal_mask, repeat_kv

PROMPT = "Once upon a time there was a king who had"


@dataclass
class Layer:
    """What one layer computes for a prompt of S tokens."""

    before: Tensor  # the residual stream before the layer, (S, D)
    attention: Tensor  # what attention adds, (S, D)
    feed_forward: Tensor  # what the feed-forward adds, (S, D)
    weights: Tensor  # of attention, (H, S, S)


@dataclass
class Inside:
    """A forward pass: the texts of its tokens, its layers, and the logits of the last token."""

    texts: list[str]
    layers: list[Layer]
    after: Tensor  # the residual stream after the last layer, (S, D)
    logits: Tensor  # (V,)


@torch.no_grad()
def look_inside(llama: Llama, text: str = PROMPT) -> Inside:
    """Compute the layers one by one, without a cache."""
    model, ids = llama.model, llama.tokenizer.encode(text, bos=True, eos=False)
    h = model.tok_embeddings(torch.tensor([ids]))
    freqs_cis = model.freqs_cis[: len(ids)]
    mask = causal_mask(torch.arange(len(ids)), len(ids), h.dtype)
    layers = []
    for block in model.layers:
        assert isinstance(block, TransformerBlock)
        attention, x = block.attention, block.attention_norm(h)
        xq, xk = (
            projection(x).view(1, len(ids), -1, attention.head_dim)
            for projection in (attention.wq, attention.wk)
        )
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis)
        keys = repeat_kv(xk, attention.n_rep)
        scores = torch.einsum("bshd,bthd->bhst", xq, keys) / math.sqrt(attention.head_dim)
        a = attention(x, None, freqs_cis, None)
        f = block.feed_forward(block.ffn_norm(h + a))
        layers.append(Layer(h[0], a[0], f[0], (scores + mask).softmax(-1)[0]))
        h = h + a + f
    logits = model.logits(model.norm(h))[0, -1]
    return Inside(llama.tokenizer.token_texts(ids), layers, h[0], logits)
