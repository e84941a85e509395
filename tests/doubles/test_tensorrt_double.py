"""The doubles of TensorRT and pycuda keep the promises that the other tests build on."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from support.double import VERSIONS, Double, doubled, environment, reports
from support.graphs import COLOURS, SIDE, WEIGHTS, expected, graph, some_images

MIB = 1024 * 1024


def python(program: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a program that finds the doubles."""
    variables = {**os.environ, **environment(**more)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


# What is built: image uint8 (n, 4, 4, 3) -> score (n,), map (n, 4, 4)


# How it is built and run, as a program would


def log_of(double: Double) -> tuple[Any, list[str]]:
    lines: list[str] = []

    class Log(double.trt.ILogger):
        def __init__(self) -> None:
            double.trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            lines.append(f"{severity.name}: {msg}")

    return Log(), lines


def plan_of(
    double: Double,
    data: bytes | None = None,
    *,
    logger: Any = None,
    flags: tuple[str, ...] = (),
    profile: bool = True,
    change: Callable[[Any], None] = lambda config: None,
) -> Any:
    """A plan for 1 to 8 images, or None."""
    trt = double.trt
    builder = trt.Builder(logger or trt.Logger(trt.Logger.ERROR))
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger or trt.Logger(trt.Logger.ERROR))
    assert parser.parse(data or graph()), parser.get_error(0)
    config = builder.create_builder_config()
    for flag in flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if profile:
        shapes = builder.create_optimization_profile()
        each = (SIDE, SIDE, COLOURS)
        shapes.set_shape("image", (1, *each), (4, *each), (8, *each))
        if network.num_inputs == 2:
            shapes.set_shape("memory_bank", (1, 2), (16, 2), (64, 2))
        assert config.add_optimization_profile(shapes) == 0
    change(config)
    return builder.build_serialized_network(network, config)


class Session:
    """An engine with a context, a stream and plain buffers, in this thread."""

    def __init__(self, double: Double, plan: Any, logger: Any = None) -> None:
        trt, cuda = double.trt, double.cuda
        self.double = double
        cuda.init()
        self.primary = cuda.Device(0).retain_primary_context()
        self.primary.push()
        self.runtime = trt.Runtime(logger or trt.Logger(trt.Logger.ERROR))
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        assert self.engine is not None
        self.context = self.engine.create_execution_context()
        self.stream = cuda.Stream()
        self.buffers = {
            "image": cuda.mem_alloc(8 * SIDE * SIDE * COLOURS),
            "score": cuda.mem_alloc(8 * 4),
            "map": cuda.mem_alloc(8 * SIDE * SIDE * 4),
        }
        for name, buffer in self.buffers.items():
            assert self.context.set_tensor_address(name, int(buffer))

    def enqueue(self, images: NDArray[np.uint8]) -> bool:
        assert self.context.set_input_shape("image", images.shape)
        self.double.cuda.memcpy_htod_async(self.buffers["image"], images, self.stream)
        done: bool = self.context.execute_async_v3(self.stream.handle)
        return done

    def read(self, count: int) -> NDArray[np.float32]:
        """The maps, as they are now."""
        found = np.empty((count, SIDE, SIDE), np.float32)
        self.double.cuda.memcpy_dtoh(found, self.buffers["map"])
        return found

    def maps(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        assert self.enqueue(images)
        self.stream.synchronize()
        return self.read(len(images))

    def close(self) -> None:
        self.buffers.clear()
        del self.context, self.engine, self.runtime, self.stream
        gc.collect()
        self.primary.pop()
        self.primary.detach()


@pytest.fixture
def double() -> Iterator[Double]:
    with doubled() as found:
        yield found


@pytest.fixture(params=VERSIONS)
def each(request: pytest.FixtureRequest) -> Iterator[Double]:
    with doubled(request.param) as found:
        yield found


@pytest.fixture
def session(double: Double) -> Iterator[Session]:
    made = Session(double, plan_of(double))
    yield made
    if double.gpu.stack():
        made.close()


# The whole way


@pytest.mark.parametrize("half", [False, True])
def test_a_plan_scores_as_the_graph_does_whatever_the_number_of_images(
    each: Double, half: bool
) -> None:
    session = Session(each, plan_of(each, graph(half=half)))
    for count in (1, 3, 8):
        images = some_images(count)
        np.testing.assert_allclose(
            session.maps(images), expected(images), rtol=5e-3 if half else 1e-5
        )
    session.close()
    each.assert_clean()


def test_what_stays_at_the_end_is_counted(session: Session) -> None:
    kinds = session.double.gpu.alive()
    assert kinds == {
        "weights": 1, "activations": 1, "device memory": 3, "contexts": 1, "streams": 1,
        "engines": 1, "execution contexts": 1,
    }  # fmt: skip
    session.close()
    session.double.assert_clean()


def test_a_bank_is_swapped_without_touching_the_engine(double: Double) -> None:
    session = Session(double, plan_of(double, graph(bank=True)))
    cuda, images = double.cuda, some_images(2)
    scores = []
    for bank in (np.ones((5, 2), np.float32), 3 * np.ones((64, 2), np.float32)):
        buffer = cuda.to_device(bank)
        session.context.set_tensor_address("memory_bank", int(buffer))
        assert session.context.set_input_shape("memory_bank", bank.shape)
        session.maps(images)
        score = np.empty(2, np.float32)
        cuda.memcpy_dtoh(score, session.buffers["score"])
        scores.append(score)
        del buffer
    peak = expected(images).max(axis=(1, 2))
    np.testing.assert_allclose(scores, [peak + 10, peak + 384], rtol=1e-5)
    session.close()
    double.assert_clean()


def test_shapes_are_told_as_the_engine_has_them(session: Session) -> None:
    engine, context = session.engine, session.context
    assert [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)] == [
        "image", "score", "map",
    ]  # fmt: skip
    assert engine.get_tensor_shape("image") == (-1, SIDE, SIDE, COLOURS)
    assert [shape[0] for shape in engine.get_tensor_profile_shape("image", 0)] == [1, 4, 8]
    trt = session.double.trt
    assert engine.get_tensor_mode("map") == trt.TensorIOMode.OUTPUT
    assert trt.nptype(engine.get_tensor_dtype("image")) is np.uint8
    assert context.infer_shapes() == ["image"]
    assert context.get_tensor_shape("map") == (-1, SIDE, SIDE)
    context.set_input_shape("image", (3, SIDE, SIDE, COLOURS))
    assert context.get_tensor_shape("map") == (3, SIDE, SIDE)
    assert context.get_max_output_size("map") == 8 * SIDE * SIDE * 4


