"""Prometheus metrics: what is counted while it happens, and what is looked up when somebody asks.

docs/metrics.md has the table of them. Labels are bounded: routes, codes and names that exist.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from app.serving.inspection import Inspection
from app.serving.rollout import How
from app.serving.views import STATES
from app.watching.health import State
from engines.camera import CODES
from engines.verdict import Label

SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10),
)
SCORES = tuple(n / 20 for n in range(1, 21))
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, unread


class Metrics:
    """The metrics of one application, in a registry of its own."""

    def __init__(self, version: str) -> None:
        self.registry = registry = CollectorRegistry()
        self.queue_length: Callable[[], int] = lambda: 0  # parts that wait for their verdict
        self.parts_open: Callable[[], int] = lambda: 0  # parts of which views are awaited
        self._requests = Counter(
            "kensa_requests",
            "HTTP requests that were answered.",
            ["route", "method", "status"],
            registry=registry,
        )
        self._failures = Counter(
            "kensa_failures",
            "HTTP requests that failed, by the code of the error.",
            ["route", "code"],
            registry=registry,
        )
        self._queue = _seconds(registry, "queue", "Waiting for a free decoder and for the engine.")
        self._decode = _seconds(registry, "decode", "From the file to the pixels.")
        self._infer = _seconds(registry, "infer", "In the engine.")
        self._total = _seconds(registry, "inspection", "From the whole request to the verdict.")
        self._batch = Histogram(
            "kensa_batch_size",
            "Parts that the engine took at once.",
            ["model"],
            buckets=SIZES,
            registry=registry,
        )
        self._score = Histogram(
            "kensa_score",
            "Normalised scores, 0 to 1.",
            ["model"],
            buckets=SCORES,
            registry=registry,
        )
        self._verdicts = Counter(
            "kensa_verdicts", "Parts that were judged.", ["model", "label"], registry=registry
        )
        self._parts = Counter(
            "kensa_parts", "Parts of several views that were decided.", ["verdict"],
            registry=registry,
        )  # fmt: skip
        for verdict in STATES[1:]:
            self._parts.labels(verdict)
        self._unusable = Counter(
            "kensa_unusable",
            "Pictures that were not usable.",
            ["model", "code"],
            registry=registry,
        )
        self._swaps = Counter(
            "kensa_swaps", "What became of versions.", ["model", "how"], registry=registry
        )
        self._rests = Counter(
            "kensa_rests", "How often a model made room for another.", ["model"], registry=registry
        )
        self._known: set[str] = set()  # models whose series exist
        self._looked_up = LookedUp(version)
        registry.register(self._looked_up)
        ProcessCollector(registry=registry)

    # ---- what happens -------------------------------------------------------------------------

    def request(self, route: str, method: str, status: int) -> None:
        """A request was answered; `route` is a template such as /models/{name}, never a path."""
        self._requests.labels(route, method, status).inc()

    def failure(self, route: str, code: str) -> None:
        """A request failed."""
        self._failures.labels(route, code).inc()

    def inspected(self, inspection: Inspection) -> None:
        """A part has its verdict."""
        model, timing, verdict = inspection.model.name, inspection.timing, inspection.verdict
        self._queue.labels(model).observe(timing.queue_ms / 1000)
        self._decode.labels(model).observe(timing.decode_ms / 1000)
        self._infer.labels(model).observe(timing.infer_ms / 1000)
        self._total.labels(model).observe(timing.total_ms / 1000)
        self._verdicts.labels(model, verdict.label).inc()
        if verdict.unusable is not None:
            self._unusable.labels(model, verdict.unusable.code).inc()
        else:
            self._score.labels(model).observe(verdict.score)

    def decided(self, verdict: str) -> None:
        """A part has its verdict from all its views, each of which was inspected."""
        self._parts.labels(verdict).inc()

    def batch(self, model: str, size: int) -> None:
        """The engine of a model took so many parts at once."""
        self._batch.labels(model).observe(size)

    def swapped(self, model: str, how: How) -> None:
        """A version of a model went live, or did not."""
        self._swaps.labels(model, how).inc()

    def rested(self, model: str) -> None:
        """A model was put to rest, because another one needed its memory."""
        self._rests.labels(model).inc()

    # ---- what is asked for --------------------------------------------------------------------

    def expose(self, state: State, accept: str) -> tuple[bytes, str]:
        """All of it in the form that `accept` asks for, and that form's content type. Blocks."""
        for model in state.models:
            self._begin_at_zero(model.name)
        self._looked_up.state, self._looked_up.queue_length = state, self.queue_length()
        self._looked_up.parts_open = self.parts_open()
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _begin_at_zero(self, model: str) -> None:
        """Let the series of a model begin before its first part: an increase is seen from there."""
        if model in self._known:
            return
        self._known.add(model)
        for histogram in (
            *(self._queue, self._decode, self._infer, self._total, self._batch, self._score),
        ):
            histogram.labels(model)
        for label in get_args(Label):
            self._verdicts.labels(model, label)
        for code in CODES:
            self._unusable.labels(model, code)
        for how in get_args(How):
            self._swaps.labels(model, how)
        self._rests.labels(model)


