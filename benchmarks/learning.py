"""How fast and how well we learn: loading, coreset, update, and the steps of EfficientAD.

    python -m benchmarks.learning [--quick]

docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import (
    BACKBONE,
    LAYERS,
    RATIO,
    SIDE,
    Subject,
    begin,
    embeddings,
    find_subject,
    phase,
    pictures,
    print_load,
    print_machine,
    print_table,
    times,
)

TURNS = 3
STEPS = 6
UPDATE_SHARE = 4  # one in four of the training images comes later
WARM_UP = 4  # images: the first call of a network takes longer
CHUNK = 1024  # patches


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the training images")
    flags = parser.parse_args()
    begin()
    with tempfile.TemporaryDirectory() as folder:
        subject = find_subject(Path(folder))
        if flags.quick:
            train = subject.category.train[::4]
            subject = replace(subject, category=replace(subject.category, train=train))
        compare(subject)


def compare(subject: Subject) -> None:
    """All comparisons, each with its table."""
    print_machine(["anomalib", "torch", "numpy"])
    print(f"{subject.words}, {BACKBONE} {'+'.join(LAYERS)}, {SIDE} px, coreset ratio {RATIO}")
    with phase("pictures to test with"):
        category = subject.category
        test = _Test(pictures(category.test_normal), pictures(category.test_anomaly))
    compare_loading()
    compare_coresets(subject, test)
    compare_update(subject, test)
    compare_steps(subject)
    print()
    print_load("after")


@dataclass(frozen=True)
class _Test:
    """Test pictures, each (n, SIDE, SIDE, 3)."""

    normal: NDArray[np.uint8]
    defective: NDArray[np.uint8]

    def verify(self, model: Any) -> Any:
        """What verification in retrain.py does: score all, find the threshold."""
        from engines.store.known_scores import KnownScores
        from workers.learning.calibrate import Budget, calibrate
        from workers.models import patchcore

        normal, defective = (
            patchcore.scores(model, [group]) for group in (self.normal, self.defective)
        )
        known = KnownScores(normal.astype(np.float64), np.arange(len(normal)))
        return calibrate(known, defective, Budget(), "test")


# ---- loading -------------------------------------------------------------------------------------


def compare_loading() -> None:
    """What passes before the first picture is looked at: torch, timm and the parts of anomalib."""
    programs = {
        "all of anomalib": "import anomalib.models, workers.models.patchcore",
        "what is asked for": "import workers.models.patchcore",
        "torch and timm alone": "import torch, timm",
    }
    ways = {
        way: partial(subprocess.run, [sys.executable, "-W", "ignore", "-c", program], check=True)
        for way, program in programs.items()
    }
    _compare("Loading", "loaded", ways, TURNS)


def _compare(title: str, what: str, ways: dict[str, Callable[[], Any]], turns: int) -> None:
    """Median seconds of each, in turn, after one that does not count; ratios to the first."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with phase(title.lower()):
        for _ in range(turns + 1):
            for way, work in ways.items():
                began = time.perf_counter()
                work()
                seconds[way].append(time.perf_counter() - began)
    medians = {way: statistics.median(found[1:]) for way, found in seconds.items()}
    first = next(iter(medians.values()))
    rows = [[way, f"{median:.2f}", f"{median / first:.3f}"] for way, median in medians.items()]
    print_table(title, [what, "seconds", "ratio"], rows)


# ---- coreset -------------------------------------------------------------------------------------


def compare_coresets(subject: Subject, test: _Test) -> None:
    """The same patches to the same number of rows: ours before and after anomalib's.

    anomalib's runs on one thread too. Beside other work its threads wait for each other at each
    step, and ours, which has one, would be compared with that waiting. Where one thread is faster
    than its default, the machine was too busy for the default's row to mean anything.
    """
    import torch

    from workers.models import patchcore

    with phase(f"patches of {len(subject.category.train)} images"):
        model = patchcore.build(subject.meta, subject.weights)
        patches = embeddings(model, pictures(subject.category.train))
    count = int(len(patches) * RATIO)
    seconds: dict[str, list[float]] = {}
    chosen: dict[str, Any] = {}
    works = {"anomalib, its default": _anomalibs, "anomalib, 1 thread": _one_thread, "ours": _ours}
    default, single, ours = works
    for name in (ours, single, ours, default, ours):
        with phase(f"coreset: {name}, {len(patches):,} to {count:,}"):
            began = time.perf_counter()
            chosen[name] = works[name](patches, count)
            seconds.setdefault(name, []).append(time.perf_counter() - began)
    rows = []
    base = statistics.median(seconds[default])
    wide = _radius(patches, patches[chosen[default]])
    threads = {default: torch.get_num_threads(), single: 1, ours: 1}
    for name in works:
        bank = patches[chosen[name]]
        with phase(f"AUROC of the bank: {name}"):
            model.bank = patchcore.Bank(bank, 0.0)
            auroc = test.verify(model).auroc
        median, radius = statistics.median(seconds[name]), _radius(patches, bank)
        row = [name, str(threads[name]), f"{len(bank):,}", f"{median:.2f}", times(base / median)]
        rows.append([*row, f"{radius:.4f}", f"{radius / wide:.3f}", f"{auroc:.4f}"])
    head = ["coreset", "threads", "rows", "seconds", "speed", "coverage radius", "radius ratio"]
    print_table(f"Coreset of {len(patches):,} patches", [*head, "image AUROC"], rows)


def _ours(patches: Any, count: int) -> Any:
    from workers.models.coreset import k_centre_greedy

    return k_centre_greedy(patches, count)[0]


