"""Processes that are killed with SIGKILL while they write. Run as a script: it forks.

    killed.py meta FILE              at each step of Meta.write
    killed.py staged FOLDER          at each step of staged, with a set of files as a model has
    killed.py staged FOLDER KILLS    at KILLS random moments of it
    killed.py old FOLDER             at each step, over a set of files without hashes

Prints one JSON value per kill: what a reader finds afterwards.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engines.bundle import Bundle
from engines.errors import KensaError
from engines.files import sha256, staged
from engines.meta import Meta

STEPS = {"open", "os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir", "os.listdir"}
NAMES = ("golden.npz", "memory_bank.npz", "model.onnx", "report.json")
MANY = 10_000  # generations that nobody reaches before being killed


def main(what: str, path: Path, kills: int = 0) -> None:
    if what == "meta":
        new = Meta.read(path).with_(image_threshold=0.75)
        for _ in at_each_step(lambda: new.write(path)):
            show(Meta.read(path).image_threshold)
        return
    hashed = what != "old"
    write_set(path, 0, hashed=hashed)
    if kills:
        for _ in at_random(lambda: write_sets(path, range(1, MANY)), kills):
            show(found_in(path))
        return
    for _ in at_each_step(lambda: write_set(path, 1)):
        show(found_in(path))
        write_set(path, 0, hashed=hashed)
        assert found_in(path) == {"opens": True, "generations": [0]}, "not healed by the next write"


def write_sets(target: Path, generations: range) -> None:
    for generation in generations:
        write_set(target, generation)


def write_set(target: Path, generation: int, *, hashed: bool = True) -> None:
    """A set of files that all say of which generation they are, as does meta.json."""
    with staged(target) as folder:
        for name in NAMES:
            (folder / name).write_text(f"{generation} " * 5000)
        meta = Meta.model_validate(
            {
                "model": "patchcore", "backbone": "resnet18", "layers": ["layer2"],
                "coreset_ratio": 0.1, "image_size": 256, "generation": generation,
                "files": {name: sha256(folder / name) for name in NAMES} if hashed else None,
            }
        )  # fmt: skip
        meta.write(folder / "meta.json")


def found_in(target: Path) -> dict[str, Any]:
    """Whether the folder opens as a model, and the generations of the files in it."""
    generations = {int((target / name).read_text().split()[0]) for name in NAMES}
    generations.add(json.loads((target / "meta.json").read_text())["generation"])
    try:
        Bundle.open(target)
    except KensaError:
        return {"opens": False, "generations": sorted(generations)}
    return {"opens": True, "generations": sorted(generations)}


def at_each_step(act: Callable[[], None]) -> Iterator[None]:
    """Kill a process before its first step, another before its second, until one gets through."""
    for step in range(1000):
        child = os.fork()
        if child == 0:
            die_before(step)
            act()
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return
        yield


def die_before(step: int) -> None:
    """Let this process die by SIGKILL when it comes to its next step but `step`."""
    left = step

    def count(event: str, _: tuple[object, ...]) -> None:
        nonlocal left
        if event in STEPS:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(count)


def at_random(act: Callable[[], None], kills: int) -> Iterator[None]:
    chance = random.Random(0)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            act()
            os._exit(0)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        yield


def show(value: object) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
