"""One version of a model on disk: meta.json and the files it names, checked before use."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import BadBundle, Unreadable
from engines.files import json_text, sha256, write_atomically
from engines.meta import Meta
from engines.regions import Regions
from engines.store.known_scores import SCORES
from engines.store.regions import read_regions

ONNX = "model.onnx"
PLAN = "model.plan"
PLAN_RECORD = "model.plan.json"  # what the plan is good for; see engines.store.plan_record
REPORT = "report.json"
STRANGE = "strange.jpg"  # pictures that were not learned, for a person to look at


@dataclass(frozen=True)
class Bundle:
    """The folder that `convtrt.py` leaves: meta.json, model.onnx, model.plan, bank, report.json."""

    root: Path
    meta: Meta

    @classmethod
    def open(cls, root: Path) -> Bundle:
        """Read meta.json and check that every file it hashed is there, and unchanged.

        Raises:
            BadMeta: meta.json is missing or wrong.
            BadBundle: a file is missing or is not the one that was written with meta.json.
        """
        meta = Meta.read(root / "meta.json")
        bundle = cls(root, meta)
        if meta.files is not None:  # older tools wrote none
            bundle._check_hashes(meta.files)
        if not bundle.onnx.is_file():
            raise BadBundle(f"{bundle.onnx} does not exist: make it with convtrt.py.")
        return bundle

    def _check_hashes(self, files: dict[str, str]) -> None:
        for name in (ONNX, self.meta.memory_bank, self.meta.regions):
            if name is not None and name not in files:
                raise BadBundle(
                    f"{self.root / 'meta.json'} was written without {name}, so the two may be of"
                    " different trainings: run convtrt.py."
                )
        check_files(self.root, self.meta)

    @property
    def onnx(self) -> Path:
        return self.root / ONNX

    @property
    def plan(self) -> Path:
        return self.root / PLAN

    def memory_bank(self) -> NDArray[np.float32] | None:
        """The memory bank (M, C) of a PatchCore model, None for the other kinds.

        Raises:
            BadBundle: it is missing or damaged.
        """
        name = self.meta.memory_bank
        return None if name is None else read_bank(self.root / name)

    def regions(self) -> Regions | None:
        """What of a picture never counts, None where all does. Errors as of `read_regions`."""
        return read_regions(self.root, self.meta)

    def report(self) -> dict[str, Any]:
        """report.json, empty where there is none.

        Raises:
            BadBundle: it is not JSON.
        """
        return read_report(self.root)


def check_files(root: Path, meta: Meta) -> None:
    """Raise BadBundle unless the files beside a meta.json are those that it was written with.

    Weights, statistics and scores may be missing: they are needed to retrain, not to serve. A plan,
    too: it stays on the device that made it. Nor does anything depend on a picture for people.
    """
    spared = (meta.weights_pth, meta.stats, SCORES, STRANGE, PLAN, PLAN_RECORD)
    for name, expected in (meta.files or {}).items():
        if name in spared and not (root / name).exists():
            continue
        check_hash(root / name, expected)


def read_strange(root: Path, meta: Meta) -> bytes | None:
    """The sheet of pictures that training left out as strange, None where there is none."""
    if STRANGE not in (meta.files or {}) or not (root / STRANGE).is_file():
        return None
    return (root / STRANGE).read_bytes()


def check_hash(path: Path, expected: str) -> None:
    """Raise BadBundle unless `path` is the file that was written with its meta.json."""
    if not path.is_file():
        raise BadBundle(f"{path} does not exist, but meta.json beside it names it.")
    if sha256(path) != expected:
        raise BadBundle(
            f"{path} is not the file that was written with the meta.json beside it"
            " (its SHA-256 differs): restore it, or run retrain.py or convtrt.py again."
        )


def read_bank(path: Path) -> NDArray[np.float32]:
    """Read the `embeddings` (M, C) of a memory_bank.npz, float32 and C-contiguous.

    Raises:
        BadBundle: it is missing, is not such a file, or holds no finite matrix.
    """
    bank = read_array(path, "embeddings")
    if bank is None:
        raise BadBundle(f"{path} has no array named embeddings, so it is no memory bank.")
    if bank.ndim != 2 or 0 in bank.shape or not np.issubdtype(bank.dtype, np.floating):
        raise BadBundle(
            f"{path}: embeddings must be a float matrix (patches, channels),"
            f" got {bank.dtype} {bank.shape}."
        )
    bank = np.ascontiguousarray(bank, dtype=np.float32)
    if not np.isfinite(bank).all():
        raise BadBundle(f"{path}: embeddings holds values that are not finite.")
    return bank


def read_coverage_radius(path: Path) -> float | None:
    """The coverage radius that `write_bank` stored, None in files of other makers.

    Raises:
        BadBundle: the file is missing or damaged.
    """
    radius = read_array(path, "coverage_radius")
    if radius is None:
        return None
    is_number = radius.shape == () and np.issubdtype(radius.dtype, np.floating)
    if not is_number or not 0 <= radius < np.inf:
        raise BadBundle(f"{path}: coverage_radius must be a distance, got {radius}.")
    return float(radius)


def read_array(path: Path, name: str) -> NDArray[Any] | None:
    """One array of an .npz, None where it has none of that name. Never unpickles."""
    try:
        with np.load(path, allow_pickle=False) as file:
            array: NDArray[Any] | None = file.get(name)
            return array
    except FileNotFoundError:
        raise BadBundle(f"{path} does not exist.") from None
    except Exception as error:  # zip and npy readers raise what they like
        Unreadable.check(path, error)
        raise BadBundle(f"{path} is not a readable .npz file: {error}.") from error


def write_bank(path: Path, embeddings: NDArray[np.float32], coverage_radius: float) -> None:
    """Write a memory bank.

    Args:
        path: where to; replaced in whole or not at all.
        embeddings: (M, C) patch embeddings, feature units.
        coverage_radius: the largest distance of any training patch to the bank, feature units.
    """
    buffer = io.BytesIO()
    np.savez(buffer, embeddings=embeddings, coverage_radius=np.float32(coverage_radius))
    write_atomically(path, buffer.getvalue())


def read_report(root: Path) -> dict[str, Any]:
    """report.json of a folder, empty where there is none; BadBundle when it is not JSON."""
    path = root / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        Unreadable.check(path, error)
        raise BadBundle(f"{path} is not readable JSON: {error}.") from None
    if not isinstance(report, dict):
        raise BadBundle(f"{path} must be a JSON object.")
    return report


def write_report(root: Path, report: dict[str, Any]) -> None:
    """Write report.json into a folder."""
    write_atomically(root / REPORT, json_text(report).encode())
