"""Is it alive, is it ready, what is running."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from app.inspection import Inspector
from app.schemas import HealthBody, InspectionsBody, ModelBody, StatusBody, error_response
from app.security import REFUSED, needs
from engines.errors import NotReady
from engines.resident import NO_MODEL, Resident

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

    The others inspect all the same.
    """
    residents = _inspector(request).residents
    if residents.problems:
        raise NotReady(" ".join(residents.problems.values()))
    if not residents.names():
        raise NotReady(NO_MODEL)
    return StatusBody(status="ready")


@router.get(
    "/healthz",
    summary="What is running?",
    response_model=HealthBody,
    dependencies=[needs("line")],
    responses={
        **REFUSED,
        503: {"model": HealthBody, "description": "The same, when no model is loaded."},
    },
)
async def healthz(request: Request) -> Response:
    """Versions, the model in memory, memory in use, and images inspected since the start."""
    inspector, state = _inspector(request), request.app.state
    residents, counts = inspector.residents, inspector.counts
    sentence = " ".join(residents.problems.values())
    if not sentence and not residents.names():
        sentence = NO_MODEL
    body = HealthBody(
        status=NotReady.code if sentence else "ok",
        error=sentence or None,
        code=NotReady.code if sentence else None,
        version=request.app.version,
        uptime_s=round(time.monotonic() - inspector.started, 1),
        models=[_described(model) for model in residents.all()],
        problems=residents.problems,
        worker=state.worker.state,
        queue=state.jobs.problem or "ok",
        resident_bytes=resident_bytes(),
        inspections=InspectionsBody(
            normal=counts.normal, anomaly=counts.anomaly, refused=counts.refused
        ),
    )
    left_out = set() if sentence else {"error", "code"}
    return JSONResponse(
        body.model_dump(exclude=left_out), status_code=NotReady.status if sentence else 200
    )


def _inspector(request: Request) -> Inspector:
    inspector: Inspector = request.app.state.inspector
    return inspector


def _described(model: Resident) -> ModelBody:
    return ModelBody(
        name=model.name,
        version=model.version,
        kind=model.meta.model,
        runtime=model.runtime.name,
        precision=model.runtime.precision,
        image_size=model.runtime.image_size,
        bank_rows=model.runtime.bank_rows,
    )


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM; None on systems without /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) for line in lines if line.startswith("VmRSS:")]  # kB
    return sizes[0] * 1024 if sizes else None