def test_what_nobody_holds_any_more_is_given_back_at_once(session: Session) -> None:
    """As pybind11's objects are: without waiting for Python's collector of cycles."""
    session.maps(some_images(2))
    gc.disable()
    try:
        session.context = session.engine = None
        assert {"weights", "activations", "engines"}.isdisjoint(session.double.gpu.alive())
    finally:
        gc.enable()


# Asynchronous


def test_who_does_not_wait_reads_what_was_there_before(double: Double) -> None:
    """Through mapped memory: a copy to the host would wait for the stream by itself."""
    session, cuda = Session(double, plan_of(double)), double.cuda
    mapped = cuda.pagelocked_empty(
        (2, SIDE, SIDE), np.float32, mem_flags=cuda.host_alloc_flags.DEVICEMAP
    )
    address = mapped.base.get_device_pointer()
    assert address != mapped.ctypes.data
    session.context.set_tensor_address("map", address)
    images = some_images(2)
    assert session.enqueue(images)
    assert np.isnan(mapped).all()
    session.stream.synchronize()
    np.testing.assert_allclose(mapped, expected(images), rtol=1e-5)
    del mapped
    session.close()
    double.assert_clean()


def test_an_event_is_enough_to_wait_for(session: Session) -> None:
    cuda, images = session.double.cuda, some_images(1)
    start, end = cuda.Event(), cuda.Event()
    start.record(session.stream)
    assert session.enqueue(images)
    end.record(session.stream)
    assert not session.stream.is_done() or end.query()
    with pytest.raises(cuda.RuntimeError, match="cuEventElapsedTime failed: device not ready"):
        cuda.Event().record(session.stream).time_since(start)
    end.synchronize()
    assert end.query()
    assert end.time_since(start) >= 0
    np.testing.assert_allclose(session.read(1), expected(images), rtol=1e-5)


def test_page_locked_memory_is_read_late_and_other_memory_at_once(session: Session) -> None:
    cuda = session.double.cuda
    locked, plain = cuda.pagelocked_empty(4, np.float32), np.zeros(4, np.float32)
    for source, found in ((locked, 2), (plain, 1)):
        device = cuda.mem_alloc(16)
        source[:] = 1
        cuda.memcpy_htod_async(device, source, session.stream)
        source[:] = 2
        session.stream.synchronize()
        back = np.empty(4, np.float32)
        cuda.memcpy_dtoh(back, device)
        assert (back == found).all()


def test_new_memory_is_no_zeros(session: Session) -> None:
    assert np.isnan(session.read(8)).all()


# What hardware does not forgive


def test_a_buffer_too_small_is_a_crash(session: Session) -> None:
    small = session.double.cuda.mem_alloc(8)
    session.context.set_tensor_address("map", int(small))
    with pytest.raises(session.double.cuda.Crash, match=r"64 bytes from .* which has 8"):
        session.enqueue(some_images(1))
    assert session.double.gpu.crashes


def test_using_memory_after_it_was_freed_is_a_crash(session: Session) -> None:
    assert session.enqueue(some_images(1))
    session.buffers["map"].free()
    with pytest.raises(session.double.cuda.Crash, match="was freed"):
        session.stream.synchronize()


