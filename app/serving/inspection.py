"""`Inspector.inspect`: from the bytes of an image to a verdict."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from app.serving.admission import Admission
from app.serving.drift import Drift
from app.serving.inference_statistics import InferenceStatistics, Timing
from app.serving.usable import Measured, Usable, measured
from app.settings import Settings
from engines.errors import NotReleased
from engines.image import (
    ImageLimits,
    Resizing,
    decode,
    hint_on,
    kind_of,
    resize,
    same_either_way,
)
from engines.meta import Meta
from engines.runtimes import cuda
from engines.serving.batching import Batcher, Done
from engines.serving.resident import Resident, Residents
from engines.verdict import Scale, Verdict, heatmap, judge, overlay, png

LINE_SHARE = 100  # what is done in gaps takes one part in so many of a line that has none
NOT_RELEASED = (
    "The model failed its challenge, so every part is NG, whatever its score, until the model is"
    " released."
)
Drawing = Literal["heatmap", "overlay"]
Image = bytes | NDArray[np.uint8]
Result = TypeVar("Result")


class Seen(NamedTuple):
    """The picture that came: what kind of file it was, and how many pixels, upright."""

    kind: str  # "JPEG", ...; "pixels" where no file came
    width: int
    height: int
    hint: str | None  # what speaks against judging it, though it was judged
    sha256: str  # of the file, or of the pixels where no file came
    measured: Measured | None = None  # where somebody asked what the picture is like


@dataclass(frozen=True)
class Inspection:
    """A verdict and what belongs to it."""

    model: Resident
    seen: Seen
    verdict: Verdict
    anomaly_map: NDArray[np.float32]  # (h, w), raw
    drawing: bytes | None  # the PNG that was asked for
    timing: Timing
    not_released: bool = False  # so that the label is not what the model says

    @property
    def code(self) -> str:
        """Why the verdict is not what its score says; empty where it is."""
        if self.verdict.unusable is not None:
            return self.verdict.unusable.code
        return NotReleased.code if self.not_released else ""


@dataclass
class Counts:
    """Images since the start. Only the event loop's thread changes them."""

    normal: int = 0
    anomaly: int = 0
    unusable: int = 0
    refused: int = 0


class Part(NamedTuple):
    """What a model saw of a part that it inspected."""

    pixels: NDArray[np.uint8]  # (S, S, 3)
    resize: Resizing | None  # as its meta.json names it
    either_way: bool  # whether the other way of resizing gives the same pixels
    sha256: str  # of the picture

    def is_as_seen_by(self, meta: Meta) -> bool:
        return self.either_way or self.resize == meta.resize


