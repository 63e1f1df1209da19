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

    Reads:
        DATA, EVAL_DATA: token files, which `llama tokenize` writes.
        TOKENIZER: the tokenizer.model with which they were written.
        CONFIG: a TOML file with flags as keys. A flag on the command line takes precedence:
            steps = 2000
            data = "tales_*.bin"

    Writes:
        OUT_DIR/step_NNNNNNNN: a checkpoint folder in Meta's layout, with the state of the
        optimizer. Other commands take OUT_DIR as the model: the newest checkpoint.
        Standard error: loss and speed.
        LOG_DIR: event files for TensorBoard, if the flag is given.

    Examples:
        llama train --data 'tales_*.bin' --tokenizer tales_tokenizer.model --out_dir run
        llama train config.toml --steps 40 --dim 64 --n_layers 2 --batch 2 --seq_len 128

    Args:
        config: TOML file with the flags' names as keys; by default none.
    """
    from llama.commands.train_config import PretrainConfig
    from llama.commands.train_run import pretrain

    say(f"Saved in {pretrain(PretrainConfig.read(config, flags))}")


@as_text
@takes(FINETUNING, LORA, FINETUNING_RUN)
def finetune(config: str | None = None, **flags: Any) -> None:
    """Fine-tune a checkpoint on dialogs. Only the assistant's messages are learned.

    A dialog longer than --seq_len is cut after an answer. After a stop the same command continues
    the run.

    Reads:
        DATA, EVAL_DATA: JSON, a dialog a line:
            {"messages": [{"role": "user", "content": "Hi"},
                          {"role": "assistant", "content": "Hello"}]}
        (in the file, a dialog has one line).
        Lines with "conversations", or with "instruction", "input" and "output", are read too.
        CONFIG: a TOML file with flags as keys. A flag on the command line takes precedence:
            steps = 200

    Writes:
        OUT_DIR/step_NNNNNNNN: a checkpoint folder in Meta's layout. With --lora_r it is a LoRA
        adapter in PEFT's format, which --adapter OUT_DIR uses in other commands, and which
        `llama convert` merges.
        Standard error: loss and speed.
        LOG_DIR: event files for TensorBoard, if the flag is given.

    Examples:
        llama finetune --ckpt_dir Llama3.2-1B-Instruct --data dialogs.jsonl --out_dir tuned
        llama finetune --data dialogs.jsonl --out_dir fox --lora_r 8 --steps 40 --seq_len 64

    Args:
        config: TOML file with the flags' names as keys; by default none.
    """
    from llama.commands.train_config import FinetuneConfig
    from llama.commands.train_run import finetune as run

    say(f"Saved in {run(FinetuneConfig.read(config, flags))}")
