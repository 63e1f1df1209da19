"""LoRA adapters that PEFT writes for random models of transformers."""

from pathlib import Path
from typing import Any

import torch
from helpers.folders import TOKENS, VOCAB
from make_checkpoint import demo_pieces, write_tokenizer

SCALED_ROPE = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192, rope_theta=500000.0,
)  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
}


def write_base(folder: Path, **changes: Any) -> Path:
    """Write a random model of eight heads on two, with scaled RoPE."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=VOCAB, bos_token_id=384, eos_token_id=5,
        max_position_embeddings=16384, rope_parameters=SCALED_ROPE,
        **changes,
    )  # fmt: skip
    torch.manual_seed(6)
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, float(weight.dim() == 1), 0.08)
    model.save_pretrained(folder)
    write_tokenizer(folder / "tokenizer.model", demo_pieces())
    return folder


def write_adapter(base: Path, folder: Path, seed: int = 0, **config: Any) -> torch.Tensor:
    """Write a random adapter of the base model, as PEFT does. Returns the logits of TOKENS.

    config: arguments of PEFT's LoraConfig.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    torch.manual_seed(seed)
    for weight in adapted.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, float(weight.dim() == 1), 0.1)
    adapted.save_pretrained(folder)
    return peft_logits(base, folder)


def peft_logits(base: Path, folder: Path) -> torch.Tensor:
    """The logits of TOKENS by the adapter in a folder, as PEFT opens it."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base)
    with torch.inference_mode():
        return PeftModel.from_pretrained(model, folder).eval()(TOKENS).logits
