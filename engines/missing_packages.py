"""Importing this makes a command say in one sentence that this Python lacks a package, or that it
was stopped while it was loaded.

Each command imports it first. It needs nothing but the standard library.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from engines.errors import EXIT_CODE, INTERRUPTED

OURS = {"app", "engines", "workers"}
ROOT = Path(__file__).resolve().parent.parent
_usual = sys.excepthook


def sentence(package: str) -> str:
    """What to do about it, for the user of this checkout or of what was installed."""
    environment = ROOT / ".venv" / "bin"
    active = Path(sys.prefix).resolve() == environment.parent.resolve()
    if (environment / "python").exists() and not active:
        mend = f"source {environment / 'activate'}, and type it again"
    elif (ROOT / "pyproject.toml").is_file():
        mend = f"pip install '{ROOT}[train]', or '{ROOT}' to serve only"
    else:
        mend = "pip install 'kensa[train]', or kensa to serve only"
    return f"{sys.executable} has no package {package}: {mend}."


def _say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        _end("Stopped.", INTERRUPTED)
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not package or package in OURS:
        _usual(kind, error, trace)
        return
    _end(sentence(package), EXIT_CODE)


def _end(why: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {why}\n")
    sys.stderr.flush()
    os._exit(code)  # an excepthook cannot say another way what the process exits with


sys.excepthook = _say