class LookedUp(Collector):
    """What nobody counts: how things are at the moment of the question."""

    def __init__(self, version: str) -> None:
        self._build = {
            "version": version,
            "python": platform.python_version(),
            "openvino": metadata.version("openvino"),
        }
        self.state: State | None = None
        self.queue_length = 0
        self.parts_open = 0

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("kensa_build", "What runs.", self._build)
        if self.state is None:
            return
        yield from _of_models(self.state)
        yield from _of_jobs(self.state)
        yield from _of_the_machine(self.state)
        for name, meaning, count in (
            ("decisions", "Decisions that were written down.", self.state.decisions),
            ("decisions_lost", "Decisions that no disk took.", self.state.decisions_lost),
        ):
            yield CounterMetricFamily(f"kensa_{name}", meaning, count)
        yield _gauge(
            "decisions_behind", "Decisions that KENSA_RECORD_URL has not got yet.",
            self.state.decisions_behind,
        )  # fmt: skip
        yield _gauge(
            "queue_length", "Parts that have arrived and wait for their verdict.", self.queue_length
        )
        yield _gauge("parts_open", "Parts of which views are awaited.", self.parts_open)


def _of_models(state: State) -> Iterator[Metric]:
    yield _gauge("ready", "1 when every live model is in memory, as /readyz says.", state.ready)
    live = InfoMetricFamily("kensa_model", "The version that judges.", labels=["model"])
    size = _family("model_resident_bytes", "About what a version takes where it runs.", "model")
    for model in state.models:
        live.add_metric(
            [model.name],
            {
                "version": model.version,
                "kind": model.meta.model,
                "runtime": model.runtime.name,
                "precision": model.runtime.precision,
            },
        )
        if model.name in state.model_bytes:
            size.add_metric([model.name], state.model_bytes[model.name])
    yield live
    yield size
    place = _family(
        "model_stands_in", "1 while a version judges in the place of the live one.", "model"
    )
    for name, reason in state.standing_in.items():
        place.add_metric([name], reason is not None)
    yield place
    released = _family(
        "model_released", "0 while no part may pass, since a challenge failed.", "model"
    )
    for name in state.standing_in:
        released.add_metric([name], name not in state.not_released)
    yield released
    if state.drift:
        off = GaugeMetricFamily(
            "kensa_drift_spreads",
            "How far the last parts are from the training, in its standard deviations.",
            labels=["model", "statistic"],
        )
        matters = _family("drifting", "How much of that is no chance, and matters.", "model")
        for name, strays in state.drift.items():
            for statistic, value in strays.items():
                off.add_metric([name, statistic], value)
            matters.add_metric([name], state.drifting.get(name, 0))
        yield off
        yield matters


def _of_jobs(state: State) -> Iterator[Metric]:
    yield _gauge("job_queue_up", "1 when the queue of jobs answers.", state.jobs is not None)
    if state.jobs is not None:
        jobs = _family("jobs", "Jobs that are kept, by their state.", "state")
        for name, count in state.jobs.items():
            jobs.add_metric([name], count)
        yield jobs
    if state.learns:
        yield _gauge("worker_up", "1 while the worker process runs.", state.worker == "running")
        yield CounterMetricFamily(
            "kensa_worker_restarts", "How often the worker ended by itself.", state.restarts
        )
        yield _gauge(
            "job_held_back_ratio", "Share of time that a job stood still.", state.held_back
        )


def _of_the_machine(state: State) -> Iterator[Metric]:
    device = state.device
    for name, meaning, value in (
        ("disk_free_bytes", "Free on the disk of the data folder.", state.disk_free),
        ("disk_size_bytes", "Size of the disk of the data folder.", state.disk_size),
        ("memory_total_bytes", "Memory of the machine.", device.memory_total),
        ("memory_available_bytes", "Memory that could be taken.", device.memory_available),
        ("gpu_memory_bytes", "Memory taken for a Jetson's GPU.", device.gpu_memory),
        ("gpu_load_ratio", "Load of a Jetson's GPU, 0 to 1.", device.gpu_load),
        ("cpus", "Processors of the machine.", device.cpus),
    ):
        if value is not None:
            yield _gauge(name, meaning, value)
    if device.cpu_busy_s is not None:
        yield CounterMetricFamily(
            "kensa_cpu_busy_seconds", "Time that the processors worked.", device.cpu_busy_s
        )
    if device.temperatures:
        zones = _family("temperature_celsius", "Thermal zones of the machine.", "zone")
        for zone, celsius in device.temperatures.items():
            zones.add_metric([zone], celsius)
        yield zones
    if device.power_mode is not None:
        yield InfoMetricFamily(
            "kensa_power", "The power mode of a Jetson.", {"mode": device.power_mode}
        )
    if device.throttled:
        hot = _family("throttled", "1 while this part of a Jetson is slowed for its heat.", "part")
        for part, slowed in device.throttled.items():
            hot.add_metric([part], slowed)
        yield hot
    if device.over_currents is not None:
        yield CounterMetricFamily(
            "kensa_over_currents", "How often a Jetson's power ran short.", device.over_currents
        )


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"kensa_{name}", meaning, float(value))


def _family(name: str, meaning: str, label: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"kensa_{name}", meaning, labels=[label])


def _seconds(registry: CollectorRegistry, name: str, meaning: str) -> Histogram:
    return Histogram(
        f"kensa_{name}_seconds", meaning, ["model"], buckets=SECONDS, registry=registry
    )
