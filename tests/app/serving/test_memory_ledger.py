"""Claims about what fits into memory: predictions, refusals, models that take turns."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from engines.files import sha256
from engines.machine import memory
from engines.machine.memory import MIB, Free, Gpu, Need
from engines.machine.memory_needs import Learning, plan_needs, to_convert, to_distil, to_learn
from engines.meta import FIRST, Meta
from engines.store.bundle import write_bank
from engines.store.golden import Golden
from engines.store.plan_record import Fingerprint, Machine
from engines.store.versions import Store
from support.damage import picture, saved
from support.double import environment
from support.line import variant
from support.project import ROOT
from support.server import RAW, Server, agreed, serving
from support.waiting import until

NANO = Machine("10.3.0", "8.7", "Orin", "36.4.3")
PATCHCORE = {"model": "patchcore", "backbone": "resnet18", "layers": ["layer2", "layer3"],
             "coreset_ratio": 0.1, "image_size": 256}  # fmt: skip
SHORT = str(ROOT / "tests" / "support" / "short.py")


# Numbers


def test_a_jetson_has_one_memory_and_one_allocation_must_fit_what_both_sides_call_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 3000 * MIB)
    assert Free.now(Gpu(4300 * MIB, 7485 * MIB, shared=True)) == Free(3000 * MIB)
    assert Free.now(Gpu(2000 * MIB, 7485 * MIB, shared=True)) == Free(2000 * MIB)
    short = Need(1000 * MIB, 1500 * MIB).short_of(Free(2000 * MIB))
    assert short is not None
    assert (short.needed, short.free) == ("about 2500 MiB", "2000 MiB are free")
    assert Need(1000 * MIB, 1000 * MIB).short_of(Free(2000 * MIB)) is None


def test_a_gpu_with_memory_of_its_own_makes_two_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 3000 * MIB)
    free = Free.now(Gpu(2000 * MIB, 12282 * MIB, shared=False))
    assert free == Free(3000 * MIB, 2000 * MIB)
    assert Need(3000 * MIB, 2000 * MIB).short_of(free) is None
    of_the_gpu = Need(1, 2001 * MIB).short_of(free)
    assert of_the_gpu is not None
    assert of_the_gpu.needed == "about 2001 MiB of the GPU"
    of_the_host = Need(3001 * MIB, 1).short_of(free)
    assert of_the_host is not None
    assert of_the_host.needed == "about 3001 MiB"
    assert free.without(Need(1000 * MIB, 500 * MIB)) == Free(2000 * MIB, 1500 * MIB)
    assert Free(3000).without(Need(1000, 500)) == Free(1500)
    assert free.at_most(MIB) == Free(MIB, MIB)
    assert free.at_most(-1) == Free(0, 0)


def test_a_plan_says_what_it_takes_and_its_bank_comes_on_top(tmp_path: Path) -> None:
    Meta.parse(PATCHCORE).write(tmp_path / "meta.json")
    record = Fingerprint(NANO, "a" * 64, "b" * 64, "f16", 4, 1500, True, 300 * MIB)
    record.write(tmp_path)
    without = plan_needs(tmp_path)
    assert without.device == 300 * MIB
    (tmp_path / "memory_bank.npz").write_bytes(bytes(10 * MIB))
    (tmp_path / "model.plan").write_bytes(bytes(20 * MIB))
    with_bank = plan_needs(tmp_path)
    assert with_bank.device == 310 * MIB
    assert 30 * MIB <= with_bank.host - without.host < 40 * MIB
    replace(record, device_bytes=900 * MIB).write(tmp_path)
    assert plan_needs(tmp_path).device == 910 * MIB


def learning(kind: dict[str, Any], train: int = 40, **more: int) -> int:
    return to_learn(Learning(Meta.parse(kind), train, **more))


@pytest.mark.parametrize(
    "kind",
    [
        PATCHCORE,
        {"model": "padim", "backbone": "resnet18", "layers": ["layer1"], "n_features": 50,
         "image_size": 256},
        {"model": "efficientad", "model_size": "small", "image_size": 256},
        {"model": "vae", "latent_dim": 64, "image_size": 256},
    ],
    ids=lambda kind: str(kind["model"]),
)  # fmt: skip
def test_more_and_larger_images_and_batches_take_more(kind: dict[str, Any]) -> None:
    least = learning(kind)
    assert least > 1000 * MIB, "torch alone"
    assert learning(kind, 80) > least or kind["model"] == "padim"
    assert learning(kind, test=500) > least
    assert learning(kind, batch=16) > least
    assert learning({**kind, "image_size": 512}) > least
    large = Meta.parse({**kind, "image_size": 512})
    assert to_convert(large) > to_convert(Meta.parse(kind))


def test_what_is_known_already_and_a_larger_share_of_patches_take_more() -> None:
    least = learning(PATCHCORE)
    assert learning(PATCHCORE, known=100 * MIB) >= least + 100 * MIB
    assert learning({**PATCHCORE, "coreset_ratio": 0.5}) > least
    assert learning({**PATCHCORE, "backbone": "some_net"}) > least, "taken for a large one"
    assert to_convert(Meta.parse(PATCHCORE), 100 * MIB) > to_convert(Meta.parse(PATCHCORE))


def test_200_pictures_may_be_learned_with_the_usual_settings_where_2_gib_are_free() -> None:
    """Its backbone was taken for a wide_resnet50_2, and 46 GiB were asked for."""
    assert learning(FIRST, 200) < 2048 * MIB


def measured() -> list[tuple[str, Meta, int, int, str, int, int]]:
    """The table of docs/benchmarks.md."""
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    part = page.split("## Memory of learning and converting")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\w+) (\S*) ?(\S*) +\|" + r" +(\S+) \|" * 6 + "$", part, re.M)
    found = []
    for kind, of, share, size, images, batch, what, most, predicted in rows[1:]:  # without the head
        meta: dict[str, Any] = {"model": kind, "image_size": int(size)}
        if kind in ("patchcore", "padim"):
            lite = "lite" in of
            layers = ["blocks.2", "blocks.4"] if lite else ["layer2", "layer3"]
            meta |= {"backbone": of, "layers": layers}
        if kind == "patchcore":
            meta["coreset_ratio"] = float(share)
        elif kind == "padim":
            meta |= {"layers": ["layer1", "layer2", "layer3"], "n_features": int(share)}
        elif kind == "efficientad":
            meta["model_size"] = of
        else:
            meta["latent_dim"] = 64
        found.append(
            (kind, Meta.parse(meta), int(images), int(batch), what, int(most), int(predicted))
        )
    return found


def test_every_prediction_lies_above_what_was_measured() -> None:
    rows = measured()
    assert len(rows) >= 30
    for kind, meta, images, batch, what, most, written in rows:
        known = Learning(meta, images, 4, batch)
        predicted = to_learn(known) if what == "retrain" else to_convert(meta, known.bank)
        assert predicted // MIB == written, f"{kind} {what}: the page has an old prediction"
        assert most <= written <= 1.8 * most, f"{kind} {meta.image_size} {images} {batch} {what}"


def test_the_prediction_for_a_teacher_lies_above_what_was_measured() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = re.findall(r"^\| (small|medium) +" + r"\| +(\d+) " * 4 + r"\|$", page, re.M)
    assert len(rows) >= 4
    for size, px, images, most, written in rows:
        assert to_distil(int(images), int(px), size) // MIB == int(written), (size, px)
        assert int(most) <= int(written) <= 1.8 * int(most)


def test_a_command_warns_before_work_that_may_not_fit_and_does_it_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.converting.convert import Convert, convert
    from workers.learning.retrain import Retrain, retrain
    from workers.progress import Progress

    said: list[str] = []
    progress = Progress(quiet=True)
    monkeypatch.setattr(progress, "say", said.append)
    monkeypatch.setattr(memory, "free_bytes", lambda: 0)
    monkeypatch.setattr(memory, "_own", lambda: 100 * MIB)
    put_images(tmp_path, 6)
    Meta.parse({"model": "vae", "latent_dim": 8, "image_size": 64}).write(tmp_path / "meta.json")
    data, out = tmp_path / "datasets", tmp_path / "out"
    retrain(Retrain("vae", "bolt", data, out, tmp_path / "meta.json", "untrained"), progress)
    pattern = r"memory may be short: this takes about \d+ MiB, and 100 MiB are free; .*"
    assert any(re.fullmatch(pattern, line) for line in said)
    said.clear()
    convert(Convert("vae", out / "model.pth", out / "meta.json", tmp_path / "engine"), progress)
    assert any(re.fullmatch(pattern, line) for line in said)
    monkeypatch.undo()
    assert memory.warning(1) is None
    assert memory._own() > 10 * MIB


# Models that take turns


def photo(seed: int) -> bytes:
    return saved(Image.fromarray(np.roll(picture(300, 256), 31 * seed, 1)), "PNG")


@contextmanager
def three(folder: Path, models: dict[str, Path], **settings: str) -> Iterator[Server]:
    """A server with room for two of three models."""
    store = Store(folder / "data" / "models")
    for name, bundle in models.items():
        store.activate(name, store.take_in(name, bundle, {}))
    with serving(
        folder, **{"KENSA_MODEL_MEMORY_MIB": "350", "KENSA_BATCHING": "off", **settings}
    ) as server:
        yield server


@pytest.fixture(scope="module")
def models(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three that give other scores each."""
    folder = tmp_path_factory.mktemp("models")
    stretched = {"bolt": 1.0, "nut": 0.9, "rod": 0.8}
    return {name: variant(kensa_model, folder / name, bank=by) for name, by in stretched.items()}


