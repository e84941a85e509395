"""`Collector`: copies the record of this machine into a PostgreSQL that several lines share.

What counts stays here: nothing waits for the network, and what could not be sent follows.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from app.decisions.database import FILE, TRAIL, DecisionDatabase
from app.decisions.decision import COLUMNS
from app.settings import Settings
from engines.errors import BadRecord, KensaError
from engines.queue.fleet import device_name
from engines.queue.postgres import Postgres

EVERY_S = 1.0
AGAIN_AFTER_S = 5.0
BATCH = 500  # lines at once: some milliseconds of Python
TABLES = ("decisions", "trail")

log = logging.getLogger("kensa")

_TYPES = {
    **dict.fromkeys(("at", "decisions"), "BIGINT NOT NULL"),
    **dict.fromkeys(("width", "height"), "INTEGER NOT NULL"),
    **dict.fromkeys(("raw_score", "score", "threshold", "raw_threshold"), "DOUBLE PRECISION"),
    **dict.fromkeys(("queue_ms", "decode_ms", "infer_ms", "total_ms"), "DOUBLE PRECISION"),
    "views": "TEXT NOT NULL DEFAULT ''",  # lines of an older Kensa send none
}
_LABELS = "label TEXT NOT NULL DEFAULT '', defect TEXT NOT NULL DEFAULT '',"


def _table(name: str, columns: tuple[str, ...]) -> str:
    typed = ", ".join(f"{one} {_TYPES.get(one, 'TEXT NOT NULL')}" for one in columns)
    return f"""
CREATE TABLE kensa.{name} (
    device TEXT NOT NULL, record BIGINT NOT NULL, number BIGINT NOT NULL,
    {typed}, hash TEXT NOT NULL, {_LABELS if name == "decisions" else ""}
    time TIMESTAMPTZ GENERATED ALWAYS AS (to_timestamp(at / 1000.0)) STORED,
    PRIMARY KEY (device, record, number)
);
CREATE INDEX ON kensa.{name} (time);
"""


_MAKE = f"""
CREATE SCHEMA IF NOT EXISTS kensa;
{_table("decisions", COLUMNS)}
CREATE INDEX ON kensa.decisions (part) WHERE part != '';
CREATE INDEX ON kensa.decisions (model, time);
{_table("trail", TRAIL)}
"""
# Tables that an older Kensa made. Only their owner may, so it is not tried where it is there.
_HAS_VIEWS = (
    "SELECT 1 FROM pg_attribute WHERE attrelid = 'kensa.decisions'::regclass"
    " AND attname = 'views' AND NOT attisdropped"
)
_ADD_VIEWS = f"ALTER TABLE kensa.decisions ADD COLUMN IF NOT EXISTS views {_TYPES['views']}"
_ONLY_ONE_MAKES = 0x6B656E7361  # of an advisory lock


class Shared:
    """What of this machine's record lies in the shared database."""

    def __init__(self, postgres: Postgres, device: str, record: int) -> None:
        """Raises psycopg.Error where the database cannot be reached, or lets nobody in."""
        import psycopg  # here, as most servers collect nothing

        self._mine = (device, record)
        self._connection = psycopg.connect(postgres.connect_to, autocommit=True)
        self._connection.execute("SET lock_timeout = '5s'; SET statement_timeout = '60s'")

    def close(self) -> None:
        self._connection.close()

    def make(self) -> None:
        """Make the tables, where nobody has, or what an older Kensa's lack."""
        with self._connection.transaction():
            self._connection.execute("SELECT pg_advisory_xact_lock(%s)", [_ONLY_ONE_MAKES])
            if not self.is_made():
                self._connection.execute(_MAKE.encode())
            elif self._connection.execute(_HAS_VIEWS).fetchone() is None:
                self._connection.execute(_ADD_VIEWS.encode())

    def is_made(self) -> bool:
        row = self._connection.execute("SELECT to_regclass('kensa.trail')").fetchone()
        return row is not None and row[0] is not None

    def last(self, table: str) -> tuple[int, str] | None:
        """Number and hash of the last line; None where there is none yet."""
        with self._connection.transaction():
            return self._connection.execute(
                f"SELECT number, hash FROM kensa.{table} WHERE device = %s AND record = %s"
                " ORDER BY number DESC LIMIT 1".encode(),
                self._mine,
            ).fetchone()

    def hashes(self, table: str, first: int, last: int) -> Iterator[tuple[int, str]]:
        """Number and hash of each line from one up to another, in their order."""
        with self._connection.transaction(), self._connection.cursor("hashes") as cursor:
            cursor.itersize = 10_000
            cursor.execute(
                f"SELECT number, hash FROM kensa.{table} WHERE device = %s AND record = %s"
                " AND number BETWEEN %s AND %s ORDER BY number".encode(),
                [*self._mine, first, last],
            )
            yield from cursor

    def add(self, table: str, rows: list[dict[str, Any]]) -> None:
        """Add lines, or know them already: all of them with the labels they give, or nothing.

        Raises:
            BadRecord: another one is there under a number, as of a copy of this record.
        """
        names = ("number", *(COLUMNS if table == "decisions" else TRAIL), "hash")
        values = ", ".join(["%s"] * (len(names) + 2))
        with self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.executemany(
                f"INSERT INTO kensa.{table} (device, record, {', '.join(names)})"
                f" VALUES ({values}) ON CONFLICT (device, record, number) DO NOTHING".encode(),
                [[*self._mine, *(_taken(row[name]) for name in names)] for row in rows],
            )
            cursor.execute(
                f"SELECT number, hash FROM kensa.{table} WHERE device = %s AND record = %s"
                " AND number BETWEEN %s AND %s".encode(),
                [*self._mine, rows[0]["number"], rows[-1]["number"]],
            )
            there: dict[int, str] = dict(cursor.fetchall())
            for row in rows:
                if there.get(row["number"]) != row["hash"]:
                    raise _another(table, row["number"])
            given = [json.loads(row["details"]) for row in rows if row.get("what") == "label"]
            cursor.executemany(  # of several of one decision, the last counts
                "UPDATE kensa.decisions SET label = %s, defect = %s"
                " WHERE device = %s AND record = %s AND number = %s",
                [[one["label"], one["defect"], *self._mine, one["number"]] for one in given],
            )


