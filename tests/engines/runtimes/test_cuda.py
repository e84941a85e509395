"""The thread that owns the GPU, its buffers and a resident bank: on the double, and on a real GPU.

Where there is no TensorRT, copies on the device take the place of the engine. What is marked real
runs only where pycuda or cuda-bindings finds a GPU that nobody else uses meanwhile:

    python -m pytest -m 'soak or not soak' tests/engines/runtimes/test_cuda.py -k real
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.errors import OutOfMemory, RuntimeFailed
from engines.runtimes import cuda
from engines.runtimes.cuda import NON_BLOCKING, Bank, Buffer, Gpu
from support.double import doubled

MIB = 1024 * 1024
ROWS, COLUMNS = 32, 96  # of what goes in and comes out
Matrix = NDArray[np.float32]


class Engine:
    """Gives back what it is given, and a row of its bank: by copies on the device."""

    def __init__(self, gpu: Gpu, bank: Matrix) -> None:
        self._gpu = gpu
        self._in, self._out, self._row = Buffer(gpu), Buffer(gpu), Buffer(gpu)
        self._bank = Bank(gpu, *bank.shape)
        gpu.call(lambda: self._take(bank))

    def _take(self, bank: Matrix) -> None:
        driver = self._gpu.cuda
        self._gpu.hold(self)
        self._stream = driver.Stream(NON_BLOCKING)
        self._event = driver.Event(int(driver.event_flags.BLOCKING_SYNC))
        for buffer in (self._in, self._out):
            buffer.take((ROWS, COLUMNS), np.float32)
        self._row.take((1, COLUMNS), np.float32)
        self._bank.take()
        self._bank.write(0, bank, self._stream)

    def run(self, values: Matrix, row: int) -> tuple[Matrix, Matrix]:
        return self._gpu.call(lambda: self._run(values, row))

    def _run(self, values: Matrix, row: int) -> tuple[Matrix, Matrix]:
        driver, count = self._gpu.cuda, len(values)
        np.copyto(self._in.host[:count], values)
        self._out.host[:] = np.nan
        self._in.send(count, self._stream)
        copy, nbytes = driver.memcpy_dtod_async, COLUMNS * 4
        copy(self._out.address, self._in.address, count * nbytes, self._stream)
        copy(self._row.address, self._bank.address + row * nbytes, nbytes, self._stream)
        self._out.fetch(count, self._stream)
        self._row.fetch(1, self._stream)
        self._event.record(self._stream)
        self._event.synchronize()
        return self._out.host[:count].copy(), self._row.host[0].copy()

    def again(self) -> None:
        pass

    def free(self) -> None:
        self._stream = self._event = None
        for one in (self._in, self._out, self._row, self._bank):
            one.free()


@cache
def why_no_gpu() -> str | None:
    """Asked in a process of its own: here the double may have been imported."""
    ask = "from engines.nvidia import driver; cuda = driver.load(); cuda.init(); cuda.Device(0)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@pytest.fixture(params=["double-mapped", "double-copied", "real"])
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    if request.param != "real":
        with doubled(device="orin-nano" if request.param == "double-mapped" else "rtx") as double:
            yield cuda.gpu()
            cuda.close()
            double.assert_clean()
        return
    if (why := why_no_gpu()) is not None:
        pytest.skip(f"no GPU here: {why}")
    yield cuda.gpu()
    cuda.close()


def hammer(gpu: Gpu, calls: int) -> None:
    """Sixteen threads, two engines with banks of their own."""
    banks = [np.random.default_rng(seed).random((500, COLUMNS), np.float32) for seed in (1, 2)]
    engines = [Engine(gpu, bank) for bank in banks]

    def ask(number: int) -> int:
        chance = np.random.default_rng(number)
        for turn in range(calls):
            which, row = (number + turn) % 2, int(chance.integers(500))
            values = chance.random((1 + turn % ROWS, COLUMNS), np.float32)
            same, known = engines[which].run(values, row)
            np.testing.assert_array_equal(same, values)
            np.testing.assert_array_equal(known, banks[which][row])
        return threading.get_ident()

    with ThreadPoolExecutor(16) as pool:
        assert threading.get_ident() not in set(pool.map(ask, range(16)))
    for engine in engines:
        gpu.forget(engine).result()


def free_memory(gpu: Gpu) -> int:
    return gpu.memory()[0]


def test_sixteen_threads_get_back_what_they_gave(gpu: Gpu) -> None:
    hammer(gpu, calls=20)


@pytest.mark.soak
def test_ten_thousand_calls_of_sixteen_threads_leak_nothing(gpu: Gpu) -> None:
    hammer(gpu, calls=20)  # what CUDA keeps for itself is taken now
    before = free_memory(gpu)
    hammer(gpu, calls=625)
    assert free_memory(gpu) == before


def test_buffers_and_banks_that_come_and_go_leak_nothing(gpu: Gpu) -> None:
    bank = np.ones((5_000, COLUMNS), np.float32)
    gpu.forget(Engine(gpu, bank)).result()
    before = free_memory(gpu)
    for _ in range(20):
        engine = Engine(gpu, bank)
        assert free_memory(gpu) < before
        gpu.forget(engine).result()
    assert free_memory(gpu) == before


def test_more_than_there_is_has_a_name_and_the_gpu_works_on(gpu: Gpu) -> None:
    _, total = gpu.memory()
    bank = Bank(gpu, total // 4, 2)  # twice of what there is
    with pytest.raises(OutOfMemory, match=rf"\d+ of {total // MIB} MiB of the GPU's memory"):
        gpu.call(bank.take)
    hammer(gpu, calls=2)


def test_an_error_that_passes_is_no_lost_gpu(gpu: Gpu) -> None:
    driver: Any = gpu.cuda
    with pytest.raises(RuntimeFailed, match="CUDA failed: cuMemcpyHtoD"):
        gpu.call(lambda: driver.memcpy_htod(1, np.zeros(4, np.uint8)))
    hammer(gpu, calls=2)


def test_it_ends_and_begins_again(gpu: Gpu) -> None:
    Engine(gpu, np.ones((10, COLUMNS), np.float32))  # which nobody gives back
    for _ in range(3):
        cuda.close()
        assert not gpu._thread.is_alive()
        gpu = cuda.gpu()
        hammer(gpu, calls=2)
