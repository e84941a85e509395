"""`teach`: parts that a person has marked become images to learn from and to test with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from app.decisions.database import DecisionDatabase, Filter, Kept
from app.decisions.decision import ENDINGS
from app.decisions.recorder import Recorder
from engines.errors import BadImage, UnknownDataset
from engines.image import ImageLimits
from engines.store.datasets import SPLITS, Datasets, Split

LABELS = ("good", "defect", "unusable")
PAGE = 500


class Taught(NamedTuple):
    """What became of the decisions that somebody has marked."""

    added: dict[Split, int]
    moved: int  # out of another split, because the label is another one now
    already_there: int
    without_picture: int  # which is not kept, or cannot be read any more


def teach(
    recorder: Recorder,
    datasets: Datasets,
    category: str,
    asked: Filter,
    test_share: float,
    limits: ImageLimits,
) -> Taught:
    """Put the pictures of marked decisions into the splits of a category. Blocks.

    A good part goes to `train`, or to `normal` with one in so many; a defect to `anomaly`; what is
    unusable, as a person or Kensa says, nowhere. A picture is in one split at most, and always in
    the same one: its SHA-256 decides. Where it was judged several times, what was said of the last
    one counts.

    Args:
        test_share: of the good ones, which are kept to test with.

    Raises:
        Conflict, DiskFull: as `Recorder.read` and `Datasets.add`.
    """
    counts: Counter[str] = Counter()
    added: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    origins: dict[str, dict[str, Any]] = {}
    datasets.origins(category)  # raises where they could not be noted in the end
    for kept in last_of_each_picture(recorder.read(lambda it: _marked(it, asked))):
        split = _split(kept, test_share)
        ending = ENDINGS.get(kept.decision.format)
        if ending is None:  # pixels, of which no file came
            counts["without_picture"] += split is not None
            continue
        name = f"decision-{kept.decision.sha256[:16]}{ending}"
        if split is not None:
            try:
                data = _picture(recorder, datasets, category, kept, name)
                stored = datasets.add(category, split, name, data, limits=limits)
            except (UnknownDataset, BadImage):
                counts["without_picture"] += 1
                continue
            counts["already_there"] += stored.already_there
            added[split] += not stored.already_there
            origins[name] = _origin(kept)
        for other in SPLITS:  # now that it is where it belongs, for nothing may be lost on the way
            if other != split:
                with suppress(UnknownDataset):
                    datasets.delete_image(category, other, name)
                    counts["moved"] += 1
    if origins:
        datasets.note_origins(category, origins)
    return Taught(added, counts["moved"], counts["already_there"], counts["without_picture"])


def _picture(recorder: Recorder, datasets: Datasets, category: str, kept: Kept, name: str) -> bytes:
    """Of a decision; where it is not kept any more, as it lies in a split since it was.

    Raises:
        UnknownDataset: it is in none.
        ImageTooLarge: the limits are others now.
    """
    with suppress(FileNotFoundError):
        return recorder.pictures.image(kept.number)
    for split in SPLITS[:-1]:
        with suppress(UnknownDataset):
            return datasets.read(category, split, name)
    return datasets.read(category, SPLITS[-1], name)


def last_of_each_picture(found: Iterable[Kept]) -> list[Kept]:
    """The last decision of each picture that had a verdict, newest first."""
    last: dict[str, Kept] = {}
    for kept in sorted(found, key=lambda one: one.number, reverse=True):
        if kept.decision.format:
            last.setdefault(kept.decision.sha256, kept)
    return list(last.values())


def _marked(database: DecisionDatabase, asked: Filter) -> list[Kept]:
    return [one for label in LABELS for one in _all(database, replace(asked, label=label))]


def _all(database: DecisionDatabase, asked: Filter) -> Iterator[Kept]:
    page = database.find(asked, PAGE)
    while page:
        yield from page
        page = database.find(asked, PAGE, page[-1].number)


def _split(kept: Kept, test_share: float) -> Split | None:
    if "unusable" in (kept.label, kept.decision.verdict):
        return None
    if kept.label == "defect":
        return "anomaly"
    return "normal" if int(kept.decision.sha256[:8], 16) < test_share * 2**32 else "train"


def _origin(kept: Kept) -> dict[str, Any]:
    one = kept.decision
    return {
        "decision": one.id, "number": kept.number, "part": one.part, "at": one.at,
        "model": one.model, "version": one.version, "raw_score": one.raw_score,
        "sha256": one.sha256, "label": kept.label, "defect": kept.defect,
    }  # fmt: skip