def ask(server: Server, name: str, image: bytes) -> httpx.Response:
    return server.client.post(f"/infer?model={name}", content=image, headers=RAW)


def until_it_answers(server: Server, name: str, image: bytes) -> httpx.Response:
    for _ in range(600):
        if (answer := ask(server, name, image)).status_code == 200:
            return answer
        assert (answer.status_code, agreed(answer)) == (503, "not_ready")
        assert answer.headers["retry-after"]
        time.sleep(0.1)
    raise AssertionError(server.log.read_text())


def resting(server: Server) -> list[str]:
    found: list[str] = server.client.get("/healthz").json()["resting"]
    return found


def rests_only(server: Server, name: str) -> bool:
    return resting(server) == [name]


def test_without_the_setting_the_one_too_many_is_refused_with_the_numbers(
    models: dict[str, Path], tmp_path: Path
) -> None:
    with three(tmp_path, models) as server:
        answer = ask(server, "rod", photo(0))
        assert (answer.status_code, agreed(answer)) == (503, "not_ready")
        pattern = r"rod \S+ needs about \d+ MiB, and \d+ MiB are free: unload another model\."
        assert re.fullmatch(pattern, answer.json()["error"])
        assert server.client.get("/readyz").status_code == 503
        refused = server.client.post("/v2/repository/models/rod/load")
        assert (refused.status_code, agreed(refused)) == (507, "out_of_memory")
        assert ask(server, "bolt", photo(0)).status_code == 200
        assert ask(server, "nut", photo(0)).status_code == 200


