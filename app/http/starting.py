"""`Starting`: what answers at the port while the server is not ready to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from typing import Any

from app.http.part import given_back_at_once

BACKLOG = 128  # connections that asyncio takes at a time
RETRY_AFTER_S = 2
AGAIN_AFTER_S = 1.0
LINGER_S = 3.0  # quiet for so long, a client is closed; a busy machine pauses in a body, too
READ_ON_S = 10.0  # and by then in any case
MAX_HEAD = 64 * 1024  # bytes
SENTENCE = "Kensa is starting: it loads its models. Try again in a few seconds."
# What a person sees who opens the screen early: it looks again by itself.
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Kensa</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<h1>Kensa is starting …</h1><p>It loads its models. This page looks again by itself.</p>
<p lang="ja">起動中です。モデルを読み込んでいます。このページは自動的に更新されます。</p></html>
"""


class Starting:
    """503 with `Retry-After` to everybody, at once, in a thread of its own.

    Importing what serves and opening models takes seconds. Who asks meanwhile would find the port
    closed, or wait in the system's queue with a deadline that nobody keeps. Only the standard
    library is imported here, so that it begins early.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._loop = asyncio.new_event_loop()
        self._open: set[_Refused] = set()
        self._taken: set[asyncio.Task[Any]] = set()  # connections that are not open yet
        self._ended = threading.Event()
        self._listener = listener
        listener.listen(BACKLOG)
        listener.setblocking(False)
        # Not `create_server`: one that is closed resets whom it took at that moment.
        self._listen()
        threading.Thread(target=self._run, name="starting", daemon=True).start()

    def end(self) -> None:
        """Take no more connections; those that were taken are answered meanwhile."""
        self._loop.call_soon_threadsafe(self._end)
        self._ended.wait()

    def _listen(self) -> None:
        if not self._ended.is_set():
            self._loop.add_reader(self._listener, self._take)

    def _end(self) -> None:
        self._loop.remove_reader(self._listener)
        self._ended.set()

    def _take(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # it is gone already
        except OSError:  # too many files are open
            self._loop.remove_reader(self._listener)
            self._loop.call_later(AGAIN_AFTER_S, self._listen)
            return
        client.setblocking(False)
        opening = self._loop.connect_accepted_socket(
            lambda: _Refused(self._loop, self._open), client
        )
        task = self._loop.create_task(opening)
        self._taken.add(task)
        task.add_done_callback(self._taken.discard)

    def _run(self) -> None:
        self._loop.run_until_complete(self._until_all_are_gone())
        self._loop.close()

    async def _until_all_are_gone(self) -> None:
        while not self._ended.is_set() or self._taken or self._open:
            await asyncio.sleep(0.05)


class _Refused(asyncio.Protocol):
    """One client. It is read on, since closing over unread bytes would take the answer back."""

    def __init__(self, loop: asyncio.AbstractEventLoop, others: set[_Refused]) -> None:
        self._loop, self._others = loop, others
        self._head, self._answered = b"", False
        self._last_read = self._until = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._others.add(self)
        self._last_read = self._loop.time()
        self._until = self._last_read + READ_ON_S
        self._loop.call_later(LINGER_S, self._look)

    def data_received(self, data: bytes) -> None:
        self._last_read = self._loop.time()
        if self._answered:
            return
        self._head += data
        if b"\r\n\r\n" in self._head or len(self._head) > MAX_HEAD:
            self._answered = True
            self._transport.write(answer(self._head))
            with contextlib.suppress(OSError):  # it was reset just now
                self._transport.write_eof()

    def connection_lost(self, _: Exception | None) -> None:
        self._others.discard(self)

    def _look(self) -> None:
        now, until = self._loop.time(), min(self._last_read + LINGER_S, self._until)
        if now >= until:
            self._transport.close()
        elif not self._transport.is_closing():
            self._loop.call_at(until, self._look)


def answer(head: bytes) -> bytes:
    """What a request gets: in the agreed form, as a line of text or a page where it wants that."""
    first, *lines = head.partition(b"\r\n\r\n")[0].split(b"\r\n")
    pairs = (line.partition(b":") for line in lines)
    headers = [(name.strip().lower(), value.strip()) for name, _, value in pairs]
    query = first.partition(b"?")[2].partition(b" ")[0]
    accepts = b",".join(value.lower() for name, value in headers if name == b"accept")
    body = json.dumps({"error": SENTENCE, "code": "not_ready"})
    media_type, more = "application/json", ""
    if b"text/plain" in accepts and b"json" not in accepts:
        media_type, body = "text/plain; charset=utf-8", "ERR not_ready\n"
        more = f"x-kensa-error: {SENTENCE}\r\n"
    elif b"text/html" in accepts:
        media_type, body = "text/html; charset=utf-8", PAGE
        more = f"refresh: {RETRY_AFTER_S}\r\n"
    for name, value in given_back_at_once(query, headers):
        more += f"{name.decode()}: {value.decode()}\r\n"
    said = (
        "HTTP/1.1 503 Service Unavailable\r\n"
        f"{more}content-type: {media_type}\r\ncontent-length: {len(body.encode())}\r\n"
        f"retry-after: {RETRY_AFTER_S}\r\n"
        f"connection: close\r\n\r\n{'' if head.startswith(b'HEAD ') else body}"
    )
    return said.encode()
