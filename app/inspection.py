"""The model held in memory, and `Inspector.inspect`: from the bytes of an image to a verdict."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from app.compiled import seal_cache, usable_cache
from app.settings import Settings
from engines.bundle import Bundle
from engines.errors import BadBundle, KensaError, NotReady, UnknownModel
from engines.files import sha256
from engines.image import ImageLimits, decode, resize
from engines.meta import Meta
from engines.runtimes import Runtime
from engines.runtimes.openvino import OpenVINORuntime
from engines.verdict import Scale, Verdict, heatmap, judge, overlay_png, png

Drawing = Literal["heatmap", "overlay"]
Result = TypeVar("Result")

log = logging.getLogger("kensa")


@dataclass(frozen=True)
class Resident:
    """A model held in memory, open and warm."""

    name: str
    version: str  # 12 hexadecimal digits of a SHA-256 over its files
    meta: Meta
    scale: Scale
    runtime: Runtime


@dataclass(frozen=True)
class Timing:
    """Where the time of one inspection went, milliseconds."""

    queue_ms: float
    decode_ms: float
    infer_ms: float
    total_ms: float


@dataclass(frozen=True)
class Inspection:
    """A verdict and what belongs to it."""

    model: Resident
    verdict: Verdict
    drawing: bytes | None  # the PNG that was asked for
    timing: Timing


@dataclass
class Counts:
    """Images since the start. Only the event loop's thread changes them."""

    normal: int = 0
    anomaly: int = 0
    refused: int = 0


