"""What TensorRT measured of its kernels, kept between the builds of one machine."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from engines.files import write_atomically
from engines.store.plan_record import Machine
from workers.progress import Progress


class TimingCache:
    """The timing cache of this machine, between builds: a file with its SHA-256 in front."""

    def __init__(self, folder: Path | None, machine: Machine, progress: Progress) -> None:
        key = hashlib.sha256(repr(machine).encode()).hexdigest()[:16]
        self._path = None if folder is None else folder / f"timing-{key}.bin"
        self._progress = progress

    def give(self, config: Any) -> None:
        """Let a build begin with what is known. A damaged file is as good as none."""
        data = b""
        if self._path is not None and self._path.is_file():
            content = self._path.read_bytes()
            data = content[32:]
            if hashlib.sha256(data).digest() != content[:32]:
                self._warn("is damaged")
                data = b""
        timing_cache = config.create_timing_cache(data)
        if timing_cache is None:
            self._warn("is not for this TensorRT")
            timing_cache = config.create_timing_cache(b"")
        config.set_timing_cache(timing_cache, ignore_mismatch=False)

    def keep(self, config: Any) -> None:
        """A plan that is there is not lost because this cannot be written."""
        if self._path is None:
            return
        data = bytes(config.get_timing_cache().serialize())
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, hashlib.sha256(data).digest() + data)
        except OSError as error:
            self._progress.say(f"the next build takes as long: {self._path}: {error.strerror}")

    def _warn(self, what: str) -> None:
        self._progress.say(f"timing cache {self._path} {what}: it is made anew")
