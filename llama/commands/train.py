"""llama train, finetune: train a new model, or teach a checkpoint from dialogs."""

from typing import Any

from llama.commands.flags import FINETUNING, PRETRAINING, RUN, changed, takes

FINETUNING_RUN = changed(
    RUN, steps="100", learning_rate="0.0001", warmup_steps="10", weight_decay="0.0"
)


@takes(PRETRAINING, RUN)
def train(config: str | None = None, **flags: Any) -> None:
    """Train a new model from token files. The same command goes on after a stop.

    Example: llama train --data 'tales_*.bin' --tokenizer tokenizer.model --out_dir run

    Every flag may also be a key of the TOML file CONFIG. A flag wins over the file.

    Args:
        config: TOML file with the flags' names as keys; by default none.
    """
    from llama.commands.train_config import PretrainConfig, pretrain

    print(f"Saved in {pretrain(PretrainConfig.read(config, flags))}")


@takes(FINETUNING, FINETUNING_RUN)
def finetune(config: str | None = None, **flags: Any) -> None:
    """Teach a checkpoint from dialogs. Only the assistant's messages are learned.

    Example: llama finetune --ckpt_dir Llama3.2-1B-Instruct --data dialogs.jsonl --out_dir run

    A line of DATA is a dialog: {"messages": [{"role": "user", "content": "…"}, {"role":
    "assistant", "content": "…"}]}. A dialog longer than --seq_len is cut after a turn.

    Args:
        config: TOML file with the flags' names as keys; by default none.
    """
    from llama.commands.train_config import FinetuneConfig
    from llama.commands.train_config import finetune as run

    print(f"Saved in {run(FinetuneConfig.read(config, flags))}")
