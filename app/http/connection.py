"""`Connection`: uvicorn's HTTP/1.1 protocol, and what it leaves to a proxy in front of it.

Kensa stands on a factory network without one. So a connection that is idle, slow, half closed or
that never reads its answer must cost the others nothing, and must end.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import json
import logging
import resource
import socket
import sys
from typing import Any, Literal

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.http.accept import error_line, sentence_header, wanted
from app.http.part import given_back_at_once
from app.settings import Settings
from engines.errors import (
    BadHttp,
    HeadTooLarge,
    KensaError,
    NotReady,
    TooManyConnections,
    TooSlow,
)

log = logging.getLogger("kensa")

MAX_HEAD = 64 * 1024  # bytes of a request line and its headers
MAX_PIPELINED = 32  # requests of one connection that wait for the one before them
SLOWEST = 64 * 1024  # bytes a second, of a body: each such piece makes up for a second
# A client that was refused may still send, so that it reads the answer: until it has been quiet for
# so long, and no longer or more than that.
LINGER_S = 1.0
READ_ON_S = 10.0
READ_ON = 256 * 1024 * 1024  # bytes
PROBE_S = 0.1  # between two looks at a client that has shut down its side
SPARE = 64  # connections beyond the limit that are there at a time, to be told so
BACKLOG = 128  # connections that asyncio takes at a time, before any of them can be refused
OTHER_FILES = 512  # descriptors for a few times that, and for the rest of the process
RETRY_AFTER_S = 2
_TCP_CLOSE = 7  # tcpi_state of a socket that was reset


def room_for_connections(wanted: int) -> int:
    """Raise this process's limit of open files, and say how many connections fit into it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + SPARE + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    fit = max(allowed - SPARE - OTHER_FILES, 8)
    if fit < wanted:
        log.warning(
            "KENSA_MAX_CONNECTIONS is %d, and the limit of open files (ulimit -n) allows %d",
            wanted,
            fit,
        )
    return min(wanted, fit)


