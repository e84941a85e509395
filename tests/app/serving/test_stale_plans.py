"""Which runtime opens a model, and what becomes of plans that are good for nothing here.

The doubles count what was deserialised: a plan that is not for this machine must never be.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from engines.errors import BadBundle, StalePlan
from engines.runtimes import cuda
from engines.runtimes.cuda import LOST_EXIT_CODE
from engines.serving.opening import Opening, open_model
from engines.store.bundle import ONNX, PLAN
from engines.store.plan_record import PLAN_RECORD
from engines.store.versions import Store
from support.damage import saved
from support.double import RTX, doubled, environment, reports
from support.plans import (
    MAX_ROWS,
    SIDE,
    seal,
    tiny_bank,
    tiny_bundle,
    tiny_score,
    with_bank,
    with_plan,
)
from support.project import ROOT
from support.server import RAW, Server, agreed, serving

NAME = "part"
NEWER = "10.16.1.11"  # JetPack 7.2, where the plans of 10.3 are of no use


def pixels(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


PARTS = [saved(Image.fromarray(pixels(seed)), "PNG") for seed in range(4)]
SCORES = [tiny_score(pixels(seed)) for seed in range(4)]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a plan."""
    return tiny_bundle(tmp_path_factory.mktemp("bare") / "model")


@pytest.fixture(scope="module")
def planned(bare: Path) -> Path:
    """With one for TensorRT 10.3 on a Jetson."""
    return with_plan(bare, bare.with_name("planned"))


