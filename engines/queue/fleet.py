"""Several machines that share one queue: what each of them is told, and what it calls things.

Without KENSA_QUEUE_URL there is no fleet: the queue is a file in the data folder.
"""

from __future__ import annotations

import hashlib
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from engines.errors import BadSettings
from engines.queue.postgres import Postgres
from engines.store.shared import check_url

QUEUE_URL = "KENSA_QUEUE_URL"
DEVICE = r"^[A-Za-z0-9_-]{1,64}$"


@dataclass(frozen=True)
class Fleet:
    """One machine among those that share a queue."""

    device: str
    queue_url: str = field(repr=False)  # may hold a password
    shared_url: str = field(repr=False)
    worker: str = "on"  # on, convert or off

    @classmethod
    def of(
        cls, queue_url: str | None, shared_url: str | None, device: str | None, worker: str
    ) -> Fleet | None:
        """What the settings KENSA_QUEUE_URL, _SHARED_URL, _DEVICE and _WORKER say; None: no fleet.

        Raises:
            BadSettings: one is wrong or missing. The sentence holds no password.
        """
        if not queue_url:
            if worker == "convert":
                raise BadSettings("KENSA_WORKER=convert leaves learning to others: it needs"
                                  " KENSA_QUEUE_URL.")  # fmt: skip
            return None
        Postgres.of(QUEUE_URL, queue_url)
        if not shared_url:
            raise BadSettings(
                "KENSA_QUEUE_URL is set without KENSA_SHARED_URL: name the folder, or the fsspec"
                " URL, through which the machines of this queue exchange images and models."
            )
        check_url(shared_url)
        return cls(device_name(device), queue_url, shared_url, worker)

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Fleet | None:
        """The same out of environment variables, for a worker.

        Raises:
            BadSettings: as `of`.
        """
        names = ("KENSA_QUEUE_URL", "KENSA_SHARED_URL", "KENSA_DEVICE")
        queue_url, shared_url, device = map(environment.get, names)
        return cls.of(queue_url, shared_url, device, environment.get("KENSA_WORKER") or "on")

    def environment(self) -> dict[str, str]:
        """What `read` reads."""
        return {
            "KENSA_QUEUE_URL": self.queue_url,
            "KENSA_SHARED_URL": self.shared_url,
            "KENSA_DEVICE": self.device,
            "KENSA_WORKER": self.worker,
        }

    @property
    def own_queue(self) -> str:
        """The queue of what only this machine does."""
        return f"convert-{self.device}"

    @property
    def mark(self) -> dict[str, str]:
        """What a row of the queue carries that belongs to this machine."""
        return {"device": self.device}

    @property
    def database_url(self) -> str:
        """The queue's URL as DBOS takes it, with its patience."""
        return Postgres.of(QUEUE_URL, self.queue_url).connect_to

    def shown(self, error: BaseException) -> str:
        """What an error says, in one line and without the password."""
        return Postgres.of(QUEUE_URL, self.queue_url).shown(error)


def lock_of(device: str) -> tuple[int, int]:
    """The two halves of the PostgreSQL advisory lock that the worker of a machine holds."""
    digest = hashlib.sha256(f"kensa worker {device}".encode()).digest()
    return int.from_bytes(digest[:4], "big", signed=True), int.from_bytes(
        digest[4:8], "big", signed=True
    )


def device_name(given: str | None) -> str:
    """What this machine is called among others.

    Raises:
        BadSettings: KENSA_DEVICE is no name.
    """
    device = given or this_machine()
    if not re.fullmatch(DEVICE, device):
        raise BadSettings(f"KENSA_DEVICE is {device!r}: it takes 1 to 64 letters, digits, - and _.")
    return device


def this_machine() -> str:
    """The host name, as a device may be called."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", socket.gethostname()).strip("-")[:64] or "machine"
