"""Opening a version: choose its runtime, share an engine where that is the same, and warm it up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engines.errors import BadBundle, NoTensorRT, OutOfMemory, RuntimeFailed, StalePlan
from engines.files import sha256
from engines.machine.memory import MIB, Gpu, Need, free_bytes
from engines.machine.memory_needs import bytes_needed, plan_needs, unpacked
from engines.meta import Meta
from engines.runtimes import ALONE, Runtime, look_past_regions
from engines.runtimes.plan_proof import prove
from engines.serving.batch_trial import choose_batches
from engines.serving.resident import Resident
from engines.store.bundle import ONNX, PLAN, PLAN_RECORD, REPORT, Bundle
from engines.store.onnx_weights import check_weights
from engines.store.plan_record import Fingerprint, Machine, has_tensorrt
from engines.verdict import Scale

log = logging.getLogger("kensa")

_DECISIVE = (ONNX, PLAN, PLAN_RECORD, REPORT)  # of any kind: what a runtime computes


@dataclass(frozen=True)
class Opening:
    """How models are opened on this machine."""

    precision: Literal["auto", "f32", "bf16"] = "auto"  # of OpenVINO; a plan has its own
    threads: int = 0  # 0 for all cores
    cache_dir: Path | None = None
    batching: bool = True
    try_later: bool = False  # one at a time until batches are tried, in gaps of the line
    runtime: Literal["auto", "openvino", "tensorrt"] = "auto"
    fallback: Literal["openvino", "none"] = "openvino"  # while there is no plan for this machine
    keep_warm_s: float = 0.0


def open_model(
    folder: Path,
    name: str,
    version: str,
    how: Opening,
    beside: Resident | None = None,
    given_up: Callable[[], bool] = lambda: False,
) -> Resident:
    """Open a version and warm it up.

    Args:
        beside: a resident version. Where the new one has the same graph, its engine is used, and
            only the memory bank is loaded, or the regions; where only meta.json differs, nothing
            is: both have the same runtime, which the last of them closes.
        given_up: whether nobody wants it any more: then no batches are tried.

    Raises:
        BadMeta, BadBundle: its files are missing, damaged or do not fit together.
        NoTensorRT: only TensorRT may run it, and it is not here.
        StalePlan: there is no plan for this machine, and nothing may stand in for it.
        OutOfMemory: it does not fit.
    """
    bundle = Bundle.open(folder)
    scale = Scale.of(bundle.meta)
    made_of = _made_of(bundle)
    graph = str(made_of[0])
    if beside is not None and beside.made_of == made_of:
        same, stale = _runs_alike(beside, bundle, how)
        if same:
            _check_size(beside.runtime, bundle.meta)
            return Resident(
                *(name, version, bundle.meta, scale, beside.runtime, graph, made_of),
                limit_alone=True,
                stale=stale,
                unused=beside.unused,
            )
    _check_bank(bundle)
    bank = bundle.memory_bank()
    shares = beside if beside is not None and _may_share(beside, made_of, bundle) else None
    stale = None
    try:
        plan = usable_plan(bundle, bank, how)
        if plan is not None:
            runtime, shared = _on_tensorrt(bundle, bank, plan, how, shares)
            if not plan.proved and not shared:
                prove(bundle, runtime, bank)
    except StalePlan as error:
        if not _may_fall_back(how):
            raise
        plan, stale = None, str(error)
    unused = None
    if plan is None:
        unused = None if stale else unused_plan(bundle, how)
        runtime, shared = _on_openvino(bundle, bank, how, shares)
    model = Resident(
        *(name, version, bundle.meta, scale, runtime, graph, made_of, shared),
        stale=stale,
        unused=unused,
    )
    try:
        look_past_regions(runtime, bundle)
        warm_up(model)
        if how.batching and not shared:
            if beside is not None and _alike(beside, model):
                runtime.take_together(beside.runtime.batches)
            elif how.try_later:
                runtime.take_together(replace(ALONE, provisional=True))
            elif not given_up() and free_bytes() > 2 * bytes_needed(folder):  # for the trial
                choose_batches(runtime)
    except BaseException:
        runtime.close()
        raise
    return model


def _check_bank(bundle: Bundle) -> None:
    """Raise OutOfMemory for a bank that is larger, unpacked, than the memory that is free."""
    name = bundle.meta.memory_bank
    needed, free = unpacked(bundle.root / name) if name else 0, free_bytes()
    if needed > free:
        raise OutOfMemory(
            f"{bundle.root / str(name)} has {needed // MIB:,} MiB unpacked, and {free // MIB:,} MiB"
            " are free: it is not opened."
        )


def memory_needed(folder: Path, how: Opening) -> Need:
    """What a version takes at most while it is opened.

    Raises:
        BadMeta, BadBundle: its files are damaged.
    """
    machine = _machine(how)
    if machine is not None:
        record = Fingerprint.read(folder)
        if record is not None and not record.machine.differences(machine):
            return plan_needs(folder)
    return Need(bytes_needed(folder))


def gpu_memory(how: Opening) -> Gpu | None:
    """That of the GPU, where TensorRT runs models; None elsewhere. May take a context first."""
    if _machine(how) is None:
        return None
    from engines.runtimes.cuda import gpu

    try:
        one = gpu()
        free, total = one.memory()
    except RuntimeFailed as error:
        log.warning("The GPU does not say what memory is free: %s", error)
        return None
    return Gpu(free, total, one.integrated)


def _machine(how: Opening) -> Machine | None:
    """This machine, where TensorRT may run models and can; opening says why it cannot."""
    if how.runtime == "openvino" or not has_tensorrt():
        return None
    try:
        return Machine.read()
    except NoTensorRT:
        return None


def usable_plan(
    bundle: Bundle, bank: NDArray[np.float32] | None, how: Opening
) -> Fingerprint | None:
    """The record of the plan that TensorRT is to run; None where OpenVINO is to run the graph.

    Only compares: whatever is raised, the plan was not read.

    Raises:
        NoTensorRT: TensorRT is asked for, and not here.
        StalePlan: TensorRT is here, and the plan is for something else, or missing.
        BadBundle: the record of the plan is damaged.
    """
    if how.runtime == "openvino" or (how.runtime == "auto" and not has_tensorrt()):
        return None
    try:
        machine = Machine.read()
    except NoTensorRT as error:
        if how.runtime == "tensorrt":
            raise
        log.warning("OpenVINO runs what TensorRT cannot: %s", error)
        return None
    plan = Fingerprint.read(bundle.root)
    if plan is None:
        raise StalePlan(
            f"{bundle.root} has no plan for TensorRT, or none that says what it was built for:"
            " convert it on this machine, with convtrt.py, or POST /convert with from_onnx."
        )
    if reason := plan.stale(bundle.root, machine):
        raise StalePlan(reason)
    if bank is not None and len(bank) > (plan.bank_rows or 0):
        raise StalePlan(
            f"The memory bank has {len(bank):,} rows, and {bundle.plan} was built for up to"
            f" {plan.bank_rows or 0:,}: convert it again."
        )
    return plan


def unused_plan(bundle: Bundle, how: Opening) -> str | None:
    """Why a version's plan is of no use on a machine where TensorRT runs none; None without one."""
    try:
        plan = Fingerprint.read(bundle.root)
    except BadBundle:  # of what is not used
        return None
    if plan is None:
        return None
    why = "KENSA_RUNTIME is openvino."
    if how.runtime != "openvino":
        try:
            Machine.read()
        except NoTensorRT as error:
            why = str(error)
    sentence = plan.unused(bundle.root, why)
    log.info("%s", sentence)
    return sentence


