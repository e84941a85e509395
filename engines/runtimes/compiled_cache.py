"""The cache of compiled networks: pruned, and trusted only as far as a checksum goes.

OpenVINO reads a damaged file without complaint, and then scores wrongly. It does not flush what it
writes either, so a power cut soon after the first start can leave zeros in it.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from engines.files import sha256, write_atomically

KEPT = 16  # networks; a resnet18 takes about 10 MB

log = logging.getLogger("kensa")


def usable_cache(folder: Path | None) -> Path | None:
    """The folder, made where it is missing, with nothing in it but sealed files, the newest few.

    None, with a warning, where it cannot be written.
    """
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
        files = sorted(folder.glob("*.blob"), key=lambda path: path.stat().st_mtime, reverse=True)
        for number, file in enumerate(files):
            if number >= KEPT or not _is_sealed(file):
                file.unlink()
                _seal_of(file).unlink(missing_ok=True)
    except OSError as error:
        log.warning("Starts will be slower: %s cannot be used (%s)", folder, error.strerror)
        return None
    return folder


def seal_cache(folder: Path | None) -> None:
    """Write the checksum of each new file beside it. Call it once a network was compiled."""
    if folder is None:
        return
    try:
        for file in folder.glob("*.blob"):
            if not _seal_of(file).exists():
                write_atomically(_seal_of(file), sha256(file).encode())
    except OSError as error:
        log.warning("The next start will be slower: %s (%s)", folder, error.strerror)


def read_sealed(file: Path) -> bytes | None:
    """What a file holds; None where it is missing, cut or damaged, or cannot be read."""
    try:
        data, seal = file.read_bytes(), _seal_of(file).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("This start is slower: %s cannot be read (%s)", file, error.strerror)
        return None
    return data if hashlib.sha256(data).hexdigest().encode() == seal else None


def _seal_of(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _is_sealed(file: Path) -> bool:
    seal = _seal_of(file)
    return seal.is_file() and seal.read_bytes() == sha256(file).encode()