@pytest.fixture(scope="module")
def banked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a memory bank, and a plan for the same."""
    folder = tmp_path_factory.mktemp("banked")
    return with_plan(tiny_bundle(folder / "bare", tiny_bank(1)), folder / "planned")


# ---- which one -------------------------------------------------------------------------------

STRICT = Opening(batching=False, fallback="none")
MEANWHILE = Opening(batching=False)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads((folder / PLAN_RECORD).read_text())
    change(record)
    (folder / PLAN_RECORD).write_text(json.dumps(record))


def other_release(folder: Path) -> None:
    rewrite(folder, lambda record: record["machine"].update(l4t="36.3.0"))


def other_onnx(folder: Path) -> None:
    import onnx

    model = onnx.load(folder / ONNX)
    model.doc_string = "another one"
    onnx.save(model, folder / ONNX)


def other_plan(folder: Path) -> None:
    data = bytearray((folder / PLAN).read_bytes())
    data[-1] ^= 1
    (folder / PLAN).write_bytes(data)


def no_record(folder: Path) -> None:
    (folder / PLAN_RECORD).unlink()


def no_plan(folder: Path) -> None:
    (folder / PLAN).unlink()


def large_bank(folder: Path) -> None:
    shutil.rmtree(folder)
    with_bank(folder.with_name("source"), folder, tiny_bank(2, rows=MAX_ROWS + 1))


FOREIGN = {
    "another TensorRT": ("11.4.0.106", "orin-nano", None, "TensorRT 10.3.0 (here 11.4.0"),
    "another GPU": ("10.3.0", "rtx", None, "compute capability 8.7 (here 8.9)"),
    "another L4T": ("10.3.0", "orin-nano", other_release, "L4T 36.3.0 (here no Jetson)"),
    "a changed graph": ("10.3.0", "orin-nano", other_onnx, "model.onnx has changed since"),
    "a changed plan": ("10.3.0", "orin-nano", other_plan, "is not the file that was built"),
    "no record": ("10.3.0", "orin-nano", no_record, "has no plan for TensorRT, or none that says"),
    "no plan": ("10.3.0", "orin-nano", no_plan, "model.plan does not exist"),
    "a larger bank": ("10.3.0", "orin-nano", large_bank, "5,001 rows, and"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_plan_that_is_not_for_this_machine_is_never_deserialised(
    case: str, banked: Path, tmp_path: Path
) -> None:
    version, device, change, says = FOREIGN[case]
    folder = Path(shutil.copytree(banked, tmp_path / "model"))
    shutil.copytree(banked, tmp_path / "source")
    if change is not None:
        change(folder)
        seal(folder)  # whoever changed it made it look whole
    with doubled(version, device) as double:
        with pytest.raises(StalePlan) as caught:
            open_model(folder, NAME, "0001", STRICT)
        assert says in str(caught.value)
        assert "convert" in str(caught.value) or "convtrt.py" in str(caught.value)
        meanwhile = open_model(folder, NAME, "0001", MEANWHILE)
        assert (meanwhile.runtime.name, meanwhile.stale) == ("openvino", str(caught.value))
        assert double.gpu.counts["engines"] == 0
        double.assert_clean()


def test_a_plan_that_is_for_this_machine_runs_and_is_not_stale(banked: Path) -> None:
    with doubled() as double:
        model = open_model(banked, NAME, "0001", Opening())
        assert (model.runtime.name, model.runtime.precision, model.stale) == (
            "tensorrt", "f32", None,
        )  # fmt: skip
        score = model.runtime.infer(pixels(0)[None])[0][0]
        assert score == pytest.approx(tiny_score(pixels(0), tiny_bank(1)), rel=1e-4)
        model.runtime.close()
        cuda.close()
        double.assert_clean()


def test_a_plan_is_refused_like_any_damaged_file_when_it_is_not_the_published_one(
    planned: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(planned, tmp_path / "model"))
    other_plan(folder)
    with doubled() as double:
        with pytest.raises(BadBundle, match=r"model\.plan is not the file"):
            open_model(folder, NAME, "0001", Opening())
        assert double.gpu.counts["engines"] == 0


def test_what_tensorrt_refuses_although_the_record_fits_is_stale_as_well(
    planned: Path, tmp_path: Path
) -> None:
    """Somebody wrote a record for a plan of another version."""
    folder = with_plan(planned.with_name("model"), tmp_path / "model", "11.4.0.106")
    rewrite(folder, lambda record: record["machine"].update(tensorrt="10.3.0"))
    seal(folder)
    with doubled():
        model = open_model(folder, NAME, "0001", MEANWHILE)
        assert model.runtime.name == "openvino"
        assert "expecting library version 10.3.0" in str(model.stale)
        cuda.close()


def test_without_openvino_nothing_stands_in_for_a_plan(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.serving.opening.find_spec", lambda name: None)
    with doubled(), pytest.raises(StalePlan, match="has no plan for TensorRT"):
        open_model(bare, NAME, "0001", MEANWHILE)


def test_a_setting_leaves_the_gpu_alone(planned: Path) -> None:
    with doubled() as double:
        model = open_model(planned, NAME, "0001", Opening(runtime="openvino"))
        assert (model.runtime.name, model.stale) == ("openvino", None)
        assert double.gpu.threads == set()


def test_a_bank_alone_does_not_go_from_one_runtime_to_the_other(
    banked: Path, tmp_path: Path
) -> None:
    other = with_bank(banked, tmp_path / "other", tiny_bank(2))
    with doubled() as double:
        on_cpu = open_model(banked, NAME, "0001", Opening(runtime="openvino", batching=False))
        moved = open_model(other, NAME, "0002", Opening(batching=False), on_cpu)
        assert (moved.runtime.name, moved.bank_alone) == ("tensorrt", False)
        back = open_model(banked, NAME, "0001", Opening(batching=False), moved)
        assert (back.runtime.name, back.bank_alone) == ("tensorrt", True)
        assert double.gpu.counts["engines"] == 1
        for model in (moved, back):
            model.runtime.close()
        cuda.close()
        double.assert_clean()


MISSING = {
    "bindings": "TensorRT's Python bindings are not in this environment",
    "libnvinfer": "TensorRT's Python bindings are here, but not a library",
    "libcuda": "The CUDA driver is not to be found",
    "device": "CUDA finds no GPU to use",
}


def on(model: Path, engine: str, tmp_path: Path, **doubles: str) -> Any:
    """./vae on a machine with the doubles."""
    Image.fromarray(pixels(0)).save(tmp_path / "part.png")
    command = [sys.executable, str(ROOT / "bin" / "vae"), "-e", str(model / engine)]
    flags = ["-d", "part.png", "-i", str(SIDE), "-t", "30"]
    return subprocess.run(
        [*command, *flags], cwd=tmp_path, env={**os.environ, **environment(**doubles)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("what", MISSING)
def test_a_command_says_what_the_machine_lacks(what: str, planned: Path, tmp_path: Path) -> None:
    done = on(planned, PLAN, tmp_path, KENSA_DOUBLE_MISSING=what)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {MISSING[what]}")
    assert done.stdout == ""


def test_a_command_runs_a_plan_on_tensorrt_and_says_nothing_of_it(
    planned: Path, tmp_path: Path
) -> None:
    reported = tmp_path / "reported"
    reported.mkdir()
    done = on(planned, PLAN, tmp_path, KENSA_DOUBLE_REPORT=str(reported))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[1]) == pytest.approx(SCORES[0], rel=1e-4)
    assert "OpenVINO" not in done.stderr
    (report,) = reports(reported)
    assert (report["executions"], report["alive"], report["crashes"]) == (1, {}, [])


def test_a_command_refuses_a_plan_of_another_machine_rather_than_run_something_else(
    planned: Path, tmp_path: Path
) -> None:
    done = on(planned, PLAN, tmp_path, version=NEWER)
    assert done.returncode == 2
    assert "was built for TensorRT 10.3.0 (here 10.16.1.11)" in done.stderr
    assert done.stdout == ""
    folder = Path(shutil.copytree(planned, tmp_path / "model"))
    no_record(folder)
    done = on(folder, PLAN, tmp_path)
    assert done.returncode == 2
    assert f"{PLAN_RECORD} belongs beside it" in done.stderr


def test_a_command_that_loses_the_gpu_ends_with_a_sentence_and_no_table(
    planned: Path, tmp_path: Path
) -> None:
    done = on(planned, PLAN, tmp_path, KENSA_DOUBLE_FAIL_EXECUTION="1")
    assert done.returncode == 2
    assert "error: The GPU failed in a way that only a new process mends" in done.stderr
    assert not (tmp_path / "result_vae.csv").exists()


def test_where_there_is_no_plan_the_graph_beside_it_runs_and_stderr_says_so(
    bare: Path, tmp_path: Path
) -> None:
    done = on(bare, PLAN, tmp_path)
    assert done.returncode == 0
    assert "model.plan does not exist: running" in done.stderr
    assert float(done.stdout.split()[1]) == pytest.approx(SCORES[0], rel=1e-4)


# ---- over HTTP --------------------------------------------------------------------------------

WORKER = {"KENSA_WORKER": "on", "KENSA_JOB_PACE": "full"}  # other tests take the idle time


@dataclass
class Jetson:
    """A server on the doubles."""

    server: Server
    store: Store
    reported: Path

    def get(self, path: str) -> Any:
        return self.server.client.get(path).json()

    @property
    def model(self) -> Any:
        return self.get(f"/models/{NAME}")

    @property
    def runtimes(self) -> list[str]:
        return [model["runtime"] for model in self.get("/healthz")["models"]]

    @property
    def jobs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("/jobs").get("jobs", [])  # 503 while it is opened
        return found

    def judges(self) -> None:
        """Every part gets its score."""
        for part, score in zip(PARTS, SCORES, strict=True):
            answer = self.server.infer(part)
            assert answer.status_code == 200, answer.text
            assert answer.json()["raw_score"] == pytest.approx(score, rel=1e-3)

    def wait(self, done: Callable[[], Any], seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < until, self.server.log.read_text()
            time.sleep(0.2)

    def said(self, text: str) -> int:
        return self.server.log.read_text().count(text)

    def report(self) -> dict[str, Any]:
        """Of the server's own process, once it has done anything with the GPU."""
        found: dict[str, Any] = json.loads(
            (self.reported / f"{self.server.process.pid}.json").read_text()
        )
        return found

    def end(self) -> int:
        self.server.process.send_signal(signal.SIGTERM)
        return self.server.process.wait(30)


