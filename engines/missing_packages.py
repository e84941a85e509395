"""Importing this makes a command say in one sentence that this Python lacks a package.

Each command imports it first. It needs nothing but the standard library.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

from engines.errors import EXIT_CODE

OURS = {"app", "engines", "workers"}
ROOT = Path(__file__).resolve().parent.parent
_usual = sys.excepthook


def sentence(package: str) -> str:
    """What to do about it, for the user of this checkout or of what was installed."""
    environment = ROOT / ".venv" / "bin"
    if (environment / "python").exists() and Path(sys.prefix).resolve() != environment.parent:
        mend = f"source {environment / 'activate'}, and type it again"
    elif (ROOT / "pyproject.toml").is_file():
        mend = f"pip install '{ROOT}[train]', or '{ROOT}' to serve only"
    else:
        mend = "pip install 'kensa[train]', or kensa to serve only"
    return f"{sys.executable} has no package {package}: {mend}."


def _say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not package or package in OURS:
        _usual(kind, error, trace)
        return
    sys.stderr.write(f"error: {sentence(package)}\n")
    sys.stderr.flush()
    os._exit(EXIT_CODE)  # an excepthook cannot say another way what the process exits with


sys.excepthook = _say
