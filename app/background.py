"""`Background`: tasks that run for ever beside the requests. One that dies is said, and goes on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

AGAIN_AFTER_S = 2.0
RECENT_S = 60.0  # a task that died is named for so long

log = logging.getLogger("kensa")


class Background:
    """Keeps tasks alive. Its methods belong to the event loop's thread."""

    def __init__(self) -> None:
        self._died: dict[str, tuple[float, str]] = {}  # what it does -> when, and of what

    async def keep(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do work; where it dies, again, until it is cancelled or ends by itself.

        Args:
            what: what it does, as in "The task that ...".
        """
        while True:
            try:
                await work()
                return
            except Exception as error:
                log.exception("The task that %s died, and is begun again", what)
                self._died[what] = time.monotonic(), type(error).__name__
            await asyncio.sleep(AGAIN_AFTER_S)

    def degraded(self) -> list[str]:
        """A sentence for each task that died within the last minute."""
        now = time.monotonic()
        return [
            f"The task that {what} died ({kind}) and was begun again; the log says why."
            for what, (when, kind) in self._died.items()
            if now - when < RECENT_S
        ]
