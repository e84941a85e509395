"""model.onnx -> model.plan, on the machine that will serve it. No torch in here.

One way for TensorRT 10.3 to 11.4: a strongly typed network, so half precision and int8 stand in the
graph and nowhere else. TF32 is off: it would round the distances in a memory bank, which must stay
in float32. A plan is refittable, so that a retraining need not build it again, and no plan is kept
whose scores of real images are not those of the graph.

Only loaded where TensorRT is: see `engines.store.plan.Machine.read`.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pycuda.driver as cuda
import tensorrt as trt
from numpy.typing import NDArray

from engines.errors import BadBundle, BadRequest, BuildFailed, KensaError, OutOfMemory
from engines.files import sha256, write_atomically
from engines.meta import Meta
from engines.store.bundle import ONNX, PLAN, read_report
from engines.store.plan import Fingerprint, Machine, Precision
from workers.converting.graphs import difference
from workers.converting.parity import compare_in
from workers.progress import Progress, Tick

MIB = 1024 * 1024
MAX_BATCH = 4
BANK_ROOM = 1.5  # a memory bank may grow by half before the plan must be built again
NEIGHBOURS = 9  # of PatchCore's graph: a bank of fewer rows has no use for it
LEAST_WORKSPACE = 256  # MiB
LINES = 200  # of TensorRT's log that are kept

T = TypeVar("T")
Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Wanted:
    """What plan is wanted, and what proves that it is right."""

    meta: Meta
    precision: Precision
    workspace: int  # MiB, at most
    use_dla: bool
    bank: NDArray[np.float32] | None  # (M, C)
    images: NDArray[np.uint8]  # (n, S, S, 3)
    expected: Scores | None  # raw scores (n,) of the images; None where nobody knows them
    cache: Path | None = None  # a folder for what TensorRT measured of its kernels

    @property
    def max_batch(self) -> int:
        return 1 if self.use_dla else MAX_BATCH

    @property
    def max_rows(self) -> int | None:
        """Rows of the largest memory bank. DLA has no dynamic shapes, so there it never grows."""
        if self.bank is None:
            return None
        return len(self.bank) if self.use_dla else max(int(len(self.bank) * BANK_ROOM), NEIGHBOURS)


def make_plan(
    folder: Path, machine: Machine, wanted: Wanted, before: Path | None, progress: Progress
) -> dict[str, Any]:
    """Put model.plan and its record beside the model.onnx of a folder.

    Args:
        before: a folder with a plan that may do, as it is or with the new weights.

    Returns:
        What report.json says of it: how it was made, why not in a faster way, and the parity.

    Raises:
        KensaError: the graph or the plan is wrong, or memory was short.
        KeyboardInterrupt: Ctrl-C; the build has been stopped.
    """
    return _on_the_gpu(lambda stop: _Making(folder, machine, wanted, progress, stop).make(before))


def check_dla() -> None:
    """Raise BadRequest unless this machine has a deep learning accelerator."""
    if _on_the_gpu(lambda stop: trt.Builder(_log()).num_DLA_cores) == 0:
        raise BadRequest(
            "This machine has no DLA core (an Orin Nano has none): leave out --use_dla."
        )


# ---- the GPU ------------------------------------------------------------------------------------


def _on_the_gpu(work: Callable[[threading.Event], T]) -> T:
    """Do it in a thread of its own, with the primary context.

    TensorRT builds for minutes within one call, during which Python hears no Ctrl-C in the thread
    that called. So the main thread only waits; when it is interrupted it sets the event.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1, "kensa-build") as pool:
        try:
            return pool.submit(_with_context, work, stop).result()
        except BaseException:
            stop.set()
            raise


def _with_context(work: Callable[[threading.Event], T], stop: threading.Event) -> T:
    cuda.init()
    primary = cuda.Device(0).retain_primary_context()
    primary.push()
    try:
        return work(stop)
    except cuda.MemoryError as error:
        raise OutOfMemory(_memory_sentence(str(error), *cuda.mem_get_info())) from None
    except cuda.Error as error:
        raise BuildFailed(f"CUDA failed while the plan was made: {error}.") from None
    except KensaError as error:
        traceback.clear_frames(error.__traceback__)  # what they hold belongs to this context
        raise
    finally:
        cuda.Context.pop()
        primary.detach()