def test_memory_of_the_host_is_no_address_of_the_device(session: Session) -> None:
    session.context.set_tensor_address("map", np.empty(64, np.float32).ctypes.data)
    with pytest.raises(session.double.cuda.Crash, match="is no address of the device"):
        session.enqueue(some_images(1))


def test_an_address_inside_a_buffer_must_be_aligned(session: Session) -> None:
    session.context.set_tensor_address("map", int(session.buffers["map"]) + 64)
    with pytest.raises(session.double.cuda.Crash, match="not aligned to 256 bytes"):
        session.enqueue(some_images(1))


def test_a_context_in_two_threads_is_a_crash(session: Session) -> None:
    assert session.enqueue(some_images(1))
    found: list[BaseException] = []

    def run() -> None:
        try:
            session.context.execute_async_v3(session.stream.handle)
        except session.double.cuda.Crash as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "two threads at once" in str(found[0])
    assert not isinstance(found[0], Exception), "no `except Exception` of a program may catch it"


def test_a_context_left_on_the_stack_of_a_thread_is_a_crash(double: Double) -> None:
    def run() -> None:
        double.cuda.init()
        double.cuda.Device(0).retain_primary_context().push()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    gc.collect()
    assert "context stack was not empty" in double.gpu.crashes[0]


def test_in_a_process_of_its_own_a_crash_ends_it() -> None:
    program = "import pycuda.driver as cuda; cuda.gpu.crash('as asked')"
    done = python(program)
    assert done.returncode < 0
    assert "as asked" in done.stderr


# What fails as it does on hardware


def test_an_execution_without_addresses_or_shapes_is_refused(each: Double) -> None:
    logger, lines = log_of(each)
    session = Session(each, plan_of(each, logger=logger), logger)
    assert not session.context.execute_async_v3(session.stream.handle)
    assert "dimensions are not specified: image" in lines[-1]
    session.context.set_input_shape("image", (1, SIDE, SIDE, COLOURS))
    session.context.set_tensor_address("map", 0)
    assert not session.context.execute_async_v3(session.stream.handle)
    assert "address or allocator is set for output tensor map" in lines[-1]
    assert not session.context.execute_async_v3(12345)
    assert "invalid resource handle" in lines[-1]
    session.close()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((9, SIDE, SIDE, COLOURS), "does not satisfy any optimization profiles"),
        ((0, SIDE, SIDE, COLOURS), "does not satisfy any optimization profiles"),
        ((1, 5, SIDE, COLOURS), "Static dimension mismatch"),
        ((1, SIDE), "Static dimension mismatch"),
    ],
)
def test_a_shape_outside_the_profile_is_refused(
    double: Double, shape: tuple[int, ...], words: str
) -> None:
    logger, lines = log_of(double)
    session = Session(double, plan_of(double, logger=logger), logger)
    assert not session.context.set_input_shape("image", shape)
    assert words in lines[-1]
    session.close()


def test_without_a_context_pycuda_refuses_and_says_so(double: Double) -> None:
    cuda = double.cuda
    with pytest.raises(cuda.LogicError, match="cuMemAlloc failed: initialization error"):
        cuda.mem_alloc(1)
    cuda.init()
    context = cuda.Device(0).retain_primary_context()
    for call, words in (
        (lambda: cuda.mem_alloc(1), "cuMemAlloc failed: invalid device context"),
        (lambda: cuda.mem_get_info(), "cuMemGetInfo failed: invalid device context"),
        (lambda: cuda.pagelocked_empty(1, np.uint8), "cuMemHostAlloc failed: invalid device"),
        (lambda: cuda.Stream(), "explicit_context_dependent failed: invalid device context"),
    ):
        with pytest.raises(cuda.LogicError, match=words):
            call()
    with pytest.raises(cuda.LogicError, match="cannot pop non-current context"):
        context.pop()
    context.detach()
    double.assert_clean()


def test_memory_that_another_thread_frees_is_warned_of_and_leaks(session: Session) -> None:
    buffer = session.double.cuda.mem_alloc(16)
    with (
        ThreadPoolExecutor() as threads,
        pytest.warns(UserWarning, match="out-of-thread context could not be cleaned up"),
    ):
        threads.submit(buffer.free).result()
    assert session.double.gpu.alive()["device memory"] == 4


def test_a_copy_that_does_not_fit_is_refused(session: Session) -> None:
    cuda = session.double.cuda
    small = cuda.mem_alloc(8)
    with pytest.raises(cuda.LogicError, match="cuMemcpyHtoD failed: invalid argument"):
        cuda.memcpy_htod(small, np.zeros(9, np.uint8))
    with pytest.raises(ValueError, match="not contiguous"):
        cuda.memcpy_htod(small, np.zeros((4, 4), np.uint8)[:, :2])
    with pytest.raises(TypeError, match="no address"):
        cuda.memcpy_htod(np.int64(int(small)), np.zeros(8, np.uint8))
    assert session.double.gpu.crashes == []


