"""llama tokenize, llama vocab: make token files and vocabularies for training."""

from pathlib import Path

from llama.errors import DataError
from llama.terminal_text import say

SHARD_TOKENS = 100_000_000  # most tokens of a file, the default


def tokenize(
    *files: str,
    tokenizer: str,
    out: str,
    shard_tokens: int = SHARD_TOKENS,
    field: str = "text",
    force: bool = False,
) -> None:
    """Write token files for training. Every document begins with bos and ends with eos.

    Reads:
        FILES: UTF-8 texts, each of which is one document, or .jsonl files with one document a line:
            {"text": "Once upon a time there was a fox."}
        TOKENIZER: a tokenizer.model, which `llama vocab` or Meta made.

    Writes:
        OUT: token files, which `llama train` reads: a header of 256 int32 with the number of
        tokens, then the ids as uint32.

    Examples:
        llama tokenize tale.txt --tokenizer tales_tokenizer.model --out tale.bin
        llama tokenize tales.jsonl --tokenizer tales_tokenizer.model --out 'tales_{:04d}.bin'

    Args:
        files: UTF-8 texts, each of which is a document, or .jsonl files with one document a line.
        tokenizer: the tokenizer.model.
        out: name of the token files; the number of a file replaces {} or {:04d}; all tokens go into
            one file if the name has no {}.
        shard_tokens (tokens): most tokens of a file.
        field: key of the text in a .jsonl line.
        force: replace the token files of this name if they exist, and delete those of higher
            numbers.
    """
    from llama.files import check_can_write
    from llama.tokenizer import Tokenizer
    from llama.training.documents import numbered, read_documents, write_token_files

    out, paths = str(out), list(map(str, files))
    is_numbered = out != numbered(out, 0)
    if not is_numbered and shard_tokens != SHARD_TOKENS:
        raise DataError(f"shard_tokens needs {{}} in out, for the number of a file: {out}")
    check_can_write(numbered(out, 0), force, inputs=[*paths, tokenizer])
    documents = read_documents(paths, str(field))
    names, count = write_token_files(documents, Tokenizer(tokenizer), out, shard_tokens, force)
    say(f"{count:,} tokens in {', '.join(names)}")


def vocab(*files: str, ranks: int, out: str, field: str = "text", force: bool = False) -> None:
    """Train a vocabulary in the format of Llama 3's tokenizer.model.

    Reads:
        FILES: UTF-8 texts, each of which is one document, or .jsonl files with one document a line:
            {"text": "Once upon a time there was a fox."}

    Writes:
        OUT: a tokenizer.model. A line is the bytes of a token in base64, and its rank:
            dGhl 278

    Examples:
        llama vocab tale.txt --ranks 300 --out tales_tokenizer.model
        llama vocab tales.jsonl tale.txt --ranks 4096 --out tales_tokenizer.model --force

    Args:
        files: UTF-8 texts, each of which is a document, or .jsonl files with one document a line.
        ranks (tokens): 257 or more; Llama 3's 256 special tokens are added to them.
        out: the file to write.
        field: key of the text in a .jsonl line.
        force: replace OUT if it exists.
    """
    from llama.files import check_can_write
    from llama.training.documents import read_documents
    from llama.training.vocabulary import train_vocabulary

    check_can_write(str(out), force, inputs=map(str, files))
    train_vocabulary(read_documents(map(str, files), str(field)), ranks, Path(str(out)))
    say(f"{ranks:,} ranks and 256 special tokens in {out}")
