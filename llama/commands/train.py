"""llama train, finetune: train a new model, or fine-tune a checkpoint on dialogs."""

from typing import Any

from llama.commands.flags import FINETUNING, LORA, PRETRAINING, RUN, as_text, takes, with_defaults
from llama.terminal_text import say

FINETUNING_RUN = with_defaults(
    RUN, steps="100", learning_rate="0.0001", warmup_steps="10", weight_decay="0.0"
)


@takes(PRETRAINING, RUN)
def train(config: str | None = None, **flags: Any) -> None:
    """Train a new model from token files. After a stop the same command continues the run.

    Example: llama train --data 'tales_*.bin' --tokenizer tokenizer.model --out_dir run

    The TOML file CONFIG may have every flag as a key. A flag on the command line takes precedence.

    Args:
        config: TOML file with the flags' names as keys; by default none.
    """
    from llama.commands.train_config import PretrainConfig, pretrain

    say(f"Saved in {pretrain(PretrainConfig.read(config, flags))}")


@as_text
@takes(FINETUNING, LORA, FINETUNING_RUN)
def finetune(config: str | None = None, **flags: Any) -> None:
    """Fine-tune a checkpoint on dialogs. Only the assistant's messages are learned.

    Example: llama finetune --ckpt_dir Llama3.2-1B-Instruct --data dialogs.jsonl --out_dir run

    A line of DATA is a dialog: {"messages": [{"role": "user", "content": "…"}, {"role":
    "assistant", "content": "…"}]}. A dialog longer than --seq_len is cut after an answer. After a
    stop the same command continues the run.

    With --lora_r the checkpoints in OUT_DIR are LoRA adapters in PEFT's format. --adapter OUT_DIR
    uses the newest one in other commands. `llama convert` merges it.

    Args:
        config: TOML file with the flags' names as keys; by default none.
    """
    from llama.commands.train_config import FinetuneConfig
    from llama.commands.train_config import finetune as run

    say(f"Saved in {run(FinetuneConfig.read(config, flags))}")
