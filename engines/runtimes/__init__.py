"""The inference runtimes, each behind the `Runtime` protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.errors import BadBundle
from engines.regions import REACH
from engines.store.bundle import Bundle


@dataclass(frozen=True)
class Batches:
    """How many images a runtime is given at once."""

    size: int = 1  # at most
    least: int = 2  # fewer are faster one by one
    provisional: bool = False  # was timed while the machine was busy, and is looked at again


ALONE = Batches()
WORTH = 0.9  # a smaller gain is not worth it that the first part waits for the others

# What a maximum over NaN is, in OpenVINO and elsewhere: the least float32 (bf16 rounds it to less
# than it). No score and no distance is anywhere near.
NO_NUMBER = 1e38


def only_whole(scores: NDArray[np.float32], *of: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scores (N,), NaN in place of each where it, or any of its map, is no finite number.

    A score alone proves nothing: OpenVINO's ReduceMax makes -3.4e38 of a map full of NaN, which
    would be "Normal". NaN gets no verdict, and the other images of a batch keep theirs.

    Args:
        of: maps, or whatever else the scores were made of, (N, ...) each.
    """
    parts = (one.reshape(len(scores), -1) for one in (scores, *of))
    whole = np.logical_and.reduce([(np.abs(part) < NO_NUMBER).all(axis=1) for part in parts])
    return np.where(whole, scores, np.float32(np.nan))


class Runtime(Protocol):
    """One model, open and ready. `infer` is called by one thread at a time."""

    name: str  # "openvino" or "tensorrt"
    precision: str  # "f32", "bf16", "f16" or "int8"
    pads: bool  # whether fewer images than `batches.size` cost as much as these

    @property
    def worth(self) -> float:
        """Images together must take less than this share of the time that they take alone."""

    @property
    def batches(self) -> Batches:
        """At first ALONE."""

    @property
    def image_size(self) -> int:
        """Side of the square input, pixels."""

    @property
    def bank_rows(self) -> int | None:
        """Rows of the memory bank, None for a model without one."""

    @property
    def places(self) -> tuple[int, int] | None:
        """How many places (h, w) of a picture may count or not; None for an older graph."""

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """What may be tried, see `engines.serving.batch_trial`; rising."""

    @property
    def nbytes(self) -> int:
        """About how many bytes it takes where it runs, the memory bank included."""

    def infer(
        self, images: NDArray[np.uint8], size: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Score images.

        Args:
            images: (N, S, S, 3) RGB, S = `image_size`; as one batch up to `size`.
            size: `batches.size` where it is not given; another one must have been prepared.

        Returns:
            Raw scores (N,) and raw anomaly maps (N, h, w), float32, owned by the caller. The score
            of an image is NaN where anything of its map is no finite number, see `only_whole`.
            A map shows nothing where nothing counts.

        Raises:
            RuntimeFailed: the device or the runtime gave up.
        """

    def prepare(self, size: int) -> None:
        """Be ready for so many images at once, too, in place of what was prepared before.

        May take seconds, and be done while another thread calls `infer`.
        """

    def take_together(self, batches: Batches) -> None:
        """Run so many images at once from now on, and give back what served another number.

        May be done while another thread calls `infer`, and takes no time for what was prepared.
        """

    def with_bank(self, bank: NDArray[np.float32] | None, precision: str) -> Runtime | None:
        """The same engine with another memory bank (M, C), or None for a model without one.

        All places count in it. None where that cannot be: another number of channels, or another
        precision. Closing one of the two leaves the other as it is.
        """

    def count_only(self, keep: NDArray[np.float32]) -> None:
        """Let some places (h, w) count in scores, 1, and others not, 0: before anything is judged.

        All do until then.
        """

    def close(self) -> None:
        """Give the memory back; `infer` must not be called any more."""


def look_past_regions(runtime: Runtime, bundle: Bundle) -> None:
    """Let what lies in the regions of a bundle not count, before anything is judged.

    Raises:
        BadBundle: the graph is of an older Kensa, or nothing is left that counts.
    """
    regions = bundle.regions()
    if regions is None:
        return
    if runtime.places is None:
        raise BadBundle(
            f"{bundle.onnx} was converted by an older Kensa and looks at all of a picture, but"
            f" {bundle.meta.regions} beside it says what never counts: convert the model again"
            " (convtrt.py, or POST /convert), or take the regions away."
        )
    reach = REACH[bundle.meta.model]
    runtime.count_only(regions.cells(runtime.image_size, runtime.places, reach))
