"""Answer four dialogs with an instruction-tuned Llama model.

python example_chat_completion.py  # the small model that comes with the package
python example_chat_completion.py --ckpt_dir Meta-Llama-3-8B-Instruct/original
torchrun --nproc_per_node 2 example_chat_completion.py --ckpt_dir llama-2-13b-chat
"""

import sys
from contextlib import closing
from typing import Any

from llama import Dialog, Llama, SamplingParams
from llama.commands.command_line import run
from llama.commands.terminal import in_turn
from llama.errors import one_line
from llama.terminal_text import without_controls

DIALOGS: list[Dialog] = [
    [{"role": "user", "content": "How do I keep basil alive on a windowsill?"}],
    # The model has no memory: a later question brings the earlier turns along.
    [
        {"role": "user", "content": "Name one river that flows north."},
        {"role": "assistant", "content": "The Nile."},
        {"role": "user", "content": "Where does it end?"},
    ],
    # A system message sets the tone for everything after it.
    [
        {"role": "system", "content": "You are a ship's cook. Answer in one short sentence."},
        {"role": "user", "content": "What should I pack for a week at sea?"},
    ],
    [
        {"role": "system", "content": "Answer with code only, in Python."},
        {"role": "user", "content": "Reverse a string."},
        {"role": "assistant", "content": "text[::-1]"},
        {"role": "user", "content": "Now word by word."},
    ],
]
# The small model that comes with the package tells tales, and little else.
TALES: list[Dialog] = [
    [{"role": "user", "content": "Who are you?"}],
    [{"role": "user", "content": "Tell me a story about a fox and a king"}],
    [
        {"role": "system", "content": "You are a teller of fairy tales."},
        {"role": "user", "content": "Tell me a tale about a witch and a princess."},
    ],
    [{"role": "user", "content": "How do I keep basil alive on a windowsill?"}],
]


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_gen_len: int | None = None,
    max_batch_size: int = 4,
) -> None:
    """Answer four dialogs with an instruction-tuned Llama model.

    Reads:
        CKPT_DIR: the model. The dialogs are in example_chat_completion.py.

    Writes:
        Standard output: the dialogs, and the generated texts.

    Examples:
        python example_chat_completion.py
        python example_chat_completion.py --ckpt_dir Meta-Llama-3-8B-Instruct/original

    Args:
        ckpt_dir: folder with params.json and the consolidated.*.pth shards; by default the small
            model that comes with the package is asked four things it can answer.
        tokenizer_path: tokenizer.model; by default the one in ckpt_dir.
        temperature: randomness of the choice; 0 always takes the likeliest token.
        top_p: choose among the likeliest tokens that together reach this probability.
        max_seq_len (tokens): longest dialog plus answer.
        max_gen_len (tokens): longest answer; by default up to max_seq_len.
        max_batch_size (dialogs): how many dialogs the model has room for at once; there are four.
    """
    dialogs = TALES if ckpt_dir is None else DIALOGS
    options: dict[str, Any] = dict(max_gen_len=max_gen_len, temperature=temperature, top_p=top_p)
    SamplingParams(**options)  # raises for a wrong option, before the model is loaded
    generator = Llama.build(
        # fire hands over a number where a name looks like one
        ckpt_dir=None if ckpt_dir is None else str(ckpt_dir),
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    events = generator.stream(dialogs, **options)
    with closing(events):
        for row, row_events in in_turn(events):  # on the first rank; the others only compute
            for message in dialogs[row]:
                print(f"{message['role'].capitalize()}: {message['content']}\n")
            print("> Assistant: ", end="")
            for event in row_events:
                print(without_controls(event.text), end="", flush=True)
            print("\n\n==================================\n")


if __name__ == "__main__":
    with one_line():
        run(main, sys.argv[1:], "python example_chat_completion.py")
