"""TensorRT's runtime and the thread that owns the GPU, on the doubles of TensorRT and pycuda.

Models are tiny, so that thousands of images take a second. Numbers are real; nothing here says how
fast TensorRT is.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.errors import BadBundle, GpuLost, OutOfMemory, RuntimeFailed, StalePlan
from engines.runtimes import ALONE, Batches, cuda
from engines.runtimes.tensorrt import TensorRTRuntime
from engines.serving.batch_trial import Stopwatch, choose_batches
from support.double import RTX, Double, doubled, environment, reports
from support.plans import SIDE, build, tiny_bank, tiny_onnx, tiny_score
from support.project import ROOT
from support.waiting import until

MIB = 1024 * 1024
Images = NDArray[np.uint8]
MACHINES = [  # mapped memory; memory of its own; the same with TensorRT for RTX on cuda-bindings
    ("10.3.0", "orin-nano"),
    ("11.4.0.106", "rtx"),
    (RTX, "rtx"),
]


def some_images(count: int, seed: int = 0) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


class Machine:
    """A machine with TensorRT, and two plans on it."""

    def __init__(self, double: Double, folder: Path) -> None:
        self.double, self.folder = double, folder
        self.bare, self.banked = self.plan("bare"), self.plan("banked", bank=True)

    def plan(self, name: str, *, bank: bool = False, offset: float = 0.0, **limits: int) -> Path:
        onnx = tiny_onnx(self.folder / f"{name}.onnx", bank=bank, offset=offset)
        build(self.double, onnx, plan := self.folder / f"{name}.plan", **limits)
        return plan

    def open(self, bank: NDArray[np.float32] | None = None, **how: Any) -> TensorRTRuntime:
        return TensorRTRuntime(self.bare if bank is None else self.banked, bank, **how)

    @property
    def gpu(self) -> Any:
        return self.double.gpu

    def alive(self) -> dict[str, int]:
        """What is left once everything was done that was asked for."""
        with suppress(GpuLost):
            cuda.gpu().call(lambda: None)
        found: dict[str, int] = self.gpu.alive()
        return found


@contextmanager
def machine_of(version: str, device: str, folder: Path) -> Iterator[Machine]:
    with doubled(version, device) as double:
        try:
            yield Machine(double, folder)
        finally:
            cuda.close()
            cuda.when_lost(cuda._nobody)
        if double.gpu.sticky is None:  # then nothing can be freed any more
            double.assert_clean()
        assert not double.gpu.crashes


@pytest.fixture(params=MACHINES, ids=lambda one: "-".join(one))
def each(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    with machine_of(*request.param, tmp_path) as machine:
        yield machine


@pytest.fixture
def jetson(tmp_path: Path) -> Iterator[Machine]:
    with machine_of(*MACHINES[0], tmp_path) as machine:
        yield machine


def right(runtime: TensorRTRuntime, images: Images, bank: Any = None, offset: float = 0.0) -> None:
    """The scores of these images are theirs."""
    scores, maps = runtime.infer(images)
    expected = [tiny_score(image, bank, offset) for image in images]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(maps.max(axis=(1, 2)) + offset, scores, rtol=1e-5)


# ---- one thread -------------------------------------------------------------------------------


def hammer(machine: Machine, calls: int, threads: int = 16) -> None:
    """All threads ask two runtimes, each for images of its own."""
    bank = tiny_bank(1)
    runtimes = [(machine.open(), None), (machine.open(bank), bank)]
    for runtime, _ in runtimes:
        runtime.take_together(Batches(4))
    openers = set(machine.gpu.threads)

    def ask(number: int) -> int:
        for turn in range(calls):
            runtime, its = runtimes[(number + turn) % 2]
            right(runtime, some_images(1 + turn % 5, seed=1000 * number + turn), its)
        return threading.get_ident()

    with ThreadPoolExecutor(threads) as pool:
        askers = set(pool.map(ask, range(threads)))
    assert machine.gpu.threads == openers  # who deserialised, and the one of the GPU
    assert len(openers) == 2
    assert not askers & openers
    for runtime, _ in runtimes:
        runtime.close()
    assert machine.alive() == {"contexts": 1}


def test_sixteen_threads_ask_at_once_and_one_uses_the_gpu(each: Machine) -> None:
    hammer(each, calls=12)


@pytest.mark.soak
def test_sixteen_threads_ask_ten_thousand_times(each: Machine) -> None:
    began = each.gpu.free
    hammer(each, calls=625)
    assert each.gpu.free == began


def test_a_part_does_not_wait_while_another_version_is_deserialised(jetson: Machine) -> None:
    runtime = jetson.open()
    deserialise = jetson.double.trt.Runtime.deserialize_cuda_engine
    reading, may_end = threading.Event(), threading.Event()

    def slowly(self: Any, data: Any) -> Any:
        reading.set()
        assert may_end.wait(60), "the part waited"
        return deserialise(self, data)

    jetson.double.trt.Runtime.deserialize_cuda_engine = slowly
    with ThreadPoolExecutor(1) as loader:
        opened = loader.submit(jetson.open)
        assert reading.wait(60)
        right(runtime, some_images(2))
        may_end.set()
        right(opened.result(), some_images(2))


def test_parts_come_in_between_while_a_large_bank_is_copied(
    jetson: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.runtimes.tensorrt.CHUNK", 64)
    runtime, done = jetson.open(), []
    write = cuda.Bank.write
    waited = threading.Event()

    def noted(self: cuda.Bank, *what: Any) -> None:
        done.append("chunk")
        waited.wait(0.002)
        write(self, *what)

    monkeypatch.setattr(cuda.Bank, "write", noted)
    bank = tiny_bank(2, rows=200)
    with ThreadPoolExecutor(1) as loader:
        opened = loader.submit(jetson.open, bank)
        while not opened.done():
            right(runtime, some_images(1))
            done.append("part")
    chunks = bank.nbytes // 64
    assert done.count("chunk") == chunks
    assert "part" in done[done.index("chunk") : len(done) - done[::-1].index("chunk")]
    right(opened.result(), some_images(3), bank)


def test_nothing_is_begun_before_it_is_needed_and_closing_twice_does_no_harm(
    jetson: Machine,
) -> None:
    cuda.close()
    assert jetson.gpu.alive() == {}
    first = jetson.open()
    gpu = cuda.gpu()
    cuda.close()  # with a model in memory
    jetson.double.assert_clean()
    cuda.close()
    with pytest.raises(RuntimeFailed, match="this process is ending"):
        first.infer(some_images(1))
    first.close()
    assert cuda.gpu() is not gpu
    right(jetson.open(), some_images(1))


ENDS = {
    "with a model in memory": "runtime.infer(np.zeros((1, 32, 32, 3), np.uint8))",
    "after a model did not load": "open_it(np.ones((20, 5), np.float32))",
    "with an exception": "1 / 0",
    "with sys.exit": "sys.exit(0)",
    "while a part is computed": (
        "threading.Thread(target=lambda: [runtime.infer(np.zeros((1, 32, 32, 3), np.uint8))"
        " for _ in range(10**6)], daemon=True).start(); time.sleep(0.3)"
    ),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_process_gives_the_gpu_back_however_it_ends(
    how: str, tmp_path: Path, jetson: Machine
) -> None:
    program = f"""
