"""A lock that threads get in the order in which they ask for it."""

import threading
from collections import deque


class Turns:
    """Guards an engine. Callers take turns: each steps the engine once for all callers, and
    then the next caller gets the lock.

    With a plain lock, a thread that releases it could take it again at once. Other callers could
    not submit a prompt until that thread has all its tokens.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._is_held = False
        self._queue: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._is_held:
                self._is_held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._queue.append(turn)
        try:
            turn.acquire()
        except BaseException:  # interrupted while it waits
            with self._guard:
                is_waiting = turn in self._queue
                if is_waiting:
                    self._queue.remove(turn)
            if not is_waiting:  # the turn was given at the same moment
                self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        with self._guard:
            if self._queue:
                self._queue.popleft().release()
            else:
                self._is_held = False

    @property
    def is_wanted(self) -> bool:
        """Whether other threads wait for their turn."""
        return bool(self._queue)

    def take_if_free(self) -> bool:
        """Take the lock if nobody holds it. Returns whether it was taken. If so, the caller must
        call `give_back`."""
        with self._guard:
            is_free = not self._is_held
            self._is_held = True
        return is_free

    def give_back(self) -> None:
        self.__exit__()