class _Log(trt.ILogger):  # type: ignore[misc]  # a class of bindings without types
    """Keeps the warnings and errors of TensorRT, which has no other way to say why it failed."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity <= trt.ILogger.WARNING and len(self.lines) < LINES:
            self.lines.append(msg)


@functools.cache
def _log() -> _Log:
    """The only one: TensorRT listens to one logger at a time, the first that is alive."""
    return _Log()


# ---- one plan -----------------------------------------------------------------------------------


@dataclass
class _Making:
    """Makes one plan: the old one as it is, refitted, or built."""

    folder: Path
    machine: Machine
    wanted: Wanted
    progress: Progress
    stop: threading.Event
    began: float = field(default_factory=time.perf_counter)

    def make(self, before: Path | None) -> dict[str, Any]:
        how, why = self._from(before)
        report = None
        if how is not None:
            try:
                report = self._prove()
            except BadBundle as error:
                how, why = None, f"the {how} plan failed its test: {error}"
        if report is None:
            if why:
                self.progress.say(f"building the plan anew: {why}")
            report = self._build_and_prove()
            how = "built"
        self.progress.say(f"model.plan: {how} in {time.perf_counter() - self.began:.1f} s")
        return {
            "how": how,
            **({"why": why} if why else {}),
            **report,
            "seconds": round(time.perf_counter() - self.began, 2),
        }

    def _from(self, before: Path | None) -> tuple[str | None, str | None]:
        """Use the plan of a folder: how ("kept", "refitted"), or why not."""
        if before is None or not (before / PLAN).is_file():
            return None, None
        why = self._unlike(before)
        if why is None and sha256(before / ONNX) == sha256(self.folder / ONNX):
            shutil.copyfile(before / PLAN, self.folder / PLAN)
            return "kept", None
        if why is None:
            why = difference(before / ONNX, self.folder / ONNX) or self._refit(before)
        return (None, why) if why else ("refitted", None)

    def _unlike(self, before: Path) -> str | None:
        """Why the plan of a folder is none that could be wanted here; None where it may be."""
        try:
            found, report = Fingerprint.read(before), read_report(before).get("plan", {})
        except BadBundle as error:
            return str(error)
        if found is None:
            return f"{before / PLAN} has no record of what it was built for."
        if (stale := found.stale(before, self.machine)) is not None:
            return stale
        wanted = self.wanted
        if found.precision != wanted.precision:
            return f"the one before is in {found.precision}, not {wanted.precision}."
        if (report.get("dla"), report.get("workspace_mib")) != (wanted.use_dla, wanted.workspace):
            return "the one before was built with another --use_dla or --workspace."
        rows = None if wanted.bank is None else len(wanted.bank)
        if (rows is None) != (found.bank_rows is None):
            return "only one of the two has a memory bank."
        if rows is not None and found.bank_rows is not None:
            exactly = wanted.use_dla and rows != found.bank_rows
            if rows > found.bank_rows or exactly:
                return f"the one before has room for {found.bank_rows:,} rows, not for {rows:,}."
        return None

    def _refit(self, before: Path) -> str | None:
        """Give the plan of a folder the weights of the new graph; why not, where it fails."""
        log = _log()
        log.lines.clear()
        runtime = trt.Runtime(log)
        engine = runtime.deserialize_cuda_engine((before / PLAN).read_bytes())
        if engine is None:
            return f"the one before cannot be read: {_last(log.lines)}"
        if not engine.refittable:
            return "the one before cannot be refitted."
        refitter = trt.Refitter(engine, log)
        parser = trt.OnnxParserRefitter(refitter, log)
        if not parser.refit_from_bytes((self.folder / ONNX).read_bytes()):
            return f"refitting failed: {parser.get_error(0).desc() if parser.num_errors else ''}"
        if missing := refitter.get_missing_weights():
            return f"refitting failed: TensorRT also wants {', '.join(missing[:3])}."
        if not refitter.refit_cuda_engine():
            return f"refitting failed: {_last(log.lines)}"
        _write(self.folder / PLAN, engine.serialize())
        return None

    def _build_and_prove(self) -> dict[str, Any]:
        # A network that is quantised goes with the ranges that were found for its weights.
        refittable = self.wanted.precision != "int8"
        self._build(refittable)
        try:
            return self._prove()
        except BadBundle:
            if not refittable:
                raise
        # "Enabling kREFIT may produce incorrect numerical output" (release notes of 11.3).
        self.progress.say("a refittable plan scores otherwise than the graph: building another")
        self._build(refittable=False)
        return self._prove()

    def _build(self, refittable: bool) -> None:
        log = _log()
        log.lines.clear()
        free, total = cuda.mem_get_info()
        builder = trt.Builder(log)
        strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(strongly_typed)
        _parse(network, log, self.folder / ONNX)
        config = builder.create_builder_config()
        config.add_optimization_profile(self._profile(builder, network))
        config.clear_flag(trt.BuilderFlag.TF32)
        if refittable:
            config.set_flag(trt.BuilderFlag.REFIT)
        if self.wanted.use_dla:
            config.default_device_type = trt.DeviceType.DLA
            config.DLA_core = 0
            config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
            self.progress.say("for DLA: one image at a time; the GPU computes what DLA cannot")
        self._limit_memory(config, free)
        timing = _Timing(self.wanted.cache, self.machine, self.progress)
        timing.give(config)
        monitor = _Monitor(self.progress.phase("build"), self.stop)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if monitor.problem is not None:
            raise monitor.problem
        if plan is None:
            raise _failure(log.lines, free, total)
        monitor.end()
        _write(self.folder / PLAN, plan)
        timing.keep(config)

    def _profile(self, builder: Any, network: Any) -> Any:
        """Which shapes the plan must take: a single image is what it is best at."""
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            least, best, most = (1, 1, self.wanted.max_batch)
            if tensor.name == "memory_bank":
                if self.wanted.bank is None or self.wanted.max_rows is None:
                    raise BadBundle(f"{self.folder / ONNX} needs a memory bank; there is none.")
                best, most = len(self.wanted.bank), self.wanted.max_rows
                least = best if self.wanted.use_dla else min(best, NEIGHBOURS)
            sides = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, (least, *sides), (best, *sides), (most, *sides))
        return profile

    def _limit_memory(self, config: Any, free: int) -> None:
        """TensorRT would take all memory for trying kernels, also what the server works with."""
        workspace, tactics = memory_limits(self.wanted.workspace, free // MIB)
        if workspace < self.wanted.workspace:
            self.progress.say(
                f"workspace: {workspace:,} MiB of the {self.wanted.workspace:,} that --workspace"
                f" allows, because {free // MIB:,} MiB are free"
            )
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace * MIB)
        config.set_memory_pool_limit(trt.MemoryPoolType.TACTIC_DRAM, tactics * MIB)

    def _prove(self) -> dict[str, Any]:
        """Score images with the plan, compare, and write its record.

        Raises:
            BadBundle: the scores are not those of the graph.
        """
        log, wanted = _log(), self.wanted
        log.lines.clear()
        runtime = trt.Runtime(log)
        plan = (self.folder / PLAN).read_bytes()
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise _failure(log.lines, *cuda.mem_get_info())
        found = _scores(engine, wanted.images, wanted.bank, wanted.max_batch)
        agreement = {"compared": False}
        if wanted.expected is not None:
            agreement = compare_in(wanted.precision, wanted.expected, found, wanted.meta)
        if not agreement.get("ok", np.isfinite(found).all()):
            raise BadBundle(
                "The plan does not agree with the model (raw scores differ by up to"
                f" {agreement.get('max_relative', float('inf')):.2e},"
                f" {agreement.get('flips', '?')} of {len(found)} verdicts flip); nothing was"
                " written."
            )
        rows = None
        if wanted.bank is not None:
            rows = engine.get_tensor_profile_shape("memory_bank", 0)[2][0]
        record = Fingerprint(
            self.machine,
            sha256(self.folder / ONNX),
            hashlib.sha256(plan).hexdigest(),
            wanted.precision,
            engine.get_tensor_profile_shape("image", 0)[2][0],
            rows,
            bool(engine.refittable),
            # The bindings of 10.3 do not tell what the weights take: about what the plan has.
            engine.device_memory_size_v2 + len(plan),
        )
        record.write(self.folder)
        return {
            "precision": wanted.precision,
            "dla": wanted.use_dla,
            "workspace_mib": wanted.workspace,
            "max_batch": record.max_batch,
            **({} if rows is None else {"bank_rows": rows}),
            "refittable": record.refittable,
            "tensorrt": self.machine.tensorrt,
            "parity": agreement,
        }


def memory_limits(asked: int, free: int) -> tuple[int, int]:
    """MiB for the workspace, and for trying a kernel with its tensors around it.

    A quarter of what is free, and half of it; the workspace never under 256 MiB, unless less was
    asked for.
    """
    workspace = min(asked, max(free // 4, LEAST_WORKSPACE))
    return workspace, max(free // 2, workspace)


def _write(path: Path, plan: Any) -> None:
    path.write_bytes(plan)  # a buffer of TensorRT's: it goes to the disk without a copy


# ---- what TensorRT says -------------------------------------------------------------------------


def _parse(network: Any, log: _Log, onnx: Path) -> None:
    """Fill the network. Weights beside the file are not looked for: a model is one file."""
    parser = trt.OnnxParser(network, log)
    if parser.parse(onnx.read_bytes()):
        return
    if not parser.num_errors:
        raise BadBundle(f"TensorRT {trt.__version__} cannot read {onnx}: {_last(log.lines)}")
    error = parser.get_error(0)
    where = ""
    if error.node() >= 0:
        where = f" at node {error.node()}, {error.node_operator()} {error.node_name()}".rstrip()
    raise BadBundle(f"TensorRT {trt.__version__} does not take {onnx}{where}: {error.desc()}")


def _failure(lines: list[str], free: int, total: int) -> KensaError:
    """Why there is no plan, or no engine, as an error with a sentence."""
    text = "\n".join(lines)
    if "Could not find any implementation for node" in text:
        node = text.split("Could not find any implementation for node ")[1].split(".)")[0]
        return OutOfMemory(_memory_sentence(f"it found no kernel for {node[:200]}", free, total))
    if "OutOfMemory" in text or "out of memory" in text or "memory is insufficient" in text:
        return OutOfMemory(_memory_sentence(_last(lines), free, total))
    return BuildFailed(f"TensorRT {trt.__version__} made no plan: {_last(lines)}")


def _memory_sentence(what: str, free: int, total: int) -> str:
    return (
        f"TensorRT ran out of memory: {what}. Of {total // MIB:,} MiB {free // MIB:,} were free"
        " before. Unload models that are not needed, stop other programs that use the GPU (on a"
        " Jetson also the desktop: sudo systemctl isolate multi-user.target), and try again; --fp16"
        " needs about half."
    )


def _last(lines: list[str]) -> str:
    return lines[-1][:500] if lines else "it did not say why."


class _Monitor(trt.IProgressMonitor):  # type: ignore[misc]
    """TensorRT's phases within phases as one bar, and the way to stop a build.

    Called from several threads. An error of ours would be swallowed by the bindings: it is kept.
    """

    def __init__(self, tick: Tick, stop: threading.Event) -> None:
        trt.IProgressMonitor.__init__(self)
        self.problem: Exception | None = None
        self._tick, self._stop = tick, stop
        self._phases = Phases()
        self._lock = threading.Lock()
        self._percent = 0

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        with self._lock:
            self._phases.start(phase_name, parent_phase, num_steps)

    def step_complete(self, phase_name: str, step: int) -> bool:
        with self._lock:
            self._phases.step(phase_name, step)
            self._show(min(99, int(100 * self._phases.fraction())))
        return self.problem is None and not self._stop.is_set()

    def phase_finish(self, phase_name: str) -> None:
        with self._lock:
            self._phases.finish(phase_name)

    def end(self) -> None:
        """The build has succeeded."""
        self._show(100)

    def _show(self, percent: int) -> None:
        if percent <= self._percent or self.problem is not None:
            return
        self._percent = percent
        try:
            self._tick(percent, 100)
        except Exception as error:  # noqa: BLE001 (raised again by who waits for the build)
            self.problem = error


class Phases:
    """What share of a build is done: a phase that runs is a part of one step of its parent."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[str | None, int, int]] = {}  # name -> parent, done, steps
        self._most = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self._running[name] = (parent, 0, max(1, steps))

    def step(self, name: str, step: int) -> None:
        if name in self._running:
            parent, done, steps = self._running[name]
            self._running[name] = (parent, min(max(done, step + 1), steps), steps)

    def finish(self, name: str) -> None:
        self._running.pop(name, None)

    def fraction(self) -> float:
        """Never less than before."""
        roots = [name for name, (parent, _, _) in self._running.items() if parent is None]
        self._most = max([self._most, *(self._of(name) for name in roots)])
        return self._most

    def _of(self, name: str) -> float:
        _, done, steps = self._running[name]
        inner = [one for one, (parent, _, _) in self._running.items() if parent == name]
        return min(1.0, (done + max(map(self._of, inner), default=0.0)) / steps)


