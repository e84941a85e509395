"""What is known of normal parts once a model has learned: scores of pictures that it had not."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.image import DEFAULT_LIMITS, ImageLimits
from engines.meta import Meta
from engines.regions import REACH, Regions
from engines.store.known_scores import KnownScores
from workers.learning.camera import Look
from workers.learning.dataset import (
    MOST_BROKEN,
    Category,
    Images,
    check_broken,
    notes_on,
    notes_on_passed_over,
)
from workers.learning.drawn_defects import Drawn
from workers.learning.eyesight import Judge, drawn_scores
from workers.learning.normal_scores import NormalScores
from workers.learning.same_part import known_again, looks, same_part
from workers.learning.strange import LEAST
from workers.learning.strange import strange as find_strange
from workers.models import Training
from workers.progress import Progress

HELD_OUT = 0.2  # share of the training images that find the threshold where there are no others
DRAWN_ON = 7  # pictures

# The scores of new pictures spread so much wider than those of what a VAE had learned: on three
# sets of photos 1.8 to 2.1 times (docs/models.md).
WIDER = 2.0
LOOKED_AT = 32  # learned pictures, to see how far they spread


@dataclass
class Course:
    """Learning, step by step: which images were read, and the seconds of learning alone."""

    kind: Any
    model: Any
    meta: Meta
    how: Training
    progress: Progress
    category: Category
    limits: ImageLimits = DEFAULT_LIMITS
    regions: Regions | None = None  # that never count
    read: list[Images] = field(default_factory=list)
    seconds: float = 0.0

    def learn(self, paths: list[Path]) -> tuple[Any, list[Path]]:
        """Train, or update what it knows; what came of it, and the images that could be read."""
        how = self.kind.update if self.kind.knows(self.model) else self.kind.train
        began, images = time.perf_counter(), self._images(paths, "images")
        images.most_broken = len(self.category.train) // MOST_BROKEN
        lesson = how(self.model, self.meta, images, self.how, self.progress)
        self.seconds += time.perf_counter() - began
        return lesson, images.used

    def judge(self, paths: list[Path]) -> Judged:
        """Score images with the model as it is now."""
        images, batches, scores = self._images(paths, "verify"), [], [np.empty(0, np.float32)]
        for batch in images:
            batches.append(batch)
            scores.append(self.kind.scores(self.model, [batch]))
        return Judged(images.used, self._together(batches), np.concatenate(scores))

    def pictures(self, paths: list[Path]) -> tuple[list[Path], NDArray[np.uint8]]:
        """The images that can be read, as the model sees them: (n, S, S, 3)."""
        images = self._images(paths, "verify")
        batches = list(images)
        return images.used, self._together(batches)

    def _together(self, batches: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        size = self.meta.image_size
        return np.concatenate([np.empty((0, size, size, 3), np.uint8), *batches])

    def counting(self) -> NDArray[np.bool_] | None:
        """Which pixels of what the model sees (S, S) count; None where all do."""
        if self.regions is None:
            return None
        size = self.meta.image_size
        return self.regions.cells(size, (size, size), REACH[self.meta.model]) > 0

    def broken(self) -> dict[str, str]:
        """The images that could not be read, and why.

        Raises:
            BadDataset: they are too many for this to be the training that was asked for.
        """
        broken = {str(path): why for images in self.read for path, why in images.broken.items()}
        listed = self.category.count
        check_broken(broken, listed, listed // MOST_BROKEN)
        return broken

    def notes(self) -> list[str]:
        """What a person should know of the pictures that were read."""
        files = {path: file for images in self.read for path, file in images.files.items()}
        passed_over = notes_on_passed_over(self.category.passed_over)
        return [*passed_over, *notes_on(files, self.meta)]

    def looks(self, paths: list[Path]) -> list[Look]:
        """What these images look like: they are read where they were not yet."""
        known = {path: file.look for images in self.read for path, file in images.files.items()}
        if others := [path for path in paths if path not in known]:  # of an older model
            unread = self._images(others, "verify")
            for _ in unread:
                pass
            known |= {path: file.look for path, file in unread.files.items()}
        return [look for path in paths if (look := known.get(path)) is not None]

    def _images(self, paths: list[Path], phase: str) -> Images:
        found = Images(paths, self.meta, self.how.batch, self.progress, limits=self.limits)
        found.tick = self.progress.phase(phase)
        self.read.append(found)
        return found


@dataclass(frozen=True)
class Judged:
    """Images that were read, and their raw scores."""

    paths: list[Path]
    pictures: NDArray[np.uint8]  # (n, S, S, 3)
    scores: NDArray[np.float32]  # (n,)


@dataclass(frozen=True)
class Normals:
    """What is known of normal parts.

    Attributes:
        learned: the images that were learned now.
        known: how many were not, because the model had learned them before.
        strange: those that were not, because they are unlike the others.
        learned_scores: what an update can go on from.
        scores: these and those of test images: what the threshold comes from.
        paths, own: the images that were scored now, and their scores.
        method: as `Calibration` has it.
        on, judge: pictures to draw defects on, and how they are judged.
        usual_scale: how far such scores are expected to spread, see `NormalScores.of`.
    """

    learned: list[Path]
    known: int
    strange: list[Path]
    learned_scores: KnownScores
    scores: KnownScores
    paths: list[Path]
    own: NDArray[np.float64]
    method: str
    on: NDArray[np.uint8]
    judge: Judge
    progress: Progress
    usual_scale: float

    def drawn(self, counting: NDArray[np.bool_] | None) -> list[tuple[Drawn, float]]:
        """Defects drawn onto normal pictures, and their scores; `counting` as `drawn_scores`."""
        tick = self.progress.phase("drawn defects")
        return drawn_scores(self.on, self.judge, tick, counting)


def leave_each_out(
    course: Course, category: Category, before: KnownScores, *, keep_strange: bool
) -> Normals:
    """Learn all images, and score each by what was learned from the others.

    Args:
        before: the scores that lie beside what is updated.
    """
    is_update = course.kind.knows(course.model)
    marks = {path: KnownScores.mark(path) for path in category.train}
    unwanted = () if keep_strange else before.strange
    strange = [path for path in category.train if marks[path] in unwanted]
    new = [path for path in category.train if marks[path] not in {*before.learned, *unwanted}]
    known = len(category.train) - len(new) - len(strange)
    if not new:
        _say_strange(course.progress, strange)
        course.progress.say(f"no image is new: {known} were learned before")
        return replace(_nothing_new(course, category, before), known=known, strange=strange)
    lesson, learned = course.learn(new)
    parts, own = _left_out(course, lesson)
    seen = looks(lesson.descriptors())
    first = ~known_again(seen, before.looks)[: len(own)]
    scale = course.kind.USUAL_SCALE
    found = np.flatnonzero(first)[find_strange(own[first], before, scale)]
    if not keep_strange and len(found):
        strange += [learned[number] for number in lesson.pictures[found]]
        kept = np.setdiff1d(np.arange(len(own)), found)
        lesson = lesson.keeping(kept, course.progress)
        learned = [path for path in learned if path not in strange]
        seen, first = seen[kept], first[kept]
        parts, own = _left_out(course, lesson)
        first = first[: len(own)]
    _say_strange(course.progress, strange)
    _say_again(course.progress, int(np.count_nonzero(~first)))
    learned_marks, strange_marks = (
        tuple(marks[path] for path in paths) for paths in (learned, strange)
    )
    new_looks = seen[: len(own)][first]
    learned_scores = before.followed_by(
        KnownScores(own[first], parts[first], learned_marks, strange_marks, new_looks)
    )
    tests = course.judge(_unknown(category.test_normal, learned_scores, course.progress))
    if not len(own):
        tested = _from_tests(course, tests, learned, "test")
        return replace(tested, known=known, strange=strange, learned_scores=learned_scores)
    others = _of_tests(tests, lesson.describe)
    # Pictures that a model of an older Kensa, or of another tool, knows already score far too low:
    # nobody can tell which they are.
    trusted = not is_update or len(before) > 0
    on = to_draw_on(parts, own, learned_scores.scores)
    return Normals(
        learned,
        known,
        strange,
        learned_scores if trusted else KnownScores.none(learned_marks, strange_marks),
        learned_scores.followed_by(others) if trusted else others,
        [*(learned[number] for number in lesson.pictures), *tests.paths],
        np.concatenate([own, others.scores]),
        "left_out" if trusted else "test",
        course.pictures([learned[lesson.pictures[number]] for number in on])[1],
        lambda drawn, number: lesson.judge(drawn, np.flatnonzero(parts == parts[on[number]])),
        course.progress,
        scale,
    )


def _unknown(tests: list[Path], known: KnownScores, progress: Progress) -> list[Path]:
    """The test images that the model has not learned: the others score far too low."""
    learned = {*known.learned}
    unknown = [path for path in tests if KnownScores.mark(path) not in learned]
    if len(unknown) < len(tests):
        progress.say(
            f"{len(tests) - len(unknown)} normal test images were learned, now or before: the"
            " threshold is found without them"
        )
    return unknown


def _left_out(course: Course, lesson: Any) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Parts and scores of the pictures that can be left out; none where nothing else is left."""
    parts = same_part(lesson.descriptors())
    if not lesson.can_spare(parts):
        return parts[:0], np.empty(0)
    return parts, lesson.scores(parts, course.progress.phase("leave out"))


