"""`kensa doctor` in the server: in a thread of its own, once for all who ask meanwhile."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from app.settings import Settings
from app.watching.doctor.command import examine
from app.watching.doctor.findings import Report


class Examination:
    """Looks at everything when somebody asks. Belongs to the event loop's thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._thread = ThreadPoolExecutor(1, "doctor")  # every file of the models is read
        self._under_way: asyncio.Future[Report] | None = None

    async def look(self) -> Report:
        """What is found now; whoever asks while it is looked at gets the same."""
        if self._under_way is None or self._under_way.done():
            self._under_way = asyncio.get_running_loop().run_in_executor(
                self._thread, lambda: examine(self._settings, serving=True)
            )
        return await asyncio.shield(self._under_way)  # else the first one to leave would end it