def _on_tensorrt(
    bundle: Bundle,
    bank: NDArray[np.float32] | None,
    plan: Fingerprint,
    how: Opening,
    shares: Resident | None,
) -> tuple[Runtime, bool]:
    """The runtime, and whether its engine is that of another version."""
    from engines.runtimes.tensorrt import TensorRTRuntime

    if shares is not None and isinstance(shares.runtime, TensorRTRuntime):
        shared = shares.runtime.with_bank(bank, plan.precision)
        if shared is not None:
            return shared, True
    check_weights(bundle.onnx)  # of which the plan was built
    whole = TensorRTRuntime(
        bundle.plan,
        bank,
        precision=plan.precision,
        keep_warm_s=how.keep_warm_s,
        cache_dir=how.cache_dir,
    )
    return whole, False


def _on_openvino(
    bundle: Bundle, bank: NDArray[np.float32] | None, how: Opening, shares: Resident | None
) -> tuple[Runtime, bool]:
    """The same."""
    from engines.runtimes.openvino import OpenVINORuntime, float32_convolutions

    precision = _openvino_precision(bundle, how)
    if shares is not None and isinstance(shares.runtime, OpenVINORuntime):
        shared = shares.runtime.with_bank(bank, precision)
        if shared is not None:
            return shared, True
    whole = OpenVINORuntime(
        bundle.onnx,
        bank,
        precision=precision,
        float32_convolutions=float32_convolutions(bundle.report()),
        threads=how.threads,
        cache_dir=how.cache_dir,
    )
    return whole, False


