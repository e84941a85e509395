"""Is it alive, is it ready, what is running."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from app.http.bodies import (
    DeviceBody,
    DiskBody,
    HealthBody,
    InspectionsBody,
    ModelBody,
    StatusBody,
    error_response,
)
from app.http.security import needs
from app.serving.inspection import Inspector
from app.watching.health import Health
from app.watching.metrics import Metrics
from engines.errors import NotReady
from engines.serving.resident import NO_MODEL, Resident

router = APIRouter(tags=["system"])

_RESPONSES: dict[int | str, dict[str, Any]] = {
    503: error_response("No model is loaded; the sentence says why.", not_ready=NO_MODEL)
}


@router.get("/", include_in_schema=False)
async def index() -> RedirectResponse:
    return RedirectResponse("/docs")


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
            normal=counts.normal, anomaly=counts.anomaly, refused=counts.refused
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