class Collector:
    """A thread that sends what is new, and follows after the network was gone."""

    def __init__(self, settings: Settings, opened: threading.Event) -> None:
        """`opened`: set once the record is there, whole and with its name; a repair replaces it."""
        self.problem: str | None = None
        # Decisions that are not sent yet, when it was looked last; before it is known what is there
        # already, those since the start.
        self.behind = 0
        self._postgres = settings.collected_in if settings.record == "on" else None
        self._device = device_name(settings.device) if self._postgres else ""
        self._path = settings.data / "decisions" / FILE
        self._sent: dict[str, int] = {}  # table -> the number of the last line
        self._opened = opened
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)

    def start(self) -> None:
        if self._postgres is not None:
            self._thread.start()

    def close(self) -> None:
        """Send what is here, if that takes but a moment."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(timeout=3)

    def _run(self) -> None:
        while not self._opened.wait(EVERY_S):
            if self._ending.is_set():
                return
        while not self._ending.is_set():
            self._follow_if_possible()

    def _follow_if_possible(self) -> None:
        try:
            self._follow()
        except Exception as error:  # noqa: BLE001 (whatever it is, it may pass, and is logged)
            self._fails(error)
            self._ending.wait(AGAIN_AFTER_S)

    def _follow(self) -> None:
        """Send what comes, until something fails or the server ends."""
        with DecisionDatabase(self._path) as here:
            self._sent.setdefault("decisions", here.last("decisions")[0])
            try:
                self._send_all(here)
            finally:
                self._count(here)

    def _send_all(self, here: DecisionDatabase) -> None:
        assert self._postgres is not None
        with closing(Shared(self._postgres, self._device, here.name)) as shared:
            shared.make()
            self._sent = {table: last_agreed(here, shared, table) for table in TABLES}
            is_last = False
            while not is_last:
                is_last = self._ending.is_set()
                self._send(here, shared)
                self._is_well()
                self._ending.wait(EVERY_S)

    def _count(self, here: DecisionDatabase) -> None:
        self.behind = max(0, here.last("decisions")[0] - self._sent["decisions"])

    def _send(self, here: DecisionDatabase, shared: Shared) -> None:
        # Labels are marks on decisions, which have to be there before: they end where those do.
        last_of_trail, _ = here.last("trail")
        last, _ = here.last("decisions")
        self._count(here)
        here.make_durable()  # else a power cut could leave more there than here
        while rows := self._next(here, "decisions", up_to=last):
            began = time.monotonic()
            shared.add("decisions", rows)
            self._sent["decisions"] = rows[-1]["number"]
            self.behind = last - self._sent["decisions"]
            # Parts come first, after a long time alone too.
            self._ending.wait(time.monotonic() - began)
            if self._ending.is_set() and self.behind > BATCH:
                return
        self._sent["decisions"], self.behind = last, 0  # what was pruned before it was sent is gone
        while rows := self._next(here, "trail", up_to=last_of_trail):
            shared.add("trail", rows)
            self._sent["trail"] = rows[-1]["number"]

    def _next(self, here: DecisionDatabase, table: str, up_to: int) -> list[dict[str, Any]]:
        return [
            {"number": number, **content, "hash": hash_}
            for number, content, hash_ in here.rows(table, self._sent[table], BATCH)
            if number <= up_to
        ]

    def _is_well(self) -> None:
        if self.problem is not None:
            assert self._postgres is not None
            log.info("Decisions are collected again in %s", self._postgres.place)
        self.problem = None

    def _fails(self, error: Exception) -> None:
        import psycopg

        assert self._postgres is not None
        said = self._postgres.shown(error)
        problem = (
            f"Decisions are not collected in {self._postgres.place}: {said}. They are kept here"
            " and follow."
        )
        if problem != self.problem:
            known = isinstance(error, psycopg.Error | sqlite3.Error | KensaError)
            log.error("%s", problem, exc_info=not known)
        self.problem = problem


def last_agreed(here: DecisionDatabase, shared: Shared, table: str) -> int:
    """The number of the last line that was sent; 0 for none.

    Raises:
        BadRecord: it is another one here, so that one of the two was changed or set back.
    """
    number, there = shared.last(table) or (0, "")
    mine = here.hash_of(table, number)
    is_pruned = mine is None and number <= here.last(table)[0]
    if number and not is_pruned and mine != there:
        raise _another(table, number, "another one" if mine else "missing")
    return number


def _another(table: str, number: int, what: str = "another one") -> BadRecord:
    return BadRecord(
        f"{_ONE[table]} {number} is {what} here: this record was changed, set back, or copied."
        " `kensa verify` names the first that differs; under another KENSA_DEVICE all of it is"
        " collected anew"
    )


def first_different(here: DecisionDatabase, shared: Shared) -> tuple[int, str | None]:
    """How many lines both have, and the first that is another one there, or only there.

    What was pruned here, and what is not sent yet, is not looked at.
    """
    count = 0
    # A server may be writing, and sending: what comes while this is read here is not looked at.
    ends = {table: (shared.last(table) or (0, ""))[0] for table in TABLES}
    with here.reading():
        for table in TABLES:
            rows, at, mine = here.rows(table), 0, ""
            pruned = here.pruned() if table == "decisions" else None
            for number, there in shared.hashes(table, pruned[0] + 1 if pruned else 1, ends[table]):
                while at < number and (row := next(rows, None)) is not None:
                    at, _, mine = row
                if at != number:
                    return count, f"{_ONE[table]} {number} was collected, and is missing here"
                if mine != there:
                    return count, f"{_ONE[table]} {number} is not the one that was collected"
                count += 1
    return count, None


_ONE = {"decisions": "Decision", "trail": "Line of the audit trail"}


def _taken(value: Any) -> Any:
    """As PostgreSQL takes it, whose text has no NUL: a client may ask for a model with one."""
    return value.replace("\0", "\ufffd") if isinstance(value, str) else value
