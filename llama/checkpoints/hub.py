"""Checkpoints from the Hugging Face Hub, by the id of their repository: owner/name@revision.

Only settings, .safetensors and the tokenizer are downloaded: no code and no pickle.
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
# From `original/` only the tokenizer is downloaded, because it may be nowhere else. The .pth files
# there hold the same weights again.
WANTED = [
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "original/tokenizer.model",
]
UNWANTED = ["*/*.safetensors"]  # in WANTED, a * matches slashes too
INSTALL = "to fetch it from the Hugging Face Hub, pip install 'llama-reference[hub]'"
LOG_IN = "log in with `hf auth login`"


class _NoProgressBar(tqdm):
    """A disabled progress bar, for all ranks except the main one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"disable": True})


def local_folder(name: str | Path) -> Path:
    """The local folder `name`. If there is none, `name` is the id of a repository on the Hub. Then
    the files that Hugging Face's cache lacks are downloaded, and the cache's folder is returned.

    name: a folder, or owner/name, or owner/name@revision with a commit, tag or branch. Without a
        revision the newest commit is used, and logged.
    Offline, only the cache is used. Several ranks may call this at once: because of the cache's
    locks, one rank downloads a file while the other ranks wait for it.
    Raises CheckpointError if the repository cannot be downloaded.
    """
    found = ID.fullmatch(str(name))
    if found is None or os.path.lexists(name) or str(name).endswith(".gguf"):
        return Path(name)
    repository, revision = found["repository"], found["revision"]
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise CheckpointError(f"no such folder: {name}; {INSTALL}") from None
    is_main = parallel.is_main_rank()
    try:
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
                tqdm_class=None if is_main else _NoProgressBar,
            )
        )
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/{repository}"
        raise CheckpointError(
            f"{repository} is gated: accept its licence at {page} and {LOG_IN}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"no such folder: {repository}, and no such repository on the Hugging Face Hub; if it "
            f"is private, {LOG_IN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repository} has no revision {revision}") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"no such folder: {name}; as an id on the Hugging Face Hub it is not in the cache, and "
            "the Hub cannot be reached: check the network and HF_HUB_OFFLINE"
        ) from error
    except Exception as error:  # depends on the network library
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
