"""`make bench`: contestants in processes of their own, and what happens without one of them."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.peer_models import PHOTO_BYTES, photo
from benchmarks.peers import OpenServer, Peers, Refused, Report, Service
from engines.image import decode
from support.plans import SIDE, tiny_bank, tiny_bundle

PAUSE_S = 0.02  # of the server below, before it answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `learn` leaves it for Kensa's engine, but for the size of the model."""
    folder = tmp_path_factory.mktemp("peers")
    (folder / "patchcore").mkdir()
    tiny_bundle(folder / "patchcore" / "engine", tiny_bank(1))
    images = np.random.default_rng(3).integers(0, 255, (12, SIDE, SIDE, 3), np.uint8)
    np.save(folder / "pictures.npy", images)
    return folder


def test_one_that_cannot_be_installed_is_named_and_the_rest_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(peers.ENVIRONMENTS, "anomalib", [str(tmp_path / "no-such-package")])
    report = Report({"CPU": "any"})
    with ExitStack() as stack:
        contestants = Peers(folder, tmp_path / "cache", ["anomalib-torch", "kensa"], report)
        (kensa,) = contestants.open_engines(stack)
        assert "no-such-package" in report.absent["anomalib, torch inferencer"]
        found = kensa.ask(begin=10, count=3)
        again = kensa.ask(seconds=0.2)
    assert kensa.process.returncode == 0
    assert found["scores"][2] == pytest.approx(again["scores"][0])  # the first of 12 once more
    assert sum(again["ms"]) > 150
    assert kensa.memory["opening"] > 50
    report.write(tmp_path / "peers.json")
    assert json.loads((tmp_path / "peers.json").read_text())["absent"] == report.absent


def test_a_table_compares_each_server_with_the_first_and_with_its_engine() -> None:
    base, ours = (server(name, 0) for name in ("fastapi", "kensa"))
    base.rates, ours.rates = [10.0, 20.0, 30.0], [40.0, 60.0, 120.0]
    base.ms, ours.ms = [100.0] * 9, [10.0] * 9
    _, (_, row) = peers._of_servers([base, ours], {"kensa": [50.0, 60.0, 150.0]})
    assert row[4:] == ["60.0", "40.0 to 120.0", "4.00x", "0.80 (0.80 to 1.00)"]


def test_at_a_steady_beat_a_wait_begins_when_the_picture_was_due(port: int) -> None:
    waits = peers._post(server("kensa", port), clients=2, seconds=1.0, beat=0.1)
    assert 14 <= len(waits) <= 20
    assert min(waits) >= 1000 * PAUSE_S
    late = peers._post(server("kensa", port), clients=1, seconds=0.5, beat=PAUSE_S / 4)
    assert max(late) > 5 * PAUSE_S * 1000  # it falls behind more and more, and says so


def test_an_answer_that_is_no_verdict_ends_it(port: int) -> None:
    with pytest.raises(Refused, match="415: not this"):
        peers._post(server("litserve", port, body="form"), clients=1, seconds=0.2)


def test_servers_get_what_a_camera_sends(tmp_path: Path) -> None:
    import cv2

    noise = np.random.default_rng(0).integers(0, 255, (380, 550, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "part.png"), cv2.blur(noise, (3, 3)))
    data = photo(tmp_path / "part.png")
    assert len(data) <= PHOTO_BYTES
    assert decode(data).shape == (1024, 1024, 3)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a server that takes one picture at a time, and no forms."""
    alone = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            with alone:
                time.sleep(PAUSE_S)
            good = self.headers["Content-Type"] == "image/jpeg"
            self.send_response(200 if good else 415)
            self.send_header("Content-Length", "8")
            self.end_headers()
            self.wfile.write(b"verdict!" if good else b"not this")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        serving.daemon_threads = True
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield serving.server_port
        serving.shutdown()
        thread.join()


def server(name: str, port: int, body: str = "raw") -> OpenServer:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return OpenServer(Service(name, name, "kensa", body=body), process, port, [b"a picture"])