class Inspector:
    """One model, a few threads that decode, and one that infers.

    Nothing here blocks the event loop: it only hands work to these threads and waits.
    """

    def __init__(self, settings: Settings) -> None:
        self.limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels)
        self.counts = Counts()
        self.started = time.monotonic()
        self._settings = settings
        self._model: Resident | None = None
        self._problem = "The model is still being loaded; try again in a few seconds."
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._engine = ThreadPoolExecutor(1, thread_name_prefix="engine")

    async def open(self) -> None:
        """Load the model. Where that fails, the reason is logged, and `model` raises it."""
        try:
            self._model = (await _timed(self._engine, lambda: open_model(self._settings))).result
        except KensaError as error:
            self._problem = str(error)
            log.error("Not ready: %s", error)
        except Exception:
            self._problem = "The model cannot be opened, for a reason that the log shows."
            log.exception("Not ready: the model cannot be opened")

    async def close(self) -> None:
        """Drop what waits, let what runs end, give the memory back."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._engine.shutdown, wait=True, cancel_futures=True)
        if self._model is not None:
            self._model.runtime.close()

    def model(self, name: str | None = None) -> Resident:
        """The model of that name, or the only one.

        Raises:
            NotReady: none is loaded; the sentence says why.
            UnknownModel: it has another name.
        """
        if self._model is None:
            raise NotReady(self._problem)
        if name not in (None, self._model.name):
            raise UnknownModel(f"There is no model {name!r}; there is {self._model.name!r}.")
        return self._model

    async def inspect(
        self, data: bytes, model: Resident, drawing: Drawing | None = None
    ) -> Inspection:
        """From the bytes of an image file to a verdict: decode, run, judge, draw if asked.

        Raises:
            BadImage: and its kinds, as `engines.image.decode`.
            RuntimeFailed: the runtime gave up.
        """
        began = time.perf_counter()

        def see() -> tuple[NDArray[np.uint8] | None, NDArray[np.uint8]]:
            picture = decode(data, self.limits, model.meta.bit_depth)  # (H, W, 3)
            pixels = resize(picture, model.runtime.image_size)  # (S, S, 3)
            return picture if drawing == "overlay" else None, pixels

        seen = await _timed(self._decoders, see)
        picture, pixels = seen.result
        ran = await _timed(self._engine, lambda: model.runtime.infer(pixels[None]))
        scores, maps = ran.result  # (1,), (1, h, w)
        verdict = judge(float(scores[0]), model.scale)

        drawn = None
        if drawing is not None:
            drawn = await _timed(self._decoders, lambda: draw(maps[0], model, picture))
        timing = Timing(
            queue_ms=seen.waited_ms + ran.waited_ms + (drawn.waited_ms if drawn else 0.0),
            decode_ms=seen.worked_ms,
            infer_ms=ran.worked_ms,
            total_ms=(time.perf_counter() - began) * 1000,
        )
        self._count(verdict)
        return Inspection(model, verdict, drawn.result if drawn else None, timing)

    def _count(self, verdict: Verdict) -> None:
        if verdict.is_anomalous:
            self.counts.anomaly += 1
        else:
            self.counts.normal += 1


def draw(
    anomaly_map: NDArray[np.float32], model: Resident, picture: NDArray[np.uint8] | None
) -> bytes:
    """A PNG of a raw anomaly map (h, w): over `picture` (H, W, 3) where there is one, else grey."""
    heat = heatmap(anomaly_map, model.scale, model.runtime.image_size)  # (S, S) in [0, 1]
    if picture is not None:
        return overlay_png(picture, heat, model.scale.threshold)
    return png((heat * 255).round().astype(np.uint8))


def open_model(settings: Settings) -> Resident:
    """Load the model that the settings name, and warm it up.

    Raises:
        NotReady: no model is set.
        BadMeta, BadBundle: its files are missing, damaged or do not fit together.
    """
    if settings.model_dir is None:
        raise NotReady("No model is set: set KENSA_MODEL_DIR to a folder that convtrt.py made.")
    began = time.perf_counter()
    bundle = Bundle.open(settings.model_dir)
    scale = Scale.of(bundle.meta)
    cache = usable_cache(settings.compiled_dir)
    runtime = OpenVINORuntime.open(
        bundle, precision=settings.precision, threads=settings.threads, cache_dir=cache
    )
    seal_cache(cache)
    model = Resident(settings.served_name, version_of(bundle), bundle.meta, scale, runtime)
    warm_up(model)
    rows = runtime.bank_rows
    log.info(
        "Loaded %s %s: %s, %d pixels, %s, %s %s, in %.1f s",
        model.name,
        model.version,
        bundle.meta.model,
        runtime.image_size,
        "no memory bank" if rows is None else f"memory bank of {rows:,}",
        runtime.name,
        runtime.precision,
        time.perf_counter() - began,
    )
    return model


def warm_up(model: Resident) -> None:
    """Run twice, so that the first part on the line does not wait for buffers to be made.

    Raises:
        BadBundle: the graph and meta.json disagree on the size of images.
    """
    size = model.runtime.image_size
    if size != model.meta.image_size:
        raise BadBundle(
            f"model.onnx takes images of {size} pixels, but meta.json says {model.meta.image_size}:"
            " they are from different trainings. Run convtrt.py again."
        )
    grey = np.full((1, size, size, 3), 128, np.uint8)
    for _ in range(2):
        model.runtime.infer(grey)


def version_of(bundle: Bundle) -> str:
    """A short name for exactly these files: it changes when any byte of them does."""
    names = ["meta.json", bundle.onnx.name, bundle.meta.memory_bank]
    hashes = [sha256(bundle.root / name) for name in names if name is not None]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class _Timed(Generic[Result]):
    """What work returned, how long it waited for a thread and how long it took."""

    result: Result
    waited_ms: float
    worked_ms: float


async def _timed(pool: ThreadPoolExecutor, work: Callable[[], Result]) -> _Timed[Result]:
    """Do `work` in a thread of `pool` while the event loop goes on; its errors are raised here."""
    asked = time.perf_counter()

    def run() -> _Timed[Result]:
        began = time.perf_counter()
        result = work()
        ended = time.perf_counter()
        return _Timed(result, (began - asked) * 1000, (ended - began) * 1000)

    return await asyncio.get_running_loop().run_in_executor(pool, run)
