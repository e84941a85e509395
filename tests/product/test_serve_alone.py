"""A server as the Jetson's image `serve` has it: without torch, by a user without rights, on a
disk that is read-only, and without a home."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.serving.loader import _behind_the_line
from engines.errors import NoWorker
from engines.queue.job_folder import JobFolder
from support import double
from support.containers import INSTALLED, JETSON, environment, health_check
from support.installed import NOBODY, interpreter, lay_out, shut_in, tiny_model, why_not
from support.project import ROOT
from support.server import RAW
from workers.jobs import job_process as job
from workers.sample_parts.drawing import draw_part

STARTS_WITHIN_S = 60.0
JOB_ENDS_WITHIN_S = 120.0


@dataclass
class Alone:
    """The server, and what it was started with."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    port: int
    disk: Path
    log: Path
    command: Callable[..., subprocess.CompletedProcess[str]]  # kensa, as the same user

    def health(self) -> Any:
        return self.client.get("/healthz").json()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("alone")
    packages = lay_out(INSTALLED, folder / "packages")
    disk = folder / "disk"
    for name in ("data", "cache"):
        (disk / name).mkdir(parents=True)
        os.chown(disk / name, NOBODY, NOBODY)
    os.chown(disk, NOBODY, NOBODY)
    for place in (folder, *folder.parents[:3]):
        place.chmod(place.stat().st_mode | 0o711)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {
        **environment("base"),
        **double.environment(),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, packages, double.DOUBLES))),
        "KENSA_PORT": str(port),
        "KENSA_DATA_DIR": str(disk / "data"),
        "KENSA_CACHE_DIR": str(disk / "cache"),
        "CUDA_CACHE_PATH": str(disk / "cache/cuda"),
        "KENSA_JOB_PACE": "full",  # else a job waits for all other tests on the machine
        "KENSA_MODEL_DIR": str(tiny_model(folder / "tiny")),
    }
    del variables["PATH"], variables["HOME"]

    def kensa(*arguments: str) -> list[str]:
        return shut_in(disk, interpreter(), "-m", "app", *arguments, **variables)

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(kensa(*arguments), capture_output=True, text=True, timeout=60)

    made = command("keys", "add", "operator", "--role", "operator")
    assert made.returncode == 0, made.stderr
    (key,) = re.findall(r"kensa_[0-9a-f]{8}_\S+", made.stdout)
    log = folder / "server.log"
    with log.open("wb") as lines:
        process = subprocess.Popen(kensa(), stdout=lines, stderr=lines)
    try:
        until(lambda: "listens on" in log.read_text(), process, log)
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False,
            headers={"X-API-Key": key},
        ) as client:  # fmt: skip
            client.get("/livez")
            yield Alone(process, client, port, disk, log, command)
    finally:
        process.kill()
        process.wait()


def until(
    done: Callable[[], Any],
    process: subprocess.Popen[bytes],
    log: Path,
    within: float = STARTS_WITHIN_S,
) -> None:
    for _ in range(int(within * 10)):
        if done():
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def test_it_runs_as_nobody_without_rights_or_a_home(alone: Alone) -> None:
    status = Path(f"/proc/{alone.process.pid}/status").read_text()
    assert re.search(rf"^Uid:\s+{NOBODY}\s+{NOBODY}\s", status, re.M)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.M)
    variables = Path(f"/proc/{alone.process.pid}/environ").read_bytes().split(b"\0")
    assert not [one for one in variables if one.startswith((b"HOME=", b"XDG_"))]
    mounts = Path(f"/proc/{alone.process.pid}/mounts").read_text()
    assert re.search(r"^\S+ / \S+ ro[, ]", mounts, re.M)


def test_what_it_loads_is_without_torch(alone: Alone) -> None:
    loaded = Path(f"/proc/{alone.process.pid}/maps").read_text()
    assert "numpy" in loaded
    assert "torch" not in loaded


def test_the_image_s_health_check_asks_this_server_and_no_other(alone: Alone) -> None:
    def healthy(port: int) -> int:
        variables = {"KENSA_HOST": "0.0.0.0", "KENSA_PORT": str(port)}
        variables["http_proxy"] = "http://127.0.0.1:1"  # no way to the server itself
        program = [interpreter(), *health_check()[1:]]
        return subprocess.run(program, env=variables, capture_output=True).returncode

    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = taken.getsockname()[1]
    assert healthy(alone.port) == 0
    assert healthy(nobody) != 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_whoever_is_far_behind_others_already_can_still_load_models() -> None:
    """The loader gives way to the line, and nobody without rights may come forward for that."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            far = os.nice(15)
            os.setuid(NOBODY)
            _behind_the_line()
            status = 0 if os.getpriority(os.PRIO_PROCESS, 0) == far else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_a_model_without_a_plan_gets_one_where_nothing_can_be_learned(alone: Alone) -> None:
    """The first verdicts come from OpenVINO; the plan is built by a job, and goes live."""
    image = png(draw_part(1, "stain")[0])

    def on_tensorrt() -> bool:
        (model,) = alone.health()["models"]
        return bool(model["runtime"] == "tensorrt")

    first = alone.client.post("/infer", content=image, headers=RAW)
    assert first.status_code == 200, first.text
    until(on_tensorrt, alone.process, alone.log, JOB_ENDS_WITHIN_S)
    then = alone.client.post("/infer", content=image, headers=RAW).json()
    assert then["label"] == first.json()["label"]
    assert then["raw_score"] == pytest.approx(first.json()["raw_score"], rel=0.01)
    # Not "another than the first": on a busy machine this asks when the plan is live already.
    assert then["model_version"].startswith("0002-")


def test_a_retraining_ends_there_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "find_spec", lambda name: None)
    wanted = {"model": "tiny", "category": "bolt"}
    progress = job.JobProgress(JobFolder(tmp_path, "retrain-1"), job.SPANS)
    with pytest.raises(NoWorker, match="pip install"):
        job.do(tmp_path, "retrain-1", "retrain", wanted, progress)


def test_the_doctor_runs_there_too(alone: Alone) -> None:
    said = alone.command("doctor", "--json")
    assert json.loads(said.stdout)["facts"]["software"]["learning"].startswith("not installed")


def test_sigterm_ends_it_in_time_and_only_the_data_folders_were_written(alone: Alone) -> None:
    began = time.monotonic()
    alone.process.send_signal(signal.SIGTERM)
    assert alone.process.wait(JETSON["stop_grace_period"]) == 0
    assert time.monotonic() - began < JETSON["stop_grace_period"] - 5
    assert "Traceback" not in alone.log.read_text()
    assert {path.name for path in alone.disk.iterdir()} == {"data", "cache"}


def png(picture: Any) -> bytes:
    import cv2

    return bytes(cv2.imencode(".png", picture[..., ::-1])[1])
