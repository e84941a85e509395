"""Is it alive, is it ready, what is running."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from app.http.access import needs
from app.http.base_body import Body, error_response
from app.serving.inspection import Inspector
from app.watching.health import Health
from app.watching.metrics import Metrics
from engines.errors import NotReady
from engines.serving.resident import NO_MODEL, Resident


class StatusBody(Body):
    """A state in one word."""

    status: str


class ModelBody(Body):
    """The model that is held in memory."""

    name: str
    version: str
    kind: str = Field(description="patchcore, padim, efficientad or vae.")
    runtime: str = Field(description="What computes it.")
    precision: str = Field(description="What is computed in: f32, bf16, f16 or int8.")
    image_size: int = Field(
        description="Side of the square that pictures are stretched to, pixels."
    )
    bank_rows: int | None = Field(description="Patches in the memory bank; null for other kinds.")
    resident_bytes: int = Field(description="About what it takes where it runs.")
    stale: str | None = Field(description="As in /models/{name}.")


class InspectionsBody(Body):
    """Images since the start of the process."""

    normal: int
    anomaly: int
    unusable: int = Field(description="Pictures that were not usable, where KENSA_UNUSABLE asks.")
    refused: int = Field(description="Damaged, too large, or of a kind that is not read.")


class DiskBody(Body):
    """The disk of the data folder; null where it does not say."""

    free_bytes: int | None
    size_bytes: int | None


class DeviceBody(Body):
    """The machine; null where it does not say."""

    memory_total: int | None = Field(description="Bytes; a Jetson's GPU has its share in them.")
    memory_available: int | None = Field(description="Bytes that could be taken.")
    gpu_memory: int | None = Field(description="Bytes taken for a Jetson's GPU.")
    gpu_load: float | None = Field(description="Of a Jetson's GPU, 0 to 1.")
    cpus: int | None
    temperatures: dict[str, float] = Field(description="Degrees Celsius of each thermal zone.")
    power_mode: str | None = Field(description="Of a Jetson, as nvpmodel calls it.")
    throttled: dict[str, bool] = Field(
        description="Parts of a Jetson, and whether each is slowed down now because it is hot."
    )
    over_currents: int | None = Field(
        description="How often a Jetson's power supply ran short since it was started."
    )


class HealthBody(Body):
    """What is running, for people and dashboards."""

    status: str = Field(description="`ok` or `not_ready`.")
    error: str | None = Field(None, description="Only when not ready: what is wrong.")
    code: str | None = Field(None, description="Only when not ready: `not_ready`.")
    version: str = Field(description="Of Kensa.")
    uptime_s: float
    models: list[ModelBody] = Field(description="In memory.")
    problems: dict[str, str] = Field(description="Models that should be in memory, and why not.")
    unloaded: list[str] = Field(description="Models that were unloaded by hand.")
    resting: list[str] = Field(description="Models that made room for others, until a part comes.")
    degraded: list[str] = Field(description="What is wrong at the moment, in sentences.")
    worker: str = Field(description="running, starting, off, or why there is none.")
    queue: str = Field(description="ok, or what is wrong with it.")
    jobs: dict[str, int] | None = Field(
        description="How many are in each state; null while the queue does not answer."
    )
    resident_bytes: int | None = Field(description="Memory of the process; null where unknown.")
    disk: DiskBody
    device: DeviceBody
    inspections: InspectionsBody


router = APIRouter(tags=["system"])

_RESPONSES: dict[int | str, dict[str, Any]] = {
    503: error_response("No model is loaded; the sentence says why.", not_ready=NO_MODEL)
}


@router.get("/livez", summary="Is the process alive?")
async def livez() -> StatusBody:
    """200 as long as the process answers, with or without a model. Restart it when it does not."""
    return StatusBody(status="ok")


@router.get("/readyz", summary="Can it inspect?", responses=_RESPONSES)
async def readyz(request: Request) -> StatusBody:
    """200 when every live model is loaded and warm; 503 names what is missing.

    The others inspect all the same. A model that was unloaded by hand, or made room for another, is
    only missed where no other is left.
    """
    if missing := _inspector(request).residents.missing():
        raise NotReady(missing)
    return StatusBody(status="ready")


@router.get(
    "/healthz",
    summary="What is running?",
    response_model=HealthBody,
    dependencies=[needs("line")],
    responses={503: {"model": HealthBody, "description": "The same, when no model is loaded."}},
)
async def healthz(request: Request) -> Response:
    """Versions, the models in memory, what is degraded, and images inspected since the start."""
    inspector = _inspector(request)
    health: Health = request.app.state.health
    state, counts = await health.look(), inspector.counts
    sentence = inspector.residents.missing()
    body = HealthBody(
        status=NotReady.code if sentence else "ok",
        error=sentence,
        code=NotReady.code if sentence else None,
        version=request.app.version,
        uptime_s=round(time.monotonic() - inspector.started, 1),
        models=[_described(model, inspector) for model in state.models],
        problems=state.problems,
        unloaded=sorted(inspector.residents.unloaded),
        resting=sorted(inspector.residents.resting),
        degraded=state.degraded,
        worker=state.worker,
        queue=state.queue or "ok",
        jobs=state.jobs,
        resident_bytes=resident_bytes(),
        disk=DiskBody(free_bytes=state.disk_free, size_bytes=state.disk_size),
        device=DeviceBody.model_validate(state.device, from_attributes=True),
        inspections=InspectionsBody(
            normal=counts.normal,
            anomaly=counts.anomaly,
            unusable=counts.unusable,
            refused=counts.refused,
        ),
    )
    left_out = set() if sentence else {"error", "code"}
    return JSONResponse(
        body.model_dump(exclude=left_out), status_code=NotReady.status if sentence else 200
    )


@router.get(
    "/metrics",
    dependencies=[needs("line")],
    summary="How is it going, for Prometheus?",
    response_class=Response,
    responses={
        200: {
            "content": {
                "text/plain": {"schema": {"type": "string"}},
                "application/openmetrics-text": {"schema": {"type": "string"}},
            }
        }
    },
)
async def metrics(request: Request) -> Response:
    """What docs/metrics.md lists, in the form of Prometheus or, if `Accept` asks, OpenMetrics."""
    health: Health = request.app.state.health
    kept: Metrics = request.app.state.metrics
    state, accept = await health.look(), request.headers.get("accept", "")
    body, content_type = await asyncio.to_thread(kept.expose, state, accept)
    return Response(body, headers={"Content-Type": content_type})


def _inspector(request: Request) -> Inspector:
    inspector: Inspector = request.app.state.inspector
    return inspector


def _described(model: Resident, inspector: Inspector) -> ModelBody:
    return ModelBody(
        name=model.name,
        version=model.version,
        kind=model.meta.model,
        runtime=model.runtime.name,
        precision=model.runtime.precision,
        image_size=model.runtime.image_size,
        bank_rows=model.runtime.bank_rows,
        resident_bytes=model.runtime.nbytes,
        stale=inspector.residents.stale.get(model.name),
    )


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM; None on systems without /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) for line in lines if line.startswith("VmRSS:")]  # kB
    return sizes[0] * 1024 if sizes else None