def hold_some_out(course: Course, category: Category) -> Normals:
    """Learn some images for many epochs, and score others: test images, where there are any."""
    tested = len(category.test_normal) >= 2
    held = [] if tested else _held_out(category.train)
    _, learned = course.learn([path for path in category.train if path not in held])
    tests = course.judge([*category.test_normal, *held])
    found = _from_tests(course, tests, learned, "test" if tested else "held_out")
    return replace(found, usual_scale=_spread_of_learned(course, learned))


def _spread_of_learned(course: Course, learned: list[Path]) -> float:
    """How far new scores will spread: wider than those of what was learned for many epochs."""
    scores = np.unique(course.judge([learned[n] for n in _evenly(len(learned), LOOKED_AT)]).scores)
    if len(scores) < 2 or not np.isfinite(scores).all():
        return float(course.kind.USUAL_SCALE)
    wide = WIDER * NormalScores.of(scores.astype(np.float64)).scale
    return float(max(course.kind.USUAL_SCALE, wide))


def _nothing_new(course: Course, category: Category, before: KnownScores) -> Normals:
    tests = course.judge(_unknown(category.test_normal, before, course.progress))
    found = _from_tests(course, tests, [], "left_out" if len(before) else "test")
    return replace(
        found,
        learned_scores=before,
        scores=before.followed_by(found.scores),
    )