import sys, threading, time
from pathlib import Path
import numpy as np
from engines.runtimes.tensorrt import TensorRTRuntime
def open_it(bank): return TensorRTRuntime(Path({str(jetson.banked)!r}), bank)
runtime = open_it(np.ones((20, 8), np.float32))
{ENDS[how]}
"""
    said = tmp_path / "said"
    said.mkdir()
    doubles = environment(KENSA_DOUBLE_REPORT=str(said))
    doubles["PYTHONPATH"] += os.pathsep + str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **doubles}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    (report,) = reports(said)
    assert (report["alive"], report["crashes"]) == ({}, [])
    assert "could not be cleaned up" not in done.stderr
    assert report["contexts"] == 1


# ---- the memory bank --------------------------------------------------------------------------


def test_another_bank_leaves_the_engine_as_it_is(each: Machine) -> None:
    banks = [tiny_bank(seed, rows) for seed, rows in ((1, 100), (2, 9), (3, 5000))]
    first = each.open(banks[0])
    images = some_images(3)
    engine = first._session.engine._engine
    others = [first.with_bank(bank, "f32") for bank in banks[1:]]
    assert all(other is not None and other._session.engine._engine is engine for other in others)
    del engine
    assert each.gpu.counts["engines"] == 1
    for runtime, bank in zip([first, *others], banks, strict=True):
        assert runtime is not None
        assert runtime.bank_rows == len(bank)
        right(runtime, images, bank)
    first.close()
    assert each.alive()["engines"] == 1
    for runtime, bank in zip(others, banks[1:], strict=True):
        assert runtime is not None
        right(runtime, images, bank)
        runtime.close()
    assert each.alive() == {"contexts": 1}


@pytest.mark.parametrize(
    ("bank", "precision"),
    [
        (tiny_bank(1), "f16"),
        (tiny_bank(1, rows=5001), "f32"),
        (tiny_bank(1, rows=8), "f32"),
        (np.ones((20, 7), np.float32), "f32"),
    ],
    ids=["other precision", "too many rows", "too few rows", "other channels"],
)
def test_a_bank_that_does_not_fit_the_engine_gets_none_of_it(
    jetson: Machine, bank: NDArray[np.float32], precision: str
) -> None:
    first = jetson.open(tiny_bank(1))
    assert first.with_bank(bank, precision) is None
    assert jetson.open().with_bank(tiny_bank(1), "f32") is None
    first.close()
    assert jetson.alive() == {"contexts": 1}


def test_a_bank_larger_than_the_profile_is_refused_with_both_numbers(jetson: Machine) -> None:
    with pytest.raises(BadBundle, match=r"5,001 rows.* built for up to 5,000: convert it again"):
        jetson.open(tiny_bank(1, rows=5001))
    assert jetson.alive() == {"contexts": 1}


def test_bytes_are_those_of_plan_activations_buffers_and_bank(each: Machine) -> None:
    before = each.gpu.free
    runtimes = [each.open(), each.open(tiny_bank(1, rows=5000))]
    taken = before - each.gpu.free
    said = sum(runtime.nbytes for runtime in runtimes)
    assert runtimes[1].nbytes > 5000 * 8 * 4
    assert abs(said - taken) < 0.1 * taken


# ---- batches ----------------------------------------------------------------------------------


def test_a_batch_goes_up_to_what_the_plan_was_built_for_and_is_not_filled_up(
    each: Machine,
) -> None:
    runtime = each.open()
    assert runtime.batch_sizes == (2, 4, 8)
    runtime.take_together(Batches(32))
    assert runtime.batches.size == 8
    before = each.gpu.counts["executions"]
    right(runtime, some_images(19))
    assert each.gpu.counts["executions"] - before == 3  # 8, 8 and 3


def test_a_plan_that_leaves_the_sides_of_the_map_open_runs(each: Machine) -> None:
    """EfficientAD's did, in models that were converted by an older Kensa."""
    onnx = tiny_onnx(each.folder / "open.onnx", bank=False, sides=("h", "w"))
    build(each.double, onnx, plan := each.folder / "open.plan")
    right(TensorRTRuntime(plan), some_images(3))


