"""What is learned again and again: schedules/NAME.json, which outlive a damaged queue."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from pydantic import ValidationError

from engines.files import read_object, write_atomically
from engines.queue.job_requests import RetrainRequest

NAME = r"^[A-Za-z0-9_-]{1,64}$"  # of a schedule: part of the ids of its jobs


class Schedules:
    """What is learned again and again: a file each."""

    def __init__(self, data: Path) -> None:
        self._folder = data / "schedules"

    def all(self) -> dict[str, dict[str, Any]]:
        """Name -> cron, timezone, retrain. A damaged one is not there."""
        found = {path.stem: read_object(path) or {} for path in sorted(self._folder.glob("*.json"))}
        return {name: one for name, one in found.items() if _is_schedule(one)}

    def write(self, name: str, content: dict[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / f"{name}.json", json.dumps(content).encode())

    def remove(self, name: str) -> None:
        (self._folder / f"{name}.json").unlink(missing_ok=True)


def last_due(cron: str, zone: str, now: float) -> datetime:
    """The last moment before `now` (seconds since 1970) that a cron expression names, in UTC.

    Raises:
        ValueError, KeyError, OSError: there is no such expression, moment or time zone.
    """
    from croniter import croniter

    local = datetime.fromtimestamp(now, ZoneInfo(zone))
    due: datetime = croniter(cron, local).get_prev(datetime)
    return due.astimezone(timezone.utc)


def _is_schedule(found: dict[str, Any]) -> bool:
    """Whether a schedule's file holds what it should; somebody may have written it by hand."""
    if not all(isinstance(found.get(key), str) for key in ("cron", "timezone")):
        return False
    try:
        RetrainRequest.model_validate(found.get("retrain"))
    except ValidationError:
        return False
    return True