# ---- what was measured of kernels ---------------------------------------------------------------


class _Timing:
    """The timing cache of this machine, between builds: a file with its SHA-256 in front."""

    def __init__(self, folder: Path | None, machine: Machine, progress: Progress) -> None:
        key = hashlib.sha256(repr(machine).encode()).hexdigest()[:16]
        self._path = None if folder is None else folder / f"timing-{key}.bin"
        self._progress = progress

    def give(self, config: Any) -> None:
        """Let a build begin with what is known. A damaged file is as good as none."""
        data = b""
        if self._path is not None and self._path.is_file():
            content = self._path.read_bytes()
            data = content[32:]
            if hashlib.sha256(data).digest() != content[:32]:
                self._warn("is damaged")
                data = b""
        timing_cache = config.create_timing_cache(data)
        if timing_cache is None:
            self._warn("is not for this TensorRT")
            timing_cache = config.create_timing_cache(b"")
        config.set_timing_cache(timing_cache, ignore_mismatch=False)

    def keep(self, config: Any) -> None:
        """A plan that is there is not lost because this cannot be written."""
        if self._path is None:
            return
        data = bytes(config.get_timing_cache().serialize())
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, hashlib.sha256(data).digest() + data)
        except OSError as error:
            self._progress.say(f"the next build takes as long: {self._path}: {error.strerror}")

    def _warn(self, what: str) -> None:
        self._progress.say(f"timing cache {self._path} {what}: it is made anew")