class Connection(HttpToolsProtocol):
    """One client. Each change to uvicorn has a test in tests/app/http/test_connection.py."""

    def __init__(self, *arguments: Any, settings: Settings, most: int, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._most = most
        self._receive_s = settings.receive_s
        self._part: Literal["head", "body", ""] = "head"  # that arrives; "" between two requests
        self._begun = False  # the request that arrives has a first byte
        self._due = 0.0  # when that part must be here, in the loop's time
        self._data = b""  # that is being parsed
        self._raw, self._body = 0, 0  # bytes of this request in all, and of its body
        self._idle_since = 0.0
        self._running: RequestResponseCycle | None = None  # the request that the application has
        self._problem: KensaError | None = None  # why the parser was stopped
        self._ended = False  # nothing more is read
        self._lingers_until = 0.0  # the answer has left; in the loop's time, 0 where it does not
        self._passed_over = 0  # bytes that came after the answer
        self._last_read = 0.0
        self._is_stopping = False
        self._receiving: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._probing: asyncio.TimerHandle | None = None

    # A connection begins and ends

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Head and body of an answer are two writes. asyncio leaves Nagle's algorithm on where a
        # socket was made without a protocol number, and then the second waits 40 ms for the first.
        at: socket.socket = transport.get_extra_info("socket")
        at.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._idle_since = self.loop.time()
        self._expect_by(self._idle_since + self._receive_s)
        others = len(self.connections) - 1
        if others >= self._most + SPARE:
            transport.abort()
        elif others >= self._most:
            self._take_place()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves it where the client reset
        for timer in (self._receiving, self._writing, self._probing):
            if timer is not None:
                timer.cancel()
        # uvicorn tells only the last of several requests, which may be none that runs.
        for cycle in (self._running, *(waiting for waiting, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
                _let_go(cycle)
        self.pipeline.clear()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client has shut down its side: it gets its answer where it asked all it wanted.

        Returns False where the connection is to be closed at once.
        """
        if self._ended or self._part == "body" or not self._is_busy:
            return False
        self.cycle.keep_alive = False
        self._probing = self.loop.call_later(PROBE_S, self._probe, False)
        return True

    def shutdown(self) -> None:
        """The server stops, and waits so long; a request must arrive two seconds before that."""
        if not self._lingers_until:
            super().shutdown()
        self._is_stopping = True
        if self._part == "body" and not self._ended:
            grace = self.config.timeout_graceful_shutdown or 0
            self._expect_by(min(self._due, self.loop.time() + max(grace - 1 - LINGER_S, 0)))

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_writing()

    @property
    def _is_busy(self) -> bool:
        """Whether the application is at work on a request, or one waits for that."""
        return self._running is not None and not self._running.response_complete

    def _take_place(self) -> None:
        """Close the connection that has been idle longest, or refuse this one."""
        others = [one for one in self.connections if isinstance(one, Connection)]
        others = [one for one in others if one is not self]
        refused = [one for one in others if one._lingers_until]
        idle = [one for one in others if not one._is_busy and not one._ended]
        if len(others) - len(refused) < self._most:  # refused ones lie over the limit, too
            idle = refused
        if not idle:
            self._refuse(
                TooManyConnections(
                    f"All {self._most} connections are at work: close some, or raise"
                    " KENSA_MAX_CONNECTIONS."
                )
            )
            return
        oldest = min(idle, key=lambda one: one._idle_since)
        self.connections.discard(oldest)
        oldest._ended = True
        oldest.transport.close()
        oldest._watch_writing()

    # A request arrives

    def data_received(self, data: bytes) -> None:
        if self._ended:
            self._pass_over(len(data))
            return
        self._raw += len(data)
        self._data = data
        super().data_received(data)
        self._data = b""
        if self._ended or self.transport.is_closing():
            return
        if not self._part:  # uvicorn stopped its timer, perhaps for a line end after a body
            if not self._is_busy and self.timeout_keep_alive_task is None:
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
        elif self._raw - self._body > MAX_HEAD + 8 * self._body:  # chunks have heads, too
            self._refuse(_head_too_large())
        elif self._receiving is None:
            self._expect_by(self._due)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = True
        if not self._part:
            self._part = "head"
            self._due = self.loop.time() + self._receive_s

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._part != "body":  # else a trailer: it came with the head or not, as packets fell
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        upgrade = self._get_upgrade()
        if upgrade == b"websocket" or self.parser.get_method() == b"CONNECT":
            self._stop_parsing(BadHttp("Kensa speaks HTTP/1.1 alone: send an ordinary request."))
        if self.parser.should_upgrade():
            return  # `_unsupported_upgrade_warning` comes
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD:
            self._stop_parsing(_head_too_large())
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop_parsing(BadHttp(f"More than {MAX_PIPELINED} requests wait for an answer."))
        self._part = "body"
        self._due = self.loop.time() + self._receive_s
        super().on_headers_complete()
        self.cycle.transport = _Closing(self)  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        if not self.cycle.response_complete:
            self._due = min(self._due + len(body) / SLOWEST, self.loop.time() + self._receive_s)
        else:
            self._pass_over(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._part, self._begun = "", False
        self._raw = self._body = self._passed_over = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._problem or BadHttp("This is not HTTP/1.1: send an ordinary request."))

    def _unsupported_upgrade_warning(self) -> None:
        """Read the request again without its header Upgrade.

        Java's client asks for h2c with each request and is content with HTTP/1.1, but the parser
        drops a body that comes with such a header.
        """
        upgrade = sys.exc_info()[1]
        assert isinstance(upgrade, httptools.HttpParserUpgrade)
        headers = [(name, value) for name, value in self.headers if name != b"upgrade"]
        lines = [b"%s: %s\r\n" % header for header in headers]
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        head = b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, b"".join(lines))
        self._part = ""
        self.parser = httptools.HttpRequestParser(self)
        super().data_received(head + self._data[upgrade.args[0] :])

    def _stop_parsing(self, problem: KensaError) -> None:
        self._problem = problem
        raise problem  # the parser turns it into an error of its own, and `send_400_response` comes

    def _expect_by(self, due: float) -> None:
        """Look then whether the request has arrived."""
        self._due = due
        if self._receiving is not None:
            self._receiving.cancel()
        self._receiving = self.loop.call_at(due, self._look)

    def _look(self) -> None:
        self._receiving = None
        if not self._part or self._ended:
            return
        now = self.loop.time()
        if self._is_held_up and not self._is_stopping:
            self._due = max(self._due, now + self._receive_s)
        if now < self._due:
            self._expect_by(self._due)
        elif not self._begun:
            self.transport.close()
        elif self._is_stopping:
            self._refuse(NotReady("The server is stopping: send this again when it is back."))
        else:
            self._refuse(
                TooSlow(
                    "The request did not arrive in time: look at the line between us, or raise"
                    " KENSA_RECEIVE_S."
                )
            )

    @property
    def _is_held_up(self) -> bool:
        """Whether the client waits for this server, not the other way round."""
        if self._part == "head":
            return self._is_busy
        return self.flow.read_paused or self.cycle.waiting_for_100_continue

    # An answer leaves

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        if self._running is not None:
            _let_go(self._running)
        if self._lingers_until:
            self.server_state.total_requests += 1
            self._watch_writing()
            return
        super().on_response_complete()
        if self._part == "body" and not self._is_busy:  # what is left of it is of no use
            self._expect_by(min(self._due, self._idle_since + self._receive_s))
        self._watch_writing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:  # most was taken
            self._writing.cancel()
            self._writing = None

    def _watch_writing(self) -> None:
        """End a connection whose client takes nothing of what is written to it."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and self._writing is None:
            self._writing = self.loop.call_later(self._receive_s, self._look_at_writing, unsent)

    def _look_at_writing(self, unsent_before: int) -> None:
        self._writing = None
        if self.transport.get_write_buffer_size() >= unsent_before:
            self.transport.abort()
        else:
            self._watch_writing()

    def _refuse(self, problem: KensaError) -> None:
        """Answer in the application's place where it has not begun to, and end the connection."""
        arriving = self.cycle if self._part == "body" else None
        if arriving is None and self._is_busy:  # with requests that came whole: they are answered
            self._ended = True
            self.cycle.keep_alive = False
            return
        if arriving is not None and arriving is not self._running:
            self.transport.abort()
            return
        if arriving is not None:
            arriving.disconnected = True
            arriving.message_event.set()
        if arriving is None or not arriving.response_started:
            self.transport.write(self._answer(problem, arriving))
        self._linger()

    def _close(self) -> None:
        """The answer of a request is complete, and it was the last one of this connection."""
        if self._part == "body" and not self.transport.is_closing():
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Close once the client had time to read: closed over unread bytes, TCP takes them back.

        Proxies send the whole body first, and so do most clients: they look for the answer after.
        """
        self._ended = True
        self._last_read = self.loop.time()
        self._lingers_until = self._last_read + READ_ON_S
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        with contextlib.suppress(OSError):  # it was reset just now
            self.transport.write_eof()
        if self._receiving is not None:
            self._receiving.cancel()
        self._receiving = self.loop.call_later(LINGER_S, self._look_at_lingering)

    def _look_at_lingering(self) -> None:
        quiet_at = self._last_read + LINGER_S
        until = min(quiet_at, self._lingers_until)
        if self._is_stopping or self.loop.time() >= until:
            self.transport.close()
        else:
            self._receiving = self.loop.call_at(until, self._look_at_lingering)

    def _pass_over(self, count: int) -> None:
        """So many bytes came that nobody wants."""
        self._last_read = self.loop.time()
        self._passed_over += count
        if self._passed_over > READ_ON:
            self.transport.abort()

    def _answer(self, problem: KensaError, arriving: RequestResponseCycle | None) -> bytes:
        body = json.dumps({"error": str(problem), "code": problem.code}).encode()
        kind, more = b"application/json", dict[str, str]()
        asked, query = (self.headers, self.url.partition(b"?")[2]) if self._begun else ([], b"")
        known_id = arriving.scope["state"].get("request_id") if arriving else None
        accepts = dict(asked).get(b"accept", b"")
        if wanted(accepts.decode("latin-1")) == "text/plain":
            body, kind = error_line(problem.code).encode(), b"text/plain; charset=utf-8"
            more = sentence_header(str(problem))
        headers = [
            *self.server_state.default_headers,
            *((name.lower().encode(), value.encode()) for name, value in more.items()),
            (b"content-type", kind),
            (b"content-length", b"%d" % len(body)),
            *given_back_at_once(query, asked, known_id),
            (b"connection", b"close"),
        ]
        if problem.status == http.HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append((b"retry-after", b"%d" % RETRY_AFTER_S))
        status = f"HTTP/1.1 {problem.status} {http.HTTPStatus(problem.status).phrase}\r\n".encode()
        lines = b"".join(b"%s: %s\r\n" % header for header in headers)
        is_head = self._begun and self.parser.get_method() == b"HEAD"  # has no body
        return b"%s%s\r\n%s" % (status, lines, b"" if is_head else body)

    def _probe(self, was_asked: bool) -> None:
        """Is a client that has shut down its side still there? Only writing to it tells.

        Where its answer takes long enough to matter, an interim response asks. A client that is
        there passes over it; where nobody is, the system resets the connection.
        """
        cycle = self._running
        if cycle is None or self.transport.is_closing():
            return
        at: socket.socket = self.transport.get_extra_info("socket")
        if at.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
            self.transport.abort()
            return
        if not was_asked and not cycle.response_started and cycle.scope["http_version"] == "1.1":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            was_asked = True
        self._probing = self.loop.call_later(PROBE_S, self._probe, was_asked)


class _Closing:
    """The transport as a request has it: to close is left to the connection, see `_close`."""

    def __init__(self, connection: Connection) -> None:
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing
        self.close = connection._close


def _let_go(cycle: RequestResponseCycle) -> None:
    """Give back the memory of a body that nobody will read.

    uvicorn keeps what has come of it until the connection's next request, and where there is none
    until Python looks for cycles: after 64 clients that were refused, 12 MB.
    """
    cycle.body = bytearray()


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(f"The head of the request has more than the {MAX_HEAD:,} bytes allowed.")