def test_a_sticky_error_fails_everything_after_it(session: Session) -> None:
    cuda = session.double.cuda
    session.double.gpu.fail(after=2)
    session.maps(some_images(1))
    assert session.enqueue(some_images(1)), "it is found out when somebody waits"
    words = "failed: an illegal memory access was encountered"
    for call in (
        session.stream.synchronize,
        lambda: cuda.mem_alloc(1),
        cuda.mem_get_info,
        lambda: session.read(1),
    ):
        with pytest.raises(cuda.LogicError, match=words):
            call()
    assert not session.context.execute_async_v3(session.stream.handle)
    assert session.engine.create_execution_context() is None
    assert session.runtime.deserialize_cuda_engine(plan_bytes(session)) is None


def plan_bytes(session: Session) -> bytes:
    return bytes(session.engine.serialize())


def test_the_environment_can_ask_for_the_sticky_error() -> None:
    with doubled(KENSA_DOUBLE_FAIL_EXECUTION="1") as double:
        session = Session(double, plan_of(double))
        with pytest.raises(double.cuda.LogicError, match="cuStreamSynchronize failed: an illegal"):
            session.maps(some_images(1))


@pytest.mark.parametrize(
    ("what", "module", "words"),
    [
        ("bindings", "tensorrt", "No module named 'tensorrt'"),
        ("libnvinfer", "tensorrt", "libnvinfer.so.10: cannot open shared object file"),
        ("libcuda", "pycuda.driver", "libcuda.so.1: cannot open shared object file"),
    ],
)
def test_a_machine_may_lack_what_it_needs(what: str, module: str, words: str) -> None:
    done = python(f"import {module}", KENSA_DOUBLE_MISSING=what)
    assert done.returncode == 1
    assert words in done.stderr


def test_without_a_device_nothing_can_be_made() -> None:
    with doubled(KENSA_DOUBLE_MISSING="device") as double:
        with pytest.raises(double.cuda.RuntimeError, match="cuInit failed: no CUDA-capable device"):
            double.cuda.init()
        logger, lines = log_of(double)
        with pytest.raises(TypeError, match="factory function returned nullptr"):
            double.trt.Runtime(logger)
        assert "CUDA initialization failure with error: 100" in lines[0]


def test_the_end_of_python_with_a_context_on_the_stack_is_a_crash() -> None:
    program = "import pycuda.driver as c; c.init(); c.Device(0).retain_primary_context().push()"
    done = python(program)
    assert done.returncode < 0
    assert "The context stack was not empty" in done.stderr


def test_a_stream_of_another_context_is_refused(double: Double) -> None:
    """The trap of pycuda.autoinit: TensorRT's own context is the primary one."""
    logger, lines = log_of(double)
    session = Session(double, plan_of(double, logger=logger), logger)
    made = double.cuda.Device(0).make_context()
    stream = double.cuda.Stream()
    made.pop()
    assert not session.context.execute_async_v3(stream.handle)
    assert "Cuda Runtime (invalid resource handle)" in lines[-1]
    del stream
    made.detach()
    session.close()
    double.assert_clean()


def test_it_is_known_which_threads_used_the_device(session: Session) -> None:
    session.maps(some_images(1))
    assert session.double.gpu.threads == {threading.get_ident()}


