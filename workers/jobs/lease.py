"""Which worker of a fleet is alive: the one whose lock the queue's database holds.

A worker holds a PostgreSQL advisory lock, named after its machine, on a connection of its own, and
says something on it every `BEAT_S`. The database takes the lock back when the connection ends, or
is silent for `SILENT_S`. A worker that got no answer for `GIVE_UP_S` ends itself and its job; one
whose lock was free for `DEAD_S` is dead for the others. Nobody looks at a wall clock: boards
without a battery wake up in 1970. Each machine only measures times of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psycopg

from engines.errors import BadSettings
from engines.queue.fleet import Fleet, lock_of

BEAT_S = 2.0
SILENT_S = 10.0
GIVE_UP_S = 20.0  # from when the last answer was asked for; less than DEAD_S
DEAD_S = 30.0
SAY_EVERY_S = 30.0  # why it waits

log = logging.getLogger("kensa.worker")


class Lease:
    """The lock of this machine's worker, and what is known of the others'."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._connection: psycopg.Connection | None = None
        self._using = threading.Lock()
        self._answered = 0.0  # when the last answer was asked for; counts while suspended, too
        self._free: dict[str, int] = {}  # another machine -> in how many looks its lock was free

    def take(self, stopping: threading.Event) -> bool:
        """Wait until this machine's lock is ours; False when told to stop before.

        Raises:
            BadSettings: the database is older than PostgreSQL 14.
        """
        said, why = -SAY_EVERY_S, ""
        while True:
            asked = _now()
            try:
                if self._try_to_take():
                    self._answered = asked
                    return True
                problem = (
                    f"Another worker calls itself {self._fleet.device}, or did a moment ago: each"
                    " machine needs a KENSA_DEVICE of its own"
                )
            except psycopg.Error as error:
                problem = f"The queue's database cannot be reached: {self._fleet.shown(error)}"
            if problem != why or _now() - said > SAY_EVERY_S:
                log.warning("%s; trying again", problem)
                said, why = _now(), problem
            if stopping.wait(BEAT_S):
                return False

    def keep(self, lost: Callable[[], None]) -> None:
        """Hold it from now on, in threads. `lost` is called once, in time before others take over.

        A connection that breaks is made anew: a restart of the database costs nothing.
        """
        threading.Thread(target=self._beat, daemon=True).start()
        threading.Thread(target=self._look_at_the_time, args=[lost], daemon=True).start()

    def dead(self, machines: set[str], every_s: float) -> list[str]:
        """Those whose workers are dead. To be asked every so many seconds; it counts its calls.

        Looks are counted, not seconds, so that a worker that was stopped itself does not take the
        time in which it saw nothing for a time in which nobody was there.

        Raises:
            psycopg.Error: the database does not answer.
        """
        with self._using:
            rows = self._connected().execute(
                "SELECT classid::bigint, objid::bigint FROM pg_locks"
                " WHERE locktype = 'advisory' AND objsubid = 2 AND granted AND database ="
                " (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
            held = set(rows.fetchall())
        free = {one for one in machines if tuple(x % 2**32 for x in lock_of(one)) not in held}
        self._free = {name: self._free.get(name, 0) + 1 for name in free}
        return [name for name, looks in self._free.items() if (looks - 1) * every_s >= DEAD_S]

    @contextmanager
    def instead_of(self, machine: str) -> Iterator[bool]:
        """Whether another machine's lock is ours for the block: then it cannot come back in it."""
        with self._using:
            connection, lock = self._connected(), lock_of(machine)
            found = connection.execute("SELECT pg_try_advisory_lock(%s, %s)", lock).fetchone()
        try:
            yield found == (True,)
        finally:
            if found == (True,):
                with self._using, suppress(psycopg.Error):  # it goes with the connection
                    connection.execute("SELECT pg_advisory_unlock(%s, %s)", lock)

    def _try_to_take(self) -> bool:
        with self._using:
            if self._connection is None or self._connection.closed:
                self._connection = psycopg.connect(self._fleet.database_url, autocommit=True)
                if self._connection.info.server_version < 140000:
                    raise BadSettings("The queue needs PostgreSQL 14 or newer.")
                self._connection.execute(f"SET idle_session_timeout = {int(SILENT_S * 1000)}")
            found = self._connection.execute(
                "SELECT pg_try_advisory_lock(%s, %s)", lock_of(self._fleet.device)
            ).fetchone()
            return found == (True,)

    def _connected(self) -> psycopg.Connection:
        if self._connection is None:
            raise psycopg.OperationalError("there is no connection at the moment")
        return self._connection

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_S)
            asked = _now()
            try:
                with self._using:
                    self._connected().execute("SELECT 1")
                self._answered = asked
            except psycopg.Error as error:
                log.warning("The queue's database is lost: %s", self._fleet.shown(error))
                self._come_back()

    def _come_back(self) -> None:
        """Take the lock again. It still is nobody else's, as long as `lost` was not called."""
        with self._using:
            if self._connection is not None:
                self._connection.close()
        while True:
            asked = _now()
            with suppress(psycopg.Error):
                if self._try_to_take():
                    self._answered = asked
                    log.info("The queue's database is back")
                    return
            time.sleep(BEAT_S / 4)

    def _look_at_the_time(self, lost: Callable[[], None]) -> None:
        while _now() - self._answered < GIVE_UP_S:
            time.sleep(BEAT_S / 8)
        lost()


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
