"""One contestant of `benchmarks.peers`, in an environment of its own: an engine, or a server.

    python benchmarks/peer.py prepare|engine|serve NAME FOLDER [PORT]
    python benchmarks/peer.py versions

It imports nothing of Kensa, whose packages another environment lacks, but for Kensa's own engine.
FOLDER has what `benchmarks.peers` learned: backbone.npz, bank.npy, train.npy, channels.npy,
pictures.npy. `prepare` makes of it what the contestant opens, in FOLDER/NAME.
"""

from __future__ import annotations

import os

# As Kensa's server does, before numpy is loaded: OpenBLAS would take a thread from the engines.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import contextlib
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Score = Callable[[NDArray[np.uint8]], float]  # (S, S, 3) RGB -> raw score

SIDE = 256
LAYERS = ["layer2", "layer3"]
PADIM_LAYERS = [0, 1, 2]  # as AnomaVision counts resnet18's first three
MEAN, SPREAD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])  # ImageNet
PACKAGES = ("anomalib", "openvino", "torch", "anomavision", "onnxruntime", "litserve", "fastapi")


def main() -> None:
    if sys.argv[1:] == ["versions"]:
        print(json.dumps(_versions()))
        return
    work, name, folder, *more = sys.argv[1:]
    place = Path(folder).resolve()
    if work == "prepare":
        _PREPARE[name](place, place / name)
    elif work == "engine":
        answer(place, name)
    else:
        _SERVE[name](place, int(more[0]))


# ---- anomalib ------------------------------------------------------------------------------------


def _anomalib(folder: Path) -> Any:
    """anomalib's PatchCore with the weights and the bank of the training."""
    import torch
    from anomalib.models import Patchcore

    model = Patchcore(backbone="resnet18", layers=LAYERS, pre_trained=False, num_neighbors=9)
    with np.load(folder / "backbone.npz") as weights:
        known = {key: torch.from_numpy(weights[key]) for key in weights}
    model.model.feature_extractor.load_state_dict(known)
    model.model.memory_bank = torch.from_numpy(np.load(folder / "bank.npy"))
    return model


def _prepare_anomalib_openvino(folder: Path, place: Path) -> None:
    # With its default for dynamic_shapes, anomalib 2.7 fixes PatchCore at batch 2: twice the work
    # for one image.
    _anomalib(folder).to_onnx(place, input_size=(SIDE, SIDE), dynamic_shapes=None)


def _prepare_anomalib_torch(folder: Path, place: Path) -> None:
    _anomalib(folder).to_torch(place)


def open_anomalib(folder: Path, precision: str | None = None) -> Score:
    """anomalib's OpenVINO inferencer as it comes, but for `post_process`."""
    from anomalib.deploy import OpenVINOInferencer

    place = folder / "anomalib-openvino"
    os.chdir(place)  # it keeps compiled graphs in openvino_cache of the current folder
    config = None if precision is None else {"INFERENCE_PRECISION_HINT": precision}
    inferencer = OpenVINOInferencer(place / "weights" / "onnx" / "model.onnx", config=config)
    # A tensor has several names in this graph, and its post_process takes the first one of a set:
    # whether predict works depends on the hash seed. Asking by name does less work, not more.
    names = ("pred_score", "anomaly_map")
    inferencer.post_process = lambda found: {name: found[name] for name in names}
    return lambda image: float(inferencer.predict(image).pred_score.item())


def _open_anomalib_torch(folder: Path) -> Score:
    os.environ["TRUST_REMOTE_CODE"] = "1"  # it opens a pickle, which this program has just made
    from anomalib.deploy import TorchInferencer

    path = folder / "anomalib-torch" / "weights" / "torch" / "model.pt"
    inferencer = TorchInferencer(path=path, device="cpu")
    return lambda image: float(inferencer.predict(image).pred_score.item())


def decoded(data: bytes) -> NDArray[np.uint8]:
    """A picture file as it is done in most services, (S, S, 3) RGB."""
    import cv2

    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    small = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    found: NDArray[np.uint8] = cv2.cvtColor(small, cv2.COLOR_BGR2RGB)
    return found


def _serve_fastapi(folder: Path, port: int) -> None:
    """A plain FastAPI app around anomalib's inferencer, as one writes it in an afternoon."""
    import threading
    from typing import Annotated

    import uvicorn
    from fastapi import Body, FastAPI

    app = FastAPI()
    score = open_anomalib(folder)
    alone = threading.Lock()  # its inferencer has one infer request: two threads would collide
    score(np.zeros((SIDE, SIDE, 3), np.uint8))

    def infer(data: bytes) -> dict[str, float]:
        image = decoded(data)
        with alone:
            return {"score": score(image)}

    infer.__annotations__["data"] = Annotated[bytes, Body(media_type="image/jpeg")]
    app.post("/infer")(infer)
    uvicorn.run(app, port=port, access_log=False, log_level="warning")


def _serve_litserve(folder: Path, port: int) -> None:
    from benchmarks.peer_litserve import serve

    serve(folder, port)


# ---- AnomaVision ---------------------------------------------------------------------------------