def test_a_plan_for_one_image_runs_one_at_a_time(jetson: Machine) -> None:
    runtime = TensorRTRuntime(jetson.plan("one", max_batch=1))
    assert runtime.batch_sizes == ()
    choose_batches(runtime, Stopwatch(delays=dict))
    assert runtime.batches == ALONE
    right(runtime, some_images(3))


def test_two_parts_run_together_where_a_batch_is_faster(jetson: Machine) -> None:
    """Nothing is filled up, so from two on it pays. Here any number of images takes one second."""
    runtime, calls = jetson.open(), itertools.count()
    choose_batches(runtime, Stopwatch(lambda: next(calls) / 1024, dict))
    assert runtime.batches == Batches(8, least=2)


# ---- memory that runs out ---------------------------------------------------------------------


@pytest.mark.parametrize("what", ["a model", "a bank alone"])
def test_wherever_memory_runs_out_nothing_is_left_and_what_runs_runs_on(
    each: Machine, what: str
) -> None:
    bank, other = tiny_bank(1), tiny_bank(2, rows=300)
    served = each.open(bank)
    before, free = each.alive(), each.gpu.free
    opens: Callable[[], Any] = lambda: each.open(other)  # noqa: E731
    if what == "a bank alone":
        opens = lambda: served.with_bank(other, "f32")  # noqa: E731
    sizes, allocate = [], each.gpu.allocate

    def noted(*what: Any, **more: Any) -> Any:
        memory = allocate(*what, **more)
        sizes.append(memory.counted)
        return memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(each.gpu, "allocate", noted)
        opens().close()
    sizes = [size for size in sizes if size]
    assert len(sizes) >= (5 if what == "a bank alone" else 6) - (not each.gpu.model.integrated)
    for number, size in enumerate(sizes):
        each.gpu.free = sum(sizes[:number]) + size - 512
        with pytest.raises(OutOfMemory, match=r"\d+ of \d+ MiB of the GPU's memory are free"):
            opens()
        each.gpu.free += free - sum(sizes[:number]) - size + 512
        assert each.alive() == before
    right(served, some_images(2), bank)
    right(opens(), some_images(2), other)


