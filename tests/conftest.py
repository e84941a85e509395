"""What the tests share: a trained model, its data, and the real photos where there are any."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import engines  # noqa: F401 (before numpy)
from support import forking
from support.project import ASSETS, run, write_meta
from support.server import Compiled

if TYPE_CHECKING:
    from support.fleet import Postgres

# As the commands set it, before anything loads torch: threads that spin take the other core away.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Each of the many processes that tests start would compile the project anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# A shell that starts the tests in the background has Ctrl-C ignored, also by what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

Once = Callable[[str, Callable[[Path], object]], Path]

LONGEST = (  # minutes each: begun last they would run alone, while the other processes are done
    "product/test_kinds.py",
    "app/jobs/test_job_queue.py",
    "workers/test_learn.py",
    "app/web/test_review.py",
    "app/open_inference/test_model_repository.py",
    "app/serving/test_drift.py",
    "app/web/test_teach.py",
    "app/web/test_line.py",
    "app/serving/test_rollout.py",
    "product/test_commands.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; `make test` keeps this order."""
    tests = Path(__file__).parent
    order = {tests / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session", autouse=True)
def _no_settings() -> None:
    """What somebody has set in this shell is not what the tests are about."""
    for name in [name for name in os.environ if name.startswith("KENSA_")]:
        del os.environ[name]


@pytest.fixture(scope="session", autouse=True)
def _servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """They share what they compile, where a test names no other place, and what they import."""
    Compiled.folder = tmp_path_factory.mktemp("compiled")
    yield
    forking.end_all()


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real photos and weights; skips where it is absent."""
    if not (ASSETS / "data").is_dir():
        pytest.skip(f"no real photos: KENSA_ASSETS names no folder of them ({ASSETS} is absent)")
    return ASSETS


def shared_by_all(config: pytest.Config) -> Path:
    """A folder of this run, the same in all processes that run its tests."""
    base: Path = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """While a test with the marker `alone` runs, the other processes wait."""
    folder = shared_by_all(item.config)
    with (folder / "door").open("w") as door, (folder / "room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)  # so that nobody comes in while one waits to be alone
        fcntl.flock(room, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # also where a process that was forked has it open


@pytest.fixture(scope="session")
def once(pytestconfig: pytest.Config) -> Once:
    """Makes a folder once for all processes that run tests."""
    shared = shared_by_all(pytestconfig) / "once"
    shared.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def sample_data(once: Once) -> Path:
    """Drawn sample parts in the layout that retrain.py reads; category sample_bracket."""
    from workers.sample_parts.write_dataset import write_dataset

    return once("data", partial(write_dataset, train=16, normal=6, per_kind=2, size=320))


@pytest.fixture(scope="session")
def trained(sample_data: Path, once: Once) -> Path:
    """What retrain.py leaves after learning the sample parts with an untrained backbone."""

    def learn(out: Path) -> None:
        meta = write_meta(out.parent / "PatchCore" / "meta.json")
        run("retrain.py", "--model", "patchcore", "--pretrained_pth", "untrained",
            "--meta_json", meta, "--category", "sample_bracket", "--data_root", sample_data,
            "--epochs", "1", "--batch", "4", "--out_dir", out)  # fmt: skip

    return once("retrained", learn)


@pytest.fixture(scope="session")
def kensa_model(trained: Path, once: Once) -> Path:
    """What convtrt.py makes of it: a bundle that the server loads. Copy it before changing it."""

    def convert(out: Path) -> None:
        run("convtrt.py", "--model", "patchcore", "--weights_pth", trained / "model.pth",
            "--meta_json", trained / "meta.json", "--memory_bank", trained / "memory_bank.npz",
            "--out_dir", out)  # fmt: skip

    return once("engine", convert)


@pytest.fixture
def no_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extra dev brings no TensorRT for RTX: on no x86-64 Linux."""
    from engines.nvidia import library

    find = library.find_spec
    monkeypatch.setattr(
        library, "find_spec", lambda name: None if name == "tensorrt_rtx" else find(name)
    )


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A real one; skips where it is not installed."""
    from support.fleet import running_postgres

    with running_postgres() as database:
        yield database


@pytest.fixture
def own_model(kensa_model: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(kensa_model, tmp_path / "model"))
