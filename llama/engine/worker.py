"""A rank's networks and KV caches, and the plans that it executes on them."""

import contextlib
from collections.abc import Sequence

import torch
from fairscale.nn.model_parallel import initialize as fs_init
from torch import Tensor

from llama.adapters import RowAdapters
from llama.cache import KVCache
from llama.engine.plan import Action, Plan, Wanted
from llama.errors import ParallelError
from llama.fast.cpu.transformer import FastTransformer
from llama.fast.gpu.static_step import StaticStep
from llama.fast.gpu.transformer import GpuTransformer
from llama.files import MappedFiles
from llama.lost_ranks import naming_lost_ranks
from llama.model import Transformer

Network = Transformer | FastTransformer | GpuTransformer


class Worker:
    """Executes plans on this rank's part of the model.

    Args:
        networks: the model with its cache and, if there is one, the draft model with its cache.
        static: the step of static shapes on a GPU; None: there is none.
        adapters: LoRA changes of the model; None: there are none.

    Attributes:
        files: the files that weights are mapped from. They are checked before each plan.
    """

    def __init__(
        self,
        networks: list[tuple[Network, KVCache]],
        static: StaticStep | None = None,
        adapters: RowAdapters | None = None,
    ) -> None:
        self._networks = networks
        self._static = static
        self._adapters = adapters
        self.files: Sequence[MappedFiles] = ()
        self._device = networks[0][0].device

    def renew_caches(self) -> bool:
        """Make a new cache for each model that was moved or whose dtype was changed, for example by
        `model.half()`. Returns whether any cache was made."""
        renewed = False
        for i, (model, cache) in enumerate(self._networks):
            if not isinstance(model, Transformer) or cache.k_scale is not None:
                continue
            weight = model.norm.weight
            if (cache.k.dtype, cache.k.device) != (weight.dtype, weight.device):
                rows, positions = cache.max_batch_size, cache.max_seq_len
                self._networks[i] = model, model.make_cache(rows, positions)
                self._device, renewed = weight.device, True
        return renewed

    @property
    def cache(self) -> KVCache:
        """The cache of the model, not of the draft model."""
        return self._networks[0][1]

    # ---- on the first rank ----------------------------------------------------------------------

    def run(self, plan: Plan) -> Tensor | None:
        """Send a plan to the other ranks and execute it here. Returns what `execute` returns.

        Raises CheckpointError if a file that weights are mapped from was changed.
        """
        for files in self.files:
            files.check()
        plan.send(self._device)
        return self.execute(plan)

    def dismiss(self, failed: bool = False) -> None:
        """End `follow` on the other ranks. If `failed`, it raises ParallelError there."""
        Plan(Action.FAILED if failed else Action.DONE).send(self._device)

    # ---- on other ranks --------------------------------------------------------------------------

    def follow(self) -> None:
        """Execute the plans of the first rank until it calls `dismiss`."""
        with torch.inference_mode():
            while (plan := Plan.receive(self._device)).action is not Action.DONE:
                if plan.action is Action.FAILED:
                    raise ParallelError("the first rank failed: its own message says why")
                self.execute(plan)

    # ---- on all ranks ---------------------------------------------------------------------------

    def execute(self, plan: Plan) -> Tensor | None:
        """Execute a plan. Returns the logits that it asks for, if any: (B, S, V), or (B, 1, V) for
        the last token of each row. V is the whole vocabulary. Raises ParallelError if a rank is
        lost."""
        with naming_lost_ranks(fs_init.get_model_parallel_group()):
            return self._execute(plan)

    def _execute(self, plan: Plan) -> Tensor | None:
        if plan.action is Action.COPY:
            for _, cache in self._networks:
                cache.copy_row(plan.source, plan.row, plan.n_keys)
        if plan.action is Action.CLEAR:
            for _, cache in self._networks:
                cache.clear_row(plan.row, plan.n_keys)
        if plan.action is not Action.FORWARD:
            return None
        model, cache = self._networks[plan.is_draft]
        if self._is_static(plan):
            assert self._static is not None
            return self._static(plan.tokens, plan.start_pos)
        tokens = torch.tensor(plan.tokens, device=self._device)  # (B, S)
        rows = cache.part(plan.row, len(plan.tokens), plan.n_keys)
        start_pos: int | Tensor = plan.start_pos[0]
        # A number as start_pos has two uses. It makes a Transformer compute with Meta's operations,
        # so a Transformer gets it only for an exact plan. It lets the other networks attend without
        # a mask, so they get it for each plan of one row too.
        is_number = plan.is_exact or (len(plan.tokens) == 1 and not isinstance(model, Transformer))
        if not is_number:
            start_pos = torch.tensor(plan.start_pos, device=self._device)  # (B,)
        with self._choosing(plan):
            features = model.features(tokens, start_pos, rows)  # (B, S, D)
        if plan.wanted is Wanted.NOTHING:
            return None
        return model.logits(features if plan.wanted is Wanted.ALL else features[:, -1:])

    def _choosing(self, plan: Plan) -> contextlib.AbstractContextManager[None]:
        """The block in which the rows have their adapters. A draft model has none."""
        if self._adapters is None or plan.is_draft:
            return contextlib.nullcontext()
        return self._adapters.chosen(plan.adapters)

    def _is_static(self, plan: Plan) -> bool:
        """Whether the static step can execute the plan. The plan must be a decode step, with or
        without proposals, and `takes` must be true for its numbers of rows and tokens."""
        if self._static is None or plan.is_draft or plan.is_exact or plan.row > 0:
            return False
        n_rows, seqlen = len(plan.tokens), len(plan.tokens[0])
        is_decode = plan.wanted is (Wanted.LAST if seqlen == 1 else Wanted.ALL)
        return is_decode and self._static.takes(n_rows, seqlen)