@pytest.fixture(scope="module")
def turns(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Where models take turns, as often as they like."""
    settings = {"KENSA_REST": "on", "KENSA_REST_S": "0"}
    with three(tmp_path_factory.mktemp("turns"), models, **settings) as server:
        yield server


def test_who_got_no_part_for_longest_makes_room_and_a_part_brings_it_back(turns: Server) -> None:
    assert resting(turns) == ["rod"], "at the start nobody is put to rest for another"
    for name in ("bolt", "nut", "bolt"):
        assert ask(turns, name, photo(1)).status_code == 200
    answer = ask(turns, "rod", photo(1))
    assert (answer.status_code, agreed(answer)) == (503, "not_ready")
    assert answer.headers["retry-after"]
    assert until_it_answers(turns, "rod", photo(1)).json()["model_name"] == "rod"
    assert resting(turns) == ["nut"]
    seen = {one["name"]: one for one in turns.client.get("/models").json()["models"]}
    assert [seen[name]["at_rest"] for name in ("bolt", "nut", "rod")] == [False, True, False]
    assert "a part for it brings it back" in seen["nut"]["problem"]
    assert seen["nut"]["resident_bytes"] is None
    assert seen["rod"]["resident_bytes"] > 100 * MIB
    assert 'kensa_rests_total{model="nut"} 1.0' in turns.client.get("/metrics").text
    assert "nut is put to rest, to make room for rod" in turns.log.read_text()
    assert turns.client.get("/readyz").status_code == 200, "nobody misses it"


def test_who_just_came_back_is_not_the_first_to_go_again(turns: Server) -> None:
    """Its last part is long ago, and it has answered none since."""
    for name in ("bolt", "nut", "rod"):
        until_it_answers(turns, name, photo(1))
    (away,) = resting(turns)
    first, second = sorted({"bolt", "nut", "rod"} - {away})
    for name in (first, second):
        assert ask(turns, name, photo(1)).status_code == 200
    for comes, goes in ((away, first), (first, second)):
        assert ask(turns, comes, photo(1)).status_code == 503
        until(partial(rests_only, turns, goes), turns.log.read_text)


def test_a_look_does_not_bring_a_model_back(turns: Server) -> None:
    until_it_answers(turns, "bolt", photo(1))
    (away,) = resting(turns)
    for path in (f"/v2/models/{away}", f"/v2/models/{away}/ready", f"/models/{away}", "/metrics"):
        turns.client.get(path)
    time.sleep(1)
    assert resting(turns) == [away]


def test_judging_a_picture_again_takes_no_model_out_of_memory(turns: Server) -> None:
    ids = {name: until_it_answers(turns, name, photo(1)).json()["id"] for name in
           ("bolt", "nut", "rod")}  # fmt: skip
    (away,) = resting(turns)
    answer = turns.client.post(f"/decisions/{ids[away]}/replay")
    assert (answer.status_code, agreed(answer)) == (507, "out_of_memory")
    assert resting(turns) == [away]
    assert turns.client.post(f"/decisions/{ids['rod']}/replay").status_code == 200
    preview = turns.client.get(f"/models/{away}/threshold/preview", params={"raw": 1})
    assert (preview.status_code, agreed(preview)) == (503, "not_ready")


def test_a_person_may_load_a_model_that_rests_and_unload_one(turns: Server) -> None:
    (away,) = resting(turns)
    load = turns.client.post(f"/v2/repository/models/{away}/load")
    assert (load.status_code, load.json()["state"]) == (200, "READY")
    (other,) = resting(turns)
    turns.client.post(f"/v2/repository/models/{other}/unload")
    assert resting(turns) == []
    answer = ask(turns, other, photo(1))
    assert "is unloaded" in answer.json()["error"], "a person wanted it so: no part brings it back"
    turns.client.post(f"/v2/repository/models/{other}/load")


@pytest.mark.alone
def test_under_load_every_answer_is_the_right_verdict_or_says_that_the_model_rests(
    turns: Server,
) -> None:
    names = ("bolt", "nut", "rod")
    right = {name: until_it_answers(turns, name, photo(2)).json()["raw_score"] for name in names}
    assert len(set(right.values())) == 3
    seen: Counter[tuple[str, int]] = Counter()
    wrong: list[Any] = []
    done = threading.Event()

    def send(name: str) -> None:
        with httpx.Client(base_url=turns.url, timeout=60, trust_env=False) as client:
            while not done.wait(0.2):
                answer = client.post(f"/infer?model={name}", content=photo(2), headers=RAW)
                seen[name, answer.status_code] += 1
                body = answer.json()
                if answer.status_code == 200:
                    if body["model_name"] != name or body["raw_score"] != right[name]:
                        wrong.append(body)
                elif (answer.status_code, body["code"]) != (503, "not_ready"):
                    wrong.append(body)

    def rests() -> int:
        metrics = turns.client.get("/metrics").text
        return sum(map(int, re.findall(r"kensa_rests_total\{\S+\} (\d+)", metrics)))

    before = rests()
    threads = [threading.Thread(target=send, args=[name]) for name in names * 2]
    for thread in threads:
        thread.start()
    try:
        until(
            lambda: rests() - before > 2 and all(seen[name, 200] > 1 for name in names),
            lambda: f"{rests() - before} rests, {dict(seen)}",
            within_s=180,  # the thread that loads has what the parts leave
        )
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert turns.client.get("/healthz").json()["problems"] == {}


def moment(server: Server, text: str) -> datetime:
    """When a line was written that says so."""
    (line,) = [line for line in server.log.read_text().splitlines() if text in line]
    return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f")


def test_the_pinned_one_stays_and_turns_are_not_taken_with_every_part(
    models: dict[str, Path], tmp_path: Path
) -> None:
    settings = {"KENSA_REST": "on", "KENSA_REST_S": "10", "KENSA_PINNED": "rod, screw"}
    with three(tmp_path, models, **settings) as server:
        assert resting(server) == ["nut"], "the pinned one came first"
        assert "KENSA_PINNED names screw, and there is no such model" in server.log.read_text()
        assert ask(server, "bolt", photo(0)).status_code == 200
        refused = ""
        while (answer := ask(server, "nut", photo(0))).status_code == 503:
            refused = answer.json()["error"] if "MiB" in answer.text else refused
            time.sleep(0.2)
        assert answer.status_code == 200
        came, went = (moment(server, line) for line in ("Loaded bolt ", "bolt is put to rest"))
        assert (went - came).total_seconds() > 9.9
        pattern = (r"nut rests: nut \S+ needs about \d+ MiB, and \d+ MiB are free: bolt may be put"
                   r" to rest for it in \d s\.")  # fmt: skip
        assert re.fullmatch(pattern, refused)
        assert server.log.read_text().count("nut is not in memory: ") <= 2, "not for each part"
        assert resting(server) == ["bolt"]
        assert ask(server, "rod", photo(0)).status_code == 200


# Jobs


@pytest.fixture
def limits(tmp_path: Path) -> Callable[[int, int], Path]:
    """A container of so many MiB, of which some are taken."""

    def lay(most: int, used: int) -> Path:
        folder = tmp_path / "cgroup"
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text(str(most * MIB))
        (folder / "memory.current").write_text(str(used * MIB))
        return folder

    return lay


def put_images(data: Path, count: int = 4) -> None:
    folder = data / "datasets" / "train" / "bolt"
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(photo(number))


def test_a_job_that_does_not_fit_is_refused_at_once_with_the_numbers(
    limits: Callable[[int, int], Path], models: dict[str, Path], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    store = Store(data / "models")
    store.activate("bolt", store.take_in("bolt", models["bolt"], {}))
    put_images(data)
    cgroup = limits(4000, 3000)
    program = (SHORT, str(cgroup), "app")
    with serving(tmp_path, program, KENSA_BATCHING="off") as server:
        until(lambda: server.client.get("/jobs").status_code == 200, server.log.read_text)
        for path, body in (("/retrain", {"model": "bolt", "category": "bolt"}),
                           ("/convert", {"model": "bolt"})):  # fmt: skip
            answer = server.client.post(path, json=body)
            assert (answer.status_code, agreed(answer)) == (507, "out_of_memory")
            said = answer.json()["error"]
            assert re.match(r"\w+ing bolt needs about \d+ MiB, and 1000 MiB are free: ", said)
            assert "KENSA_JOB_MEMORY=wait" in said
        limits(1000, 100)
        answer = server.client.post("/convert", json={"model": "bolt"})
        assert "it will never fit here" in answer.json()["error"]
        assert ask(server, "bolt", photo(0)).status_code == 200
        limits(4000, 100)
        jobs = [server.client.post("/retrain", json={"model": "bolt", "category": "bolt"})]
        assert jobs[0].status_code == 202, jobs[0].text
        limits(4000, 3000)  # the first job may be what takes it, so who comes later is let in
        later = {"model": "bolt", "category": "bolt", "queue": True}
        assert server.client.post("/retrain", json=later).status_code == 202


@contextmanager
def worker(data: Path, cgroup: Path, how: str) -> Iterator[None]:
    command = [sys.executable, SHORT, str(cgroup), "worker", str(data)]
    environment = {**os.environ, "KENSA_JOB_MEMORY": how, "KENSA_JOB_PACE": "full"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_a_job_waits_for_memory_visibly_until_there_is_some_or_it_is_cancelled(
    limits: Callable[[int, int], Path], models: dict[str, Path], tmp_path: Path
) -> None:
    from app.jobs.job_queue import JobQueue
    from engines.queue.job_requests import ConvertRequest

    data = tmp_path / "data"
    store = Store(data / "models")
    for name in ("bolt", "nut", "rod"):
        store.activate(name, store.take_in(name, models[name], {}))
    jobs = JobQueue(data, store)
    jobs.open()
    cgroup = limits(4000, 3000)

    def wait(job: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        for _ in range(900):
            found = jobs.get(job)
            if wanted(found):
                return found
            time.sleep(0.1)
        raise AssertionError(f"{found}\n{jobs.lines(job)[0]}")

    def phase(found: dict[str, Any]) -> str:
        return str((found["progress"] or {}).get("phase", ""))

    ids = [jobs.submit("convert", ConvertRequest(model=name))["id"] for name in ("bolt", "nut")]
    with worker(data, cgroup, "wait"):
        pattern = r"waiting for memory: needs about \d+ MiB, 1000 MiB are free"
        wait(ids[0], lambda found: bool(re.fullmatch(pattern, phase(found))))
        jobs.cancel(ids[0])
        wait(ids[1], lambda found: phase(found).startswith("waiting for memory"))
        limits(4000, 3100)
        wait(ids[1], lambda found: "900 MiB are free" in phase(found))
        limits(4000, 100)
        wait(ids[1], lambda found: "waiting" not in phase(found))
        assert any("there is memory enough now" in line for line in jobs.lines(ids[1])[0])
        with contextlib.suppress(Exception):
            jobs.cancel(ids[1])
    assert jobs.get(ids[0])["state"] == "cancelled"
    limits(4000, 3000)
    last = jobs.submit("convert", ConvertRequest(model="rod"))["id"]
    with worker(data, cgroup, "refuse"):
        ended = wait(last, lambda found: found["state"] == "failed")
    assert ended["code"] == "out_of_memory"
    assert "1000 MiB are free" in ended["error"]
    jobs.close()


# A Jetson, on the double


PLANS = """
import sys
from pathlib import Path

import numpy as np

from engines.files import sha256
from engines.store.golden import Golden
from engines.meta import Meta
from workers.converting.export import export_onnx
from workers.models import efficientad
from workers.progress import Progress
from workers.converting.plan.rebuild import rebuild

small, *pairs = map(Path, sys.argv[1:])
meta = Meta.parse({"model": "efficientad", "model_size": "small", "image_size": 256,
                   "image_threshold_auto": 1.0, "raw_image_min": 0.0, "raw_image_max": 2.0})
model = efficientad.build(meta, "untrained")
model.learned = True
model.networks.mean_std["std"].data.fill_(1.0)
for name in ("qb_st", "qb_ae"):
    model.networks.quantiles[name].data.fill_(1.0)
small.mkdir()
Golden(np.zeros((1, 256, 256, 3), np.uint8)).write(small)
export_onnx(*efficientad.graph(model, half=False), small / "model.onnx", 17)
hashes = {name: sha256(small / name) for name in ("model.onnx", "golden.npz")}
meta.with_(files=hashes).write(small / "meta.json")
for source, target in zip(pairs[::2], pairs[1::2], strict=True):
    rebuild(source, target, Progress(quiet=True), workspace=512, use_dla=False, cache=None)
"""


@pytest.fixture(scope="module")
def plans(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two PatchCore models, an EfficientAD-S, and a PatchCore with a bank of 90,000 rows."""
    folder = tmp_path_factory.mktemp("plans")
    onnx = {name: folder / f"{name}-onnx" for name in ("bolt", "nut", "rod", "zinc")}
    variant(kensa_model, onnx["bolt"])
    variant(kensa_model, onnx["nut"], bank=0.9)
    variant(kensa_model, onnx["zinc"])
    rows = np.random.default_rng(0).standard_normal((90_000, 384), np.float32)
    write_bank(onnx["zinc"] / "memory_bank.npz", rows, 1.0)
    for name in ("bolt", "nut", "zinc"):  # one image proves a plan as well as sixteen, here
        Golden(picture(300, 256)[None, :256, :256]).write(onnx[name])
        meta = Meta.read(onnx[name] / "meta.json")
        hashes = {file: sha256(onnx[name] / file) for file in meta.files or {}}
        meta.with_(files=hashes).write(onnx[name] / "meta.json")
    pairs = [str(path) for name in onnx for path in (onnx[name], folder / name)]
    subprocess.run(
        [sys.executable, "-c", PLANS, onnx["rod"], *pairs], cwd=ROOT, check=True, timeout=600,
        env={**os.environ, **environment(memory_mib=(62841, 58000))},
    )  # fmt: skip
    return {name: folder / name for name in onnx}


@contextmanager
def jetson(folder: Path, models: dict[str, Path], free_mib: int, **more: str) -> Iterator[Server]:
    store = Store(folder / "data" / "models")
    for name, bundle in models.items():
        store.activate(name, store.take_in(name, bundle, {}, plan=True))
    quiet = {"KENSA_BATCHING": "off", "KENSA_DEADLINE_MS": "60000"}
    settings = {**environment(memory_mib=(7485, free_mib)), **quiet, **more}
    with serving(folder, **settings) as server:
        yield server


def test_an_orin_nano_admits_two_patchcore_and_an_efficientad_and_refuses_the_one_too_many(
    plans: dict[str, Path], tmp_path: Path
) -> None:
    with jetson(tmp_path, plans, 4300) as server:
        found = {one["name"]: one for one in server.client.get("/models").json()["models"]}
        running = {one["name"]: one for one in server.client.get("/healthz").json()["models"]}
        assert sorted(running) == ["bolt", "nut", "rod"], found["zinc"]
        assert {one["runtime"] for one in running.values()} == {"tensorrt"}
        for name in running:
            assert found[name]["resident_bytes"] > 10 * MIB
            assert ask(server, name, photo(0)).status_code == 200
        pattern = r"zinc \S+ needs about (\d+) MiB, and (\d+) MiB are free: unload another model\."
        said = re.fullmatch(pattern, found["zinc"]["problem"])
        assert said, found["zinc"]
        assert int(said[1]) > int(said[2])
        taken = sum(found[name]["resident_bytes"] for name in running) // MIB
        assert 4300 - taken - 10 < int(said[2]) <= 4300 - taken + 10
        print(f"{taken} MiB taken; {found['zinc']['problem']}")
        refused = server.client.post("/v2/repository/models/zinc/load")
        assert (refused.status_code, agreed(refused)) == (507, "out_of_memory")
        assert ask(server, "bolt", photo(0)).status_code == 200


def test_a_conversion_that_does_not_fit_beside_serving_is_refused(
    plans: dict[str, Path], tmp_path: Path
) -> None:
    models = {name: plans[name] for name in ("bolt", "nut")}
    with jetson(tmp_path, models, 1900) as server:
        assert ask(server, "bolt", photo(0)).status_code == 200
        until(lambda: server.client.get("/jobs").status_code == 200, server.log.read_text)
        refused = server.client.post("/convert", json={"model": "bolt"})
        assert (refused.status_code, agreed(refused)) == (507, "out_of_memory")
        pattern = r"Converting bolt needs about \d+ MiB, and 1\d+ MiB are free: unload a model, or"
        assert re.match(pattern, refused.json()["error"])
        without_torch = server.client.post("/convert", json={"model": "bolt", "from_onnx": True})
        assert without_torch.status_code == 202, without_torch.text
