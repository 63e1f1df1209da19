"""The graph that TensorBoard shows has the model's modules, and all layers are what they are."""

from pathlib import Path

import pytest
import torch
from helpers.folders import BASE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama import ModelArgs
from llama.config import PRESETS
from llama.explain import graph
from llama.explain.graph import model_graph
from llama.tensorboard_files import GraphNode, write_graph

ARGS = ModelArgs(**BASE, n_kv_heads=4)


def by_name(nodes: list[GraphNode]) -> dict[str, GraphNode]:
    named = {node.name: node for node in nodes}
    assert len(named) == len(nodes)
    return named


def boxes(names: set[str]) -> set[str]:
    return {name.rpartition("/")[0] for name in names}


def test_boxes_are_metas_modules() -> None:
    nodes = by_name(model_graph(PRESETS["llama-3-8b"], torch.bfloat16))
    assert {"tok_embeddings", "layers/31/attention/wq", "layers/0/feed_forward/w2",
            "layers/9/ffn_norm", "norm", "output"} <= boxes(nodes.keys())  # fmt: skip
    for name, shape in PRESETS["llama-3-8b"].whole_shapes().items():
        assert nodes[name.replace(".", "/")].shape == shape
    assert nodes["logits"].shape == (1, graph.SEQLEN, 128256)
    assert nodes["logits"].dtype == "float32"
    assert nodes["layers/3/attention/softmax"].shape == (1, 32, graph.SEQLEN, graph.SEQLEN)
    assert nodes["layers/3/attention/wk/linear"].dtype == "bfloat16"


def test_every_input_is_a_node_and_every_weight_reaches_the_logits() -> None:
    nodes = by_name(model_graph(PRESETS["llama-3.2-1b"], torch.bfloat16))
    reached, waiting = set(), ["logits"]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += nodes[name].inputs  # a KeyError for an input that is no node
    assert reached == nodes.keys()
    assert "output/weight" not in nodes  # tied
    assert "tok_embeddings/weight" in nodes["output/linear"].inputs


def test_keys_and_values_go_through_the_cache() -> None:
    nodes = by_name(model_graph(ARGS, torch.float32))
    (copied,) = [n for n in nodes["layers/0/attention/copy(2)"].inputs if "zeros" not in n]
    assert nodes[copied].inputs == ("layers/0/attention/wv/linear",)


@pytest.mark.parametrize(
    ("n_layers", "dtype"), [(1, torch.bfloat16), (4, torch.bfloat16), (4, torch.float32)]
)
def test_repeated_layers_equal_recorded_ones(
    n_layers: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ModelArgs(**BASE | dict(n_layers=n_layers))
    repeated = by_name(model_graph(args, dtype))
    monkeypatch.setattr(graph, "N_RECORDED", n_layers)
    assert repeated == by_name(model_graph(args, dtype))


def test_the_event_file(tmp_path: Path) -> None:
    nodes = model_graph(ARGS, torch.bfloat16)
    write_graph(tmp_path / "new" / "folder", nodes)
    events = EventAccumulator(str(tmp_path / "new" / "folder"))
    events.Reload()
    read = events.Graph().node
    assert [(node.name, node.op, tuple(node.input)) for node in read] == [
        (node.name, node.op, node.inputs) for node in nodes
    ]
    sizes = [[dim.size for dim in node.attr["_output_shapes"].list.shape[0].dim] for node in read]
    assert sizes == [list(node.shape) for node in nodes]
