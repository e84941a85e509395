"""Processes that are killed with SIGKILL while they write. Run as a script: it forks.

    killed.py meta FILE              at each step of Meta.write
    killed.py staged FOLDER          at each step of staged, with a set of files as a model has
    killed.py staged FOLDER KILLS    at KILLS random moments of it
    killed.py old FOLDER             at each step, over a set of files without hashes
    killed.py publish STORE [KILLS]  at each step, or at random moments, of Store.publish
    killed.py activate STORE [KILLS]     the same of Store.activate
    killed.py roll_back STORE [KILLS]    the same of Store.roll_back
    killed.py prune STORE [KILLS]        the same of Store.prune
    killed.py discard STORE [KILLS]      the same of Store.discard
    killed.py together STORE KILLS   one of several that change a model at the same time

Prints one JSON value per kill: what a reader finds afterwards.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).resolve().parents[n]) for n in (2, 1))

from engines.errors import Conflict, KensaError, UnknownVersion
from engines.files import sha256, staged
from engines.meta import Meta
from engines.store.bundle import Bundle
from engines.store.versions import Store

STEPS = {"open", "os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir", "os.listdir",
         "fcntl.flock"}  # fmt: skip
NAMES = ("golden.npz", "memory_bank.npz", "model.onnx", "report.json")
MANY = 10_000  # generations that nobody reaches before being killed
SEED = "seed"  # the model whose copies are changed


def main(what: str, path: Path, kills: int = 0) -> None:
    if what == "together":
        together(Store(path), kills)
        return
    if what in CHANGES:
        in_store(what, Store(path), kills)
        return
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
        end(child)
        yield


# ---- the model store ----------------------------------------------------------------------------


def in_store(what: str, store: Store, kills: int) -> None:
    """Kill processes that change a model, each a new copy of the seed."""
    seed(store)
    name = copy_of_seed(store, 0)
    change = CHANGES[what]

    def once() -> None:
        change(store, name)

    def for_ever() -> None:
        while True:
            change(store, name)

    killing = at_random(for_ever, kills) if kills else at_each_step(once)
    for number, _ in enumerate(killing, 1):
        show(stored(store, name))
        publish(store, name)
        healed = stored(store, name)
        assert healed["whole"], "not healed by the next publisher"
        assert healed["versions"][-1] == max(healed["versions"])
        assert not list((store.root / ".staging").glob("tmp*")), "nobody swept"
        store.activate(name, store.versions(name)[-1])
        store.prune(name, 1)
        assert not list((store.root / name).glob(".*-*")), "nobody pruned the rest"
        gates = {path.name for path in (store.root / name / "gates").iterdir()}
        assert gates <= set(store.versions(name))
        name = copy_of_seed(store, number)


def seed(store: Store) -> None:
    """Five versions, 0 to 4, all seen by the gate; 1 is live and 0 was before it."""
    for _ in range(5):
        store.record_gate(SEED, publish(store, SEED), {"ok": True})
    for version in store.versions(SEED)[:2]:
        store.activate(SEED, version)


def copy_of_seed(store: Store, number: int) -> str:
    name = f"part{number}"
    shutil.copytree(store.root / SEED, store.root / name)
    return name


def publish(store: Store, name: str, generation: int | None = None) -> str:
    """Publish a generation, or the next."""
    if generation is None:
        known = [generation_of(store, name, version) for version in store.versions(name)]
        generation = max(known, default=-1) + 1
    with store.staging() as folder:
        for file in (*NAMES, "meta.json"):
            (folder / file).write_text(f"{generation} " * 200)
        return store.publish(name, folder, {})


def activate(store: Store, name: str) -> None:
    """Make the oldest version live that neither is nor was before."""
    pointer = store.pointer(name)
    assert pointer is not None
    others = [one for one in store.versions(name) if one not in (pointer.live, pointer.previous)]
    store.activate(name, others[0])


def prune(store: Store, name: str) -> None:
    """Leave three versions; where there are no more, make some first."""
    if len(store.versions(name)) <= 3:
        for _ in range(3):
            store.record_gate(name, publish(store, name), {"ok": True})
    store.prune(name, 1)


def discard(store: Store, name: str) -> None:
    """The newest, whose number must not be given again; where there are few, make some first."""
    if len(store.versions(name)) <= 3:
        for _ in range(3):
            store.record_gate(name, publish(store, name), {"ok": True})
    store.discard(name, store.versions(name)[-1])


CHANGES: dict[str, Callable[[Store, str], object]] = {
    "publish": publish,
    "activate": activate,
    "roll_back": lambda store, name: store.roll_back(name),
    "prune": prune,
    "discard": discard,
}


def stored(store: Store, name: str) -> dict[str, Any]:
    """What a reader finds of a model, by generations, and whether every version is whole."""
    whole = all(is_whole(store, name, version) for version in store.versions(name))
    pointer = store.pointer(name)
    found = {
        "whole": whole,
        "versions": [generation_of(store, name, one) for one in store.versions(name)],
        "live": pointer and generation_of(store, name, pointer.live),
        "previous": pointer and pointer.previous and generation_of(store, name, pointer.previous),
        "candidates": [generation_of(store, name, one) for one in store.candidates(name)],
    }
    (store.root / name / "live").rename(store.root / "live")
    without = store.candidates(name)
    (store.root / "live").rename(store.root / name / "live")
    return {**found, "without pointer": [generation_of(store, name, one) for one in without]}


def is_whole(store: Store, name: str, version: str) -> bool:
    """Whether all files are there, as they were published, of one generation."""
    try:
        folder = store.check(name, version)
        files = store.manifest(name, version).files
        generations = {(folder / file).read_text().split()[0] for file in files}
    except (KensaError, OSError):
        return False
    return set(files) == {*NAMES, "meta.json"} and len(generations) == 1


def generation_of(store: Store, name: str, version: str) -> int:
    return int((store.root / name / version / "meta.json").read_text().split()[0])


def together(store: Store, kills: int) -> None:
    """A publisher, one who changes what is live and one who prunes; each may die at any moment."""
    seed(store)
    chance = random.Random(0)
    log = store.root.parent / "published"
    work: list[Callable[[], None]] = [
        lambda: publish_and_log(store, log),
        lambda: change_what_is_live(store, chance),
        lambda: keep_pruning(store),
    ]
    workers = [started(act) for act in work]
    try:
        for _ in range(kills):
            time.sleep(chance.uniform(0, 0.05))
            number = chance.randrange(len(work))
            end(workers[number])
            look_at(store)
            workers[number] = started(work[number])
    finally:
        for worker in workers:
            with suppress(ProcessLookupError):  # of one that ended by itself
                os.kill(worker, signal.SIGKILL)
    assert {os.waitpid(worker, 0)[1] for worker in workers} == {signal.SIGKILL}
    publish(store, SEED)
    serials = [line.split("-")[0] for line in log.read_text().split()]
    show({**stored(store, SEED), "published": len(serials), "numbers": len(set(serials))})


def started(act: Callable[[], None]) -> int:
    """A child that does something for ever; it ends with 1 where that raises."""
    child = os.fork()
    if child:
        return child
    try:
        while True:
            act()
    finally:
        os._exit(1)


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it ended by itself"


def publish_and_log(store: Store, log: Path) -> None:
    version = publish(store, SEED, random.SystemRandom().getrandbits(60))
    with log.open("a") as file:
        file.write(f"{version}\n")


def change_what_is_live(store: Store, chance: random.Random) -> None:
    version = chance.choice(store.versions(SEED))
    try:
        store.record_gate(SEED, version, {"ok": True})
        store.activate(SEED, version)
        store.roll_back(SEED)
    except (UnknownVersion, Conflict):
        pass  # it was pruned just now


def keep_pruning(store: Store) -> None:
    store.prune(SEED, 3)
    time.sleep(0.002)


def look_at(store: Store) -> None:
    """While others change it: every version that stays is whole, and the live one is there."""
    for version in store.versions(SEED):
        if not is_whole(store, SEED, version):
            assert version not in store.versions(SEED), "half of a version"
    for _ in range(1000):  # what is live may change between the two looks
        pointer = store.pointer(SEED)
        assert pointer is not None
        if pointer.live in store.versions(SEED):
            show({"live": pointer.live})
            return
    raise AssertionError("the live version is gone")


def show(value: object) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
