"""`make demo`: from pictures of normal parts to verdicts over HTTP, on this machine.

It goes the way a user goes: pictures in folders, retrain, convert, start the server, post a part.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import httpx
import numpy as np

from engines.errors import BadSettings, RuntimeFailed
from engines.files import write_atomically
from engines.meta import FIRST, Meta
from workers.commands import run, summarise_conversion, summarise_training
from workers.progress import Progress
from workers.sample_parts.fields import Pixels
from workers.sample_parts.write_dataset import CATEGORY, write_dataset

START_LIMIT_S = 120.0
STOP_LIMIT_S = 30.0
TERMINATED = 143  # what shells expect after SIGTERM
PARTS = {  # that it judges: what they are called, and their files below test/<category>
    "good part": "normal/0000.png",
    "burr": "anomaly/burr_00.png",
    "missing hole": "anomaly/missing_hole_00.png",
    "stain": "anomaly/stain_00.png",
}
CELL, HEAD = 360, 36  # pixels, of a part in the picture and of the words above it


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo ARGS=...", description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=8000, help="of the server (default 8000)")
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="(default .demo)")
    parser.add_argument("--once", action="store_true", help="judge the parts and end")
    flags = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so the server ends, too
    progress = Progress()
    stay = not flags.once
    return run(lambda: demo(flags.folder.resolve(), flags.port, progress, stay=stay), progress)


def demo(folder: Path, port: int, progress: Progress, *, stay: bool = True) -> None:
    """Draw, learn, convert, serve, inspect; stay until Ctrl-C, or end."""
    _must_be_free(port)
    progress.say(f"1/4  drawing sample parts into {folder / 'data'}")
    data = write_dataset(folder / "data", progress=progress)
    progress.say("2/4  learning what a normal part looks like")
    trained = _learn(data, folder / "models", progress)
    progress.say("3/4  converting the model")
    engine = _convert(trained, folder / "models" / "engine", progress)
    progress.say(f"4/4  starting the server on port {port}")
    with _Server(engine, port) as server:
        _inspect(server, data, folder / "verdicts.jpg")
        if stay:
            server.run_until_stopped()


def _must_be_free(port: int) -> None:
    """Raise BadSettings where something listens on the port already: it would be taken for ours."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        raise BadSettings(
            f"Port {port} cannot be had: {error.strerror}. Stop what uses it, or pass another"
            " --port (make demo ARGS='--port 8001')."
        ) from None


def _learn(data: Path, models: Path, progress: Progress) -> Path:
    from workers.learning.retrain import Retrain, retrain

    meta_json = models / "meta.json"
    models.mkdir(parents=True, exist_ok=True)
    Meta.model_validate(FIRST).write(meta_json)
    trained = models / "trained"

    report = retrain(Retrain(FIRST["model"], CATEGORY, data, trained, meta_json), progress)
    print("\n".join(summarise_training(report, trained)), flush=True)
    return trained


def _convert(trained: Path, engine: Path, progress: Progress) -> Path:
    from workers.converting.convert import Convert, convert

    request = Convert(FIRST["model"], trained / "model.pth", trained / "meta.json", engine)
    print("\n".join(summarise_conversion(convert(request, progress), engine)), flush=True)
    return engine


def _inspect(server: _Server, data: Path, picture: Path) -> None:
    """Post a good part and bad ones, print and draw the verdicts, and how to ask for one by hand.

    Args:
        picture: the JPEG file that is drawn.
    """
    cells = []
    print()
    for name, file in PARTS.items():
        path = data / "test" / CATEGORY / file
        verdict = _answer(server, path, "application/json").json()
        print(
            f"{name:<12} {path.name:<19} {verdict['label']:<8} score {verdict['score']:.3f}"
            f" (threshold {verdict['threshold']:.2f}), {verdict['timing']['total_ms']:.0f} ms"
        )
        drawn = _answer(server, path, "image/png").content
        cells.append(_cell(drawn, name, verdict["label"], verdict["score"]))
    _, jpeg = cv2.imencode(".jpg", np.hstack(cells), [cv2.IMWRITE_JPEG_QUALITY, 88])
    write_atomically(picture, jpeg.tobytes())
    print(
        f"\nAll of them: {picture}"
        f"\nTry it:      curl -F file=@{path} {server.url}/infer"
        f"\nSee it:      curl -F file=@{path} -H 'Accept: image/png' -o overlay.png"
        f" {server.url}/infer"
        f"\nThe screen:  {server.url}/"
        f"\nDocs page:   {server.url}/docs",
        flush=True,
    )


def _answer(server: _Server, path: Path, kind: str) -> httpx.Response:
    headers = {"Content-Type": "image/png", "Accept": kind}
    answer = httpx.post(f"{server.url}/infer", content=path.read_bytes(), headers=headers)
    return answer.raise_for_status()


def _cell(drawn: bytes, name: str, label: str, score: float) -> Pixels:
    """A part as the server drew it, uint8 BGR (CELL + HEAD, CELL, 3), its verdict above it."""
    part = cv2.imdecode(np.frombuffer(drawn, np.uint8), cv2.IMREAD_COLOR)
    head = np.full((HEAD, CELL, 3), 40, np.uint8)
    words, colour = ("OK", (120, 220, 120)) if label == "Normal" else ("NG", (110, 110, 255))
    font, line = cv2.FONT_HERSHEY_SIMPLEX, cv2.LINE_AA
    cv2.putText(head, f"{words} {score:.2f}  {name}", (10, 24), font, 0.6, colour, 1, line)
    return np.vstack([head, cv2.resize(part, (CELL, CELL), interpolation=cv2.INTER_AREA)])


class _Server:
    """`kensa` in a process of its own, ready when the block is entered and gone after it."""

    def __init__(self, engine: Path, port: int) -> None:
        environment = {
            "KENSA_MODEL_DIR": str(engine),
            "KENSA_DATA_DIR": str(engine.parents[1] / "kensa"),
            "KENSA_PORT": str(port),
        }
        _must_be_free(port)  # learning takes its time
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "app"],
            env={**os.environ, **environment, "KENSA_LOG_LEVEL": "warning"},
        )

    def __enter__(self) -> _Server:
        try:
            self._until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _until_ready(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeFailed("The server did not start; its own message is above.")
            try:
                if httpx.get(f"{self.url}/readyz").status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise RuntimeFailed(f"The server was not ready within {START_LIMIT_S:.0f} s.")

    def run_until_stopped(self) -> None:
        """Until Ctrl-C, or until it ends by itself."""
        try:
            print("\nThe server runs until Ctrl-C.", flush=True)
            self._process.wait()
        except KeyboardInterrupt:
            print("Stopping.", flush=True)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


if __name__ == "__main__":
    sys.exit(main())
