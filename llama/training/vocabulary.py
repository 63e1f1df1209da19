"""Train a byte-pair vocabulary and write it in the format of Llama 3's `tokenizer.model`.

Philip Gage 1994, "A New Algorithm for Data Compression"; Sennrich et al. 2016, arxiv.org/abs/
1508.07909. The merges are counted by the `tokenizers` library (extra `[train]`).
"""

import base64
from collections.abc import Iterable
from pathlib import Path

from llama.errors import TokenizerError
from llama.files import atomic_file
from llama.tokenizer_files.hugging_face import BYTE_OF_CHARACTER
from llama.tokenizer_files.meta import WORD_PATTERN


def train_vocabulary(texts: Iterable[str], n_ranks: int, path: str | Path) -> None:
    """Write a `tokenizer.model` of `n_ranks` byte sequences, the 256 single bytes among them.

    `Tokenizer` opens it and puts Llama 3's 256 special tokens after the ranks. The words are cut
    by Llama 3's pattern before any merge. The same text always gives the same bytes.
    Raises TokenizerError where the text has too few pairs for so many ranks.
    """
    try:
        from tokenizers import Regex, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as BytePairTokenizer
    except ImportError as error:
        raise TokenizerError(
            "training a vocabulary needs the tokenizers library: pip install 'llama-reference"
            "[train]'"
        ) from error
    if not isinstance(n_ranks, int) or n_ranks < 257:
        raise TokenizerError(f"a vocabulary of {n_ranks!r} ranks: 256 are the bytes, ask for more")

    bpe = BytePairTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            # Writes every byte as one printable character, which is undone below.
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=n_ranks, initial_alphabet=alphabet, show_progress=False),
    )
    vocabulary = bpe.get_vocab()
    if len(vocabulary) < n_ranks:
        raise TokenizerError(
            f"the text has merges for {len(vocabulary)} ranks only, {n_ranks} were asked for"
        )
    lines = []
    for token, rank in sorted(vocabulary.items(), key=lambda item: item[1]):
        sequence = bytes(BYTE_OF_CHARACTER[character] for character in token)
        lines.append(f"{base64.b64encode(sequence).decode()} {rank}\n")
    with atomic_file(path) as file:
        file.write("".join(lines).encode("ascii"))
