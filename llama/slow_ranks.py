"""Wait for ranks that may work for hours longer than others, and notice those that are lost."""

import threading
import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from llama.lost_ranks import has_ended, naming_lost_ranks, silent_ranks_error, timeout

POLL = 0.1  # seconds between two looks at the others


class SlowRanks:
    """Adds up the numbers of all ranks, which may come at very different times. All ranks make it
    together, and then call `sum` once.

    In each rank a thread counts heartbeats in the store. So a rank that is stopped, or has lost its
    network, is not taken for a slow one.
    """

    def __init__(self) -> None:
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        if self._size > 1:
            threading.Thread(target=self._beat, name="heart", daemon=True).start()

    def sum(self, number: int) -> int:
        """The sum of all ranks' numbers. Raises ParallelError if a rank is lost."""
        if self._size == 1:
            return number
        with naming_lost_ranks():
            store = _get_default_store()
            store.set(f"llama/number/{self._rank}", str(number))
            for rank in range(self._size):
                self._wait_for(store, rank)
            numbers = [int(store.get(f"llama/number/{rank}")) for rank in range(self._size)]
            dist.barrier()  # the store is in rank 0, which must not end before all have read it
        return sum(numbers)

    def _wait_for(self, store: dist.Store, rank: int) -> None:
        """Wait for the number of a rank, as long as its heart beats."""
        n_beats, since = 0, time.monotonic()
        while not store.check([key := f"llama/number/{rank}"]):
            if has_ended(rank) and not store.check([key]):
                raise silent_ranks_error([rank])
            if (found := store.add(f"llama/beats/{rank}", 0)) != n_beats:
                n_beats, since = found, time.monotonic()
            if time.monotonic() - since > timeout().total_seconds():
                raise silent_ranks_error([rank])
            time.sleep(POLL)

    def _beat(self) -> None:
        store = _get_default_store()
        try:
            while True:
                store.add(f"llama/beats/{self._rank}", 1)
                time.sleep(timeout().total_seconds() / 5)
        except RuntimeError:  # the store has ended
            return
