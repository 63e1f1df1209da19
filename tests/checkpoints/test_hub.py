"""Hub ids: the real client, and a local server with the Hub's protocol."""

import hashlib
import json
import logging
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import write_adapter
from helpers.folders import TOKENS, make_model, write_meta
from helpers.ranks import run_ranks

from llama import Llama
from llama.__main__ import main
from llama.checkpoints import hub
from llama.checkpoints.convert import convert
from llama.checkpoints.verify import kind_of
from llama.errors import LlamaError

COMMIT = "5e" * 20
OTHERS = ["modeling_tiny.py", "pytorch_model.bin", "original/consolidated.00.pth", "README.md",
          "onnx/model.safetensors"]  # fmt: skip


class Hub(ThreadingHTTPServer):
    """A server of repositories, id -> path -> content. `asked` has the requested paths."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories = repositories
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            parts = parts[2:]
        repository, (kind, revision, *rest) = "/".join(parts[:2]), parts[2:]
        files = self.server.repositories.get(repository)
        if repository == "tiny/gated":
            return self.answer(403, error="GatedRepo")
        if files is None:
            return self.answer(404, error="RepoNotFound")
        if revision not in ("main", "v1", COMMIT):
            return self.answer(404, error="RevisionNotFound")
        if kind == "revision":
            return self.answer(200, json.dumps({"id": repository, "sha": COMMIT}).encode())
        if kind == "tree":
            listed = [
                {"type": "file", "path": path, "size": len(content), "oid": self.oid(content)}
                for path, content in files.items()
            ]
            return self.answer(200, json.dumps(listed).encode())
        assert kind == "resolve"
        path = "/".join(rest)
        self.server.asked.append(path)
        return self.answer(200, files[path])

    do_HEAD = do_GET

    def oid(self, content: bytes) -> str:
        return hashlib.sha1(content).hexdigest()

    def answer(self, status: int, content: bytes = b"", error: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{self.oid(content)}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    source = write_meta(root / "Llama-3.2-1B", make_model(n_kv_heads=4), 1)
    return convert(source, root / "hf", "hf")


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapter = tmp_path_factory.mktemp("adapter")
    write_adapter(folder, adapter, target_modules=["q_proj"])
    return adapter


@pytest.fixture
def server(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server with a model. Its tokenizer is in `original/`, as in meta-llama's repositories."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    files |= dict.fromkeys(OTHERS, b"must not be fetched")
    server = Hub({"tiny/Llama-3.2-1B": files, "tiny/pickled": {"pytorch_model.bin": b"x"}})
    # These are for processes that a test starts. The test process itself never connects.
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    yield server
    server.stop()


def build_all(names: list[str]) -> list[Any]:
    """Build from each name. Returns for each the logits and the log lines, or the error."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("llama").addHandler(handler)
    logging.getLogger("llama").setLevel(logging.INFO)
    results: list[Any] = []
    for name in names:
        lines.clear()
        try:
            with torch.inference_mode():
                logits = Llama.build(name, max_seq_len=64).model(TOKENS, 0).clone()
            results.append((logits, "\n".join(lines)))
        except LlamaError as error:
            results.append(str(error))
    return results


def test_what_is_fetched_and_what_is_not(server: Hub, folder: Path, tmp_path: Path) -> None:
    ids = ["tiny/Llama-3.2-1B", "tiny/Llama-3.2-1B@v1", f"tiny/Llama-3.2-1B@{COMMIT}"]
    bad = ["tiny/gated", "tiny/none", "tiny/Llama-3.2-1B@v9", "tiny/pickled"]
    (results,) = run_ranks(1, tmp_path, build_all, ids + bad)
    (newest, log), *pinned = results[: len(ids)]
    gated, none, revision, pickled = errors = results[len(ids) :]
    with torch.inference_mode():
        expected = Llama.build(folder, max_seq_len=64).model(TOKENS, 0)
    assert torch.equal(newest, expected)
    assert f"is at commit {COMMIT}: pin it as tiny/Llama-3.2-1B@{COMMIT}" in log
    for logits, log in pinned:
        assert torch.equal(logits, expected)
        assert "pin it" not in log
    assert set(server.asked) == {
        "config.json", "generation_config.json", "model.safetensors", "original/tokenizer.model",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    snapshot = next((tmp_path / "cache").rglob("snapshots/*"))
    assert snapshot.name == COMMIT
    assert kind_of(snapshot) == "base"  # the name of the repository says so
    assert "tiny/gated is gated: accept its licence at https://huggingface.co/tiny/gated" in gated
    assert "no such folder: tiny/none, and no such repository on the Hugging Face Hub" in none
    assert revision == "tiny/Llama-3.2-1B has no revision v9"
    assert "tiny/pickled has no .safetensors: fetch its files with `hf download" in pickled
    assert not any("\n" in error for error in errors)


def test_without_a_network_the_cache_has_to_do(server: Hub, tmp_path: Path) -> None:
    name = "tiny/Llama-3.2-1B"
    first = run_ranks(2, tmp_path, build_all, [name])
    server.stop()
    again = run_ranks(2, tmp_path, build_all, [name, f"{name}@{COMMIT}", "tiny/other"])
    for ((logits, _),), (newest, pinned, other) in zip(first, again, strict=True):
        assert torch.equal(logits, newest[0])
        assert torch.equal(logits, pinned[0])
        assert "no such folder: tiny/other; as an id" in other


def logits_with(adapter: str, base: Path) -> torch.Tensor:
    with torch.inference_mode():
        return Llama.build(base, max_seq_len=64, adapter=adapter).model(TOKENS, 0).clone()


def test_an_adapter_by_its_id(server: Hub, folder: Path, adapter: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in adapter.iterdir()}
    server.repositories["tiny/adapter"] = files | {"adapter_model.bin": b"must not be fetched"}
    (logits,) = run_ranks(1, tmp_path, logits_with, "tiny/adapter", folder)
    assert torch.equal(logits, logits_with(str(adapter), folder))
    assert set(server.asked) == {"adapter_config.json", "adapter_model.safetensors"}


def test_names_that_are_folders_or_no_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    names = ["owner/name", "/owner/other", "./owner/other", "a/b/c", "word", "owner/name@", "../x"]
    for name in names:
        assert hub.local_folder(name) == Path(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    monkeypatch.setattr("sys.argv", ["llama", "doctor", "owner/other"])
    with pytest.raises(SystemExit):
        main()
    error = "error: no such folder: owner/other; to fetch it from the Hugging Face Hub"
    assert error in capsys.readouterr().err
