"""`StalePlans`: what becomes of versions that TensorRT here has no plan for.

After an update of JetPack every plan is stale, and a model that came from another machine has none.
So a job builds it from the version's own model.onnx, and what it publishes goes live through the
gate as any other version.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Literal

from app.jobs.job_queue import KEPT, JobQueue, failures
from engines.errors import Conflict, NoWorker
from engines.queue.job_requests import ConvertRequest
from engines.serving.resident import Residents

AGAIN_AFTER_S = 2.0  # a model that has a job, a queue that does not answer

log = logging.getLogger("kensa")


class StalePlans:
    """Has a plan built, once for each version. Its methods belong to the event loop's thread."""

    def __init__(
        self, jobs: JobQueue, residents: Residents, worker: Literal["on", "convert", "off"]
    ) -> None:
        self._jobs = jobs
        self._residents = residents
        self._worker = worker
        self._wanted: dict[str, tuple[str, str]] = {}  # model -> version, why its plan is stale
        self._asked: set[tuple[str, str]] = set()  # versions that nothing more is to be done for
        self._not_before = 0.0  # on the monotonic clock

    def note(self, name: str, version: str, reason: str) -> None:
        """A version is to serve, and there is no plan for it."""
        if self._wanted.get(name) == (version, reason):
            return
        self._wanted[name] = (version, reason)
        log.warning("%s %s is stale: %s", name, version, reason)
        if self._worker == "off":
            reason = f"{reason} Nothing here does so by itself, because KENSA_WORKER is off."
        self._residents.stale[name] = reason

    def settle(self, name: str) -> None:
        """A version serves that needs none, or has one."""
        self._wanted.pop(name, None)
        self._residents.stale.pop(name, None)

    async def look(self) -> None:
        """Ask for what nobody asked for yet. To be called again and again."""
        if self._worker == "off" or time.monotonic() < self._not_before:
            return
        for name, (version, reason) in list(self._wanted.items()):
            if (name, version) in self._asked:
                continue
            try:
                job = await asyncio.to_thread(self._ask, name, version)
            except (Conflict, NoWorker):  # its next version may bring one; the queue is not open
                self._not_before = time.monotonic() + AGAIN_AFTER_S
                continue
            except failures() as error:
                self._not_before = time.monotonic() + AGAIN_AFTER_S
                log.error("No job can be queued that builds the plan of %s: %s", name, error)
                continue
            self._asked.add((name, version))
            if self._wanted.get(name) == (version, reason):
                self._residents.stale[name] = f"{reason} {job}"

    def _ask(self, name: str, version: str) -> str:
        """Queue the job, unless there was one; a sentence about it. Blocks."""
        for job in self._jobs.newest(KEPT):
            request = job["request"]
            if (
                job["kind"] == "convert"
                and request.get("from_onnx")
                and not request.get("target")  # which would be for others
                and (request.get("model"), request.get("version")) == (name, version)
            ):
                return f"Job {job['id']} was to do so ({job['state']}): it is not tried again."
        wanted = {"model": name, "version": version, "from_onnx": True}
        job = self._jobs.submit("convert", ConvertRequest.model_validate(wanted))
        log.info("Job %s builds a plan for %s %s", job["id"], name, version)
        return f"Job {job['id']} does so."
