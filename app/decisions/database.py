"""`DecisionDatabase`: the file of decisions and of the audit trail, each a chain of hashes.

A line's hash is of its content and of the hash before it, so that a line cannot be changed, removed
or put in between without all after it being written anew. A line of the trail names the last
decision at its time: so the two chains hold each other.
"""

from __future__ import annotations

import json
import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from app.decisions.decision import COLUMNS, FIRST_HASH, Decision, Label, hash_after
from app.decisions.quarters import Quarter, of_batch
from engines.errors import Conflict

FILE = "decisions.sqlite"
WAIT_S = 10.0  # for another process that writes
FEW = 20_000  # decisions that are looked at one by one, in 20 ms
MOST_LINES = 500  # about one decision
LAYOUT = 2  # of the tables; a later one is of a later Kensa

_TYPES = {
    **dict.fromkeys(COLUMNS, "TEXT NOT NULL"),
    **dict.fromkeys(("at", "width", "height"), "INTEGER NOT NULL"),
    **dict.fromkeys(("raw_score", "score", "threshold", "raw_threshold"), "REAL"),
    **dict.fromkeys(("queue_ms", "decode_ms", "infer_ms", "total_ms"), "REAL"),
    "views": "TEXT NOT NULL DEFAULT ''",  # lines of an older Kensa have none
}
_SCHEMA = f"""
CREATE TABLE decisions (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    {", ".join(f"{name} {kind}" for name, kind in _TYPES.items())},
    hash TEXT NOT NULL,
    label TEXT NOT NULL DEFAULT '',
    defect TEXT NOT NULL DEFAULT '',
    picture_bytes INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX decisions_by_id ON decisions (id);
CREATE INDEX decisions_by_part ON decisions (part, at) WHERE part != '';
CREATE INDEX decisions_by_time ON decisions (at);
CREATE INDEX decisions_by_model ON decisions (model, at, scorer, verdict, raw_score, label);
CREATE INDEX decisions_by_version ON decisions (version, at);
CREATE INDEX decisions_by_score ON decisions (score, at);
CREATE INDEX decisions_not_normal ON decisions (verdict, at) WHERE verdict != 'normal';
CREATE INDEX decisions_by_label ON decisions (label, at) WHERE label != '';
CREATE INDEX decisions_with_pictures ON decisions (number, picture_bytes) WHERE picture_bytes > 0;
CREATE TABLE trail (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    at INTEGER NOT NULL,
    who TEXT NOT NULL,
    what TEXT NOT NULL,
    subject TEXT NOT NULL,
    reason TEXT NOT NULL,
    details TEXT NOT NULL,
    decisions INTEGER NOT NULL,
    decisions_hash TEXT NOT NULL,
    hash TEXT NOT NULL
);
CREATE INDEX trail_by_subject ON trail (subject, number);
CREATE TABLE quarters (
    model TEXT NOT NULL,
    at INTEGER NOT NULL,
    content TEXT NOT NULL,
    PRIMARY KEY (model, at)
) WITHOUT ROWID;
PRAGMA user_version = {LAYOUT};
"""
TRAIL = ("at", "who", "what", "subject", "reason", "details", "decisions", "decisions_hash")
CHALLENGED = ("challenge_passed", "challenge_failed")
NOT_NORMAL = ("anomaly", "unusable", "none")
OF_MODELS = (  # lines whose subject is a model
    "threshold", "regions", "live", "rollback", "held", "discarded", *CHALLENGED, "challenges",
    "release",
)  # fmt: skip
_INSERT = (
    f"INSERT INTO decisions (number, {', '.join(COLUMNS)}, hash, picture_bytes)"
    f" VALUES (:number, {', '.join(f':{name}' for name in COLUMNS)}, :hash, :picture_bytes)"
)
_INSERT_TRAIL = (
    f"INSERT INTO trail (number, {', '.join(TRAIL)}, hash)"
    f" VALUES (:number, {', '.join(f':{name}' for name in TRAIL)}, :hash)"
)
_NEXT_LAYOUT = {  # what brings a file of a layout to the next one
    1: f"ALTER TABLE decisions ADD COLUMN views {_TYPES['views']}",
}
_KEPT = f"number, {', '.join(COLUMNS)}, hash, label, defect, picture_bytes"