# ---- what fails -------------------------------------------------------------------------------


def test_an_error_that_stays_is_told_once_and_nothing_is_computed_after_it(each: Machine) -> None:
    told: list[str] = []
    cuda.when_lost(told.append)
    runtimes = [each.open(), each.open(tiny_bank(1))]
    right(runtimes[0], some_images(1))
    each.gpu.fail()
    for runtime in runtimes * 2:
        with pytest.raises(GpuLost, match="illegal memory access"):
            runtime.infer(some_images(1))
    with pytest.raises(GpuLost):
        each.open()
    assert len(told) == 1
    for runtime in runtimes:
        runtime.close()


@pytest.mark.parametrize("code", [702, 709, 719])
def test_every_error_that_stays_is_known_by_what_it_does(jetson: Machine, code: int) -> None:
    """CUDA has no list of them."""
    cuda.when_lost(lambda why: None)
    runtime = jetson.open()
    jetson.gpu.fail(code=code)
    with pytest.raises(GpuLost):
        runtime.infer(some_images(1))


def test_all_that_wait_when_the_gpu_is_lost_get_an_error_and_no_score(jetson: Machine) -> None:
    cuda.when_lost(lambda why: None)
    runtime, images = jetson.open(), some_images(16)
    expected = [tiny_score(image) for image in images]
    jetson.gpu.fail(after=5)

    def ask(number: int) -> float | None:
        try:
            return float(runtime.infer(images[number : number + 1])[0][0])
        except GpuLost:
            return None

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(16)))
    scored = [(one, right) for one, right in zip(found, expected, strict=True) if one is not None]
    assert len(scored) == 4
    for one, its in scored:
        assert one == pytest.approx(its, rel=1e-4)


def test_an_error_that_passes_has_a_name_and_the_next_part_is_scored(jetson: Machine) -> None:
    runtime, gpu = jetson.open(), cuda.gpu()
    with pytest.raises(RuntimeFailed, match="CUDA failed: cuMemcpyHtoD failed: invalid argument"):
        gpu.call(lambda: gpu.cuda.memcpy_htod(1, np.zeros(4, np.uint8)))
    session = runtime._session
    gpu.call(lambda: session._context.set_tensor_address("map", 0))
    with pytest.raises(RuntimeFailed, match=r"Neither address or allocator is set.*map") as caught:
        runtime.infer(some_images(1))
    assert not isinstance(caught.value, GpuLost)
    gpu.call(lambda: session._context.set_tensor_address("map", session._buffers["map"].address))
    right(runtime, some_images(1))