def _with_backbone(folder: Path) -> None:
    """Let torchvision give our weights instead of asking the internet for some."""
    import torch
    import torchvision
    from anomavision.algorithm.common import feature_extraction

    with np.load(folder / "backbone.npz") as weights:
        known = {key.partition(".")[2]: torch.from_numpy(weights[key]) for key in weights}

    def resnet18(**_: Any) -> Any:
        model = torchvision.models.resnet18(weights=None)
        left = model.load_state_dict(known, strict=False)
        if left.unexpected_keys or any(not key.startswith(_UNUSED) for key in left.missing_keys):
            raise ValueError(f"the weights do not fit its resnet18: {left}")
        return model

    feature_extraction.BACKBONES["resnet18"] = (resnet18, None)


_UNUSED = ("layer4.", "fc.")


def _prepare_anomavision(folder: Path, place: Path) -> None:
    """Its PaDiM, fitted to the same pictures with the same channels, as it saves and exports it."""
    import logging

    import torch
    from anomavision import Padim
    from anomavision.export import ModelExporter

    _with_backbone(folder)
    pictures = torch.from_numpy(_normal(np.load(folder / "train.npy")))
    channels = torch.from_numpy(np.load(folder / "channels.npy"))
    model = Padim("resnet18", channel_indices=channels, layer_indices=PADIM_LAYERS)
    batches = [(batch,) for batch in pictures.split(4)]
    with torch.no_grad():
        model.fit(batches)
    place.mkdir(exist_ok=True)
    model.save_statistics(str(place / "model.pth"), half=False)
    exporter = ModelExporter(place / "model.pth", place, logging.getLogger(), "cpu")
    if exporter.export_onnx((1, 3, SIDE, SIDE), "model.onnx", dynamic_batch=False) is None:
        raise ValueError("AnomaVision cannot export its model")


def _open_anomavision(folder: Path, file: str) -> Score:
    """Its own wrapper, which picks the library by the name of the file."""
    from anomavision.inference.model.wrapper import ModelWrapper

    _with_backbone(folder)
    model = ModelWrapper(str(folder / "anomavision" / file), "cpu")
    return lambda image: float(np.ravel(model.predict(_normal(image[None]))[0])[0])


def _normal(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(n, S, S, 3) uint8 -> (n, 3, S, S) float32, as ImageNet's networks take it."""
    normal = ((images / np.float32(255) - MEAN) / SPREAD).astype(np.float32)
    return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))


# ---- Kensa ---------------------------------------------------------------------------------------


def _open_kensa(bundle: Path) -> Score:
    from engines.runtimes.openvino import OpenVINORuntime
    from engines.store.bundle import Bundle

    runtime = OpenVINORuntime.open(Bundle.open(bundle))
    return lambda image: float(runtime.infer(image[None])[0][0])


# ---- an engine that is asked on stdin ------------------------------------------------------------


def answer(folder: Path, name: str) -> None:
    """Open an engine, then score pictures as often as a line of JSON asks, and print the answer."""
    talk = os.fdopen(os.dup(1), "w")  # what libraries print goes elsewhere
    os.dup2(2, 1)
    score = _ENGINES[name](folder)
    pictures = np.load(folder / "pictures.npy")  # (n, S, S, 3)
    score(pictures[0])
    opening = _peak_mib()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for picture in pictures[:10]:
        score(picture)
    said: Any = {"memory": {"opening": opening, "inferring": _peak_mib()}}
    while True:
        print(json.dumps(said), file=talk, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        said = _scored(score, pictures, **json.loads(line))


def _scored(
    score: Score, pictures: NDArray[np.uint8], begin: int = 0, count: int = 0, seconds: float = 0
) -> dict[str, list[float]]:
    """Milliseconds and raw scores of `count` pictures, or of as many as fit into `seconds`."""
    taken, scores = [], []
    until = time.perf_counter() + seconds
    for picture in islice(cycle(pictures), begin, None):
        if len(taken) >= count and time.perf_counter() >= until:
            break
        began = time.perf_counter()
        scores.append(score(picture))
        taken.append((time.perf_counter() - began) * 1000)
    return {"ms": taken, "scores": scores}


def _versions() -> dict[str, str]:
    """Of the packages that matter, as far as this environment has them."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


_PREPARE: dict[str, Callable[[Path, Path], None]] = {
    "anomalib-openvino": _prepare_anomalib_openvino,
    "anomalib-torch": _prepare_anomalib_torch,
    "anomavision": _prepare_anomavision,
}
_ENGINES: dict[str, Callable[[Path], Score]] = {
    "kensa": lambda folder: _open_kensa(folder / "patchcore" / "engine"),
    "kensa-padim": lambda folder: _open_kensa(folder / "padim" / "engine"),
    "anomalib-openvino": open_anomalib,
    "anomalib-openvino-f32": lambda folder: open_anomalib(folder, "f32"),
    "anomalib-torch": _open_anomalib_torch,
    "anomavision-onnx": lambda folder: _open_anomavision(folder, "model.onnx"),
    "anomavision-torch": lambda folder: _open_anomavision(folder, "model.pth"),
}
_SERVE: dict[str, Callable[[Path, int], None]] = {
    "fastapi": _serve_fastapi,
    "litserve": _serve_litserve,
}

if __name__ == "__main__":
    main()
