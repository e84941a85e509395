"""--int8: as many convolutions compute in int8 as the proof allows; the rest stays in float32.

All of them are tried first. Where that changes scores or verdicts too much, each is tried alone,
and those that do most harm stay in float32: as few as do, found by halving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import BadBundle
from engines.image import ImageLimits
from engines.meta import Meta
from engines.runtimes.openvino import OpenVINORuntime
from engines.runtimes.parity import INT8_LIMIT, compare, compare_in
from workers.converting.export import agreement, plain_scores
from workers.converting.quantise import convolutions, measure, quantise
from workers.learning.dataset import Category, Images
from workers.progress import Progress

AUROC_DROP = 0.005  # that int8 may cost
HALF = 0.5  # of the multiplications: with fewer in int8, --fp16 is likely to be the faster one
INSTEAD = "nothing was written. Try --fp16 in the place of --int8."

Score = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class OnTestImages:
    """Test images, which must be told apart as well as before."""

    category: Category
    score: Score  # of the torch model
    meta: Meta
    bank: NDArray[np.float32] | None
    limits: ImageLimits
    progress: Progress

    @cached_property
    def known(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Raw scores (n,) of the torch model, and which images are of defective parts (n,)."""
        batches = [(self.score(batch), bad) for batch, bad in self._batches(self.progress)]
        scores = np.concatenate([found for found, _ in batches])
        return scores, np.repeat([bad for _, bad in batches], [len(found) for found, _ in batches])

    def judge(self, path: Path) -> dict[str, Any]:
        """What report.json says of a graph's scores of them."""
        from sklearn.metrics import roc_auc_score

        expected, defective = self.known
        runtime = OpenVINORuntime(path, self.bank)
        again = self._batches(Progress(quiet=True))  # what is broken has been named
        scored = [runtime.infer(one[None])[0] for batch, _ in again for one in batch]
        runtime.close()
        found = np.concatenate(scored)
        tells = np.isfinite(found).all()
        return {
            "float32": float(roc_auc_score(defective, expected)),
            "int8": float(roc_auc_score(defective, found)) if tells else 0.0,
            "images": len(found),
            "flips": compare(expected, found, self.meta, INT8_LIMIT)["flips"],
        }

    def _batches(self, progress: Progress) -> Iterator[tuple[NDArray[np.uint8], bool]]:
        for paths, bad in ((self.category.test_normal, False), (self.category.test_anomaly, True)):
            for batch in Images(paths, self.meta, 4, progress, limits=self.limits):
                yield batch, bad


@dataclass(frozen=True)
class Proof:
    """What an int8 graph is held to: raw scores of the torch model, and test images if any."""

    images: NDArray[np.uint8]  # (n, S, S, 3)
    expected: NDArray[np.float32]  # (n,)
    bank: NDArray[np.float32] | None
    meta: Meta
    tests: OnTestImages | None

    def judge(self, path: Path) -> _Judged:
        found = agreement(path, self.images, self.expected, self.bank, self.meta, "int8")
        worst = max(found.values(), key=lambda one: (one["flips"], one["max_relative"]))
        said = (
            f"raw scores within {100 * worst['max_relative']:.1f} %"
            f" ({100 * worst['mean_relative']:.1f} % on average),"
            f" {worst['flips']} of {len(self.images)} verdicts flip"
        )
        agrees = all(one["ok"] for one in found.values())
        if not agrees or self.tests is None:
            return _Judged(agrees, said, {})
        auroc = self.tests.judge(path)
        said += f", AUROC {auroc['int8']:.4f} in int8, {auroc['float32']:.4f} in float32"
        enough = auroc["int8"] >= auroc["float32"] - AUROC_DROP
        return _Judged(enough, said, {"auroc": auroc})

    def harm(self, path: Path) -> float:
        """How far the raw scores of a graph are from the torch model's."""
        scores = plain_scores(path, self.images, self.bank)
        return float(compare_in("int8", self.expected, scores, self.meta)["max_relative"])


@dataclass(frozen=True)
class _Judged:
    ok: bool
    words: str
    report: dict[str, Any]


def to_int8(
    path: Path, seen: NDArray[np.uint8], proof: Proof, progress: Progress
) -> dict[str, Any]:
    """Rewrite a graph in float32 so that it computes in int8 and still passes its proof.

    Args:
        seen: (n, S, S, 3) pictures of parts, for the ranges.

    Returns:
        What report.json says of it.

    Raises:
        BadBundle: no convolution may compute in int8, or there is none.
    """
    search = _Search(path, seen, proof, progress)
    found = search.all_of_them()
    left_out: list[str] = []
    if not found.ok:
        left_out, found = search.fewest_left_out(found)
    every = search.multiplications
    chosen = [name for name in every if name not in left_out]
    search.write(chosen)
    share = sum(every[name] for name in chosen) / sum(every.values())
    if left_out:
        progress.say(
            f"int8: {len(left_out)} of {len(every)} convolutions stay in float32:"
            f" {', '.join(left_out)}"
        )
    if share < HALF:
        progress.say(
            f"only {100 * share:.0f} % of what could be multiplied in int8 is: --fp16 may be faster"
        )
    return {
        "convolutions": len(chosen),
        "of": len(every),
        "share": round(share, 3),
        "float32": left_out,
        **found.report,
    }


class _Search:
    """Tries which convolutions may compute in int8. `path` holds what was tried last."""

    def __init__(
        self, path: Path, seen: NDArray[np.uint8], proof: Proof, progress: Progress
    ) -> None:
        self._path, self._proof, self._progress = path, proof, progress
        self._plain = path.read_bytes()
        self.multiplications = convolutions(path)
        self._names = list(self.multiplications)
        self._reach = measure(path, seen, progress.phase("ranges"))

    def write(self, chosen: list[str]) -> None:
        self._path.write_bytes(self._plain)
        quantise(self._path, self._reach, chosen)

    def all_of_them(self) -> _Judged:
        return self._judge(self._names)

    def fewest_left_out(self, judged: _Judged) -> tuple[list[str], _Judged]:
        """What stays in float32, worst first, and how the rest was judged.

        Args:
            judged: how all of them were.
        """
        worst = self._worst_first()
        fails, passes, found = 0, len(worst), None
        while passes - fails > 1:
            count = (fails + passes) // 2
            judged = self._judge(worst[count:])
            if judged.ok:
                passes, found = count, judged
            else:
                fails = count
        if found is None:
            raise BadBundle(
                f"No convolution of this model may compute in int8: with {worst[-1]} alone, the"
                f" least harmful of {len(worst)}, {judged.words}; {INSTEAD}"
            )
        return worst[:passes], found

    def _judge(self, chosen: list[str]) -> _Judged:
        self.write(chosen)
        found = self._proof.judge(self._path)
        self._progress.say(
            f"int8 in {len(chosen)} of {len(self._names)} convolutions: {found.words}:"
            f" {'good' if found.ok else 'too far off'}"
        )
        return found

    def _worst_first(self) -> list[str]:
        """All convolutions by the harm that each does alone."""
        harm = {}
        tick = self._progress.phase("each alone")
        for number, name in enumerate(self._names, 1):
            self.write([name])
            harm[name] = self._proof.harm(self._path)
            tick(number, len(self._names))
        return sorted(self._names, key=lambda name: -harm[name])
