"""Checkpoints from the Hugging Face Hub, by the id of their repository: owner/name@revision.

Fetched is what a model is read from, JSON, .safetensors and the tokenizer: no code and no pickle.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama import parallel
from llama.errors import CheckpointError

log = logging.getLogger("llama")

ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
# Meta's own weights in `original/` are the same again, as .pth; the tokenizer may be there alone.
WANTED = [
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "original/tokenizer.model",
]
UNWANTED = ["*/*.safetensors"]  # a * stands for slashes too
INSTALL = "to fetch it from the Hugging Face Hub, pip install 'llama-reference[hub]'"
LOG_IN = "log in with `hf auth login`"


class _Silent(tqdm):
    """The progress bar of all ranks but one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"disable": True})


def local_folder(name: str | Path) -> Path:
    """The checkpoint folder of that name; where there is none, that of the repository on the Hub
    with this id, downloaded into Hugging Face's cache as far as it is not there.

    name: a folder, or owner/name with @ and a commit, tag or branch. Without a revision it is the
        newest, and the log says which commit that is.
    Offline, the cache has to do. Several ranks may call this at once: the cache's locks let one
    download a file while the others wait for it.
    Raises CheckpointError where the repository cannot be had.
    """
    found = ID.fullmatch(str(name))
    if found is None or os.path.lexists(name):
        return Path(name)
    repository, revision = found["repository"], found["revision"]
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise CheckpointError(f"no such checkpoint folder: {name}; {INSTALL}") from None
    is_main = parallel.is_main_rank()
    try:
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
                tqdm_class=None if is_main else _Silent,
            )
        )
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/{repository}"
        raise CheckpointError(
            f"{repository} is gated: accept its licence at {page} and {LOG_IN}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"no such folder: {repository}; nor is it a repository on the Hugging Face Hub; if it "
            f"is private, {LOG_IN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repository} has no revision {revision}") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"no such folder: {name}; as an id on the Hugging Face Hub it is not in the cache, and "
            "the Hub cannot be reached: check the network and HF_HUB_OFFLINE"
        ) from error
    except Exception as error:  # the network library is not always the same
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"cannot fetch {name} from the Hugging Face Hub: {reason}") from error
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{repository} has no .safetensors: fetch its files with `hf download {repository} "
            f"--local-dir FOLDER`"
        )
    if revision is None and is_main:
        log.info("%s is at commit %s: pin it as %s@%s", name, folder.name, name, folder.name)
    return folder
