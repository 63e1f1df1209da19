"""A rank's networks and KV caches, and the plans that it executes on them."""

import torch
from torch import Tensor

from llama.cache import KVCache
from llama.engine.plan import Action, Plan, Wanted
from llama.errors import ParallelError
from llama.fast.cpu.transformer import FastTransformer
from llama.fast.gpu.static_step import StaticStep
from llama.model import Transformer

Network = Transformer | FastTransformer


class Worker:
    """Executes plans on this rank's part of the model.

    Args:
        networks: the model with its cache, and the draft model with its own where there is one.
        static: the decode step of static shapes, on a GPU.
    """

    def __init__(
        self, networks: list[tuple[Network, KVCache]], static: StaticStep | None = None
    ) -> None:
        self._networks = networks
        self._static = static
        self._device = networks[0][0].device

    # ---- on the first rank ----------------------------------------------------------------------

    def run(self, plan: Plan) -> Tensor | None:
        """Send a plan to the other ranks and execute it here. Returns what `execute` returns."""
        plan.send(self._device)
        return self.execute(plan)

    def dismiss(self, failed: bool = False) -> None:
        """Let the other ranks return from `follow`, with an error where this rank failed."""
        Plan(Action.FAILED if failed else Action.DONE).send(self._device)

    # ---- on the others --------------------------------------------------------------------------

    def follow(self) -> None:
        """Execute the plans of the first rank until it calls `dismiss`."""
        with torch.inference_mode():
            while (plan := Plan.receive(self._device)).action is not Action.DONE:
                if plan.action is Action.FAILED:
                    raise ParallelError("the first rank failed: its own message says why")
                self.execute(plan)

    # ---- on all ---------------------------------------------------------------------------------

    def execute(self, plan: Plan) -> Tensor | None:
        """Execute a plan. Returns the logits it asks for, of the whole vocabulary: (B, S, V), or
        (B, 1, V) where only the last of each row are wanted."""
        if plan.action is Action.COPY:
            for _, cache in self._networks:
                cache.copy_row(plan.source, plan.row, plan.n_keys)
        if plan.action is not Action.FORWARD:
            return None
        model, cache = self._networks[plan.is_draft]
        is_decode = plan.wanted is Wanted.LAST and not plan.is_exact and len(plan.tokens[0]) == 1
        if self._static is not None and plan.row == 0 and is_decode and not plan.is_draft:
            return self._static([row[0] for row in plan.tokens], plan.start_pos)[:, None]
        tokens = torch.tensor(plan.tokens, device=self._device)  # (B, S)
        rows = cache.part(plan.row, len(plan.tokens), plan.n_keys)
        start_pos: int | Tensor = plan.start_pos[0]
        if not plan.is_exact:
            start_pos = torch.tensor(plan.start_pos, device=self._device)  # (B,)
        features = model.features(tokens, start_pos, rows)  # (B, S, D)
        if plan.wanted is Wanted.NOTHING:
            return None
        return model.logits(features if plan.wanted is Wanted.ALL else features[:, -1:])
