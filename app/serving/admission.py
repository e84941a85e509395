"""`Admission`: which requests are let in, and which are too much at the moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engines.errors import Overloaded

INBOX = 16  # bodies in memory at once, of the largest size allowed


class Admission:
    """Counts the requests that wait for their verdict, and the bodies that are in memory.

    It belongs to the event loop's thread.
    """

    def __init__(self, queue_size: int, largest: int) -> None:
        """
        Args:
            queue_size: how many requests may wait for their verdict at once.
            largest: bytes of an image.
        """
        self.on_busy: Callable[[bool], None] = lambda _: None  # a part came, or the last one went
        self.idle = asyncio.Event()  # set while no part waits for its verdict
        self.idle.set()
        self._queue_size = queue_size
        self._largest = largest
        self._inbox_bytes = 0
        self._under_way = 0

    @property
    def under_way(self) -> int:
        """Requests that wait for their verdict."""
        return self._under_way

    def check_room(self) -> None:
        """Raise Overloaded where a request would not be let in now."""
        if self._under_way >= self._queue_size:
            raise Overloaded(
                f"{self._under_way} parts wait for their verdict already, as many as"
                " KENSA_QUEUE_SIZE allows: send this one again a little later."
            )

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A request waits for its verdict in this block. Raises Overloaded, as `check_room`."""
        self.check_room()
        self._under_way += 1
        if self._under_way == 1:
            self.idle.clear()
            self.on_busy(True)
        try:
            yield
        finally:
            self._under_way -= 1
            if self._under_way == 0:
                self.idle.set()
                self.on_busy(False)

    @contextmanager
    def holding(self) -> Iterator[Callable[[int], None]]:
        """Count the bytes of a body that is in memory for as long as this block.

        What it yields is called with the size of each chunk, and raises Overloaded when all bodies
        together are too much, such as hundreds of large ones that arrive at the same time.
        """
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            if self._inbox_bytes + size > INBOX * self._largest:
                raise Overloaded("Too many large images arrive at once: send them one by one.")
            held += size
            self._inbox_bytes += size

        try:
            yield hold
        finally:
            self._inbox_bytes -= held
