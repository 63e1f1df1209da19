"""Difficult texts and small vocabularies for the tokenizer tests."""

import io
import random
from functools import cache

import sentencepiece
from hypothesis import strategies as st

from llama.tokenizer import TextDecoder, Tokenizer

# Any Unicode, including halves of surrogate pairs, with many blanks, so that runs of blanks occur.
ANY_TEXT = st.lists(st.text(st.characters()) | st.sampled_from(" \n\t\r\u3000a1!")).map("".join)
NAMES = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|python_tag|>")


def repaired(text: str) -> str:
    """The text with U+FFFD in the place of each unpaired half of a surrogate pair."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of the ids, decoded one id at a time."""
    decoder = TextDecoder(tokenizer)
    return "".join(decoder.push(i) for i in ids) + decoder.flush()


@cache
def sentencepiece_model(**options: object) -> bytes:
    """A small SentencePiece model with Llama 2's options: BPE with byte fallback, all blanks kept,
    and the same special ids. options: other options of the trainer."""
    words = "the quick brown fox jumps over the lazy dog while rain falls on [INST] SYS".split()
    rng = random.Random(0)
    like_llama2 = dict(
        model_type="bpe", byte_fallback=True, vocab_size=380, character_coverage=1.0,
        bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity", split_digits=True,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choices(words, k=9)) for _ in range(200)]),
        model_writer=model,
        **like_llama2 | options,
    )
    return model.getvalue()
