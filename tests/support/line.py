"""A server with versions in its store, as a line has it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from engines.files import sha256
from engines.meta import Meta
from engines.store.bundle import read_bank, write_bank
from engines.store.versions import Store
from support.server import Server, serving

NAME = "part"


def variant(
    bundle: Path, target: Path, *, bank: float = 1.0, finite: bool = True, **meta: Any
) -> Path:
    """A model of its own, made of another: its memory bank stretched, its meta.json changed."""
    shutil.copytree(bundle, target)
    path = target / "memory_bank.npz"
    rows = read_bank(path) * np.float32(bank)
    write_bank(path, rows, 1.0)
    if not finite:
        _break_a_weight(target / "model.onnx")
    changed = Meta.read(target / "meta.json").with_(**meta)
    hashes = {name: sha256(target / name) for name in changed.files or {}}
    changed.with_(files=hashes).write(target / "meta.json")
    return target


def _break_a_weight(path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    weights = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    values = numpy_helper.to_array(weights).copy()
    values.flat[7] = np.nan
    weights.CopyFrom(numpy_helper.from_array(values, weights.name))
    onnx.save(model, path)


@dataclass
class Line:
    """A server, its store, and the versions in it."""

    server: Server
    store: Store

    def publish(self, folder: Path, name: str = NAME, **origin: Any) -> str:
        """As the worker does it."""
        return self.store.take_in(name, folder, {"activate": True, **origin}, plan=True)

    def activate(self, version: str, name: str = NAME) -> httpx.Response:
        return self.server.client.post(f"/models/{name}/versions/{version}/activate")

    def model(self, name: str = NAME) -> dict[str, Any]:
        answer = self.server.client.get(f"/models/{name}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def state(self, version: str, name: str = NAME) -> str:
        found = self.model(name)
        states = {one["version"]: one["state"] for one in found["versions"]}
        if version in found["refused"]:
            return "refused"
        return str(states[version])

    def wait(self, version: str, *states: str, name: str = NAME) -> str:
        """Until the version is in one of these states."""
        for _ in range(600):
            if (state := self.state(version, name)) in states:
                return state
            time.sleep(0.1)
        raise AssertionError(f"{version} is still {state}; log:\n{self.server.log.read_text()}")

    def score(self, image: bytes) -> tuple[str, float]:
        answer = self.server.infer(image)
        assert answer.status_code == 200, answer.text
        return answer.json()["model_version"], answer.json()["raw_score"]


@contextmanager
def line(folder: Path, *bundles: Path, **settings: str) -> Iterator[Line]:
    """A server whose model `part` has these versions; the last one is live."""
    store = Store(folder / "data" / "models")
    for bundle in bundles:
        store.activate(NAME, store.take_in(NAME, bundle, {}, plan=True))
    with serving(folder, **settings) as server:
        yield Line(server, store)


SLOW_DISK = """
import sys, time
from engines.store.versions import Store
activate, point = Store.activate, Store._point
Store.activate = lambda *which: [activate(*which), time.sleep(1)][0]
Store._point = lambda *which: [time.sleep(1), point(*which)][1]  # the gate's record stands by then
sys.argv = ["kensa"]
from app.__main__ import main
main()
"""
