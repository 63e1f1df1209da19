"""Read documents from text files, and write them as token files."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from llama.errors import DataError
from llama.files import check_can_write, read_records, read_text
from llama.tokenizer import Tokenizer
from llama.training.token_files import write_token_file


def read_documents(files: Iterable[str | Path], field: str = "text") -> Iterator[str]:
    """Yield the documents of files.

    Each line of a `.jsonl` file is an object with a document under the key `field`. Any other file
    is one document. Raises DataError for a file that cannot be read or is not UTF-8, and, with the
    line number, for a line without such an object.
    """
    for file in files:
        if Path(file).suffix != ".jsonl":
            text = read_text(file)
            if not text:
                raise DataError(f"{file} is empty")
            yield text
            continue
        for number, record in read_records(file):
            if not isinstance(record.get(field), str):
                raise DataError(f"{file}, line {number} has no text in {field!r}")
            yield record[field]


def write_token_files(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    pattern: str,
    shard_tokens: int,
    force: bool = False,
) -> tuple[list[str], int]:
    """Encode documents, each from bos to eos, and write them as token files.

    Args:
        pattern: a file name with one {}, which the number of the file replaces. A name without {}
            is one file for all tokens.
        shard_tokens: the most tokens of a file, if the name has {}.
        force: files of these names may be replaced.

    Returns the files' names and the number of tokens. Raises DataError for a wrong pattern or
    limit, for a file that exists or cannot be written, and if there are no documents.
    """
    try:
        numbered = pattern.format(0) != pattern.format(1)
    except (IndexError, KeyError, ValueError) as error:
        raise DataError(f"{pattern!r} is not a file name with at most one {{}}: {error}") from error
    if tokenizer.bos_id < 0:
        raise DataError(
            f"{tokenizer.model_path} has no bos token, which marks where a document begins"
        )
    if shard_tokens < 1:
        raise DataError(f"shard_tokens is {shard_tokens}: it must be 1 or more")
    check_can_write(pattern.format(0), force)
    fingerprint = tokenizer.fingerprint()
    names: list[str] = []
    pending = np.zeros(0, dtype=np.uint32)
    count = 0

    def write(tokens: np.ndarray) -> None:
        names.append(pattern.format(len(names)))
        write_token_file(names[-1], tokens, fingerprint)

    for document in documents:
        tokens = np.array(tokenizer.encode(document, bos=True, eos=True), dtype=np.uint32)
        count += len(tokens)
        pending = np.concatenate([pending, tokens])
        while numbered and len(pending) > shard_tokens:
            write(pending[:shard_tokens])
            pending = pending[shard_tokens:]
    if not count:
        raise DataError("there is no document in the files")
    write(pending)
    return names, count
