"""Documents read from text files, and written as token files."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from llama.errors import DataError
from llama.files import read_records, read_text
from llama.tokenizer import Tokenizer
from llama.training.token_files import write_token_file


def read_documents(files: Iterable[str | Path], field: str = "text") -> Iterator[str]:
    """The documents of files. A line of a `.jsonl` has one under the key `field`. Any other file is
    one document.

    Raises DataError that names the file, and the line that has no such text.
    """
    for file in files:
        if Path(file).suffix != ".jsonl":
            yield read_text(file)
            continue
        for number, record in read_records(file):
            if not isinstance(record.get(field), str):
                raise DataError(f"{file}, line {number} has no text in {field!r}")
            yield record[field]


def write_token_files(
    documents: Iterable[str], tokenizer: Tokenizer, pattern: str, shard_tokens: int
) -> tuple[list[str], int]:
    """Write documents, each with bos and eos, into files of at most `shard_tokens` tokens.

    pattern: the files' name, with {} in place of the number. Without {} there is one file.
    Returns the files' names and the number of tokens.
    """
    try:
        numbered = pattern.format(0) != pattern.format(1)
    except (IndexError, KeyError, ValueError) as error:
        raise DataError(f"{pattern!r} is no name with one place for a number: {error}") from error
    if tokenizer.bos_id < 0:
        raise DataError(
            f"{tokenizer.model_path} has no bos token, by which training tells documents apart"
        )
    if shard_tokens < 1:
        raise DataError(f"shard_tokens is {shard_tokens}: it must be 1 or more")
    names: list[str] = []
    waiting = np.zeros(0, dtype=np.uint32)
    count = 0

    def write(tokens: np.ndarray) -> None:
        names.append(pattern.format(len(names)))
        write_token_file(names[-1], tokens)

    for document in documents:
        tokens = np.array(tokenizer.encode(document, bos=True, eos=True), dtype=np.uint32)
        count += len(tokens)
        waiting = np.concatenate([waiting, tokens])
        while numbered and len(waiting) > shard_tokens:
            write(waiting[:shard_tokens])
            waiting = waiting[shard_tokens:]
    if not count:
        raise DataError("there is no document in the files")
    write(waiting)
    return names, count
