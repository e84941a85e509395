"""Clients that send parts without a pause, while something is done to the server."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import httpx

from support.server import RAW


@dataclass
class Clients:
    """Eight of them, what they were told, and what failed."""

    url: str
    photos: list[bytes]
    seen: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # which photo, the answer
    failures: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Clients:
        self._threads = [threading.Thread(target=self._send, args=(n,)) for n in range(8)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _send(self, number: int) -> None:
        photo = number % len(self.photos)
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post("/infer", content=self.photos[photo], headers=RAW)
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    continue
                if answer.status_code != 200:
                    self.failures.append(answer.text)
                else:
                    self.seen.append((photo, answer.json()))