log = logging.getLogger("kensa")


class Kept(NamedTuple):
    """A decision as it lies in the file."""

    number: int
    decision: Decision
    hash: str
    label: str  # the last one; empty where nobody has looked
    defect: str
    picture_bytes: int  # of image and map; 0 where they are not kept

    @classmethod
    def of(cls, row: Sequence[Any]) -> Kept:
        count = len(COLUMNS)
        return cls(row[0], Decision(*row[1 : count + 1]), *row[count + 1 :])


class Note(NamedTuple):
    """What a line of the audit trail is to say: who did what to what, and why."""

    at: int  # milliseconds since 1970, UTC
    who: str  # the name of the API key; empty for Kensa itself, or where none was needed
    what: str
    subject: str
    reason: str
    details: dict[str, Any]

    @classmethod
    def now(cls, what: str, who: str, subject: str, reason: str, details: dict[str, Any]) -> Note:
        return cls(round(time.time() * 1000), who, what, subject, reason, details)


class Line(NamedTuple):
    """A line of the audit trail."""

    number: int
    at: int
    who: str
    what: str
    subject: str
    reason: str
    details: dict[str, Any]
    decisions: int  # the number of the last decision at its time; 0 for none
    decisions_hash: str
    hash: str


@dataclass(frozen=True)
class Filter:
    """Which decisions are asked for; what is None is not asked."""

    part: str | None = None
    model: str | None = None
    version: str | None = None
    verdict: str | None = None
    label: str | None = None  # "none": those that nobody has marked
    score_from: float | None = None
    score_to: float | None = None
    since: int | None = None  # milliseconds since 1970, UTC; this one and later
    until: int | None = None  # earlier

    def where(self) -> tuple[str, list[Any]]:
        """The condition in SQL, and its values."""
        found: list[tuple[str, Any]] = [
            ("part = ?", self.part), ("model = ?", self.model), ("version = ?", self.version),
            ("verdict = ?", self.verdict), ("score >= ?", self.score_from),
            ("score <= ?", self.score_to), ("at >= ?", self.since), ("at < ?", self.until),
            ("label = ?", "" if self.label == "none" else self.label),
        ]  # fmt: skip
        asked = [(sql, value) for sql, value in found if value is not None]
        conditions = [sql for sql, _ in asked]
        # As the indices say that are of some of the lines only.
        conditions += ["part != ''"] * bool(self.part)
        conditions += ["label != ''"] * (self.label not in (None, "none"))
        conditions += ["verdict != 'normal'"] * (self.verdict in NOT_NORMAL)
        return " AND ".join(conditions) or "TRUE", [value for _, value in asked]

    def index(self, few_scores: Callable[[], bool]) -> str:
        """The one that leads to the fewest lines; SQLite would have to have counted them.

        Args:
            few_scores: tells whether few decisions have such a score.
        """
        has_score = self.score_from is not None or self.score_to is not None
        for name, is_asked in (
            ("part", bool(self.part)),
            ("label", self.label not in (None, "none")),
            ("version", self.version is not None),
            ("score", has_score and few_scores()),
            ("not_normal", self.verdict in NOT_NORMAL),
            ("model", self.model is not None),
        ):
            if is_asked:
                return "decisions_not_normal" if name == "not_normal" else f"decisions_by_{name}"
        return "decisions_by_time"


