"""Teach the bundled model not to repeat itself, by sequence-level unlikelihood.

Welleck et al. 2019, https://arxiv.org/abs/1908.04319.

The model tells stories. Where a story repeats a run of four tokens, the last of them becomes less
likely. The usual batches are trained beside, so that the model keeps what it has learned.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from bundled_dialogs import DialogSource
from torch import Tensor, nn

from llama import Llama
from llama.model import Transformer
from llama.tokenizer import Tokenizer

RUN = 4  # tokens
STORIES = 64  # that the model tells at a time
RENEWED = 10  # steps after which it tells new ones
IN_STEP = 8  # stories in the loss of a batch
LONGEST = 320  # tokens of a story
TEMPERATURE = 0.6


class Story(NamedTuple):
    """tokens: the dialog with its answer. repeats: the indices that end a repeated run."""

    tokens: list[int]
    repeats: list[int]


class WithUnlikelihood(nn.Module):
    """The loss of a batch, and the unlikelihood of the repeats in the model's own stories.

    rate: weight of a repeat, beside a target's.
    """

    def __init__(
        self, loss: nn.Module, model: Transformer, tokenizer: Tokenizer, dialogs: DialogSource,
        rate: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.loss, self.model = loss, model
        self.tokenizer, self.dialogs, self.rate = tokenizer, dialogs, rate
        self.stories: list[Story] = []
        self.repeated = 0.0  # share of the newest stories' tokens that end a repeated run
        self.calls = 0

    def forward(self, batch: object) -> Tensor:
        if self.calls % RENEWED == 0:
            self._tell()
        first = self.calls % RENEWED * IN_STEP % STORIES
        self.calls += 1
        loss: Tensor = self.loss(batch)
        stories = [story for story in self.stories[first : first + IN_STEP] if story.repeats]
        if not stories:
            return loss
        return loss + self.rate * unlikelihood(self.model, stories)

    def _tell(self) -> None:
        rng = random.Random(f"stories {self.calls} {len(self.stories)} {self.repeated}")
        prompts: list[list[int]] = []
        while len(prompts) < STORIES:
            if example := self.dialogs.draw(rng, LONGEST):
                prompts.append(example.tokens[: example.learned.index(True)])
        llama = Llama(self.model, self.tokenizer, mode="reference", max_batch_size=STORIES)
        with torch.autocast(self.model.device.type, enabled=False):
            answers, _ = llama.generate(
                prompts, LONGEST, temperature=TEMPERATURE, seed=rng.getrandbits(31)
            )
        self.stories = [
            Story(prompt + answer, repeats(answer, len(prompt)))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        found = sum(len(story.repeats) for story in self.stories)
        self.repeated = found / max(1, sum(map(len, answers)))
        print(f"{self.repeated:.1%} of the tokens of {STORIES} stories end a repeated run")


def repeats(answer: Sequence[int], offset: int) -> list[int]:
    """The indices, plus `offset`, that end a run of RUN tokens which the answer had before."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for end in range(RUN, len(answer) + 1):
        run = tuple(answer[end - RUN : end])
        if run in seen:
            found.append(offset + end - 1)
        seen.add(run)
    return found


def unlikelihood(model: Transformer, stories: Sequence[Story]) -> Tensor:
    """The sum of -log(1 - p) over the repeats of the stories, with the model's probabilities p."""
    longest = max(len(story.tokens) for story in stories)
    rows = [story.tokens + [0] * (longest - len(story.tokens)) for story in stories]
    tokens = torch.tensor(rows, device=model.device)
    row = torch.tensor([i for i, story in enumerate(stories) for _ in story.repeats])
    at = torch.tensor([index for story in stories for index in story.repeats])
    logits = model.logits(model.features(tokens[:, :-1])[row, at - 1])  # (n, V)
    chosen = logits.softmax(-1).gather(1, tokens[row, at][:, None])
    return -torch.log1p(-chosen.clamp(max=1 - 1e-4)).sum()