def _from_tests(course: Course, tests: Judged, learned: list[Path], method: str) -> Normals:
    scores = _of_tests(tests, None)
    return Normals(
        learned,
        0,
        [],
        KnownScores.none(),
        scores,
        tests.paths,
        scores.scores,
        method,
        tests.pictures[to_draw_on(scores.parts, scores.scores, scores.scores)],
        lambda drawn, _: course.kind.scores(course.model, [drawn]),
        course.progress,
        course.kind.USUAL_SCALE,
    )


def _of_tests(
    tests: Judged, describe: Callable[[NDArray[np.uint8]], NDArray[np.float32]] | None
) -> KnownScores:
    """Scores of test images; each of a part of its own where nothing says what they look like."""
    count = len(tests.scores)
    parts = same_part(describe(tests.pictures)) if describe and count else np.arange(count)
    return KnownScores(tests.scores.astype(np.float64), parts)


def to_draw_on(
    parts: NDArray[np.int64], own: NDArray[np.float64], known: NDArray[np.float64]
) -> NDArray[np.int64]:
    """A few pictures to draw defects on, of parts with equally many pictures: as much is left out.

    What is drawn has to be found for itself, so they are some that score low: of many new ones the
    lower half, of few those below the median of all that are known.

    Args:
        parts, own: of the new pictures, and their scores.
        known: scores of these and of earlier ones.
    """
    usual = own if len(own) >= LEAST else known
    low = np.flatnonzero(own <= np.median(usual)) if len(own) else np.arange(0)
    if not len(low):
        return low
    _, number, sizes = np.unique(parts[low], return_inverse=True, return_counts=True)
    candidates = low[sizes[number] == np.bincount(sizes).argmax()]
    return np.asarray(candidates[_evenly(len(candidates), DRAWN_ON)], np.int64)


def _evenly(count: int, most: int) -> NDArray[np.int64]:
    """Of so many, at the most that many, spread over all."""
    chosen = np.linspace(0, max(0, count - 1), min(most, count))
    return np.unique(chosen.round().astype(np.int64))


def _say_strange(progress: Progress, strange: list[Path]) -> None:
    if strange:
        names = ", ".join(path.name for path in strange)
        progress.say(
            f"not learned: {len(strange)} unlike the others and unlike what is known: {names}."
            " If these parts are good, learn them with keep_strange."
        )


def _say_again(progress: Progress, count: int) -> None:
    if count:
        progress.say(
            f"{count} new files hold pictures that were learned before: their scores do not count"
        )


def _held_out(train: list[Path]) -> list[Path]:
    """A fifth of the training images, at least 4 and at most half, spread over the list."""
    count = min(max(4, math.ceil(len(train) * HELD_OUT)), len(train) // 2)
    return train[:: math.ceil(len(train) / count)][:count] if count else []
