"""Whether the chains of decisions and of the audit trail are whole: `kensa verify`."""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
from contextlib import closing
from datetime import datetime, timezone
from typing import NamedTuple

import psycopg

from app.decisions.collector import Shared, first_different
from app.decisions.database import FILE, DecisionDatabase
from app.decisions.decision import FIRST_HASH, hash_after
from app.settings import Settings
from engines.errors import BadRecord, Conflict
from engines.queue.fleet import device_name


class Found(NamedTuple):
    """What was looked at, and the first thing that is wrong with it."""

    lines: int
    decisions: int
    first: int  # the number of the first decision that is kept
    head: str  # the hash of the last one: whoever wrote it down can tell that all are still there
    problem: str | None


def verify(database: DecisionDatabase, noted: tuple[int, str] | None = None) -> Found:
    """Walk along both chains up to the first line that breaks one.

    Args:
        noted: the number and hash of a decision that somebody wrote down, as a report on paper.
    """
    with database.reading():
        found = _verify(database)
        if noted is not None and found.problem is None:
            return found._replace(problem=_of_noted(database, *noted))
        return found


def _of_noted(database: DecisionDatabase, number: int, hash_: str) -> str | None:
    there = database.hash_of("decisions", number) if abs(number) < 2**63 else None
    if there is None:
        return (
            f"Decision {number} is not in the record: it was never made, or is too old to be kept."
        )
    if there != hash_.lower():
        return f"Decision {number} is not the one that was noted: its hash is {there}."
    return None


def _verify(database: DecisionDatabase) -> Found:
    lines, problem = 0, None
    named: dict[int, str] = {}  # decisions that lines of the trail name, by their hash
    labels: dict[int, tuple[str, str]] = {}
    pruned, before, expected = (0, FIRST_HASH), FIRST_HASH, 1
    for number, content, hash_ in database.rows("trail"):
        when = _time(content["at"])
        if number != expected:
            problem = f"line {expected} of the audit trail is missing: {number} comes next ({when})"
            break
        if hash_after(before, {"number": number, **content}) != hash_:
            problem = f"line {number} of the audit trail was changed ({content['what']}, {when})"
            break
        lines, before, expected = lines + 1, hash_, number + 1
        details = json.loads(content["details"])
        named[content["decisions"]] = content["decisions_hash"]
        if content["what"] == "prune":
            pruned = details["number"], details["hash"]
        elif content["what"] == "label":
            labels[details["number"]] = details["label"], details["defect"]
    if problem is None and database.highest_ever("trail") >= expected:
        problem = f"line {expected} of the audit trail is missing, and all after it"
    if problem is not None:
        return Found(lines, 0, 0, FIRST_HASH, f"{problem[0].upper()}{problem[1:]}.")
    decisions, head, problem = _along_decisions(database, pruned, named)
    problem = problem or _of_labels(database, labels, pruned[0])
    return Found(lines, decisions, pruned[0] + 1, head, problem)


def _along_decisions(
    database: DecisionDatabase, pruned: tuple[int, str], named: dict[int, str]
) -> tuple[int, str, str | None]:
    number, before = pruned
    expected, count = number + 1, 0
    for number, content, hash_ in database.rows("decisions"):
        who = f"{content['id']}, {_time(content['at'])}"
        if number != expected:
            return count, before, f"Decision {expected} is missing: {number} comes next ({who})."
        if hash_after(before, {"number": number, **content}) != hash_:
            return count, before, f"Decision {number} was changed ({who})."
        if named.get(number, hash_) != hash_:
            return count, before, f"Decision {number} is not the one that the trail names ({who})."
        count, before, expected = count + 1, hash_, number + 1
    if max(database.highest_ever("decisions"), max(named, default=0)) >= expected:
        return count, before, f"Decision {expected} is missing, and all after it."
    return count, before, None


def _of_labels(
    database: DecisionDatabase, said: dict[int, tuple[str, str]], pruned: int
) -> str | None:
    # One that was withdrawn has an empty label in the trail, and none in the table.
    said = {number: label for number, label in said.items() if number > pruned and label[0]}
    found = {number: (label, defect) for number, label, defect in database.labels()}
    for number in sorted(said.keys() | found.keys()):
        if said.get(number) != found.get(number):
            return f"The label of decision {number} is not the last one in the audit trail."
    return None


def _time(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def command(arguments: list[str]) -> None:
    """`kensa verify`.

    Raises:
        BadRecord: something is not as it was written; the sentence names the first of it.
    """
    parser = argparse.ArgumentParser(
        prog="kensa verify",
        description="Check the record in KENSA_DATA_DIR: whether a decision or a line of the audit"
        " trail was changed, removed or put in. Exits with 2 and names the first that is wrong.",
    )
    parser.add_argument("--decision", type=int, metavar="N",
        help="the number of a decision on a report of a shift, to hold that against the record",
    )  # fmt: skip
    parser.add_argument("--hash", metavar="H", help="its hash there")
    flags = parser.parse_args(arguments)
    if (flags.decision is None) != (flags.hash is None):
        parser.error("say both, --decision and --hash, as they stand on the report")
    noted = None if flags.decision is None else (flags.decision, flags.hash)
    settings = Settings.read()
    path = settings.data / "decisions" / FILE
    if not path.is_file():
        raise BadRecord(f"There is no record yet: {path} does not exist.")
    try:
        with DecisionDatabase(path) as database:
            found = verify(database, noted)
            collected = _collected(database, settings) if found.problem is None else ""
    except sqlite3.Error as error:
        raise BadRecord(f"{path} cannot be read: {error}.") from error
    if found.problem is not None:
        raise BadRecord(found.problem)
    sys.stdout.write(
        f"The record is whole: {found.decisions:,} decisions from number {found.first:,} on, and"
        f" {found.lines:,} lines of the audit trail.\nThe last decision's hash: {found.head}\n"
        f"{collected}"
    )
    if noted is not None:
        sys.stdout.write(f"Decision {noted[0]:,} is the one that was noted.\n")


def _collected(database: DecisionDatabase, settings: Settings) -> str:
    """What comes of comparing it with what was collected elsewhere, which nobody here can write.

    Raises:
        BadRecord: the two differ.
        Conflict: nobody answers there.
    """
    postgres = settings.collected_in
    if postgres is None:
        return ""
    device = device_name(settings.device)
    try:
        with closing(Shared(postgres, device, database.name)) as shared:
            if not shared.is_made():
                return f"Nothing is collected yet in {postgres.place}.\n"
            count, problem = first_different(database, shared)
    except psycopg.Error as error:
        raise Conflict(
            f"The record here is whole. What is collected in {postgres.place} cannot be compared:"
            f" {postgres.shown(error)}."
        ) from error
    if problem is not None:
        raise BadRecord(f"{problem} ({device} in {postgres.place}).")
    return f"As collected in {postgres.place} under {device}: {count:,} lines, all the same.\n"
