"""`llama inspect --tree` shows the modules of print(model) and the sizes that the model has."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torchinfo
from helpers.folders import BASE
from helpers.ranks import run_ranks

from llama import ModelArgs, Transformer
from llama.checkpoints.inspect import weights_of
from llama.checkpoints.module_tree import module_tree
from llama.config import PRESETS


def meta_model(args: ModelArgs) -> Transformer:
    with torch.device("meta"):
        return Transformer(args)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_torchinfo(name: str) -> None:
    args = PRESETS[name]
    _, first, *_ = module_tree(args, 1).splitlines()
    total = torchinfo.summary(meta_model(args), verbose=0).total_params
    if args.tied:  # torchinfo counts the one matrix twice
        total -= args.vocab_size * args.dim
    assert first.strip() == f"{total:,} parameters"


@pytest.mark.parametrize("args", [PRESETS["llama-2-7b"], PRESETS["llama-3.2-1b"]])
def test_modules_are_those_of_print(args: ModelArgs) -> None:
    tree = module_tree(args, 8)
    names_only = re.sub(r"\(weight[^)]*\)", "()", tree)
    names_only = re.sub(r"\n *[\d,]+ parameters.*", "", names_only)
    assert names_only == str(meta_model(args))


def test_parameters_of_each_module() -> None:
    args = ModelArgs(**BASE, n_kv_heads=2, attention_bias=True)
    model = meta_model(args)
    shown = re.findall(r"([\d,]+) parameters(?:, ([\d,]+) a rank)?", module_tree(args, 1))
    modules = [model, model.tok_embeddings, *model.layers[0].modules(), model.norm, model.output]
    counted = [sum(weight.numel() for weight in module.parameters()) for module in modules]
    assert [int(total.replace(",", "")) for total, _ in shown] == counted
    assert not any(of_rank for _, of_rank in shown)


def shapes_on_rank(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(weight.shape) for name, weight in Transformer(args).named_parameters()}
    dist.barrier()  # a rank that ended now would break the groups that the others still make
    return shapes


@pytest.mark.parametrize("n_kv_heads", [4, 2])  # with 2, each head is on two ranks
def test_shapes_are_those_on_a_rank(n_kv_heads: int, tmp_path: Path) -> None:
    args = ModelArgs(**BASE, n_kv_heads=n_kv_heads)
    shapes, *_ = run_ranks(4, tmp_path, shapes_on_rank, replace(args, n_kv_heads=4))
    assert shapes == {
        name: weight.shape_per_rank(4) for weight in weights_of(args, 4) for name in weight.names
    }
    tree = module_tree(args, 4)
    n_parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert f"{n_parameters:,} a rank" in tree.splitlines()[1]
    for name, shape in shapes.items():
        module = name.split(".")[-2]
        sizes = " × ".join(map(str, shape))
        assert re.search(rf"\({module}\): \w+\(weight {sizes}, ", tree), name
