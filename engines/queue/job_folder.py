"""Where a job says how it goes.

It changes many times a second, so it stands in files, which cost no flash memory its life:

    jobs/ID/progress.json   how far it is
    jobs/ID/log.txt         what it said
    jobs/ID/result.json     how it ended
    jobs/ID/work/           what it makes; gone when it ends
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from engines.files import printable, read_object, write_atomically


class JobFolder:
    """The files of one job."""

    def __init__(self, data: Path, job_id: str) -> None:
        self.root = data / "jobs" / job_id
        self.work = self.root / "work"
        self.log = self.root / "log.txt"

    def progress(self) -> dict[str, Any]:
        """How far it is; empty before it began."""
        return read_object(self.root / "progress.json") or {}

    def write_progress(self, content: dict[str, Any]) -> None:
        """In whole or not at all, but not flushed: after a power cut the job begins again."""
        temporary = self.root / ".progress"
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(self.root / "progress.json")

    def result(self) -> dict[str, Any] | None:
        """How it ended; None before that."""
        return read_object(self.root / "result.json")

    def write_result(self, content: dict[str, Any]) -> None:
        write_atomically(self.root / "result.json", json.dumps(content).encode())

    def attempts(self) -> int:
        """How often it was begun."""
        found = read_object(self.root / "attempts.json") or {}
        return int(found.get("attempts", 0))

    def begin(self) -> int:
        """Count one more attempt, flushed to the disk before it begins."""
        self.root.mkdir(parents=True, exist_ok=True)
        attempts = self.attempts() + 1
        write_atomically(self.root / "attempts.json", json.dumps({"attempts": attempts}).encode())
        return attempts

    def say(self, line: str) -> None:
        """Add a line to the log."""
        self.root.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(line)}\n")

    def go_on_with(self, text: str) -> None:
        """Let the log be what it was at the first call, and then what another machine says."""
        before = self.root / "before.txt"
        if not before.exists():
            write_atomically(before, self.log.read_bytes() if self.log.exists() else b"")
        temporary = self.root / ".log"
        temporary.write_bytes(before.read_bytes() + text.encode())
        temporary.replace(self.log)

    def lines(self, after: int = 0) -> tuple[list[str], int]:
        """Whole lines of the log from a byte on, and the byte after the last of them."""
        try:
            with self.log.open("rb") as file:
                file.seek(after)
                text = file.read()
        except FileNotFoundError:
            return [], after
        whole = text[: text.rfind(b"\n") + 1]
        return whole.decode("utf-8", "replace").splitlines(), after + len(whole)

    def clean(self) -> None:
        """Remove what was being made."""
        shutil.rmtree(self.work, ignore_errors=True)
