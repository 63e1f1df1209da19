"""Complete four prompts with a pretrained Llama model.

python example_text_completion.py  # the small model that comes with the package
python example_text_completion.py --ckpt_dir Meta-Llama-3-8B/original
torchrun --nproc_per_node 2 example_text_completion.py --ckpt_dir llama-2-13b
"""

import sys
from contextlib import closing
from typing import Any

from llama import Llama, SamplingParams
from llama.commands.command_line import run
from llama.commands.terminal import in_turn
from llama.errors import one_line
from llama.terminal_text import without_controls

# A pretrained model continues text. No prompt ends in a blank: the blank belongs to the next
# word's token, and a prompt that takes it away asks for a token sequence never seen in training.
PROMPTS = [
    "A sailor finds north at night by",
    "Bread rises because",
    """def is_leap_year(year: int) -> bool:
    \"\"\"True for a leap year of the Gregorian calendar.\"\"\"
    return""",
    # Few-shot: the examples before the open line are the whole instruction.
    """English to Spanish:

bread => pan
window => ventana
good night => buenas noches
library =>""",
]
# The small model that comes with the package has read nothing but tales.
TALES = [
    "Once upon a time there was a king who had three sons.",
    "The fox looked up at the bird and said:",
    "'Who are you?' asked the princess.",
    "When the old witch saw that the door was open, she",
]


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int = 64,
    max_batch_size: int = 4,
) -> None:
    """Complete four prompts with a pretrained Llama model.

    Reads:
        CKPT_DIR: the model. The prompts are in example_text_completion.py.

    Writes:
        Standard output: the prompts, and the generated texts.

    Examples:
        python example_text_completion.py
        python example_text_completion.py --ckpt_dir Meta-Llama-3-8B/original

    Args:
        ckpt_dir: folder with params.json and the consolidated.*.pth shards; by default the small
            model that comes with the package continues four beginnings of tales.
        tokenizer_path: tokenizer.model; by default the one in ckpt_dir.
        temperature: randomness of the choice; 0 always takes the likeliest token.
        top_p: choose among the likeliest tokens that together reach this probability.
        max_seq_len (tokens): longest prompt plus answer.
        max_gen_len (tokens): longest answer.
        max_batch_size (prompts): how many prompts the model has room for at once; there are four.
    """
    prompts = TALES if ckpt_dir is None else PROMPTS
    options: dict[str, Any] = dict(max_gen_len=max_gen_len, temperature=temperature, top_p=top_p)
    SamplingParams(**options)  # raises for a wrong option, before the model is loaded
    generator = Llama.build(
        # fire hands over a number where a name looks like one
        ckpt_dir=None if ckpt_dir is None else str(ckpt_dir),
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    events = generator.text_completion(prompts, **options, stream=True)
    with closing(events):
        for row, row_events in in_turn(events):  # on the first rank; the others only compute
            print(f"{prompts[row]}\n> ", end="")
            for event in row_events:
                print(without_controls(event.text), end="", flush=True)
            print("\n\n==================================\n")


if __name__ == "__main__":
    with one_line():
        run(main, sys.argv[1:], "python example_text_completion.py")
