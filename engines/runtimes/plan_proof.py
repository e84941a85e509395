"""A plan that was built without a GPU is proved by the machine that opens it, before it judges."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from engines.errors import StalePlan
from engines.image import resize
from engines.runtimes import Runtime
from engines.runtimes.parity import compare_in
from engines.store.bundle import Bundle
from engines.store.golden import Golden, torch_scores
from engines.store.plan_record import Precision

log = logging.getLogger("kensa")


def prove(
    bundle: Bundle,
    runtime: Runtime,
    bank: NDArray[np.float32] | None,
) -> None:
    """Compare the scores of a plan with those of its graph: one image alone, the others together.

    Raises:
        StalePlan: they differ. The runtime is closed.
    """
    try:
        golden = Golden.read(bundle.root, bundle.meta.image_size)
        images = golden.images if golden else _pictures(bundle.meta.image_size)
        report = bundle.report() if golden else {}
        expected = expected_scores(bundle.onnx, report, images, bank)
        if expected is None:
            log.warning("Nobody knows the scores of %s here: its plan is unproved", bundle.onnx)
            return
        found = _scores(runtime, images)
        precision = cast(Precision, runtime.precision)  # of a plan, as its record has it
        agreement = compare_in(precision, expected, found, bundle.meta)
        if not agreement["ok"]:
            raise StalePlan(
                f"{bundle.plan} was built without a GPU, and scores otherwise on this one than its"
                f" graph: by up to {agreement['max_relative']:.2e}, and {agreement['flips']} of"
                f" {len(found)} verdicts flip. Build it on this machine: POST /convert with"
                " from_onnx."
            )
        differs = agreement["max_relative"]
        log.info("%s is proved: raw scores within %.1e of its graph", bundle.plan, differs)
    except BaseException:
        runtime.close()
        raise


def expected_scores(
    onnx: Path,
    report: dict[str, Any],
    images: NDArray[np.uint8],
    bank: NDArray[np.float32] | None,
) -> NDArray[np.float32] | None:
    """What a plan of this graph must score.

    Args:
        report: that of the version, where the images (n, S, S, 3) are its golden ones; else empty.

    Returns:
        Raw scores (n,): the torch model's, when it was exported, else what OpenVINO says here. None
        where nobody knows them.
    """
    known = torch_scores(report, len(images))
    if known is not None or find_spec("openvino") is None:
        return known
    from engines.runtimes.openvino import OpenVINORuntime

    graph = OpenVINORuntime(onnx, bank)
    try:
        return np.concatenate([graph.infer(image[None])[0] for image in images])
    finally:
        graph.close()


def _scores(runtime: Runtime, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    alone, _ = runtime.infer(images[:1])
    if len(images) == 1:
        return alone
    together, _ = runtime.infer(images[1:], max(runtime.batch_sizes, default=1))
    return np.concatenate([alone, together])


def _pictures(size: int) -> NDArray[np.uint8]:
    """Soft patches of colour (4, S, S, 3), for a model that came without images of its own."""
    rough = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    return np.stack([resize(image, size) for image in rough])
