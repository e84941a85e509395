"""What the server tells its worker, and the worker the processes of its jobs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from app.background import Background
from app.jobs.worker_process import WorkerProcess
from app.settings import Settings
from engines.image import ImageLimits


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
