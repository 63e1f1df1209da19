"""Read documents from text files, and write them as token files."""

import glob
import re
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
        force: existing files of these names are replaced. Those of higher numbers are deleted at
            the end, because a pattern such as "tales_*.bin" would read them too.

    Returns the files' names and the number of tokens. Raises DataError for a wrong pattern or
    limit, for a file that exists or cannot be written, and if there are no documents.
    """
    is_numbered = numbered(pattern, 0) != numbered(pattern, 1)
    if tokenizer.bos_id < 0:
        raise DataError(
            f"{tokenizer.model_path} has no bos token, which marks where a document begins"
        )
    if shard_tokens < 1:
        raise DataError(f"shard_tokens is {shard_tokens}: it must be 1 or more")
    older = _existing(pattern)
    for name in (numbered(pattern, 0), *older):
        check_can_write(name, force)
    fingerprint = tokenizer.fingerprint()
    names: list[str] = []
    pending = np.zeros(0, dtype=np.uint32)
    count = 0

    def write(tokens: np.ndarray) -> None:
        names.append(numbered(pattern, len(names)))
        write_token_file(names[-1], tokens, fingerprint)

    for document in documents:
        tokens = np.array(tokenizer.encode(document, bos=True, eos=True), dtype=np.uint32)
        count += len(tokens)
        pending = np.concatenate([pending, tokens])
        while is_numbered and len(pending) > shard_tokens:
            write(pending[:shard_tokens])
            pending = pending[shard_tokens:]
    if not count:
        raise DataError("there is no document in the files")
    write(pending)
    for name in set(older) - set(names):
        Path(name).unlink(missing_ok=True)
    return names, count


def numbered(pattern: str, number: int) -> str:
    """The name of a token file. Raises DataError for a wrong pattern."""
    try:
        return pattern.format(number)
    except (IndexError, KeyError, ValueError) as error:
        raise DataError(f"{pattern!r} is not a file name with at most one {{}}: {error}") from error


def _existing(pattern: str) -> list[str]:
    """The files that have the pattern's name with some number."""
    before, _, after = re.sub(r"\{\w*(:\w*)?\}", "\0", pattern).partition("\0")
    found = []
    for name in sorted(glob.glob(f"{glob.escape(before)}*{glob.escape(after)}")):
        number = name.removeprefix(before).removesuffix(after)
        if number.isdecimal() and numbered(pattern, int(number)) == name:
            found.append(name)
    return found