def test_a_plan_that_tensorrt_does_not_take_is_stale_in_its_own_words(
    jetson: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    whole = jetson.bare.read_bytes()
    for content, says in ((b"hello" * 100, "header.magicTag"), (whole[:-9], "plan.header.size")):
        jetson.bare.write_bytes(content)
        with caplog.at_level(logging.ERROR), pytest.raises(StalePlan, match=says):
            jetson.open()
        assert any(says in line.getMessage() for line in caplog.records)
    jetson.bare.write_bytes(b"")
    with pytest.raises(BadBundle, match="is empty"):
        jetson.open()
    assert jetson.alive() == {"contexts": 1}


def test_scores_that_are_no_numbers_are_no_verdict(jetson: Machine) -> None:
    runtime = TensorRTRuntime(jetson.plan("broken", offset=float("nan")))
    assert np.isnan(runtime.infer(some_images(1))[0]).all()


def test_what_was_not_computed_is_not_the_score_of_the_part_before(
    each: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should an execution ever do nothing and say nothing."""
    runtime = each.open()
    right(runtime, some_images(1))
    monkeypatch.setattr(each.gpu, "execute", lambda work: None)
    if each.gpu.model.integrated:
        assert np.isnan(runtime.infer(some_images(1, seed=1))[0]).all()


# ---- awake ------------------------------------------------------------------------------------


def test_a_gpu_that_is_idle_is_kept_awake_and_scores_stay_right(each: Machine) -> None:
    runtime = each.open(keep_warm_s=0.02)
    right(runtime, some_images(3))
    before = each.gpu.counts["executions"]
    until(lambda: each.gpu.counts["executions"] - before >= 3)
    right(runtime, some_images(2, seed=5))
    runtime.close()
    before = each.gpu.counts["executions"]
    time.sleep(0.1)
    assert each.gpu.counts["executions"] == before


def test_a_gpu_may_sleep_where_a_setting_says_so(jetson: Machine) -> None:
    runtime = jetson.open()
    right(runtime, some_images(1))
    before = jetson.gpu.counts["executions"]
    time.sleep(0.1)
    assert jetson.gpu.counts["executions"] == before


def test_a_gpu_that_is_lost_while_idle_is_told_of(jetson: Machine) -> None:
    told = threading.Event()
    cuda.when_lost(lambda why: told.set())
    runtime = jetson.open(keep_warm_s=0.02)
    right(runtime, some_images(1))
    jetson.gpu.fail()
    assert told.wait(30)
    with pytest.raises(GpuLost):
        runtime.infer(some_images(1))


# ---- in any order -----------------------------------------------------------------------------


def in_any_order(machine: Machine, seed: int, steps: int) -> dict[str, int]:
    """Open, swap banks, infer, close and drop at random, with too little memory now and then."""
    chance = random.Random(seed)
    plans = {0.0: machine.bare, 5.0: machine.plan("shifted", offset=5.0)}
    alive: list[tuple[TensorRTRuntime, Any, float]] = []
    done = dict.fromkeys(("opened", "shared", "full", "right", "closed", "dropped", "lost"), 0)
    free = machine.gpu.free

    def open_one() -> tuple[TensorRTRuntime, Any, float]:
        bank, offset = tiny_bank(chance.randrange(9), chance.randrange(9, 400)), 0.0
        banked = [one for one in alive if one[1] is not None]
        if banked and chance.random() < 0.4:
            other = chance.choice(banked)[0].with_bank(bank, "f32")
            assert other is not None
            done["shared"] += 1
            return other, bank, offset
        if chance.random() < 0.5:
            return machine.open(bank), bank, offset
        offset = chance.choice([*plans])
        return TensorRTRuntime(plans[offset]), None, offset

    for _ in range(steps):
        what = chance.random()
        try:
            if what < 0.3 and len(alive) < 6:
                if chance.random() < 0.3:
                    machine.gpu.free = chance.randrange(0, 60_000)
                alive.append(open_one())
                done["opened"] += 1
            elif what < 0.45 and alive:
                one = alive.pop(chance.randrange(len(alive)))
                if chance.random() < 0.7:
                    one[0].close()
                    done["closed"] += 1
                else:
                    done["dropped"] += 1
                del one
            elif alive:
                runtime, bank, offset = chance.choice(alive)
                if chance.random() < 0.2:
                    runtime.take_together(Batches(chance.choice([1, 2, 4, 8])))
                seed = chance.randrange(10**6)
                right(runtime, some_images(chance.randrange(1, 12), seed), bank, offset)
                done["right"] += 1
                del runtime
        except OutOfMemory:
            done["full"] += 1
        except GpuLost:
            done["lost"] += 1
        machine.alive()  # what was dropped is gone
        machine.gpu.free = free - sum(one.counted for one in machine.gpu._memory.values())
    for runtime, _, _ in alive:
        runtime.close()
    if not done["lost"]:
        alive.clear()
        assert machine.alive() == {"contexts": 1}
    return done


def test_models_come_and_go_in_any_order_and_scores_stay_right(each: Machine) -> None:
    done = in_any_order(each, seed=1, steps=120)
    assert all(count for what, count in done.items() if what != "lost"), done


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_models_come_and_go_in_many_orders(each: Machine, seed: int) -> None:
    print(in_any_order(each, seed=seed + 100, steps=1500))


@pytest.mark.parametrize("seed", range(3))
def test_a_gpu_that_is_lost_at_any_time_gives_errors_and_no_wrong_score(
    jetson: Machine, seed: int
) -> None:
    cuda.when_lost(lambda why: None)
    jetson.gpu.fail(after=random.Random(seed).randrange(1, 60))
    done = in_any_order(jetson, seed=seed, steps=100)
    assert done["lost"]
    assert not jetson.gpu.crashes
