"""What a line may ask for beside verdicts, and what that costs each of them.

    python -m benchmarks.line_features [--clients N] [--turns N] [--seconds S]

Two servers with the same PatchCore model (256 pixels), which judge photos of 1024 x 1024 as JPEG:
one looks at nothing else; the other says which pictures are not usable, watches for drift, leaves a
region out of the score and has passed its challenge. They are asked in turns by the same clients.
All in one run, because machines differ from one minute to the next.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import cv2
import httpx
import numpy as np

from benchmarks.common import ASSETS, begin, phase, print_load, print_machine
from benchmarks.load import CATEGORY, WEIGHTS, compare, learned, server

SIDE = 1024  # pixels
ALL_ON = {"KENSA_UNUSABLE": "all", "KENSA_DRIFT_PARTS": "200"}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.line_features", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--clients", type=int, default=1, help="at once (default 1)")
    parser.add_argument("--turns", type=int, default=10, help="for each server (default 10)")
    parser.add_argument("--seconds", type=float, default=6, help="for each turn (default 6)")
    flags = parser.parse_args()
    begin()
    if not WEIGHTS.is_file():
        sys.exit(f"This benchmark needs real photos and weights: {WEIGHTS} does not exist.")
    print_machine(["openvino"])
    with tempfile.TemporaryDirectory() as folder:
        data = enlarged(Path(folder) / "data")
        with phase("learning"):
            engine = learned("patchcore", Path(folder) / "patchcore", data)
        beside_the_line(engine, data, flags.clients, flags.turns, flags.seconds)
    print_load("after")


def enlarged(root: Path) -> Path:
    """The photos as a camera of 1024 x 1024 pixels would send them."""
    for path in sorted((ASSETS / "data").glob(f"t*/{CATEGORY}/**/*.png")):
        photo = cv2.resize(cv2.imread(str(path)), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        place = root / path.relative_to(ASSETS / "data").with_suffix(".jpg")
        place.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place), photo, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return root


def beside_the_line(engine: Path, data: Path, clients: int, turns: int, seconds: float) -> None:
    """One server with all of it, and one with none."""
    normal = sorted((data / "test" / CATEGORY / "normal").iterdir())
    defective = sorted((data / "test" / CATEGORY / "anomaly").iterdir())
    photos = [path.read_bytes() for path in normal[:8]]
    with ExitStack() as stack:
        ports = {
            name: stack.enter_context(server(engine, "on", **more))[0]
            for name, more in (("off", {}), ("on", ALL_ON))
        }
        ask_for_all(f"http://127.0.0.1:{ports['on']}", normal[8], defective[0])
        compare("all of it", ports, photos, clients, turns, seconds)


def ask_for_all(url: str, good: Path, bad: Path) -> None:
    """Leave a corner out of the score, and pass a challenge."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[: SIDE // 8, : SIDE // 8] = 255
    _, png = cv2.imencode(".png", mask)
    with httpx.Client(base_url=url, timeout=60) as client:
        (model,) = client.get("/models").raise_for_status().json()["models"]
        place = f"/models/{model['name']}"
        client.put(f"{place}/regions", params={"reason": "benchmark"}, content=png.tobytes(),
                   headers={"Content-Type": "image/png"}).raise_for_status()  # fmt: skip
        files = [("good", good.open("rb")), ("bad", bad.open("rb"))]
        client.put(
            f"{place}/challenges", data={"reason": "benchmark"}, files=files
        ).raise_for_status()
        passed = client.post(f"{place}/challenge").raise_for_status().json()
        assert passed["passed"], passed


if __name__ == "__main__":
    main()
