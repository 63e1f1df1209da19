"""`llama inspect` counts a tied matrix once, prints the tree and writes the graph."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama import Llama
from llama.checkpoints.folder import BUNDLED

Run = Callable[..., str]


def test_a_tied_matrix_counts_once(run: Run) -> None:
    total = sum(weight.numel() for weight in Llama.build().model.parameters())
    printed = run("inspect")
    assert f"bundled: {total:,} parameters" in printed
    assert "is tok_embeddings" in printed


def test_the_tree_follows_the_table(run: Run) -> None:
    table, tree = run("inspect", "llama-3.1-70b", "--mp", 8, "--tree").split("\n\nTransformer(\n")
    assert table + "\n" == run("inspect", "llama-3.1-70b", "--mp", 8)
    assert tree.startswith("  70,553,706,496 parameters, 8,820,367,360 a rank\n")
    assert "(0-79): 80 x TransformerBlock(" in tree


def test_the_graph_of_a_folder(run: Run, tmp_path: Path) -> None:
    printed = run("inspect", BUNDLED, "--tensorboard", tmp_path / "graph")
    assert f"tensorboard --logdir {tmp_path / 'graph'}" in printed
    events = EventAccumulator(str(tmp_path / "graph"))
    events.Reload()
    names = {node.name for node in events.Graph().node}
    assert {"tokens", "tok_embeddings/weight", "layers/3/attention/softmax", "logits"} <= names


def test_a_graph_that_cannot_be_written(
    fail: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert fail("inspect", "--tensorboard", file) == (
        f"error: cannot write {file}: {file} is not a folder"
    )
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    message = "error: TensorBoard is missing: pip install 'llama-reference[train]'"
    assert fail("inspect", "--tensorboard", tmp_path / "new") == message


def test_more_layers_than_can_be_drawn(run: Run, fail: Run, tmp_path: Path) -> None:
    params = json.loads((BUNDLED / "params.json").read_text()) | {"n_layers": 10**9}
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert "1000000000 layers" in run("inspect", tmp_path)
    for flag in (["--tree"], ["--tensorboard", tmp_path / "new"]):
        message = "error: n_layers is 1000000000: at most 1000 can be drawn"
        assert fail("inspect", tmp_path, *flag) == message
