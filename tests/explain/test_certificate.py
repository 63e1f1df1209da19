"""Certificates are read back whole, checked figure by figure, and refused if damaged."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.checkpoints.convert import convert
from llama.checkpoints.folder import BUNDLED
from llama.errors import ConfigError, DataError
from llama.explain.certificate import (
    Certificate,
    certify,
    checksums,
    compare_figures,
    read_certificate,
    write_certificate,
)
from llama.explain.difference import Difference
from llama.explain.parity import compare
from llama.explain.recording import LOGITS

DOCS = Path(__file__).parent.parent.parent / "docs" / "parity"
ADVICE = "run scripts/make_certificates.py and commit what it writes"


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    return certify(compare(device="cpu", max_gen_len=4), device="cpu")


def test_what_a_certificate_says(certificate: Certificate) -> None:
    paths = [path for path in BUNDLED.iterdir() if path.suffix != ".md"]
    assert certificate.files == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }
    assert certificate.versions.keys() == {"llama-reference", "torch", "llama-models", "Python"}
    assert certificate.versions["torch"] == torch.__version__
    assert (certificate.model, certificate.device, certificate.threads) == ("bundled", "cpu", 1)
    assert certificate.comparison.dtype == "float32"


def test_a_certificate_is_read_back(certificate: Certificate, tmp_path: Path) -> None:
    write_certificate(certificate, tmp_path / "c.json")
    assert read_certificate(tmp_path / "c.json") == certificate
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["verdict"] == certificate.comparison.verdict


def test_differences_that_are_not_finite_are_read_back(
    certificate: Certificate, tmp_path: Path
) -> None:
    largest = torch.finfo(torch.float64).max
    worst = {LOGITS: Difference(1, 1, largest, largest)}
    damaged = replace(certificate, comparison=replace(certificate.comparison, modules=worst))
    write_certificate(damaged, tmp_path / "c.json")
    assert read_certificate(tmp_path / "c.json") == damaged


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop("files"), "it lacks files"),
        (lambda c: c["comparison"].pop("tokens"), "comparison lacks tokens"),
        (lambda c: c["comparison"].update(tokens="all"), "tokens is of type str, not list"),
        (lambda c: c["comparison"].update(prompt_tokens=[1, True]),
         "prompt_tokens is of type bool, not int"),
        (lambda c: c["comparison"].update(dtype=None), "dtype is of type NoneType, not str"),
        (lambda c: c["comparison"]["modules"].update(norm=[]),
         "modules.norm is of type list, not dict"),
        (lambda c: c["comparison"]["modules"].pop("output"), "it has no module output"),
        (lambda c: c.update(threads=1.5), "threads is of type float, not int"),
        (lambda c: c.update(model="a\x1b[2J"), "model has characters that cannot be printed"),
        (lambda c: c["files"].update({"a\nb": "0"}), "files has characters that cannot be printed"),
        (lambda c: c["comparison"].update(limit=10**400), "limit is of type int, not float"),
    ],
)  # fmt: skip
def test_a_damaged_certificate(
    damage: Callable[[dict[str, Any]], object],
    message: str,
    certificate: Certificate,
    tmp_path: Path,
) -> None:
    path = tmp_path / "c.json"
    write_certificate(certificate, path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        read_certificate(path)
    assert str(error.value) == f"{path} is no certificate of parity: {message}"


def test_a_file_that_is_cut_short(certificate: Certificate, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    write_certificate(certificate, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"c\.json is not JSON"):
        read_certificate(path)


# ---- figures ------------------------------------------------------------------------------------


def failing(stated: Certificate, found: Certificate) -> list[str]:
    """The names of the figures that do not hold."""
    return [f.name for f in compare_figures(stated, found) if f.holds is False]


def test_the_same_run_holds(certificate: Certificate) -> None:
    assert failing(certificate, certificate) == []


def test_another_machine_may_have_other_bits(certificate: Certificate) -> None:
    elsewhere = replace(certificate.comparison, logits_sha256="0" * 64)
    other = replace(certificate, processor="another", comparison=elsewhere)
    assert failing(certificate, other) == []


def test_another_token(certificate: Certificate) -> None:
    tokens = [*certificate.comparison.tokens[:2], 5, 6]
    other = replace(certificate, comparison=replace(certificate.comparison, tokens=tokens))
    assert failing(certificate, other) == ["tokens"]
    assert compare_figures(certificate, other)[1].found == "2 equal"


def test_a_larger_difference(certificate: Certificate) -> None:
    far = Difference(10, 1, 0.1, 0.5)
    modules = certificate.comparison.modules | {LOGITS: far}
    other = replace(certificate, comparison=replace(certificate.comparison, modules=modules))
    assert failing(certificate, other) == ["modules that differ", "logits, ulps"]
    assert failing(other, other) == []
    assert failing(other, certificate) == []


def test_with_a_limit_only_the_logits_must_hold(certificate: Certificate) -> None:
    limited = replace(certificate.comparison, limit=2.0)

    def with_logits(ulps: float) -> Certificate:
        modules = dict.fromkeys(limited.modules, Difference(10, 10, 0.1, ulps))
        return replace(certificate, comparison=replace(limited, modules=modules))

    stated = replace(certificate, comparison=limited)
    assert failing(stated, with_logits(2.0)) == []
    assert failing(stated, with_logits(2.1)) == ["logits, ulps"]


def test_a_changed_weight_file(certificate: Certificate, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(BUNDLED, tmp_path / "copy"))
    path = folder / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    state["layers.1.feed_forward.w1.weight"][3, 5] *= 2
    torch.save(state, path)
    again = certify(compare(folder, device="cpu", max_gen_len=4, dtype="float32"), folder)
    figures = compare_figures(certificate, again)
    assert figures[0].found == "changed: consolidated.00.pth"
    assert figures[0].holds is False


@pytest.mark.parametrize("against", ["llama-models", "transformers"])
def test_a_gguf_file(against: str, tmp_path: Path) -> None:
    path = convert(BUNDLED, tmp_path / "model.gguf", "gguf", dtype="q8_0")
    comparison = compare(path, against=against, device="cpu", max_gen_len=4, dtype="float32")
    assert comparison.holds
    certificate = certify(comparison, path, device="cpu")
    assert certificate.model == "model.gguf"
    assert certificate.files == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}


# ---- the committed certificates -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["bundled_llama_models", "bundled_transformers"])
def test_the_committed_certificates_hold(name: str) -> None:
    stated = read_certificate(DOCS / f"{name}.json")
    assert stated.files == checksums(BUNDLED), f"the bundled model has changed: {ADVICE}"
    assert stated.comparison.holds
    found = certify(compare(device="cpu", **stated.comparison.settings), device="cpu")
    figures = compare_figures(stated, found)
    assert [f for f in figures if f.holds is False] == [], ADVICE