def test_another_process_tells_what_it_did(tmp_path: Path) -> None:
    program = (
        "import pycuda.driver as c; c.init(); x = c.Device(0).retain_primary_context(); x.push()\n"
        "try: c.memcpy_htod(c.mem_alloc(1), b'too long')\n"
        "except c.LogicError as error: print(error)\n"
        "kept = c.mem_alloc(8); x.pop()"
    )
    done = python(program, KENSA_DOUBLE_REPORT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "cuMemcpyHtoD failed: invalid argument" in done.stdout, "the driver checks that itself"
    (report,) = reports(tmp_path)
    assert report["alive"] == {"contexts": 1, "device memory": 1}
    assert report["crashes"] == []
    assert report["threads"] == 1


def test_processes_share_the_memory_of_the_device(tmp_path: Path) -> None:
    program = (
        "import pycuda.driver as c; c.init(); x = c.Device(0).retain_primary_context(); x.push()\n"
        "kept = c.mem_alloc(30 << 20); print(c.mem_get_info()[0] >> 20, flush=True); input()\n"
        "kept.free(); x.pop(); x.detach()"
    )
    variables = environment(memory_mib=(100, 80), KENSA_DOUBLE_REPORT=str(tmp_path))
    with ExitStack() as stack:
        shown = []
        for _ in range(3):
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                env={**os.environ, **variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            shown.append(process.stdout.readline().strip())
        assert shown == ["50", "20", ""]
        assert "cuMemAlloc failed: out of memory" in process.stderr.read()


def test_a_build_takes_as_long_as_it_is_set_to() -> None:
    with doubled(KENSA_DOUBLE_BUILD_SECONDS="0.2") as double:
        started = time.perf_counter()
        assert plan_of(double)
        assert time.perf_counter() - started > 0.2


# Memory


def test_memory_is_what_was_set_and_comes_back() -> None:
    with doubled(memory_mib=(7485, 40)) as double:
        plan = plan_of(double)
        session = Session(double, plan)
        free, total = double.cuda.mem_get_info()
        assert total == 7485 * MIB
        assert 39 * MIB < free < 40 * MIB
        taken = double.cuda.mem_alloc(30 * MIB)
        with pytest.raises(double.cuda.MemoryError, match="cuMemAlloc failed: out of memory"):
            double.cuda.mem_alloc(30 * MIB)
        locked = double.cuda.pagelocked_empty(8 * MIB, np.uint8)
        assert double.cuda.mem_get_info()[0] < 2 * MIB, "a Jetson's memory is shared"
        taken.free()
        del locked
        assert double.cuda.mem_get_info()[0] == free
        session.close()
        double.assert_clean()
        assert double.gpu.free == 40 * MIB


def test_an_engine_or_a_context_that_does_not_fit_is_none(each: Double) -> None:
    logger, lines = log_of(each)
    plan = plan_of(each, logger=logger)
    engine = each.trt.Runtime(logger).deserialize_cuda_engine(plan)
    each.gpu.free = 600
    assert engine.create_execution_context() is None
    assert "OutOfMemory (Requested size was" in lines[-1]
    each.gpu.free = 0
    assert each.trt.Runtime(logger).deserialize_cuda_engine(plan) is None
    assert "Engine deserialization failed" in lines[-1]


def test_a_build_without_memory_cannot_find_an_implementation(each: Double) -> None:
    logger, lines = log_of(each)
    each.gpu.free = 2048
    assert plan_of(each, logger=logger) is None
    assert "Device memory is insufficient to use tactic" in lines[0]
    assert "Could not find any implementation for node cast" in lines[-1]
    each.assert_clean()


def test_a_small_workspace_only_skips_tactics(double: Double) -> None:
    logger, lines = log_of(double)
    pool = double.trt.MemoryPoolType.WORKSPACE
    assert plan_of(double, logger=logger, change=lambda c: c.set_memory_pool_limit(pool, 64))
    assert "Skipping tactic" in lines[0]


def test_devices_are_what_they_are() -> None:
    for name, cores, integrated in (("orin-nano", 0, 1), ("agx-orin", 2, 1), ("rtx", 0, 0)):
        with doubled(device=name) as double:
            double.cuda.init()
            device = double.cuda.Device(0)
            attribute = double.cuda.device_attribute
            assert device.get_attribute(attribute.INTEGRATED) == integrated
            assert double.trt.Builder(double.trt.Logger()).num_DLA_cores == cores


# Plans


def test_a_plan_of_another_version_is_none_and_the_log_says_which() -> None:
    with doubled("10.16.1.11") as newer:
        plan = bytes(plan_of(newer))
    with doubled() as double:
        logger, lines = log_of(double)
        assert double.trt.Runtime(logger).deserialize_cuda_engine(plan) is None
        assert (
            "The engine plan file is not compatible with this version of TensorRT, expecting"
            " library version 10.3.0.30 got 10.16.1.11, please rebuild." in lines[0]
        )
        assert "Engine deserialization failed" in lines[1]


def test_a_plan_of_another_gpu_is_none_and_of_a_sister_a_warning() -> None:
    plans = {}
    for device in ("rtx", "agx-orin"):
        with doubled(device=device) as other:
            plans[device] = bytes(plan_of(other))
    with doubled() as double:
        logger, lines = log_of(double)
        runtime = double.trt.Runtime(logger)
        assert runtime.deserialize_cuda_engine(plans["rtx"]) is None
        assert "expecting compute 8.7 got compute 8.9, please rebuild." in lines[0]
        assert runtime.deserialize_cuda_engine(plans["agx-orin"]) is not None
        assert "different models of devices is not recommended" in lines[-1]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda plan: b"", "Cannot deserialize with an empty memory buffer"),
        (lambda plan: graph(), "Serialization assertion header.magicTag"),
        (lambda plan: plan[:20], "Assertion bufferSize >= minBufferSize failed"),
        (lambda plan: plan[:-1], "Serialization assertion plan.header.size == blobSize failed"),
        (lambda plan: plan[:-9] + b"?" + plan[-8:], "Serialization assertion"),
    ],
    ids=["empty", "an ONNX", "only the beginning", "one byte short", "one byte other"],
)
def test_bytes_that_are_no_plan_are_none(
    double: Double, damage: Callable[[bytes], bytes], words: str
) -> None:
    logger, lines = log_of(double)
    plan = damage(bytes(plan_of(double, logger=logger)))
    assert double.trt.Runtime(logger).deserialize_cuda_engine(plan) is None
    assert words in lines[0]