@contextmanager
def jetson(
    folder: Path,
    *bundles: Path,
    version: str = "10.3.0",
    device: str = "orin-nano",
    memory_mib: tuple[int, int] | None = None,
    **settings: str,
) -> Iterator[Jetson]:
    """A server whose model `part` has these versions; the last one is live."""
    store, reported = Store(folder / "data" / "models"), folder / "reported"
    reported.mkdir(exist_ok=True)
    for bundle in bundles:
        store.activate(NAME, store.take_in(NAME, bundle, {}, plan=True))
    doubles = environment(version, device, memory_mib, KENSA_DOUBLE_REPORT=str(reported))
    with serving(folder, **{**doubles, **settings}) as server:
        yield Jetson(server, store, reported)


def test_a_server_judges_with_tensorrt_and_leaves_the_gpu_clean(
    planned: Path, tmp_path: Path
) -> None:
    with jetson(tmp_path, planned) as running:
        running.judges()
        health = running.get("/healthz")
        (model,) = health["models"]
        assert (model["runtime"], model["precision"], model["stale"]) == ("tensorrt", "f32", None)
        assert model["resident_bytes"] > 0
        assert health["degraded"] == []
        assert running.model["stale"] is None
        metrics = running.server.client.get("/metrics").text
        assert f'kensa_model_resident_bytes{{model="part"}} {model["resident_bytes"]}' in metrics
        assert 'runtime="tensorrt"' in metrics
        assert running.end() == 0
        report = running.report()
        assert (report["alive"], report["crashes"], report["threads"]) == ({}, [], 2)