def _anomalibs(patches: Any, count: int) -> Any:
    import torch
    from anomalib.models.components import KCenterGreedy

    torch.manual_seed(0)  # it begins with a random row
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        sampler = KCenterGreedy(patches, sampling_ratio=RATIO)
        return torch.tensor(sampler.select_coreset_idxs())


def _one_thread(patches: Any, count: int) -> Any:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _anomalibs(patches, count)
    finally:
        torch.set_num_threads(threads)


def _radius(patches: Any, bank: Any) -> float:
    """The largest distance of any patch to the bank, feature units; in float64, for both alike."""
    import torch

    bank = bank.double()
    chunks = torch.split(patches, CHUNK)
    return max(float(torch.cdist(chunk.double(), bank).amin(dim=1).max()) for chunk in chunks)


# ---- update --------------------------------------------------------------------------------------


def compare_update(subject: Subject, test: _Test) -> None:
    """Training on all images, beside the update of a bank that knows three in four."""
    from workers.models import patchcore

    paths = subject.category.train
    later = paths[UPDATE_SHARE - 1 :: UPDATE_SHARE]
    first = [path for path in paths if path not in later]
    model = patchcore.build(subject.meta, subject.weights)
    embeddings(model, pictures(first[:WARM_UP]))
    with phase(f"a bank of {len(first)} images"):
        _learn(patchcore.train, model, subject, first)
    known = model.bank
    works = {
        f"train on {len(paths)}": lambda: _learn(patchcore.train, model, subject, paths),
        f"update {len(first)} with {len(later)}": lambda: _update(model, subject, known, later),
    }
    results: dict[str, list[_Result]] = {name: [] for name in works}
    for turn in range(TURNS):
        for name, work in works.items():
            with phase(f"{name}, turn {turn + 1} of {TURNS}"):
                results[name].append(_timed(work, model, test, pictures(first)))
    _print_update(results)


def _learn(how: Callable[..., None], model: Any, subject: Subject, paths: list[Path]) -> None:
    """As retrain.py does it, from files to a bank."""
    from workers.learning.dataset import Images
    from workers.models import Training
    from workers.progress import Progress

    silent = Progress(quiet=True)
    images = Images(paths, subject.meta, 4, silent)
    how(model, subject.meta, images, Training(), silent)


def _update(model: Any, subject: Subject, known: Any, later: list[Path]) -> None:
    from workers.models import patchcore

    model.bank = known
    _learn(patchcore.update, model, subject, later)


@dataclass(frozen=True)
class _Result:
    learn: float  # seconds
    verify: float  # seconds
    rows: int
    auroc: float
    rejected: int  # of the images learned first

    @property
    def whole(self) -> float:
        return self.learn + self.verify


def _timed(work: Callable[[], None], model: Any, test: _Test, first: Any) -> _Result:
    from workers.models import patchcore

    began = time.perf_counter()
    work()
    learned = time.perf_counter()
    calibration = test.verify(model)
    verified = time.perf_counter()
    rejected = int((patchcore.scores(model, [first]) > calibration.threshold).sum())
    rows, auroc = len(model.bank.embeddings), calibration.auroc
    return _Result(learned - began, verified - learned, rows, auroc, rejected)


def _print_update(results: dict[str, list[_Result]]) -> None:
    base = next(iter(results.values()))
    rows = []
    for name, found in results.items():
        # Ratios within a turn: other work on the machine comes and goes between turns.
        learn = [one.learn / other.learn for one, other in zip(found, base, strict=True)]
        whole = [one.whole / other.whole for one, other in zip(found, base, strict=True)]
        row = [name, f"{statistics.median(one.learn for one in found):.2f}"]
        row += [f"{statistics.median(learn):.3f}"]
        row += [f"{statistics.median(one.whole for one in found):.2f}"]
        row += [f"{statistics.median(whole):.3f}", f"{found[-1].rows:,}"]
        rows.append([*row, f"{found[-1].auroc:.4f}", str(found[-1].rejected)])
    head = ["work", "learn s", "ratio", "with verification s", "ratio", "rows", "image AUROC"]
    print_table("Update beside training anew", [*head, "known normals rejected"], rows)


# ---- EfficientAD ---------------------------------------------------------------------------------


def compare_steps(subject: Subject) -> None:
    """A step of training, forwards and back, from the same weights: ours beside anomalib's.

    Of one photo and one natural image, for which a photo of the same parts stands here.
    """
    import torch
    from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel

    from engines.meta import Meta
    from workers.models import efficientad
    from workers.models.backbone import UNTRAINED

    content = {"model": "efficientad", "model_size": "small", "image_size": SIDE}
    model = efficientad.build(Meta.model_validate(content), UNTRAINED)
    photos = torch.from_numpy(pictures(subject.category.train[:2]))
    efficientad._measure_teacher(model, photos)
    theirs = EfficientAdModel()
    theirs.load_state_dict(model.networks.state_dict())
    theirs.teacher.requires_grad_(False)
    part, natural = (photos.permute(0, 3, 1, 2).float() / 255).split(1)

    def anomalibs() -> None:
        distance = theirs.compute_student_teacher_distance(part)[1]
        torch.stack(theirs.compute_losses(part, natural, distance)).sum().backward()

    def ours() -> None:
        torch.stack(list(efficientad._losses(model, part, natural))).sum().backward()

    _compare("A step of EfficientAD", "step of", {"anomalib": anomalibs, "ours": ours}, STEPS)


if __name__ == "__main__":
    main()