def test_a_plan_is_a_buffer_and_nothing_more(double: Double, tmp_path: Path) -> None:
    plan = plan_of(double)
    (tmp_path / "plan").write_bytes(plan)
    assert (tmp_path / "plan").stat().st_size == plan.nbytes
    with pytest.raises(TypeError):
        len(plan)
    with pytest.raises(AttributeError):
        plan.hex()


# Building


def test_a_dynamic_network_needs_a_profile_for_each_input(each: Double) -> None:
    logger, lines = log_of(each)
    assert plan_of(each, logger=logger, profile=False) is None
    assert (
        "Network has dynamic or shape inputs, but no optimization profile has been defined."
        in lines[-1]
    )

    def incomplete(config: Any) -> None:
        config.reset()
        config.add_optimization_profile(each.trt.Builder(logger).create_optimization_profile())

    assert plan_of(each, logger=logger, change=incomplete) is None
    assert "Dynamic input tensor image is missing dimensions in profile 0" in lines[-1]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_tensorrt_11_took_away_is_not_there(version: str) -> None:
    with doubled(version) as double:
        old = version.startswith("10")
        assert hasattr(double.trt.BuilderFlag, "FP16") == old
        assert hasattr(double.trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH") == old
        assert hasattr(double.trt.Builder, "platform_has_fast_fp16") == old
        assert hasattr(double.trt.ICudaEngine, "device_memory_size") == old
        assert hasattr(double.trt.ICudaEngine, "device_memory_size_v2")
        assert not hasattr(double.trt, "get_context")


def test_half_precision_is_no_flag_of_a_strongly_typed_network(double: Double) -> None:
    logger, lines = log_of(double)
    assert plan_of(double, logger=logger, flags=("FP16",)) is None
    assert "kFP16 is set, and is not allowed for a strongly typed network" in lines[-1]


def test_dla_needs_a_core_and_fixed_shapes() -> None:
    for device, words in (("orin-nano", "no DLA core"), ("agx-orin", "dynamic shapes")):
        with doubled(device=device) as double:
            logger, lines = log_of(double)

            def use(config: Any, double: Double = double) -> None:
                config.default_device_type = double.trt.DeviceType.DLA
                config.DLA_core = 0

            assert plan_of(double, logger=logger, change=use) is None
            assert words in lines[-1]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"no ONNX", "MODEL_DESERIALIZE_FAILED"),
        (graph(cast_first=False), "TensorRT does not support UINT8 types for intermediate"),
        (graph(opset=6), "Pre-opset 7 broadcasting is unsupported"),
        (
            graph(extra=[helper.make_node("Unique", ["map"], ["unused"], "unique", sorted=1)]),
            "operator: Unique .*UNSUPPORTED_NODE",
        ),
        (
            graph(extra=[helper.make_node("TopK", ["score", "last"], ["a", "b"], sorted=0)]),
            "operator: TopK .*`sorted` must be 1",
        ),
        (
            graph(extra=[helper.make_node("QuantizeLinear", ["map", "offset"], ["a"], "q")]),
            "operator: QuantizeLinear .*must be 0, and int8",
        ),
        (
            graph(extra=[helper.make_node("MatMul", ["map", "weights"], ["a"], "odd")]),
            "operator: MatMul .*INVALID_NODE: Invalid Node - odd",
        ),
    ],
    ids=["no ONNX", "uint8", "old", "operator", "unsorted", "zero point", "shapes"],
)
def test_a_graph_that_tensorrt_does_not_take_is_refused(
    double: Double, data: bytes, words: str
) -> None:
    logger, lines = log_of(double)
    builder = double.trt.Builder(logger)
    network = builder.create_network(0)
    parser = double.trt.OnnxParser(network, logger)
    assert not parser.parse(data)
    assert parser.num_errors == 1
    assert re.search(words, str(parser.get_error(0)))
    assert parser.get_error(0).desc() in lines[-1]
    assert network.num_outputs == 0
    assert not parser.parse(graph()), "neither can be used again"


def test_nothing_is_an_empty_graph_and_cannot_be_built(each: Double) -> None:
    logger, lines = log_of(each)
    builder = each.trt.Builder(logger)
    network = builder.create_network(0)
    assert each.trt.OnnxParser(network, logger).parse(b"")
    assert builder.build_serialized_network(network, builder.create_builder_config()) is None
    assert "Network must have at least one output" in lines[-1]


def test_a_parser_whose_network_is_gone_is_a_crash(double: Double) -> None:
    builder = double.trt.Builder(double.trt.Logger())
    parser = double.trt.OnnxParser(builder.create_network(0), double.trt.Logger())
    with pytest.raises(double.cuda.Crash, match="whose network nobody holds"):
        parser.parse(graph())