def test_a_model_folder_of_this_machine_brings_its_plan(planned: Path, tmp_path: Path) -> None:
    settings = {"KENSA_MODEL_DIR": str(planned), "KENSA_MODEL_NAME": NAME}
    with jetson(tmp_path, **settings) as running:
        assert running.runtimes == ["tensorrt"]
        running.judges()


def test_a_foreign_plan_is_built_again_while_openvino_answers(
    planned: Path, tmp_path: Path
) -> None:
    """After an update of JetPack: nobody does anything, and the model is on the GPU again."""
    with jetson(tmp_path, planned, version=NEWER, **WORKER) as running:
        running.judges()
        (first,) = running.store.versions(NAME)
        assert running.runtimes == ["openvino"]
        says = "was built for TensorRT 10.3.0 (here 10.16.1.11)"
        assert says in running.model["stale"]
        assert any(says in one for one in running.get("/healthz")["degraded"])
        assert not list(running.reported.iterdir()), "something was done with the GPU"
        running.wait(lambda: running.jobs)
        (job,) = running.jobs
        assert (job["kind"], job["model"]) == ("convert", NAME)
        assert (job["request"]["from_onnx"], job["request"]["version"]) == (True, first)
        running.wait(lambda: running.jobs[0]["outcome"] or running.jobs[0]["error"])
        assert running.jobs[0]["outcome"] == "live", running.jobs
        assert running.model["stale"] is None
        assert running.runtimes == ["tensorrt"]
        assert running.model["live"] == running.store.versions(NAME)[-1] != first
        assert running.get("/healthz")["degraded"] == []
        running.judges()
        assert running.report()["engines"] == 1
        assert len(running.jobs) == 1
        assert running.said(f"{NAME} {first} is stale: ") == 1
        assert running.end() == 0
    with jetson(tmp_path, version=NEWER) as running:  # the plan outlives the server
        assert running.runtimes == ["tensorrt"]
        running.judges()


def test_a_pc_proves_a_plan_that_was_built_elsewhere_before_it_judges(
    bare: Path, tmp_path: Path
) -> None:
    plan = with_plan(bare, tmp_path / "planned", RTX, "rtx", proved=False)
    with jetson(tmp_path, plan, version=RTX, device="rtx") as running:
        running.judges()
        assert running.runtimes == ["tensorrt"]
        assert running.said("model.plan is proved: raw scores within") == 1
        assert (running.model["stale"], running.model["plan_unused"]) == (None, None)
        assert running.end() == 0
        report = running.report()
        assert (report["alive"], report["crashes"], report["threads"]) == ({}, [], 2)


