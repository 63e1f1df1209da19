"""What the engine does when memory runs out: the requests that needed it end, all others go on."""

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

from llama import parallel
from llama.engine.request import Event, Request
from llama.engine.slot import Slot
from llama.engine.worker import Network
from llama.errors import OutOfMemory, is_out_of_memory
from llama.memory import available_memory, size
from llama.model import Transformer


def check_fits(request: Request, model: Network) -> None:
    """Raise OutOfMemory if an exact request's prompt needs more memory than is free.

    An exact prompt is computed in one forward, so its scores grow with the square of its length.
    Other prompts are computed in chunks and need little.
    """
    if not request.is_exact or not isinstance(model, Transformer):
        return
    ranks = parallel.local_size() if model.device.type == "cpu" else 1  # they share the memory

    def needed(tokens: int) -> int:
        itemsize = model.norm.weight.dtype.itemsize
        return ranks * model.params.prefill_bytes(1, tokens, parallel.mp_size(), itemsize)

    length, free = len(request.prompt_tokens), available_memory(model.device)
    if needed(length) > free:
        fitting = bisect_right(range(length), free, key=needed) - 1
        raise OutOfMemory(
            f"a prompt of {length:,} tokens needs about {size(needed(length))} in reference mode, "
            f"but {size(free)} are free on {model.device}: {fitting:,} tokens would fit, and mode "
            "fast needs less"
        )


@contextlib.contextmanager
def ending(
    slots: Sequence[Slot], model: Network, events: list[Event], release: Callable[[Slot], None]
) -> Iterator[None]:
    """If memory runs out in the block, end the requests of the slots, and add their last events.

    With several ranks a failed allocation is raised, because the other ranks wait for this one.
    """
    try:
        yield
    except Exception as error:
        is_known_before = isinstance(error, OutOfMemory)
        if not is_known_before and (not is_out_of_memory(error) or parallel.mp_size() > 1):
            raise
        running = [slot for slot in slots if slot.request is not None]
        for slot in running:
            request = slot.running
            request.error = error if is_known_before else _ran_out(request, len(running), model)
            release(slot)
            events.append(request.end("error"))


def _ran_out(request: Request, n_rows: int, model: Network) -> OutOfMemory:
    """The error of a request whose allocation failed."""
    length = len(request.prompt_tokens) + len(request.tokens)
    return OutOfMemory(
        f"memory ran out at {length:,} tokens with {n_rows} of {model.params.max_batch_size} rows "
        f"in use, {size(available_memory(model.device))} are free on {model.device}: a smaller "
        "max_seq_len or max_batch_size needs less"
    )