class DecisionDatabase:
    """One file. Its methods block; a connection belongs to the thread that opened it."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None)
        self._connection.execute("PRAGMA synchronous = NORMAL")

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> DecisionDatabase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- writing -----------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """All that is written in the block, or nothing; one process at a time."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # what ended the transaction already
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def reading(self) -> Iterator[None]:
        """All that is read in the block is of one moment, whatever others write meanwhile."""
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            self._connection.execute("ROLLBACK")

    def last(self, table: str) -> tuple[int, str]:
        """The number and hash of the last line of a table, also of one that was pruned."""
        order = f"SELECT number, hash FROM {table} ORDER BY number DESC LIMIT 1"
        found = self._connection.execute(order).fetchone()
        if found is None and table == "decisions" and (pruned := self.pruned()):
            return pruned
        return found or (0, FIRST_HASH)

    def append(
        self,
        entries: Sequence[Decision | Note],
        keep: Callable[[int, int], int] = lambda *_: 0,
    ) -> None:
        """Add decisions and lines of the trail to the ends of their chains, in their order.

        Args:
            keep: keeps the pictures of the n-th entry under a number; how many bytes that took.
        """
        with self.writing():
            number, before = self.last("decisions")
            for place, entry in enumerate(entries):
                if isinstance(entry, Note):
                    self._note(entry, number, before)
                    continue
                number, content = number + 1, entry.values()
                before = hash_after(before, {"number": number, **content})
                kept = {"number": number, "hash": before, "picture_bytes": keep(place, number)}
                self._connection.execute(_INSERT, content | kept)
            self._count(entry for entry in entries if isinstance(entry, Decision))

    def _count(self, decisions: Iterable[Decision]) -> None:
        """Add decisions to what is known of their quarters of an hour."""
        for place, quarter in of_batch(decisions).items():
            found = self._connection.execute(
                "SELECT content FROM quarters WHERE model = ? AND at = ?", place
            ).fetchone()
            if found is not None:
                quarter += Quarter.of(json.loads(found[0]))
            self._connection.execute(
                "INSERT OR REPLACE INTO quarters VALUES (?, ?, ?)",
                [*place, json.dumps(quarter.content())],
            )

    def _note(self, note: Note, decisions: int, decisions_hash: str) -> None:
        number, before = self.last("trail")
        details = json.dumps(note.details, sort_keys=True, ensure_ascii=False)
        kept = {
            "number": number + 1, **note._asdict(), "details": details,
            "decisions": decisions, "decisions_hash": decisions_hash,
        }  # fmt: skip
        self._connection.execute(_INSERT_TRAIL, kept | {"hash": hash_after(before, kept)})

    def mark(
        self,
        kept: Kept,
        label: Label | Literal[""],
        defect: str,
        who: str,
        reason: str,
        after: int | None = None,
    ) -> None:
        """Label a decision; what others said of it stays in the trail.

        Args:
            label: empty to withdraw the last one, as if nobody had looked.
            after: only where this line of the trail is what was said of it last.

        Raises:
            Conflict: another one is.
        """
        with self.writing():
            labels = (one.number for one in self.lines_about(kept) if one.what == "label")
            if after is not None and next(labels, None) != after:
                raise Conflict(
                    f"Somebody marked {kept.decision.id!r} meanwhile: its history says who."
                )
            self._connection.execute(
                "UPDATE decisions SET label = ?, defect = ? WHERE number = ?",
                [label, defect, kept.number],
            )
            details = {"number": kept.number, "label": label, "defect": defect}
            note = Note.now("label", who, kept.decision.id, reason, details)
            self._note(note, *self.last("decisions"))

    def lines_about(self, kept: Kept) -> list[Line]:
        """What people did with a decision, and not with another of the same id; newest first."""
        lines = self.lines(MOST_LINES, subject=kept.decision.id)
        return [one for one in lines if one.details.get("number") == kept.number]

    def forget_pictures(self, numbers: Iterable[int], note: Note | None = None) -> None:
        """Say of decisions that their pictures are not kept any more; in the trail, who says so."""
        with self.writing():
            if note is not None:
                self._note(note, *self.last("decisions"))
            self._connection.executemany(
                "UPDATE decisions SET picture_bytes = 0 WHERE number = ?",
                [[number] for number in numbers],
            )

    def prune(self, up_to: int, why: str, who: str = "") -> int:
        """Delete the decisions up to a number, which a line of the trail vouches for; how many."""
        with self.writing():
            found = self._connection.execute(
                "SELECT number, hash FROM decisions WHERE number <= ? ORDER BY number DESC LIMIT 1",
                [up_to],
            ).fetchone()
            if found is None:
                return 0
            number, hash_ = found
            note = Note.now("prune", who, "decisions", why, {"number": number, "hash": hash_})
            self._note(note, *self.last("decisions"))
            order = "DELETE FROM decisions WHERE number <= ?"
            return self._connection.execute(order, [number]).rowcount

    def pruned(self) -> tuple[int, str] | None:
        """The number and hash of the last decision that was pruned."""
        found = self._connection.execute(
            "SELECT details FROM trail WHERE what = 'prune' ORDER BY number DESC LIMIT 1"
        ).fetchone()
        if found is None:
            return None
        details = json.loads(found[0])
        return details["number"], details["hash"]

    # ---- reading -----------------------------------------------------------------------------

    def find(self, asked: Filter, limit: int, before: int | None = None) -> list[Kept]:
        """Decisions, newest first.

        Args:
            before: only those before the one with this number: the last of the page before.
        """
        where, values = asked.where()
        if before is not None:
            where += " AND (at, number) < (SELECT at, number FROM decisions WHERE number = ?)"
            values.append(before)
        index = asked.index(lambda: self._has_few(asked))
        rows = self._connection.execute(
            f"SELECT {_KEPT} FROM decisions INDEXED BY {index} WHERE {where}"
            " ORDER BY at DESC, number DESC LIMIT ?",
            [*values, limit],
        )
        return [Kept.of(row) for row in rows]

    def after(self, number: int, limit: int) -> list[Kept]:
        """The newest decisions after a number, oldest first; of all where it is of none yet."""
        last, _ = self.last("decisions")
        rows = self._connection.execute(
            f"SELECT {_KEPT} FROM decisions WHERE number > ? ORDER BY number DESC LIMIT ?",
            [number if number <= last else 0, limit],
        ).fetchall()
        return [Kept.of(row) for row in reversed(rows)]

    def by_minute(self, since: int, minute_ms: int) -> list[tuple[str, int, str, int]]:
        """Model, minute since 1970, verdict, and how many parts, since a time."""
        return self._connection.execute(
            f"SELECT model, at / {minute_ms}, verdict, COUNT(*)"
            " FROM decisions INDEXED BY decisions_by_time WHERE at >= ? GROUP BY 1, 2, 3",
            [since],
        ).fetchall()

    def _has_few(self, asked: Filter) -> bool:
        """Whether so few decisions have such a score that all of them can be looked at."""
        where, values = Filter(score_from=asked.score_from, score_to=asked.score_to).where()
        (count,) = self._connection.execute(
            f"SELECT COUNT(*) FROM (SELECT 1 FROM decisions WHERE {where} LIMIT {FEW})", values
        ).fetchone()
        return bool(count < FEW)

    def one(self, id_: str, number: int | None = None) -> Kept | None:
        """A decision by its id; by its number as well where a client has chosen the id twice."""
        rows = self._connection.execute(
            f"SELECT {_KEPT} FROM decisions WHERE id = ? AND (? IS NULL OR number = ?)"
            " ORDER BY number DESC LIMIT 1",
            [id_, number, number],
        ).fetchall()
        return Kept.of(rows[0]) if rows else None

    def lines(self, limit: int, before: int | None = None, subject: str = "") -> list[Line]:
        """Lines of the trail, newest first."""
        rows = self._connection.execute(
            f"SELECT number, {', '.join(TRAIL)}, hash FROM trail"
            " WHERE number < ? AND (? = '' OR subject = ?) ORDER BY number DESC LIMIT ?",
            [2**62 if before is None else before, subject, subject, limit],
        )
        return [_line(row) for row in rows]

    def challenges(
        self, model: str, limit: int, before: int | None = None, version: str | None = None
    ) -> list[Line]:
        """Lines of the challenges of a model, newest first.

        Args:
            version: only of this one.
        """
        rows = self._connection.execute(
            f"SELECT number, {', '.join(TRAIL)}, hash FROM trail"
            f" WHERE subject = ? AND what IN ({', '.join(map(repr, CHALLENGED))}) AND number < ?"
            " AND (? IS NULL OR json_extract(details, '$.version') = ?)"
            " ORDER BY number DESC LIMIT ?",
            [model, 2**62 if before is None else before, version, version, limit],
        )
        return [_line(row) for row in rows]

    def count_flips(self, asked: Filter, scorer: str, raw: float) -> Flips:
        """What another limit would have said of decisions with raw scores of the same scorer."""
        where, values = asked.where()
        where += " AND scorer = ? AND verdict IN ('normal', 'anomaly') AND code = ''"
        row = self._connection.execute(
            "SELECT COUNT(*), SUM(verdict = 'anomaly'), SUM(raw_score > ?),"
            " SUM(label = 'good'), SUM(label = 'good' AND verdict = 'anomaly'),"
            " SUM(label = 'good' AND raw_score > ?), SUM(label = 'defect'),"
            " SUM(label = 'defect' AND verdict != 'anomaly'),"
            f" SUM(label = 'defect' AND raw_score <= ?) FROM decisions WHERE {where}",
            [raw, raw, raw, *values, scorer],
        ).fetchone()
        return Flips(*(number or 0 for number in row))

    def flips(self, asked: Filter, scorer: str, raw: float, limit: int) -> list[Kept]:
        """Those whose verdict would be another one, newest first."""
        where, values = asked.where()
        rows = self._connection.execute(
            f"SELECT {_KEPT} FROM decisions WHERE {where} AND scorer = ?"
            " AND verdict IN ('normal', 'anomaly') AND code = ''"
            " AND (verdict = 'anomaly') != (raw_score > ?) ORDER BY at DESC, number DESC LIMIT ?",
            [*values, scorer, raw, limit],
        )
        return [Kept.of(row) for row in rows]

    def scores(self, asked: Filter, scorer: str, limit: int) -> list[tuple[float, str]]:
        """Raw score and label of the last decisions of the same scorer, newest first."""
        where, values = asked.where()
        return self._connection.execute(
            f"SELECT raw_score, label FROM decisions INDEXED BY decisions_by_model WHERE {where}"
            " AND scorer = ? AND verdict IN ('normal', 'anomaly') AND code = ''"
            " ORDER BY at DESC, number DESC LIMIT ?",
            [*values, scorer, limit],
        ).fetchall()

    def quarters(
        self, since: int, until: int, model: str | None = None
    ) -> Iterator[tuple[str, int, Quarter]]:
        """Model, beginning and sums of each quarter of an hour that began within a time."""
        rows = self._connection.execute(
            "SELECT model, at, content FROM quarters"
            " WHERE at >= ? AND at < ? AND (? IS NULL OR model = ?) ORDER BY at, model",
            [since, until, model, model],
        )
        for name, at, content in rows:
            yield name, at, Quarter.of(json.loads(content))

    def judged(self, asked: Filter) -> list[Judged]:
        """By which versions and limits decisions of a model were made, in the order of their times.

        Args:
            asked: names a model.
        """
        where, values = asked.where()
        rows = self._connection.execute(
            "SELECT version, threshold, raw_threshold, MIN(at) AS began, MAX(at), COUNT(*),"
            " SUM(verdict = 'anomaly') FROM decisions INDEXED BY decisions_by_model"
            f" WHERE {where} AND verdict IN ('normal', 'anomaly')"
            " GROUP BY version, threshold, raw_threshold ORDER BY began",
            values,
        )
        return [Judged(*row) for row in rows]

    def marks(self, asked: Filter) -> list[tuple[str, str, int]]:
        """Label, kind of defect and how many of these decisions have them; the most first."""
        where, values = asked.where()
        return self._connection.execute(
            f"SELECT label, defect, COUNT(*) FROM decisions INDEXED BY {asked.index(lambda: False)}"
            f" WHERE {where} GROUP BY label, defect ORDER BY COUNT(*) DESC, label, defect",
            values,
        ).fetchall()

    def worst(self, asked: Filter, limit: int, most_bytes: int, most_pixels: int) -> list[Kept]:
        """Those with the highest scores whose pictures are kept, and are not larger than this."""
        where, values = asked.where()
        rows = self._connection.execute(
            f"SELECT {_KEPT} FROM decisions INDEXED BY {asked.index(lambda: False)}"
            f" WHERE {where} AND picture_bytes BETWEEN 1 AND ? AND width * height <= ?"
            " ORDER BY score DESC, raw_score DESC, number LIMIT ?",
            [*values, most_bytes, most_pixels, limit],
        )
        return [Kept.of(row) for row in rows]

    def changes(self, since: int, until: int, limit: int, model: str | None = None) -> list[Line]:
        """Lines of the trail within a time that are no labels, oldest first.

        Args:
            model: none of other models than this one.
        """
        rows = self._connection.execute(
            f"SELECT number, {', '.join(TRAIL)}, hash FROM trail"
            " WHERE at >= ? AND at < ? AND what != 'label'"
            f" AND (? IS NULL OR subject = ? OR what NOT IN ({', '.join(map(repr, OF_MODELS))}))"
            " ORDER BY number LIMIT ?",
            [since, until, model, model, limit],
        )
        return [_line(row) for row in rows]

    def markers(self, since: int, until: int, model: str | None = None) -> list[tuple[str, int]]:
        """Who marked how many parts within a time; empty where no key was needed.

        Args:
            model: only parts that it judged, and whose decisions are kept.
        """
        return self._connection.execute(
            "SELECT who, COUNT(*) FROM trail WHERE at >= ? AND at < ? AND what = 'label'"
            " AND json_extract(details, '$.label') IS NOT ''"  # one that was withdrawn is no mark
            " AND (? IS NULL OR EXISTS"
            " (SELECT 1 FROM decisions WHERE id = subject AND model = ?))"
            " GROUP BY who ORDER BY COUNT(*) DESC, who",
            [since, until, model, model],
        ).fetchall()

    # ---- room --------------------------------------------------------------------------------

    def bytes_used(self) -> int:
        """What the lines take; pages that are free will be written again."""
        pages, free, size = (
            int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size

    def span(self) -> tuple[int, int]:
        """The first and the last number of the decisions that are kept; 0 for none."""
        row = self._connection.execute("SELECT MIN(number), MAX(number) FROM decisions").fetchone()
        return row[0] or 0, row[1] or 0

    def last_before(self, at: int) -> int:
        """The number up to which all decisions were made before a time; 0 for none.

        Not the last one of that age: a clock that was wrong after a start may have made it.
        """
        newer = self._connection.execute(  # in the order of numbers: it ends at the first
            "SELECT number FROM decisions NOT INDEXED WHERE at >= ? ORDER BY number LIMIT 1", [at]
        ).fetchone()
        row = self._connection.execute(
            "SELECT MAX(number) FROM decisions WHERE number < ?", [newer[0] if newer else 2**62]
        ).fetchone()
        return row[0] or 0

    def picture_bytes(self) -> int:
        """Of all pictures that are kept."""
        row = self._connection.execute(
            "SELECT SUM(picture_bytes) FROM decisions WHERE picture_bytes > 0"
        ).fetchone()
        return row[0] or 0

    def with_pictures(self, up_to: int = 2**62) -> list[int]:
        """The numbers of decisions up to one whose pictures are kept."""
        rows = self._connection.execute(
            "SELECT number FROM decisions WHERE picture_bytes > 0 AND number <= ?", [up_to]
        )
        return [row[0] for row in rows]

    def oldest_pictures(self, limit: int) -> list[tuple[int, int]]:
        """(number, bytes) of the oldest pictures; those that somebody has marked come last."""
        return self._connection.execute(
            "SELECT number, picture_bytes FROM decisions WHERE picture_bytes > 0"
            " ORDER BY label != '', number LIMIT ?",
            [limit],
        ).fetchall()

    # ---- whether it is whole -----------------------------------------------------------------

    def rows(
        self, table: str, after: int = 0, limit: int = -1
    ) -> Iterator[tuple[int, dict[str, Any], str]]:
        """Number, content and hash of each line of a table, in their order.

        Args:
            after: only of those with higher numbers.
            limit: that many at most; -1 for all.
        """
        names = COLUMNS if table == "decisions" else TRAIL
        there = _columns(self._connection, table)  # of an older Kensa, whom `kensa verify` reads
        selected = ", ".join(name if name in there else f"'' AS {name}" for name in names)
        rows = self._connection.execute(
            f"SELECT number, {selected}, hash FROM {table} WHERE number > ?"
            " ORDER BY number LIMIT ?",
            [after, limit],
        )
        for number, *content, hash_ in rows:
            yield number, dict(zip(names, content, strict=True)), hash_

    def hash_of(self, table: str, number: int) -> str | None:
        """Of one line; also of the last decision that was pruned. None where it is not there."""
        row = self._connection.execute(
            f"SELECT hash FROM {table} WHERE number = ?", [number]
        ).fetchone()
        if row is None and table == "decisions" and (pruned := self.pruned()):
            return pruned[1] if pruned[0] == number else None
        return row[0] if row else None

    @property
    def name(self) -> int:
        """A number that no other record has; it stays when the file is moved or copied."""
        return int(self._connection.execute("PRAGMA application_id").fetchone()[0])

    def make_durable(self) -> None:
        """See to it that no power cut takes what is written so far."""
        self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")  # which syncs the log first

    def labels(self) -> Iterator[tuple[int, str, str]]:
        """Number, label and defect of each decision that has one."""
        yield from self._connection.execute(
            "SELECT number, label, defect FROM decisions WHERE label != '' ORDER BY number"
        )

    def highest_ever(self, table: str) -> int:
        """The highest number that a line of a table ever had, by SQLite's own count."""
        row = self._connection.execute(
            "SELECT seq FROM sqlite_sequence WHERE name = ?", [table]
        ).fetchone()
        return row[0] if row else 0


class Judged(NamedTuple):
    """What a version decided with its limit."""

    version: str
    threshold: float  # for the score
    raw_threshold: float
    first: int  # milliseconds since 1970, UTC
    last: int
    parts: int
    rejects: int


class Flips(NamedTuple):
    """What a limit did and what another would have done, in numbers of decisions."""

    parts: int
    rejected: int
    would_reject: int
    good: int  # marked so by a person
    good_rejected: int
    good_would_reject: int
    defects: int
    defects_missed: int
    defects_would_miss: int


def _line(row: Sequence[Any]) -> Line:
    number, at, who, what, subject, reason, details, *rest = row
    return Line(number, at, who, what, subject, reason, json.loads(details), *rest)


def _columns(database: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in database.execute(f"PRAGMA table_info({table})")]


def open_or_make(folder: Path) -> DecisionDatabase:
    """The database of a folder, made where there is none; a damaged one is repaired, in words.

    Only for the server that has the folder: nobody else may have the file open.

    Raises:
        OSError, sqlite3.Error: it cannot be written, or is of another Kensa.
    """
    path = folder / FILE
    if not path.exists() and _repaired(path).exists():  # killed at the end of a repair
        _put_in_place(path, path.with_name(f"{FILE}.damaged"))
    if path.exists() and (why := _damage(path)):
        _repair(path, why)
    return _made(folder)


def _made(folder: Path) -> DecisionDatabase:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    with closing(sqlite3.connect(path, timeout=WAIT_S)) as database:
        layout = database.execute("PRAGMA user_version").fetchone()[0]
        # Who reads waits for nobody. Always: a copy by VACUUM INTO has lost it.
        database.execute("PRAGMA journal_mode = WAL")
        if layout == 0:
            database.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        elif not 0 < layout <= LAYOUT:
            raise sqlite3.DatabaseError(f"{path} is of another Kensa (layout {layout})")
        elif layout < LAYOUT:
            _renew(database)
        if database.execute("PRAGMA application_id").fetchone()[0] == 0:
            database.execute(f"PRAGMA application_id = {secrets.randbelow(2**31 - 1) + 1}")
    return DecisionDatabase(path)


def _renew(database: sqlite3.Connection) -> None:
    """Bring the tables of an older Kensa up to this one's, whoever begins to at the same time."""
    database.execute("BEGIN IMMEDIATE")
    (layout,) = database.execute("PRAGMA user_version").fetchone()
    for old in range(layout, LAYOUT):
        database.execute(_NEXT_LAYOUT[old])
    database.execute(f"PRAGMA user_version = {LAYOUT}")
    database.execute("COMMIT")


def note_once(folder: Path, what: str, subject: str, **details: Any) -> None:
    """Add a line to the audit trail from a command; the log says where that fails."""
    try:
        with _made(folder) as database:  # never repaired: a server may be writing it
            database.append([Note.now(what, "", subject, "", {**details, "by": "command"})])
    except (OSError, sqlite3.Error) as error:
        log.error("The audit trail lacks a line, %s of %s: %s", what, subject, error)


def _damage(path: Path) -> str | None:
    """What is wrong with a file; None where nothing is."""
    try:
        with closing(sqlite3.connect(path, timeout=WAIT_S)) as database:
            found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.OperationalError:  # it is locked, or cannot be read at the moment
        raise
    except sqlite3.DatabaseError as error:
        found = str(error)
    return None if found == "ok" else str(found)


def _repair(path: Path, why: str) -> None:
    """Take over into a new file whatever of it can be read, and put it aside."""
    aside = path.with_name(f"{FILE}.damaged-{secrets.token_hex(3)}")
    repaired = _repaired(path)
    repaired.unlink(missing_ok=True)
    counts = {}
    with closing(sqlite3.connect(repaired)) as new, closing(sqlite3.connect(path)) as old:
        new.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
        old.execute("PRAGMA writable_schema = ON")  # else nothing is read of a file that was cut
        for table in ("decisions", "trail", "quarters"):
            counts[table] = _take_over(old, new, table)
        new.commit()
    with DecisionDatabase(repaired) as database:
        details = {"aside": aside.name, **counts}
        database.append([Note.now("repair", "", FILE, why, details)])
    log.error(
        "%s was damaged (%s): it is now %s, and %d decisions and %d lines of the trail were taken"
        " over into a new one", path.name, why, aside.name, counts["decisions"], counts["trail"],
    )  # fmt: skip
    path.rename(aside)
    _put_in_place(path, aside)


def _repaired(path: Path) -> Path:
    return path.with_name(f"{FILE}.repaired")  # in its place once all is taken over


def _put_in_place(path: Path, aside: Path) -> None:
    """The repaired file, where the damaged one was; what lay beside that goes with it."""
    for suffix in ("-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    _repaired(path).rename(path)


def _take_over(old: sqlite3.Connection, new: sqlite3.Connection, table: str) -> int:
    """Copy the lines that can be read, from both ends; how many those were."""
    columns = _columns(new, table)
    with suppress(sqlite3.DatabaseError):  # the old one may be of an older Kensa, with fewer
        columns = [name for name in _columns(old, table) if name in columns]
    key, names = "at" if table == "quarters" else "number", ", ".join(columns)
    insert = f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({', '.join('?' * len(columns))})"
    for order in ("ASC", "DESC"):
        with suppress(sqlite3.DatabaseError):  # here the damage begins
            for row in old.execute(f"SELECT {names} FROM {table} ORDER BY {key} {order}"):
                with suppress(sqlite3.IntegrityError):
                    new.execute(insert, row)
    return int(new.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])