def test_a_file_is_parsed_by_its_name_and_not_by_a_path(double: Double, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(graph())
    logger, lines = log_of(double)
    network = double.trt.Builder(logger).create_network(0)
    parser = double.trt.OnnxParser(network, logger)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        parser.parse_from_file(tmp_path / "model.onnx")
    assert parser.parse_from_file(str(tmp_path / "model.onnx"))
    assert (network.num_inputs, network.num_outputs) == (1, 2)
    assert network.get_input(0).shape == (-1, SIDE, SIDE, COLOURS)
    assert network.get_input(0).dtype == double.trt.uint8
    assert not parser.parse_from_file(str(tmp_path / "model.onnx"))
    assert "non-empty network" in lines[-1]


def test_a_parser_that_failed_once_takes_no_graph_any_more(double: Double, tmp_path: Path) -> None:
    """As the real one: it blames a node that is right for the file that was not there."""
    (tmp_path / "model.onnx").write_bytes(graph())
    logger, _ = log_of(double)
    network = double.trt.Builder(logger).create_network(0)
    parser = double.trt.OnnxParser(network, logger)
    assert not parser.parse_from_file(str(tmp_path / "absent.onnx"))
    parser.clear_errors()
    assert not parser.parse_from_file(str(tmp_path / "model.onnx"))
    assert parser.get_error(0).node_operator() == "Cast"
    assert "absent.onnx" in parser.get_error(0).desc()


class Monitored:
    """What a monitor was told, and after how many steps it cancels."""

    def __init__(self, double: Double, until: int | None = None, fault: bool = False) -> None:
        events: list[tuple[Any, ...]] = []
        threads: set[int] = set()
        self.events, self.threads = events, threads

        class Monitor(double.trt.IProgressMonitor):
            def __init__(self) -> None:
                double.trt.IProgressMonitor.__init__(self)

            def phase_start(
                self, phase_name: str, parent_phase: str | None, num_steps: int
            ) -> None:
                events.append(("start", phase_name, parent_phase, num_steps))

            def step_complete(self, phase_name: str, step: int) -> bool:
                threads.add(threading.get_ident())
                events.append(("step", phase_name, step))
                if fault:
                    raise ValueError("of the program's own")
                return until is None or len([e for e in events if e[0] == "step"]) < until

            def phase_finish(self, phase_name: str) -> None:
                events.append(("finish", phase_name))

        self.monitor = Monitor()

    def set(self, config: Any) -> None:
        config.progress_monitor = self.monitor


def test_progress_comes_in_phases_within_phases(each: Double) -> None:
    told = Monitored(each)
    assert plan_of(each, change=told.set)
    assert told.events[0] == ("start", "Building engine", None, 6)
    inner = next(event for event in told.events if event[2:3] == ("Building engine",))
    steps = [event[2] for event in told.events if event[:2] == ("step", inner[1])]
    assert steps == list(range(inner[3]))
    done = [event[2] for event in told.events if event[:2] == ("step", "Building engine")]
    assert done == list(range(5)), "one fewer than it announced, as the real one"
    assert told.events[-1] == ("finish", "Building engine")
    open_phases: list[str] = []
    for event in told.events:
        if event[0] == "start":
            assert event[2] == (open_phases[-1] if open_phases else None)
            open_phases.append(event[1])
        elif event[0] == "finish":
            assert open_phases.pop() == event[1]
    assert open_phases == []
    assert len(told.threads) > 1, "TensorRT reports from threads of its own, too"


def test_a_monitor_that_says_no_cancels_the_build(each: Double) -> None:
    told = Monitored(each, until=3)
    assert plan_of(each, change=told.set) is None
    assert len([event for event in told.events if event[0] == "step"]) == 3
    finished = [event[1] for event in told.events if event[0] == "finish"]
    assert finished[-1] == "Building engine"
    each.assert_clean()


def test_a_monitor_that_fails_cancels_the_build(
    each: Double, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan_of(each, change=Monitored(each, fault=True).set) is None
    said = capsys.readouterr().err
    assert "[ERROR] Exception caught in step_complete(): ValueError: of the program's own" in said


def test_a_timing_cache_shortens_the_next_build(each: Double) -> None:
    def steps(cache: bytes, double: Double = each) -> tuple[int, bytes]:
        told, kept = Monitored(double), []

        def use(config: Any) -> None:
            found = config.create_timing_cache(cache)
            assert config.set_timing_cache(found, ignore_mismatch=False)
            told.set(config)
            kept.append(config)

        assert plan_of(double, change=use)
        count = len([event for event in told.events if event[0] == "step"])
        return count, bytes(kept[0].get_timing_cache().serialize())

    first, cache = steps(b"")
    second, _ = steps(cache)
    assert second < first
    config = each.trt.Builder(each.trt.Logger(each.trt.Logger.ERROR)).create_builder_config()
    assert config.create_timing_cache(b"damaged") is None
    both = config.create_timing_cache(b"")
    assert both.combine(config.create_timing_cache(cache), ignore_mismatch=False)
    assert bytes(both.serialize()) == cache


# Refitting


def refit(double: Double, engine: Any, data: bytes) -> tuple[bool, Any]:
    logger = double.trt.Logger(double.trt.Logger.INTERNAL_ERROR)
    refitter = double.trt.Refitter(engine, logger)
    parser = double.trt.OnnxParserRefitter(refitter, logger)
    done = parser.refit_from_bytes(data) and refitter.refit_cuda_engine()
    return done, parser


def test_a_refit_changes_the_weights_of_the_engine_that_runs(each: Double) -> None:
    session = Session(each, plan_of(each, flags=("REFIT",)))
    images, other = some_images(3), WEIGHTS[::-1] * 2
    session.maps(images)
    assert refit(each, session.engine, graph(other))[0]
    assert (each.gpu.counts["refits"], each.gpu.counts["engines"]) == (1, 1)
    np.testing.assert_allclose(session.maps(images), expected(images, other), rtol=1e-5)
    kept = plan_bytes(session)
    session.close()
    again = Session(each, kept)
    np.testing.assert_allclose(again.maps(images), expected(images, other), rtol=1e-5)
    again.close()
    each.assert_clean()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (graph(np.ones((3, 5), np.float32)), "Failed to set named weights"),
        (graph(half=True), "Failed to set named weights"),
        (graph().replace(b"weights", b"weight_"), "Only successfully refitted 1 weights out of 2"),
        (b"no ONNX", "Failed to parse the ONNX model"),
    ],
    ids=["shape", "type", "name", "no ONNX"],
)
def test_weights_that_do_not_fit_are_refused(double: Double, data: bytes, words: str) -> None:
    session = Session(double, plan_of(double, flags=("REFIT",)))
    done, parser = refit(double, session.engine, data)
    assert not done
    assert words in parser.get_error(0).desc()
    images = some_images(1)
    np.testing.assert_allclose(session.maps(images), expected(images), rtol=1e-5)


