"""What the server tells its worker, and the worker the processes of its jobs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from app.background import Background
from app.jobs.worker_process import WorkerProcess
from app.settings import Settings
from engines.image import ImageLimits
from support.project import ROOT
from support.waiting import alive, until


def test_the_limits_of_the_server_are_those_of_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, str]] = []

    async def start(*_: str, env: dict[str, str], **__: Any) -> None:
        told.append(env)
        raise asyncio.CancelledError

    async def at_once() -> None:
        pass

    async def serve() -> None:
        settings = Settings(max_image_pixels=20_000_000, max_image_bytes=64_000_000)
        worker = WorkerProcess(tmp_path, settings, Background())
        worker.start(at_once())
        while not told:
            await asyncio.sleep(0.01)
        await worker.close()

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    asyncio.run(asyncio.wait_for(serve(), 30))
    assert ImageLimits.read(told[0]) == ImageLimits(64_000_000, 20_000_000)


def test_ctrl_c_in_the_terminal_is_no_error_while_the_worker_starts(tmp_path: Path) -> None:
    """The terminal sends it to all processes of its group, at whatever they are."""
    log = tmp_path / "server.log"
    settings = {"KENSA_PORT": "0", "KENSA_DATA_DIR": str(tmp_path / "data"), "KENSA_WORKER": "on"}
    with log.open("wb") as lines:
        server = subprocess.Popen(
            [sys.executable, "-m", "app"], cwd=ROOT, env={**os.environ, **settings}, stderr=lines,
            start_new_session=True,
        )  # fmt: skip
    try:
        until(lambda: _workers_of(tmp_path), log.read_text)
        (worker,) = _workers_of(tmp_path)
        time.sleep(0.2)  # into its imports, where it has no handler yet
        assert "Waiting for jobs" not in log.read_text()
        os.killpg(server.pid, signal.SIGINT)
        assert server.wait(timeout=60) in (0, -signal.SIGINT)
        until(lambda: not alive(worker))
    finally:
        server.kill()
        server.wait()
    said = log.read_text()
    assert "Traceback" not in said
    assert "ERROR" not in said


def _workers_of(folder: Path) -> list[int]:
    mark = f"workers.jobs\0--data_dir\0{folder}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes():
                found.append(int(path.parent.name))
    return found
