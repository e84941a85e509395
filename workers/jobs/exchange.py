"""What the machines of a fleet send each other, through the store that they share."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from engines.errors import BadBundle, NoShared
from engines.queue.fleet import DEVICE, Fleet
from engines.queue.job_folder import JobFolder
from engines.queue.job_requests import RetrainRequest, weights_in
from engines.store.bundle import ONNX, PLAN
from engines.store.shared import Shared
from engines.store.versions import Store, is_name
from workers.jobs import parent_and_child

RELAY_EVERY_S = 1.0  # progress and log, through the shared store

log = logging.getLogger("kensa.worker")
Result = TypeVar("Result")


def needed(
    data: Path, request: RetrainRequest, parent: str | None, say: Callable[[str], None]
) -> dict[str, Path]:
    """The files that learning needs: images, the version to start from, weights.

    What of the images is passed over is not sent, so it is said here.

    Raises:
        BadDataset, BadBundle, BadWeights: something is missing or damaged.
    """
    from workers.learning.dataset import Category, notes_on_passed_over  # which reads pictures

    datasets = data / "datasets"
    images = Category.find(datasets, request.category)
    for note in notes_on_passed_over(images.passed_over):
        say(f"note: {note}")
    files = {
        f"datasets/{path.relative_to(datasets).as_posix()}": path
        for path in (*images.train, *images.test_normal, *images.test_anomaly)
        if path.resolve().is_relative_to(datasets.resolve())
    }
    if parent is not None:
        store = Store(data / "models")
        folder = store.check(request.model, parent)
        names = set(store.manifest(request.model, parent).files) - {ONNX, PLAN}
        files |= {f"start/{name}": folder / name for name in names}
    weights = weights_in(data, request.pretrained)
    if weights is not None and weights != "untrained":
        files[f"weights/{request.pretrained}"] = Path(weights)
    return files


def mirror(
    fleet: Fleet, shared: Shared, job_id: str, folder: JobFolder, said: dict[str, str]
) -> None:
    """Make progress and log of the machine that learns this job's own. Raises NoShared."""
    place = f"{fleet.device}/progress/{job_id}"
    attempts = sorted(shared.names(place), key=lambda name: (len(name), name))
    for attempt in attempts:
        if attempt in said and attempt != attempts[-1]:
            continue  # it says nothing more
        content = shared.read(f"{place}/{attempt}")
        with suppress(ValueError, KeyError, TypeError):
            found = json.loads(content or b"")
            said[attempt] = str(found["log"])
            if attempt == attempts[-1] and found["progress"]:
                folder.root.mkdir(parents=True, exist_ok=True)
                folder.write_progress(found["progress"])
    if said:
        folder.root.mkdir(parents=True, exist_ok=True)
        folder.go_on_with("".join(said[attempt] for attempt in attempts if attempt in said))


class Relay:
    """Sends progress and log of a job to the shared store, when they changed, until `end`."""

    def __init__(self, shared: Shared, place: str, folder: JobFolder) -> None:
        self._shared, self._place, self._folder = shared, place, folder
        self._sent = b""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Send the last of it."""
        self._ending.set()
        self._thread.join()
        self._send()

    def _run(self) -> None:
        while not self._ending.wait(RELAY_EVERY_S):
            self._send()

    def _send(self) -> None:
        lines, _ = self._folder.lines()
        content = {"progress": self._folder.progress(), "log": "".join(f"{x}\n" for x in lines)}
        text = json.dumps(content).encode()
        if text == self._sent or not (content["progress"] or lines):
            return
        try:
            attempt = max(1, self._folder.attempts())
            self._shared.write(f"{self._place}/{attempt}", text)
            self._sent = text
        except (NoShared, SQLAlchemyError) as error:  # it is only news
            log.warning("How the job goes cannot be told: %s", error)


def patiently(
    work: Callable[[], Result], folder: JobFolder, stop: Callable[[], bool] = lambda: False
) -> Result | None:
    """What `work` returns, however long the shared store does not answer; None where told to stop.

    Why it waits stands in the job's log.
    """
    pause, said = 1.0, ""
    while True:
        try:
            return work()
        except NoShared as error:
            if str(error) != said:
                said = str(error)
                folder.say(f"{said} Trying again.")
                log.warning("%s Trying again.", said)
        end = time.monotonic() + pause
        while time.monotonic() < end:
            if stop():
                return None
            time.sleep(parent_and_child.LOOK_EVERY_S)
        pause = min(2 * pause, 30.0)


def checked(wanted: dict[str, Any]) -> tuple[str, str]:
    """The names of machine and model out of the queue, as they may stand in a path.

    Raises:
        BadBundle: they may not.
    """
    device, model = str(wanted.get("device")), str(wanted.get("model"))
    for key, is_good in (("device", re.fullmatch(DEVICE, device)), ("model", is_name(model))):
        if not is_good:
            raise BadBundle(f"The queue names a {key} {wanted.get(key)!r}, which is no name.")
    return device, model
