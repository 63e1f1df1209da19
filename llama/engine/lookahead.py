"""Launch a GPU's next decode step before the host knows the tokens that this step is fed.

This is not speculation: the tokens are already drawn, on the device, so the next step can start at
once. While it runs, the host reads the tokens. Reading takes about as long as a small model's step.
If a row ends, the launched step's result for this row is dropped. If the engine needs another step
than the launched one, it runs the needed step too, and drops the result of the launched one.
"""

from collections.abc import Sequence

from torch import Tensor

from llama.engine.slot import Slot
from llama.fast.gpu.static_step import StaticStep


class Lookahead:
    """Holds at most one step in flight."""

    def __init__(self, static: StaticStep) -> None:
        self._static = static
        self._launched: list[tuple[Slot, object, int]] = []  # slot, its request, position

    def launch(self, decoding: Sequence[Slot], rows: Sequence[Slot], ids: Tensor) -> None:
        """Launch the step after the one that drew `ids`, which holds one token for each slot in
        `decoding`.

        rows: all slots that the launched step covers. Slots that are not in `decoding` are padding.
        """
        self._launched = []
        last = self._static.cache.max_seq_len - 1
        start_pos = [min(len(slot.tokens), last) for slot in rows]
        goes_on = [len(s.running.tokens) + 1 < s.running.max_gen_len for s in decoding]
        if not any(goes_on) or any(len(slot.tokens) > last for slot in decoding):
            return
        places = {slot: i for i, slot in enumerate(decoding)}
        self._static.launch(ids, [places.get(slot, 0) for slot in rows], start_pos)
        self._launched = [(slot, slot.running, len(slot.tokens)) for slot in decoding]

    def take(self, decoding: Sequence[Slot], n_rows: int) -> Tensor | None:
        """The logits (B, 1, V) of the step in flight, if it covers these slots; else None."""
        launched, self._launched = self._launched, []
        wanted = [(slot, slot.request, len(slot.tokens)) for slot in decoding]
        if not launched or not set(wanted) <= set(launched):
            return None
        return self._static.logits(n_rows)
