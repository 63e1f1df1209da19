"""The graph of a model's operations, for TensorBoard. No weight is read, and none takes memory.

`torch.export` records a prefill of `SEQLEN` tokens on the meta device, as one rank that holds the
whole model computes it. A node's name begins with the module that computes it, by Meta's names:
layers/0/attention/wq/linear.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from llama.config import ModelArgs
from llama.model import Transformer
from llama.tensorboard_files import GraphNode

SEQLEN = 8  # tokens of the prompt; edges in the graph are labelled with shapes
N_RECORDED = 2  # layers that are recorded
LAYER = re.compile(r"^layers/(\d+)/")


def model_graph(args: ModelArgs, dtype: torch.dtype) -> list[GraphNode]:
    """The nodes of a model of this shape and dtype, in the order of computation.

    Recording a layer takes a fraction of a second. All layers are alike, so only the first two are
    recorded, and the nodes of the second are repeated for each further layer.
    """
    n_recorded = min(N_RECORDED, args.n_layers)
    seqlen = min(SEQLEN, args.context)
    recorded = replace(args, n_layers=n_recorded, max_batch_size=1, max_seq_len=seqlen)
    nodes = _nodes_of(_export(recorded, dtype, seqlen), is_tied=args.tied)
    return list(_with_layers(nodes, n_recorded, args.n_layers))


def _export(args: ModelArgs, dtype: torch.dtype, seqlen: int) -> ExportedProgram:
    with torch.device("meta"):
        model = Transformer(args).to(dtype)
        tokens = torch.zeros(1, seqlen, dtype=torch.long)
    assert model.freqs_cis is not None  # computed here, so that its computation is not recorded
    with torch.no_grad(), warnings.catch_warnings():
        # PyTorch warns that the model assigns its KV cache during the call.
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (tokens, 0))
        # Operations in place become operations with results. So the keys and values that are
        # written to the cache are inputs of the attention that reads them.
        return program.run_decompositions({})


def _nodes_of(program: ExportedProgram, is_tied: bool) -> list[GraphNode]:
    names: dict[fx.Node, str] = {}  # for each recorded node, the name of the node with its result
    counts: Counter[str] = Counter()  # for each name, how many nodes so far would have it
    signature = program.graph_signature
    sources = signature.inputs_to_parameters | signature.inputs_to_lifted_tensor_constants
    nodes: list[GraphNode] = []
    for node in program.graph.nodes:
        if node.op == "output":
            last = nodes[-1]
            nodes.append(GraphNode("logits", "Output", (last.name,), last.shape, last.dtype))
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not node.users:
            continue  # a check without a result, or a tied weight's second name
        if node.op == "placeholder":
            source = sources.get(node.name, node.name)
            if is_tied and source == "output.weight":
                source = "tok_embeddings.weight"
            name, op = source.lstrip("_").replace(".", "/"), "Parameter"
        else:
            if (unchanged := _unchanged(node)) is not None:
                names[node] = names[unchanged]
                continue
            op = node.target.overloadpacket.__name__.lstrip("_")
            name = "/".join([*_module_of(node), op])
            counts[name] += 1
            # TensorBoard would draw nodes with names such as view_2 and view_3 as one.
            name += f"({counts[name]})" if counts[name] > 1 else ""
        names[node] = name
        inputs = tuple(names[source] for source in node.all_input_nodes)
        dtype = str(value.dtype).removeprefix("torch.")
        nodes.append(GraphNode(name, op, inputs, tuple(value.shape), dtype))
    return nodes


def _module_of(node: fx.Node) -> list[str]:
    """The path of the module whose `forward` ran the operation."""
    path, _ = list(node.meta["nn_module_stack"].values())[-1]
    return path.split(".") if path else []


def _unchanged(node: fx.Node) -> fx.Node | None:
    """The input that the operation returns as it is, or None. fairscale's layers make such views
    where ranks would communicate."""
    if node.target not in (torch.ops.aten.view.default, torch.ops.aten.alias.default):
        return None
    source = node.all_input_nodes[0]
    return source if source.meta["val"].shape == node.meta["val"].shape else None


def _with_layers(nodes: list[GraphNode], n_recorded: int, n_layers: int) -> Iterator[GraphNode]:
    """The nodes of all layers. Those of the last recorded layer are repeated."""
    n_more = n_layers - n_recorded  # layers that are not recorded
    for node in nodes:
        layer = LAYER.match(node.name)
        if layer is None:  # outside the layers; what follows them takes the last one's result
            shifts = range(n_more, n_more + 1)
        else:
            shifts = range(n_more + 1 if int(layer[1]) == n_recorded - 1 else 1)
        for shift in shifts:
            inputs = tuple(_shifted(name, shift) for name in node.inputs)
            yield replace(node, name=_shifted(node.name, shift), inputs=inputs)


def _shifted(name: str, shift: int) -> str:
    """The name with the number of its layer raised by `shift`."""
    return LAYER.sub(lambda match: f"layers/{int(match[1]) + shift}/", name)
