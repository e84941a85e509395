"""What the tests share: a trained model, its data, and the real photos where there are any."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# As the commands set it, before anything loads torch: threads that spin take the other core away.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A shell that starts the tests in the background has Ctrl-C ignored, also by what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
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


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real photos and weights; skips where it is absent."""
    if not (ASSETS / "data").is_dir():
        pytest.skip(f"no real photos: KENSA_ASSETS names no folder of them ({ASSETS} is absent)")
    return ASSETS


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn sample parts in the layout that retrain.py reads; category sample_bracket."""
    from workers.sample_parts import write_dataset

    return write_dataset(tmp_path_factory.mktemp("data"), train=16, normal=6, per_kind=2, size=320)


@pytest.fixture(scope="session")
def trained(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What retrain.py leaves after learning the sample parts with an untrained backbone."""
    seed = tmp_path_factory.mktemp("models") / "PatchCore"
    meta = write_meta(seed / "meta.json")
    run("retrain.py", "--model", "patchcore", "--pretrained_pth", "untrained",
        "--meta_json", meta, "--category", "sample_bracket", "--data_root", sample_data,
        "--epochs", "1", "--batch", "4", "--out_dir", seed / "retrained")  # fmt: skip
    return seed / "retrained"


@pytest.fixture(scope="session")
def kensa_model(trained: Path) -> Path:
    """What convtrt.py makes of it: a bundle that the server loads. Copy it before changing it."""
    engine = trained.parent / "engine"
    run("convtrt.py", "--model", "patchcore", "--weights_pth", trained / "model.pth",
        "--meta_json", trained / "meta.json", "--memory_bank", trained / "memory_bank.npz",
        "--out_dir", engine)  # fmt: skip
    return engine


@pytest.fixture
def own_model(kensa_model: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(kensa_model, tmp_path / "model"))
