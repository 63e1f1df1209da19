"""The tree of a model's modules, as `print(model)` shows it, with the weights that a rank holds."""

import torch
from torch import nn

from llama.checkpoints.inspect import Weight, weights_of
from llama.config import ModelArgs
from llama.model import Transformer


def module_tree(args: ModelArgs, mp_size: int) -> str:
    """The modules of a model that mp_size ranks share. No weight is read, and no ranks are needed.

    Each module has the number of parameters of the whole model, and, if there are several ranks, of
    one rank. The shape of a weight is the shape of one rank's part.
    """
    weights = {name: weight for weight in weights_of(args, mp_size) for name in weight.names}
    with torch.device("meta"):
        model = Transformer(args)
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        inside = {
            name.removeprefix(prefix): weight
            for name, weight in weights.items()
            if name.startswith(prefix)
        }
        text = _describe(module, inside, mp_size)
        # print(model) shows what a module's `extra_repr` returns.
        vars(module)["extra_repr"] = text.__str__
    return repr(model)


def _describe(module: nn.Module, inside: dict[str, Weight], mp_size: int) -> str:
    """The shapes of the module's own weights, and the number of all its parameters.

    inside: the weights of the module and of the modules in it, by their names there.
    """
    if not inside:  # only the output matrix of a tied model
        return "weight is tok_embeddings.weight"
    own = [name for name, _ in module.named_parameters(recurse=False)]
    shapes = [
        f"{name} {' × '.join(map(str, inside[name].shape_per_rank(mp_size)))}" for name in own
    ]
    n_all = sum(weight.parameters // weight.count for weight in inside.values())
    n_own = sum(weight.per_rank(mp_size) // weight.count for weight in inside.values())
    counts = f"{n_all:,} parameters" + (f", {n_own:,} a rank" if mp_size > 1 else "")
    return ", ".join([*shapes, counts])