def test_weights_that_only_the_file_has_are_passed_over_in_silence(double: Double) -> None:
    """As ModelRefitter.cpp does: so two graphs must be compared before they are refitted."""
    session = Session(double, plan_of(double, flags=("REFIT",)))
    model = onnx.load_from_string(graph())
    model.graph.initializer.append(numpy_helper.from_array(WEIGHTS, "only_here"))
    assert refit(double, session.engine, model.SerializeToString())[0]


def test_an_engine_that_was_not_built_for_it_is_not_refitted(double: Double) -> None:
    session = Session(double, plan_of(double))
    assert not session.engine.refittable
    with pytest.raises(TypeError, match="factory function returned nullptr"):
        refit(double, session.engine, graph())


def test_a_refit_amid_work_is_a_crash(double: Double) -> None:
    session = Session(double, plan_of(double, flags=("REFIT",)))
    assert session.enqueue(some_images(1))
    with pytest.raises(double.cuda.Crash, match="while it had work to do"):
        refit(double, session.engine, graph())


# Bindings


def test_what_pybind11_refuses_is_refused(each: Double) -> None:
    trt = each.trt
    builder = trt.Builder(trt.Logger())
    config = builder.create_builder_config()
    with pytest.raises(AttributeError):
        config.max_workspace_size = 1
    with pytest.raises(TypeError):
        config.set_flag(1)
    with pytest.raises(TypeError):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, -1)
    with pytest.raises(TypeError):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1.5)
    with pytest.raises(TypeError, match="No constructor defined"):
        trt.IBuilderConfig()
    with pytest.raises(TypeError):
        1 << trt.BuilderFlag.REFIT
    assert int(trt.BuilderFlag.REFIT) != trt.BuilderFlag.REFIT
    assert trt.Dims((1, 2)) == (1, 2)
    with pytest.raises(TypeError):
        assert trt.Dims((1, 2)) == trt.Dims((1, 2))

    class Forgetful(trt.ILogger):
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="must be called when overriding"):
        Forgetful()


def test_only_the_first_logger_is_used(double: Double) -> None:
    """Until all builders, runtimes and refitters are gone."""
    first, heard = log_of(double)
    second, unheard = log_of(double)
    runtime = double.trt.Runtime(first)
    other = double.trt.Runtime(second)
    assert "differs from one already provided" in heard[0]
    assert other.deserialize_cuda_engine(b"no plan" * 50) is None
    assert "header.magicTag == kEXPECTED_MAGIC_TAG failed" in heard[1]
    assert unheard == []
    del runtime, other
    gc.collect()
    assert double.trt.Runtime(second).deserialize_cuda_engine(b"no plan") is None
    assert unheard


def test_the_doubles_are_light_to_import() -> None:
    program = "import sys, tensorrt, pycuda.driver; print(*sys.modules)"
    done = python(program)
    assert done.returncode == 0, done.stderr
    assert not {"openvino", "onnx", "torch"} & set(done.stdout.split())