class Inspector:
    """The models in memory, a few threads that decode, and the one of the engines.

    Nothing here blocks the event loop: it only hands work to these threads and waits.
    """

    def __init__(self, settings: Settings) -> None:
        self.limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels)
        self.admission = Admission(settings.queue_size, settings.max_image_bytes)
        self.residents = Residents()
        self.counts = Counts()
        self.statistics = InferenceStatistics()
        self.usable = Usable(settings.unusable_codes)
        self.drift = Drift(settings.drift_parts)
        self.started = time.monotonic()
        self.not_released: dict[str, str] = {}  # model -> why none of its parts may pass
        self._refuses = settings.not_released == "refuse"
        self.on_inspection: Callable[[Inspection], None] = lambda _: None
        self.on_verdict: Callable[[Resident, Verdict], None] = lambda *_: None
        self._recent: dict[str, deque[Part]] = {}
        self._keep = settings.gate_recent
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self.batcher = Batcher()
        self._patience_s = 1.0

    async def close(self) -> None:
        """Drop what waits, let what runs end, give the memory back."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.batcher.close)
        for model in self.residents.all():
            model.runtime.close()
        await asyncio.to_thread(cuda.close)  # also what a request that was given up still holds

    def recent(self, name: str) -> list[Part]:
        """The last parts that a model inspected, oldest first."""
        return list(self._recent.get(name, ()))

    def forget(self, name: str) -> None:
        """Give back the memory of a model's last parts."""
        self._recent.pop(name, None)
        self.usable.forget(name)
        self.drift.forget(name)

    async def beside(self, work: Callable[[], Result]) -> Result:
        """Do work that belongs to a part in the threads that decode, which nothing else uses."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work)

    async def in_a_gap(self, work: Callable[[], Result]) -> Result:
        """Do `work` in the engine's thread while no part is being inspected.

        A line without gaps is not waited for longer than the work may take up of it, a hundredth.
        """
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.admission.idle.wait(), self._patience_s)
        done = await self.batcher.call(work)
        self._patience_s = done.worked_ms / 1000 * LINE_SHARE
        return done.result

    # ---- one image ----------------------------------------------------------------------------

    async def inspect(
        self,
        image: Image,
        name: str | Resident | None = None,
        drawing: Drawing | None = None,
        part: str = "",
    ) -> Inspection:
        """From an image to a verdict, by the version that is live now.

        Args:
            image: the bytes of an image file, or its pixels (H, W, 3), uint8, RGB.
            name: of the model; None for the only one; or the version itself, held by the caller.
            drawing: what to draw besides.
            part: what it is called, if anything.

        Raises:
            BadImage: and its kinds, as `engines.image.decode`.
            RuntimeFailed: the runtime gave up.
            NotReady, UnknownModel: as `Residents.get`.
            NotReleased: the model failed a challenge, and parts are to get no verdict then.
        """
        with self.residents.use(name) as model:
            if self._refuses and model.name in self.not_released:
                raise NotReleased(self.not_released[model.name])
            counted, began = self.statistics.of(model), time.perf_counter()
            try:
                inspection = await self._inspect(image, model, drawing, part)
            except Exception:
                counted.fail.add((time.perf_counter() - began) * 1000)
                raise
            counted.add(inspection.timing)
            return inspection

    async def _inspect(
        self, image: Image, model: Resident, drawing: Drawing | None, part: str
    ) -> Inspection:
        """Decode, run, judge, draw if asked."""
        began = time.perf_counter()
        measure = bool(self.usable.asked or self.drift.parts)
        seen = await _timed(self._decoders, lambda: self._see(image, model, drawing, measure))
        picture, pixels, about = seen.result
        ran = await self.batcher.infer(model.runtime, pixels, model.name)
        raw_score, anomaly_map = ran.result  # (h, w)
        verdict = judge(raw_score, model.scale)
        if about.measured is not None:
            self.drift.count(model, about.measured.values, raw_score)
            verdict = verdict.on_unusable(self.usable.why_not(model, about.measured, part))
        verdict, about, is_stopped = self._as_released(model, verdict, about)
        drawn = None
        if drawing is not None:
            size = model.runtime.image_size
            drawn = await _timed(
                self._decoders, lambda: draw(anomaly_map, model.scale, size, picture)
            )
        timing = Timing(
            queue_ms=seen.waited_ms + ran.waited_ms + (drawn.waited_ms if drawn else 0.0),
            decode_ms=seen.worked_ms,
            infer_ms=ran.worked_ms,
            total_ms=(time.perf_counter() - began) * 1000,
        )
        alike = same_either_way(about.width, about.height, model.runtime.image_size)
        self._note(model, verdict, Part(pixels, model.meta.resize, alike, about.sha256))
        png = drawn.result if drawn else None
        done = Inspection(model, about, verdict, anomaly_map, png, timing, is_stopped)
        self.on_inspection(done)
        return done

    def _as_released(
        self, model: Resident, verdict: Verdict, about: Seen
    ) -> tuple[Verdict, Seen, bool]:
        """The verdict on a part, and whether it is another one since no part of it may pass."""
        is_stopped = not self._refuses and model.name in self.not_released
        if is_stopped and verdict.unusable is None:
            verdict, about = stopped(verdict, about)
        return verdict, about, is_stopped

    def _see(
        self,
        image: Image,
        model: Resident,
        drawing: Drawing | None = None,
        measure: bool = False,
    ) -> tuple[NDArray[np.uint8] | None, NDArray[np.uint8], Seen]:
        """What the model sees of an image (S, S, 3), and what is said of it.

        Before them the picture (H, W, 3) where it is drawn on; else it is not kept in memory.
        """
        kind, picture, sha256 = "pixels", image, _sha256(image)
        if isinstance(picture, bytes):
            kind = kind_of(picture)
            picture = decode(picture, self.limits, model.meta.bit_depth)
        height, width = picture.shape[:2]
        size, how = model.runtime.image_size, model.meta.resize
        pixels = resize(picture, size, how)
        like = measured(picture, pixels, model) if measure else None
        about = Seen(kind, width, height, hint_on(width, height, size), sha256, like)
        return picture if drawing == "overlay" else None, pixels, about

    async def look(self, image: Image, model: Resident) -> Verdict:
        """What a version says of a picture, in a gap of the line. It counts nowhere.

        It is decoded in a thread that no part waits for.

        Raises:
            BadImage, RuntimeFailed: as `inspect`.
        """
        _, pixels, _ = await asyncio.to_thread(self._see, image, model)
        scores, _ = await self.in_a_gap(lambda: model.runtime.infer(pixels[None]))
        return judge(float(scores[0]), model.scale)

    async def try_out(
        self, image: Image, name: str | None, drawing: Drawing | None = None
    ) -> Inspection:
        """What `inspect` would say of a picture, in a gap of the line. It counts nowhere.

        Raises:
            BadImage, RuntimeFailed, NotReady, UnknownModel, NotReleased: as `inspect`.
        """
        with self.residents.use(name) as model:
            if self._refuses and model.name in self.not_released:
                raise NotReleased(self.not_released[model.name])
            began = time.perf_counter()
            measure = bool(self.usable.asked)
            picture, pixels, about = await asyncio.to_thread(
                self._see, image, model, drawing, measure
            )
            seen, size = time.perf_counter(), model.runtime.image_size

            def run() -> tuple[float, NDArray[np.float32], float]:
                begun = time.perf_counter()
                scores, maps = model.runtime.infer(pixels[None])
                return float(scores[0]), maps[0], (time.perf_counter() - begun) * 1000

            raw_score, anomaly_map, infer_ms = await self.in_a_gap(run)
            ran = time.perf_counter()
            verdict = judge(raw_score, model.scale)
            if about.measured is not None:
                verdict = verdict.on_unusable(self.usable.look(model, about.measured))
            verdict, about, is_stopped = self._as_released(model, verdict, about)
            drawn = None
            if drawing is not None:
                drawn = await asyncio.to_thread(draw, anomaly_map, model.scale, size, picture)
            timing = Timing(
                queue_ms=(ran - seen) * 1000 - infer_ms, decode_ms=(seen - began) * 1000,
                infer_ms=infer_ms, total_ms=(time.perf_counter() - began) * 1000,
            )  # fmt: skip
            return Inspection(model, about, verdict, anomaly_map, drawn, timing, is_stopped)

    async def draw_again(self, image: Image, name: str | None, drawing: Drawing) -> bytes:
        """The drawing of a picture that has its verdict already. It counts nowhere.

        Raises:
            BadImage, RuntimeFailed, NotReady, UnknownModel: as `inspect`.
        """
        with self.residents.use(name) as model:
            picture, pixels, _ = await self.beside(lambda: self._see(image, model, drawing))
            _, anomaly_map = (await self.batcher.infer(model.runtime, pixels, model.name)).result
            size = model.runtime.image_size
            return await self.beside(lambda: draw(anomaly_map, model.scale, size, picture))

    def _note(self, model: Resident, verdict: Verdict, part: Part) -> None:
        if verdict.unusable is not None:  # which says nothing of the version that judged
            self.counts.unusable += 1
            return
        if verdict.is_anomalous:
            self.counts.anomaly += 1
        else:
            self.counts.normal += 1
        self._recent.setdefault(model.name, deque(maxlen=self._keep)).append(part)
        if model.name not in self.not_released:  # else it is not what the version says
            self.on_verdict(model, verdict)


def _sha256(image: Image) -> str:
    data = image if isinstance(image, bytes) else np.ascontiguousarray(image).data
    return hashlib.sha256(data).hexdigest()


def stopped(verdict: Verdict, about: Seen) -> tuple[Verdict, Seen]:
    """What is said of a part of a model that is not released: it is not good, and why."""
    hint = f"{NOT_RELEASED} {about.hint}" if about.hint else NOT_RELEASED
    label = "Anomaly" if verdict.label == "Normal" else verdict.label
    return replace(verdict, label=label), about._replace(hint=hint)


def draw(
    anomaly_map: NDArray[np.float32], scale: Scale, size: int, picture: NDArray[np.uint8] | None
) -> bytes:
    """A PNG of a raw anomaly map (h, w): over `picture` (H, W, 3) where there is one, else grey."""
    if picture is not None:
        return overlay(picture, anomaly_map, scale, size)
    heat = heatmap(anomaly_map, scale, size)  # (S, S) in [0, 1]
    return png((heat * 255).round().astype(np.uint8))


async def _timed(pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Done[Result]:
    """Do `work` in a thread of `pool` while the event loop goes on; its errors are raised here."""
    asked = time.perf_counter()

    def run() -> Done[Result]:
        began = time.perf_counter()
        result = work()
        ended = time.perf_counter()
        return Done(result, (began - asked) * 1000, (ended - began) * 1000)

    return await asyncio.get_running_loop().run_in_executor(pool, run)
