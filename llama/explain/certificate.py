"""Certificates of parity: JSON files that say what was compared, where, and with which result.

Another machine can run the comparison again and check each figure.
"""

import dataclasses
import importlib.metadata
import platform
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama import parallel
from llama.checkpoints import hub
from llama.checkpoints.folder import BUNDLED, find_folder, find_tokenizer
from llama.checkpoints.verify import checksum
from llama.errors import DataError
from llama.explain.oracles import ORACLES
from llama.explain.parity import Comparison, n_equal
from llama.explain.recording import LOGITS
from llama.files import read_json, write_json
from llama.gguf_file import is_gguf, parts_of
from llama.processor import processor_name

WEIGHTS = (".pth", ".safetensors", ".bin", ".gguf")
CONFIGURATIONS = ("params.json", "config.json")


@dataclass(frozen=True)
class Certificate:
    """A comparison with its model and its machine.

    model: the folder's name, or its id on the Hub.
    files: the SHA-256 of each file that the result depends on, by name.
    versions: of the packages and of Python.
    device: the GPU's name, or "cpu" or "mps".
    processor: the name of the CPU, and the instructions that PyTorch uses on it.
    threads: how many PyTorch uses on the CPU.
    """

    model: str
    files: dict[str, str]
    versions: dict[str, str]
    device: str
    processor: str
    threads: int
    comparison: Comparison


def certify(
    comparison: Comparison,
    ckpt_dir: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    device: str | torch.device | None = None,
) -> Certificate:
    """The certificate of a comparison that was made on this machine with these arguments."""
    given = ckpt_dir or BUNDLED
    local = hub.local_folder(given)
    packages = ("llama-reference", "torch", ORACLES[comparison.against].package)
    target = parallel.local_device(device)
    return Certificate(
        model=local.resolve().name if local == Path(given) else str(given),
        files=checksums(local, tokenizer_path),
        versions={name: importlib.metadata.version(name) for name in packages}
        | {"Python": platform.python_version()},
        device=torch.cuda.get_device_name(target) if target.type == "cuda" else target.type,
        processor=f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}",
        threads=torch.get_num_threads(),
        comparison=comparison,
    )


def checksums(ckpt_dir: Path, tokenizer_path: str | Path | None = None) -> dict[str, str]:
    """The SHA-256 of the weights, the configuration and the tokenizer, by file name."""
    folder = find_folder(ckpt_dir)
    paths = parts_of(folder) if is_gguf(folder) else sorted(folder.iterdir())
    paths = [path for path in paths if path.suffix in WEIGHTS or path.name in CONFIGURATIONS]
    paths.append(Path(tokenizer_path or find_tokenizer(folder, ckpt_dir)))
    # A GGUF file is the tokenizer's file too.
    return {path.name: checksum(path, "sha256") for path in dict.fromkeys(paths)}


# ---- the file -----------------------------------------------------------------------------------


def write_certificate(certificate: Certificate, path: str | Path) -> None:
    """Write a certificate as JSON. The verdict comes first, where a person sees it."""
    verdict = {"verdict": certificate.comparison.verdict}
    write_json(path, verdict | dataclasses.asdict(certificate))


def read_certificate(path: str | Path) -> Certificate:
    """Read a certificate. Raises ConfigError if the file is not JSON, and DataError if it is no
    certificate."""
    content = read_json(Path(path))
    try:
        certificate: Certificate = _parse(Certificate, content, "")
    except DataError as error:
        raise DataError(f"{path} is no certificate of parity: {error}") from error
    if LOGITS not in certificate.comparison.modules:
        raise DataError(f"{path} is no certificate of parity: it has no module {LOGITS}")
    if content.get("verdict") != certificate.comparison.verdict:
        raise DataError(f"{path} is no certificate of parity: its verdict contradicts its figures")
    return certificate


def _parse(kind: Any, value: Any, name: str) -> Any:
    """A JSON value as the annotated type `kind`: a dataclass, dict, list, number, text or None."""
    if isinstance(kind, types.UnionType):  # X | None
        return None if value is None else _parse(typing.get_args(kind)[0], value, name)
    container = typing.get_origin(kind) or (dict if dataclasses.is_dataclass(kind) else kind)
    if kind is float and type(value) is int and value.bit_length() < 1024:  # fits into a float
        value = float(value)
    if type(value) is not container:
        raise DataError(f"{name} is of type {type(value).__name__}, not {container.__name__}")
    if kind is str and not str(value).isprintable():  # such as a terminal's control codes
        raise DataError(f"{name} has characters that cannot be printed")
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if missing := [key for key in hints if key not in value]:
            raise DataError(f"{name or 'it'} lacks {', '.join(missing)}")
        return kind(**{key: _parse(hints[key], value[key], key) for key in hints})  # type: ignore[operator]
    inner = typing.get_args(kind)
    if container is dict:
        return {
            _parse(str, key, name): _parse(inner[1], value[key], f"{name}.{key}") for key in value
        }
    if container is list:
        return [_parse(inner[0], element, name) for element in value]
    return value


# ---- checking -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One figure of a certificate, and the same figure on this machine.

    holds: None if the figure need not hold.
    """

    name: str
    stated: str
    found: str
    holds: bool | None


def compare_figures(stated: Certificate, found: Certificate) -> list[Figure]:
    """Whether each figure of a certificate holds for a new one with the same settings.

    Files and tokens must be the same. Differences must be no larger, or within the limit of the
    other implementation. The bits of the logits may differ on another machine.
    """
    there, here = stated.comparison, found.comparison

    def number(name: str, of: Callable[[Comparison], float], is_required: bool = True) -> Figure:
        a, b = of(there), of(here)
        holds = b <= max(a, here.limit) if is_required else None
        return Figure(name, f"{a:.3g}", f"{b:.3g}", holds)

    names = dict.fromkeys([*stated.files, *found.files])
    changed = [name for name in names if stated.files.get(name) != found.files.get(name)]
    n_same = n_equal(there.tokens, here.tokens)
    # Where the logits have a limit, the other differences follow from rounding.
    is_exact = here.limit == 0
    return [
        Figure("files", f"{len(stated.files)}", _changes(changed), not changed),
        Figure("tokens", f"{len(there.tokens)}", f"{n_same} equal", there.tokens == here.tokens),
        number("modules that differ", lambda c: len(c.differing_modules), is_exact),
        number("logits, ulps", lambda c: c.modules[LOGITS].ulps),
        number("decoded logits, ulps", lambda c: c.decoded.ulps),
        number("logprobs, nats", lambda c: c.logprob_difference, is_exact),
        Figure("SHA-256 of the logits", there.logits_sha256[:12], here.logits_sha256[:12], None),
    ]


def _changes(changed: list[str]) -> str:
    return f"changed: {', '.join(changed)}" if changed else "the same"