def test_a_pc_whose_card_a_plan_is_not_for_builds_one(bare: Path, tmp_path: Path) -> None:
    plan = with_plan(bare, tmp_path / "planned", RTX, "agx-orin")  # SM87
    with jetson(tmp_path, plan, version=RTX, device="rtx", **WORKER) as running:
        running.judges()
        assert running.runtimes == ["openvino"]
        assert "SM87 (here NVIDIA GeForce RTX 4070, SM89)" in running.model["stale"]
        running.wait(lambda: running.jobs and running.jobs[0]["outcome"])
        assert running.runtimes == ["tensorrt"]
        running.judges()
        assert len(running.jobs) == 1
        assert running.end() == 0


def test_a_pc_without_a_card_says_what_the_plan_is_for_and_begins_no_job(
    bare: Path, tmp_path: Path
) -> None:
    plan = with_plan(bare, tmp_path / "planned", RTX, "rtx")
    missing = {**WORKER, "version": RTX, "device": "rtx", "KENSA_DOUBLE_MISSING": "libcuda"}
    with jetson(tmp_path, plan, **missing) as running:  # type: ignore[arg-type]
        running.judges()
        assert running.runtimes == ["openvino"]
        unused = running.model["plan_unused"]
        assert "model.plan is for TensorRT for RTX 1.7.1.116 and" in unused
        assert "NVIDIA's driver is not to be found" in unused
        assert running.model["stale"] is None
        assert running.get("/healthz")["degraded"] == []
        assert running.said("and not used here: ") == 1
        time.sleep(1.5)
        assert running.jobs == []


def test_without_a_fallback_nobody_answers_until_there_is_a_plan(
    bare: Path, tmp_path: Path
) -> None:
    """A model that came from a PC."""
    settings = {"KENSA_FALLBACK": "none", **WORKER}
    with jetson(tmp_path, bare, **settings) as running:
        answer = running.server.infer(PARTS[0])
        assert (answer.status_code, agreed(answer)) == (503, "not_ready")
        assert "has no plan for TensorRT" in answer.json()["error"]
        assert "has no plan for TensorRT" in running.model["stale"]
        assert running.server.client.get("/readyz").status_code == 503
        by_hand = running.server.client.post(
            f"/models/{NAME}/versions/{running.store.versions(NAME)[0]}/activate"
        )
        assert (by_hand.status_code, agreed(by_hand)) == (503, "stale_plan")
        running.wait(lambda: running.server.client.get("/readyz").status_code == 200)
        assert running.runtimes == ["tensorrt"]
        running.judges()
        assert running.model["stale"] is None


def test_without_a_worker_it_is_said_what_to_type_and_nothing_is_queued(
    planned: Path, tmp_path: Path
) -> None:
    with jetson(tmp_path, planned, version=NEWER) as running:
        stale = running.model["stale"]
        assert "convtrt.py, or POST /convert with from_onnx" in stale
        assert "KENSA_WORKER is off" in stale
        time.sleep(1.5)
        assert running.jobs == []
        running.judges()


def test_a_job_that_failed_is_not_tried_again_not_even_by_the_next_server(
    planned: Path, tmp_path: Path
) -> None:
    settings = {**WORKER, "version": NEWER}
    no_room = {"memory_mib": (7485, 0)}  # nothing can be built
    with jetson(tmp_path, planned, **settings, **no_room) as running:  # type: ignore[arg-type]
        running.wait(lambda: running.jobs and running.jobs[0]["state"] == "failed")
        (job,) = running.jobs
        running.judges()
    with jetson(tmp_path, **settings) as running:  # type: ignore[arg-type]
        running.wait(lambda: job["id"] in running.model["stale"])
        assert "it is not tried again" in running.model["stale"]
        time.sleep(1)
        assert [one["id"] for one in running.jobs] == [job["id"]]


def test_a_damaged_plan_is_refused_and_the_version_before_judges(
    planned: Path, bare: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "data" / "models")
    second = with_plan(tiny_bundle(tmp_path / "bare", offset=9.0), tmp_path / "second")
    for bundle in (planned, second):
        store.activate(NAME, store.take_in(NAME, bundle, {}, plan=True))
    other_plan(store.folder(NAME, store.versions(NAME)[-1]))
    with jetson(tmp_path) as running:
        running.judges()
        (reason,) = running.model["refused"].values()
        assert "model.plan is not the file" in reason
        assert running.report()["engines"] == 1


