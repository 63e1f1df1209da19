"""A tiny Llama that has learned its answers by heart, with the vocabulary of the bundled model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from helpers.folders import make_model

from llama import Llama
from llama.chat_format import ChatFormat
from llama.checkpoints.folder import BUNDLED
from llama.tokenizer import Tokenizer
from llama.tools import PYTHON_TAG, Tool
from llama.training.objective import next_token_loss

N_STEPS = 80
CONTEXT = 2048


def make_talker(answers: Mapping[str, str], tools: Sequence[Tool] = (), **build: Any) -> Llama:
    """A Llama that says `answers[question]` to each question, with these tools in the prompt.

    A question and its answer should differ from the others in their first words.
    """
    tokenizer = Tokenizer(BUNDLED / "tokenizer.model")
    shape = dict(dim=48, n_layers=1, n_heads=2, hidden_dim=96, vocab_size=tokenizer.n_words)
    model = make_model(**shape, max_seq_len=CONTEXT).requires_grad_()
    formatter = ChatFormat(tokenizer)
    special = tokenizer.special_tokens
    rows = []
    for question, answer in answers.items():
        prompt = formatter.encode_dialog_prompt(
            [{"role": "user", "content": question}], tools=tools
        )
        tag = [special[PYTHON_TAG]] * answer.startswith(PYTHON_TAG)
        said = tokenizer.encode(answer.removeprefix(PYTHON_TAG), bos=False, eos=False)
        end = special["<|eom_id|>" if tag else "<|eot_id|>"]
        rows.append((prompt, [*tag, *said, end]))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(N_STEPS):
        optimizer.zero_grad()
        for prompt, said in rows:
            tokens = torch.tensor([prompt + said])
            logits = model(tokens[:, :-1], None)[:, len(prompt) - 1 :]
            next_token_loss(logits, torch.tensor([said])).backward()
        optimizer.step()
    return Llama(model, tokenizer, **build)
