"""model.onnx -> model.plan, on the machine that will serve it, or for others. No torch in here.

One way for TensorRT 10.3 to 11.4 and for TensorRT for RTX: a strongly typed network, so half
precision and int8 stand in the graph and nowhere else. TF32 is off: it would round the distances in
a memory bank, which must stay in float32. A plan is refittable, where the library can refit one, so
that a retraining need not build it again, and no plan is kept whose scores of real images are not
those of the graph: where there is no GPU to score them with, the record says so, and the machine
that serves compares them.

Only loaded where TensorRT is: see `engines.store.plan_record.Machine`.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines.errors import BadBundle, BadRequest, BuildFailed, KensaError, OutOfMemory
from engines.files import sha256
from engines.machine import memory_needs
from engines.machine.memory import MIB, free_bytes, total_bytes
from engines.meta import Meta
from engines.nvidia import driver
from engines.nvidia.library import TURING, here
from engines.runtimes.parity import compare_in
from engines.store.bundle import ONNX, PLAN, PLAN_RECORD, read_report
from engines.store.onnx_weights import check_weights
from engines.store.plan_record import Fingerprint, Machine, Precision
from workers.converting.graphs import difference
from workers.converting.plan.build_progress import Monitor
from workers.converting.plan.scores import Scores, score_images
from workers.converting.plan.tensorrt_log import (
    Log,
    failure,
    last_line,
    logger,
    memory_sentence,
    no_turing,
)
from workers.converting.plan.timing_cache import TimingCache
from workers.progress import Progress

LIBRARY = here()
trt = LIBRARY.load()

MAX_BATCH = 4
BANK_ROOM = 1.5  # a memory bank may grow by half before the plan must be built again
NEIGHBOURS = 9  # of PatchCore's graph: a bank of fewer rows has no use for it

T = TypeVar("T")


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
    any_gpu: bool = False  # of a plan for others: what the graph cannot be built for is left out

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
    check_weights(folder / ONNX)  # TensorRT itself looks when it refits, but not when it builds

    def make(stop: threading.Event) -> dict[str, Any]:
        return _Making(folder, machine, wanted, progress, stop).make(before)

    return _in_a_thread(make) if machine.elsewhere else _on_the_gpu(make)


def check_dla() -> None:
    """Raise BadRequest unless this machine has a deep learning accelerator."""
    if _on_the_gpu(lambda stop: trt.Builder(logger()).num_DLA_cores) == 0:
        raise BadRequest(
            "This machine has no DLA core (an Orin Nano has none): leave out --use_dla."
        )


# ---- the GPU ------------------------------------------------------------------------------------


def _on_the_gpu(work: Callable[[threading.Event], T]) -> T:
    """Do it in a thread of its own, with the primary context."""
    return _in_a_thread(lambda stop: _with_context(work, stop))


def _in_a_thread(work: Callable[[threading.Event], T]) -> T:
    """Do it in a thread of its own.

    TensorRT builds for minutes within one call, during which Python hears no Ctrl-C in the thread
    that called. So the main thread only waits; when it is interrupted it sets the event.
    """
    stop, begin = threading.Event(), threading.Event()

    def wait_and_work() -> T:
        begin.wait()
        if stop.is_set():
            raise CancelledError
        return work(stop)

    with ThreadPoolExecutor(1, "kensa-build") as pool:
        try:
            # Interrupted within submit(), the pool does not know its thread, and waits for none.
            done = pool.submit(wait_and_work)
            begin.set()
            return done.result()
        except BaseException:
            stop.set()
            begin.set()
            raise


def _with_context(work: Callable[[threading.Event], T], stop: threading.Event) -> T:
    cuda = driver.load()
    cuda.init()
    primary = cuda.Device(0).retain_primary_context()
    primary.push()
    try:
        return work(stop)
    except cuda.MemoryError as error:
        raise OutOfMemory(memory_sentence(str(error), *cuda.mem_get_info())) from None
    except cuda.Error as error:
        raise BuildFailed(f"CUDA failed while the plan was made: {error}.") from None
    except KensaError as error:
        traceback.clear_frames(error.__traceback__)  # what they hold belongs to this context
        raise
    finally:
        cuda.Context.pop()
        primary.detach()


# ---- one plan -----------------------------------------------------------------------------------


@dataclass
class _Making:
    """Makes one plan: the old one as it is, refitted, or built."""

    folder: Path
    machine: Machine
    wanted: Wanted
    progress: Progress
    stop: threading.Event
    kept_for: Machine | None = None  # what a plan that is kept was built for: perhaps more GPUs
    began: float = field(default_factory=time.perf_counter)

    def make(self, before: Path | None) -> dict[str, Any]:
        how, why = self._reuse(before)
        report = None
        if self.machine.elsewhere and how is not None:
            assert before is not None
            shutil.copyfile(before / PLAN_RECORD, self.folder / PLAN_RECORD)
            report = self._report({"compared": False})
        elif how is not None:
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

    def _reuse(self, before: Path | None) -> tuple[str | None, str | None]:
        """Use the plan of a folder: how ("kept", "refitted"), or why not."""
        if before is None or not (before / PLAN).is_file():
            return None, None
        why = self._unlike(before)
        if why is None and sha256(before / ONNX) == sha256(self.folder / ONNX):
            shutil.copyfile(before / PLAN, self.folder / PLAN)
            self.kept_for = self._built_for(before)
            return "kept", None
        if why is None and not LIBRARY.refits:
            why = f"{LIBRARY.spoken} gives no new weights to a plan."
        if why is None:
            why = difference(before / ONNX, self.folder / ONNX) or self._refit(before)
        return (None, why) if why else ("refitted", None)

    def _built_for(self, before: Path) -> Machine:
        found = Fingerprint.read(before)
        assert found is not None
        return found.machine

    def _unlike(self, before: Path) -> str | None:
        """Why the plan of a folder is none that could be wanted here; None where it may be."""
        try:
            found, report = Fingerprint.read(before), read_report(before).get("plan", {})
        except BadBundle as error:
            return str(error)
        if found is None:
            return f"{before / PLAN} has no record of what it was built for."
        if (stale := found.stale(before, self.machine)) is not None:
            elsewhere = f"the one before was built for {found.machine.made_for}."
            return elsewhere if self.machine.elsewhere else stale
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
        log = logger()
        log.lines.clear()
        runtime = trt.Runtime(log)
        engine = runtime.deserialize_cuda_engine((before / PLAN).read_bytes())
        if engine is None:
            return f"the one before cannot be read: {last_line(log.lines)}"
        if not engine.refittable:
            return "the one before cannot be refitted."
        refitter = trt.Refitter(engine, log)
        parser = trt.OnnxParserRefitter(refitter, log)
        if not parser.refit_from_bytes((self.folder / ONNX).read_bytes()):
            return f"refitting failed: {parser.get_error(0).desc() if parser.num_errors else ''}"
        if missing := refitter.get_missing_weights():
            return f"refitting failed: TensorRT also wants {', '.join(missing[:3])}."
        if not refitter.refit_cuda_engine():
            return f"refitting failed: {last_line(log.lines)}"
        _write(self.folder / PLAN, engine.serialize())
        return None

    def _build_and_prove(self) -> dict[str, Any]:
        # A network that is quantised goes with the ranges that were found for its weights.
        refittable = LIBRARY.refits and self.wanted.precision != "int8"
        self._build(refittable)
        if self.machine.elsewhere:
            return self._record_unproved()
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
        log = logger()
        log.lines.clear()
        self.kept_for = None
        free, total = self._memory()
        builder = trt.Builder(log)
        strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(strongly_typed)
        _parse(network, log, self.folder / ONNX)
        config = builder.create_builder_config()
        if config.add_optimization_profile(self._profile(builder, network)) < 0:
            raise failure(log.lines, free, total)
        config.clear_flag(trt.BuilderFlag.TF32)
        if refittable:
            config.set_flag(trt.BuilderFlag.REFIT)
        if self.wanted.use_dla:
            config.default_device_type = trt.DeviceType.DLA
            config.DLA_core = 0
            config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
            self.progress.say("for DLA: one image at a time; the GPU computes what DLA cannot")
        if LIBRARY.names_gpus:
            self._name_gpus(config)
        self._limit_memory(config, free)
        timing = None
        if LIBRARY.times_kernels:
            timing = TimingCache(self.wanted.cache, self.machine, self.progress)
            timing.give(config)
        monitor = Monitor(self.progress.phase("build"), self.stop)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        if monitor.problem is not None:
            raise monitor.problem
        if plan is None and self._leave_turing_out(log.lines):
            return self._build(refittable)
        if plan is None:
            raise failure(log.lines, free, total, self.wanted.workspace * MIB)
        monitor.end()
        _write(self.folder / PLAN, plan)
        if timing is not None:
            timing.keep(config)
        return None

    def _memory(self) -> tuple[int, int]:
        """Bytes free and in all, of where the plan is built."""
        if self.machine.elsewhere:
            return free_bytes(), total_bytes()
        free, total = driver.load().mem_get_info()
        return int(free), int(total)

    def _name_gpus(self, config: Any) -> None:
        """Say which GPUs the plan is for."""
        names = self.machine.capabilities if self.machine.elsewhere else ("CURRENT",)
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)

    def _leave_turing_out(self, lines: list[str]) -> bool:
        """Whether to build once more, without the GPUs that cannot run such a graph.

        Raises:
            BuildFailed: somebody named them.
        """
        if not no_turing(lines):
            return False
        others = tuple(one for one in self.machine.capabilities if one != TURING)
        if not self.wanted.any_gpu or not others or not self.machine.elsewhere:
            raise BuildFailed(
                f"{LIBRARY.spoken} {trt.__version__} cannot run this graph on a Turing card"
                f" ({TURING}), which multiplies no float32 matrices there: such a card needs"
                " OpenVINO, on the CPU. Name other capabilities, or none."
            )
        self.progress.say(f"not for {TURING} (Turing): such a card needs OpenVINO for this graph")
        self.machine = Machine.of_others(others)
        return True

    def _profile(self, builder: Any, network: Any) -> Any:
        """Which shapes the plan must take: a single image is what it is best at."""
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            if tensor.name == "keep":  # has one shape
                continue
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
        log, wanted = logger(), self.wanted
        log.lines.clear()
        runtime = trt.Runtime(log)
        plan = (self.folder / PLAN).read_bytes()
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise failure(log.lines, *self._memory())
        found = score_images(engine, wanted.images, wanted.bank, wanted.max_batch)
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
        self._record(
            plan,
            max_batch=engine.get_tensor_profile_shape("image", 0)[2][0],
            bank_rows=rows,
            refittable=bool(engine.refittable),
            # The bindings of 10.3 do not tell what the weights take: about what the plan has.
            device_bytes=engine.device_memory_size_v2 + len(plan),
        )
        return self._report(agreement)

    def _record_unproved(self) -> dict[str, Any]:
        """Write the record of a plan that nothing here can read."""
        plan, wanted = (self.folder / PLAN).read_bytes(), self.wanted
        self._record(
            plan,
            max_batch=wanted.max_batch,
            bank_rows=wanted.max_rows,
            refittable=False,
            device_bytes=len(plan) + memory_needs.to_run(wanted.meta.image_size),
            proved=False,
        )
        return self._report({"compared": False})

    def _record(self, plan: bytes, **of: Any) -> None:
        onnx, sha = sha256(self.folder / ONNX), hashlib.sha256(plan).hexdigest()
        machine = self.kept_for or self.machine
        Fingerprint(machine, onnx, sha, self.wanted.precision, **of).write(self.folder)

    def _report(self, agreement: dict[str, Any]) -> dict[str, Any]:
        """What report.json says of the plan, by its record."""
        record, wanted = Fingerprint.read(self.folder), self.wanted
        assert record is not None
        rtx = {"gpus": list(record.machine.capabilities), "proved": record.proved}
        return {
            "precision": wanted.precision,
            "dla": wanted.use_dla,
            "workspace_mib": wanted.workspace,
            "max_batch": record.max_batch,
            **({} if record.bank_rows is None else {"bank_rows": record.bank_rows}),
            "refittable": record.refittable,
            "tensorrt": record.machine.tensorrt,
            **(rtx if LIBRARY.names_gpus else {}),
            "parity": agreement,
        }


def memory_limits(asked: int, free: int) -> tuple[int, int]:
    """MiB for the workspace, and for trying a kernel with its tensors: about half of what is free.

    The second must be a power of two: another number is an error that only the log hears of.
    """
    workspace = memory_needs.workspace(asked * MIB, free * MIB) // MIB
    tactics = 1 << max(free // 2, workspace, 1).bit_length() - 1
    return workspace, tactics if tactics >= workspace else 2 * tactics


def _write(path: Path, plan: Any) -> None:
    path.write_bytes(plan)  # a buffer of TensorRT's: it goes to the disk without a copy


def _parse(network: Any, log: Log, onnx: Path) -> None:
    """Fill the network. Weights beside the file are not looked for: a model is one file."""
    parser = trt.OnnxParser(network, log)
    if parser.parse(onnx.read_bytes()):
        if not network.num_outputs:  # bytes without a graph are taken as well
            raise BadBundle(f"{onnx} holds no graph: convert the model again.")
        return
    if not parser.num_errors:
        raise BadBundle(
            f"{LIBRARY.spoken} {trt.__version__} cannot read {onnx}: {last_line(log.lines)}"
        )
    error = parser.get_error(0)
    where = ""
    if error.node() >= 0:
        where = f" at node {error.node()}, {error.node_operator()} {error.node_name()}".rstrip()
    why = error.desc()
    if why == "false":  # which is all that it says of an operator that it does not know
        why = "it does not know this operator"
    raise BadBundle(f"{LIBRARY.spoken} {trt.__version__} does not take {onnx}{where}: {why}")