# ---- scores -------------------------------------------------------------------------------------


def _scores(
    engine: Any, images: NDArray[np.uint8], bank: NDArray[np.float32] | None, batch: int
) -> Scores:
    """Raw scores (n,): of the first image alone, of the others as many at once as may be."""
    context = engine.create_execution_context()
    if context is None:
        raise _failure(_log().lines, *cuda.mem_get_info())
    held = _Buffers(engine, context, cuda.Stream())
    try:
        if bank is not None:
            held.put("memory_bank", bank)
        parts = [images[:1], *(images[at : at + batch] for at in range(1, len(images), batch))]
        return np.concatenate([held.score(part) for part in parts if len(part)])
    finally:
        held.free()


class _Buffers:
    """Device memory for one context's tensors."""

    def __init__(self, engine: Any, context: Any, stream: Any) -> None:
        self._engine, self._context, self._stream = engine, context, stream
        self._held: dict[str, Any] = {}

    def put(self, name: str, array: NDArray[Any]) -> None:
        """Copy an input to the device."""
        array = np.ascontiguousarray(array)
        memory = self._room(name, array.nbytes)
        if not self._context.set_input_shape(name, array.shape):
            raise _failure(_log().lines, *cuda.mem_get_info())
        cuda.memcpy_htod(memory, array)

    def score(self, images: NDArray[np.uint8]) -> Scores:
        self.put("image", images)
        results = {}
        for name in ("score", "map"):
            shape = tuple(self._context.get_tensor_shape(name))
            results[name] = np.empty(shape, trt.nptype(self._engine.get_tensor_dtype(name)))
            self._room(name, results[name].nbytes)
        if not self._context.execute_async_v3(self._stream.handle):
            raise _failure(_log().lines, *cuda.mem_get_info())
        self._stream.synchronize()
        for name, array in results.items():
            cuda.memcpy_dtoh(array, self._held[name])
        whole = np.isfinite(results["map"]).all()
        return np.where(whole, results["score"], np.float32(np.nan))

    def _room(self, name: str, nbytes: int) -> Any:
        if name in self._held:
            self._held.pop(name).free()
        self._held[name] = cuda.mem_alloc(nbytes)
        self._context.set_tensor_address(name, int(self._held[name]))
        return self._held[name]

    def free(self) -> None:
        for memory in self._held.values():
            memory.free()
        self._held.clear()