def _may_share(beside: Resident, made_of: tuple[str | None, ...], bundle: Bundle) -> bool:
    """Whether the engine of another version may serve: with a bank, that of the same graph; without
    one, that of the same files but for the regions.
    """
    if bundle.meta.memory_bank is not None:
        return beside.graph == made_of[0]
    files = len(_DECISIVE)
    return beside.made_of[:files] == made_of[:files]


def _alike(one: Resident, other: Resident) -> bool:
    """Whether what was measured of one holds for the other: a model before and after learning."""
    return _what_takes_time(one) == _what_takes_time(other)


def _what_takes_time(model: Resident) -> tuple[object, ...]:
    meta, runtime = model.meta, model.runtime
    return meta.model, meta.backbone, runtime.name, runtime.image_size, runtime.precision


def warm_up(model: Resident) -> None:
    """Run twice, so that the first part on the line does not wait for buffers to be made.

    Raises:
        BadBundle: the graph and meta.json disagree on the size of images, or scores are no numbers.
    """
    size = model.runtime.image_size
    _check_size(model.runtime, model.meta)
    grey = np.full((1, size, size, 3), 128, np.uint8)
    for _ in range(2):
        scores, _ = model.runtime.infer(grey)
        if not np.isfinite(scores).all():
            raise BadBundle("The model gives scores that are no numbers: train it again.")


def _openvino_precision(bundle: Bundle, how: Opening) -> Literal["f32", "bf16"]:
    from engines.runtimes.openvino import choose_precision

    if bundle.meta.memory_bank is not None:
        return "f32"
    return choose_precision(bundle.report()) if how.precision == "auto" else how.precision


def _may_fall_back(how: Opening) -> bool:
    return how.fallback != "none" and find_spec("openvino") is not None


def _runs_alike(beside: Resident, bundle: Bundle, how: Opening) -> tuple[bool, str | None]:
    """Whether a version with the same files would get the same runtime, and why no plan if none.

    Raises:
        NoTensorRT, StalePlan, BadBundle: as `open_model`.
    """
    stale = None
    try:
        plan = usable_plan(bundle, None, how)  # whose rows are those of the bank in memory
    except StalePlan as error:
        if not _may_fall_back(how):
            raise
        plan, stale = None, str(error)
    name = "openvino" if plan is None else "tensorrt"
    precision = _openvino_precision(bundle, how) if plan is None else plan.precision
    return (beside.runtime.name, beside.runtime.precision) == (name, precision), stale


def _check_size(runtime: Runtime, meta: Meta) -> None:
    size = runtime.image_size
    if size != meta.image_size:
        raise BadBundle(
            f"model.onnx takes images of {size} pixels, but meta.json says {meta.image_size}:"
            " they are from different trainings. Run convtrt.py again."
        )


def _made_of(bundle: Bundle) -> tuple[str | None, ...]:
    """The SHA-256 of every file that decides what a runtime computes; None for those not there."""
    first, *others = _DECISIVE
    files = (first, bundle.meta.memory_bank, *others, bundle.meta.regions)
    paths = [bundle.root / name for name in files if name is not None]
    return tuple(sha256(path) if path.is_file() else None for path in paths)
