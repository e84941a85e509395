"""What stands between a browser and a server, and falls silent as a network may."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


class Proxy:
    """Hands bytes on, both ways, until it is told to fall silent on what is open then."""

    def __init__(self, target: str) -> None:
        at = urlsplit(target)
        self._target = (at.hostname or "", at.port or 0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._silent: set[socket.socket] = set()
        self._open: set[socket.socket] = set()
        self._streams: set[socket.socket] = set()
        threading.Thread(target=self._listen, daemon=True).start()

    def fall_silent(self) -> None:
        """Nothing passes any more where a stream of events is open, and nobody is told.

        Others are closed, as those that are idle are after a minute.
        """
        self._silent |= self._streams
        for one in self._open - self._streams:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for one in (self._listener, *self._open):
            with suppress(OSError):
                one.close()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._open |= {client, server}
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                if data.startswith(b"GET /line/events"):
                    self._streams |= {one, other}
                if one not in self._silent:
                    other.sendall(data)
            if one not in self._silent:
                other.shutdown(socket.SHUT_WR)


@contextmanager
def proxy(target: str) -> Iterator[Proxy]:
    """Between whoever asks and the server at `target`."""
    found = Proxy(target)
    try:
        yield found
    finally:
        found.close()
