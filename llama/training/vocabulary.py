"""Train a byte-pair vocabulary, in the file format of Llama 3's tokenizer.

Philip Gage 1994, "A New Algorithm for Data Compression"; Sennrich et al. 2016, arxiv.org/abs/
1508.07909. The merges are counted by the `tokenizers` library (extra `[train]`).
"""

from collections.abc import Iterable
from pathlib import Path

from llama.errors import TokenizerError
from llama.files import atomic_file
from llama.tokenizer_files.library import BYTE_OF_CHARACTER
from llama.tokenizer_files.meta import WORD_PATTERN, ranks_file


def train_vocabulary(texts: Iterable[str], n_ranks: int, path: str | Path) -> None:
    """Write a `tokenizer.model` of `n_ranks` byte sequences. These include the 256 single bytes.

    `Tokenizer` opens the file and adds Llama 3's 256 special tokens after the ranks. Llama 3's
    pattern splits the texts into words, and merges stay inside a word. The same texts always give
    the same bytes. Raises TokenizerError if n_ranks is below 257, if the texts have too few pairs
    for n_ranks, or if the tokenizers library is missing.
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
        raise TokenizerError(
            f"ranks is {n_ranks!r}: it must be 257 or more, since 256 are the bytes"
        )

    bpe = BytePairTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            # ByteLevel writes every byte as one printable character. BYTE_OF_CHARACTER undoes it.
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
            f"the text has merges for {len(vocabulary)} ranks only, but ranks is {n_ranks}"
        )
    ranks = {
        bytes(BYTE_OF_CHARACTER[character] for character in token): rank
        for token, rank in vocabulary.items()
    }
    with atomic_file(path) as file:
        file.write(ranks_file(ranks))
