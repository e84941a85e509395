"""The project as a user runs it, and where the real photos are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


ASSETS = Path(os.environ.get("KENSA_ASSETS", ROOT.parent / "shared" / "assets"))


PATCHCORE = {
    "backbone": "resnet18",
    "layers": ["layer2", "layer3"],
    "coreset_ratio": 0.1,
    "image_size": 256,
    "weights_pth": "model.pth",
    "memory_bank": "memory_bank.npz",
    "image_threshold": 0.5,
}


def run(
    *command: str | Path, cwd: Path | None = None, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of the repository as a user would; `check` fails the test when it fails."""
    words = [str(word) for word in command]
    if words[0].endswith(".py"):
        words = [sys.executable, str(ROOT / words[0]), *words[1:]]
    done = subprocess.run(
        words,
        cwd=cwd or ROOT,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if check and done.returncode:
        pytest.fail(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def write_meta(path: Path, **changes: Any) -> Path:
    """A meta.json as an engineer writes it before the first training."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**PATCHCORE, **changes}))
    return path
