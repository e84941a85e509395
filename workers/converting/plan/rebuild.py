"""A version's plan built again from its own model.onnx, without torch: where it is only served."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from engines.errors import BadBundle, BadRequest
from engines.files import sha256
from engines.image import resize
from engines.nvidia.library import ANY_RTX, RTX, capabilities_of, here, possible
from engines.runtimes.plan_proof import expected_scores
from engines.store.bundle import ONNX, PLAN, PLAN_RECORD, REPORT, Bundle, write_report
from engines.store.golden import Golden
from engines.store.plan_record import Machine, Precision
from workers.progress import Progress
from workers.sample_parts.drawing import draw_part

UNPROVED = (
    "the plan is for GPUs of other machines: the one that serves compares its scores with the"
    " golden images before it counts"
)
DLA_IS_NOT_FOR_FLOAT32 = "--use_dla needs --fp16 or --int8: DLA does not compute in float32."


def rebuild(
    source: Path,
    out_dir: Path,
    progress: Progress,
    *,
    workspace: int,
    use_dla: bool,
    cache: Path | None,
    target: str | None = None,
) -> dict[str, Any]:
    """Copy a version into a new folder, with a plan for this machine, or for others.

    Args:
        target: as --target of convtrt.py; None for this machine.

    Returns:
        Its report.

    Raises:
        NoTensorRT: this machine cannot build.
        KensaError: the version is damaged, or its plan scores otherwise than its graph.
    """
    bundle = Bundle.open(source)
    meta, report, bank = bundle.meta, bundle.report(), bundle.memory_bank()
    precision = _precision(report)
    machine = builder_for(precision, use_dla, target)
    from workers.converting.plan.build import Wanted, make_plan

    golden = Golden.read(source, meta.image_size)
    images = golden.images if golden else sample_parts(meta.image_size)
    expected = (
        None
        if machine.elsewhere
        else expected_scores(bundle.onnx, report if golden else {}, images, bank)
    )
    if machine.elsewhere:
        progress.say(UNPROVED)
    elif expected is None:
        progress.say("nobody knows the scores of this graph here: the plan is built unproven")
    began = time.perf_counter()
    names = [name for name in meta.files or {} if (source / name).is_file()]
    names = sorted({*names, ONNX} - {PLAN, PLAN_RECORD, REPORT})
    out_dir.mkdir(parents=True)
    for name in names:
        shutil.copyfile(source / name, out_dir / name)
    wanted = Wanted(meta, precision, workspace, use_dla, bank, images, expected, cache,
                    any_gpu=target == ANY_RTX)  # fmt: skip
    report["plan"] = make_plan(out_dir, machine, wanted, None, progress)
    report["plan"]["seconds"] = round(time.perf_counter() - began, 2)
    write_report(out_dir, report)
    hashes = {name: sha256(out_dir / name) for name in (*names, PLAN, PLAN_RECORD, REPORT)}
    meta.with_(files=hashes).write(out_dir / "meta.json")
    return report


def builder_for(precision: Precision, use_dla: bool, target: str | None = None) -> Machine:
    """What a plan is for, this machine or others, asked before anything else is done: so what is
    missing is said at once.

    Raises:
        NoTensorRT: it cannot build plans.
        BadRequest: it has no DLA, or DLA does not compute in that precision; or it can build for no
            GPU such as the target names.
    """
    if use_dla and target is not None:
        raise BadRequest("A PC's GPU has no DLA: --use_dla and --target rtx do not go together.")
    if target is not None:
        return Machine.of_others(capabilities_of(target) or possible())
    if use_dla and precision == "f32":
        raise BadRequest(DLA_IS_NOT_FOR_FLOAT32)
    machine = Machine.read()
    if use_dla and here() is RTX:
        raise BadRequest("This machine has no DLA core: a PC's GPU has none. Leave out --use_dla.")
    if use_dla:
        from workers.converting.plan.build import check_dla

        check_dla()
    return machine


def sample_parts(size: int) -> NDArray[np.uint8]:
    """Drawn parts, for a model that came without images of its own: (4, S, S, 3)."""
    parts = [draw_part(seed, defect) for seed, defect in enumerate([None, None, "stain", "burr"])]
    return np.stack([resize(image, size) for image, _ in parts])


def _precision(report: dict[str, Any]) -> Precision:
    found = report.get("export", {}).get("precision", "f32")
    if found not in ("f32", "f16", "int8"):
        raise BadBundle(f"report.json names the precision {found!r}, which is none.")
    return cast(Precision, found)