@pytest.mark.parametrize("what", ["libcuda", "device"])
def test_where_cuda_is_missing_openvino_judges_unless_only_tensorrt_may(
    what: str, planned: Path, tmp_path: Path
) -> None:
    lacks = {"KENSA_DOUBLE_MISSING": what}
    if what == "libcuda":
        with jetson(tmp_path, planned, **lacks) as running:
            assert running.runtimes == ["openvino"]
            running.judges()
            assert running.said("OpenVINO runs what TensorRT cannot: The CUDA driver")
        return
    with jetson(tmp_path, planned, KENSA_RUNTIME="tensorrt", **lacks) as running:
        answer = running.server.infer(PARTS[0])
        assert (answer.status_code, agreed(answer)) == (503, "not_ready")
        assert MISSING[what] in answer.json()["error"]


def test_a_version_that_does_not_fit_into_memory_leaves_the_old_one_serving(
    banked: Path, tmp_path: Path
) -> None:
    """20 MB of activations each."""
    second = with_plan(tiny_bundle(tmp_path / "bare", tiny_bank(2), 9.0), tmp_path / "second")
    with jetson(tmp_path, banked, memory_mib=(7485, 35)) as running:
        score = tiny_score(pixels(0), tiny_bank(1))
        assert running.server.infer(PARTS[0]).json()["raw_score"] == pytest.approx(score, rel=1e-3)
        version = running.store.take_in(NAME, second, {}, plan=True)
        url = f"/models/{NAME}/versions/{version}/activate"
        for _ in range(3):
            answer = running.server.client.post(url)
            assert (answer.status_code, agreed(answer)) == (507, "out_of_memory")
            assert "MiB" in answer.json()["error"]
        assert running.server.infer(PARTS[0]).json()["raw_score"] == pytest.approx(score, rel=1e-3)
        assert running.model["refused"] == {}
        alive = running.report()["alive"]
        assert (alive["engines"], alive["execution contexts"]) == (1, 1)


# ---- a GPU that is lost -----------------------------------------------------------------------


def test_a_lost_gpu_ends_the_server_with_errors_for_those_that_wait_and_no_wrong_verdict(
    planned: Path, tmp_path: Path
) -> None:
    fails = {"KENSA_DOUBLE_FAIL_EXECUTION": "150"}
    codes: list[str] = []
    right = 0
    with jetson(tmp_path, planned, KENSA_KEEP_WARM_S="0", **fails) as running:

        def send(number: int) -> int:
            scored, until = 0, time.monotonic() + 60
            with httpx.Client(base_url=running.server.url, timeout=30, trust_env=False) as client:
                while time.monotonic() < until:
                    try:
                        answer = client.post("/infer", content=PARTS[number], headers=RAW)
                    except httpx.HTTPError:
                        return scored  # it has ended
                    if answer.status_code != 200:
                        codes.append(agreed(answer))
                        assert answer.headers["retry-after"]
                        continue
                    assert answer.json()["raw_score"] == pytest.approx(SCORES[number], rel=1e-3)
                    scored += 1
            raise AssertionError("the server does not end")

        with ThreadPoolExecutor(4) as pool:
            right = sum(pool.map(send, range(4)))
        assert running.server.process.wait(30) == LOST_EXIT_CODE
        assert running.said(f"This process ends with exit code {LOST_EXIT_CODE}.") == 1
        assert running.said("Traceback") == 0
    assert right > 10
    assert set(codes) == {"gpu_lost"}
    with jetson(tmp_path) as running:  # as the supervisor starts it
        running.judges()


def test_a_gpu_that_is_lost_while_nothing_comes_ends_the_server_as_well(
    planned: Path, tmp_path: Path
) -> None:
    fails = {"KENSA_DOUBLE_FAIL_EXECUTION": "100", "KENSA_BATCHING": "off"}
    with jetson(tmp_path, planned, KENSA_KEEP_WARM_S="0.02", **fails) as running:
        running.judges()
        assert running.server.process.wait(60) == LOST_EXIT_CODE
