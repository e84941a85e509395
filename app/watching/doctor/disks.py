"""The disks of the data folder and the cache: what is free, and whether they can be written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.settings import Settings
from app.watching.doctor.findings import Finding, free_of_total, note, wrong
from engines.machine.memory import MIB

LOW_DISK = 1024 * MIB


def disk_facts(settings: Settings) -> Iterator[tuple[str, Any]]:
    for name, folder in (("data", settings.data), ("cache", settings.compiled_dir)):
        if folder is not None:
            usage = shutil.disk_usage(_nearest(folder))
            yield name, f"{folder}, {free_of_total(usage.free, usage.total)}"


def disk_findings(settings: Settings) -> Iterator[Finding]:
    data, cache = settings.data, settings.compiled_dir
    free = shutil.disk_usage(_nearest(data)).free
    if free < LOW_DISK:
        yield wrong(
            f"The disk of {data} has {free // MIB:,} MiB left.",
            f"Delete images or models that are not needed: du -sh {data}/*/*",
        )
    if not os.access(_nearest(data), os.W_OK | os.X_OK):
        yield wrong(
            f"{data} cannot be written by this user ({_user()}).",
            f"sudo chown -R {_user()} {data}, or set KENSA_DATA_DIR to another folder",
        )
    if cache is None or not os.access(_nearest(cache), os.W_OK | os.X_OK):
        yield note(
            f"{cache or 'The cache'} cannot be written: each start compiles the models anew.",
            "Set KENSA_CACHE_DIR to a folder of this user.",
        )


def _nearest(folder: Path) -> Path:
    """The folder, or the one above it that there is, and that may be looked at."""
    return next(place for place in (folder, *folder.parents) if os.access(place, os.F_OK))


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
