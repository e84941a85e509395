"""How this server is set up, and what is wrong with it or its machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from app.http.access import needs
from app.http.base_body import Body
from app.settings import Settings, in_force
from app.watching.doctor.examination import Examination


class SettingBody(Body):
    """A setting as it is now."""

    variable: str
    value: str | None = Field(
        description="In force; null where it is not set, or is never shown. Where it is not set and"
        " found out, what was found."
    )
    default: str | None
    unit: str
    meaning: str
    group: str
    changed: bool = Field(description="Whether it is another than the default.")
    secret: bool = Field(description="Whether a password may be in it, so that it is never shown.")


class SettingsBody(Body):
    """All settings, in the order of docs/settings.md."""

    settings: list[SettingBody]


class FindingBody(Body):
    """What is wrong and must be mended, or is only worth knowing."""

    level: Literal["wrong", "note"]
    what: str
    do: str = Field(description="What to type, or else to do; empty where there is nothing.")


class FitBody(Body):
    """A model, and whether this machine can serve it."""

    name: str
    version: str = Field(description="The one that would serve.")
    kind: str
    plan: str = Field(description="TensorRT's: good, stale, none, or why it does not matter.")
    needs_mib: int = Field(description="Memory at most, while it is opened.")
    fits: bool | None = Field(description="null: it is in memory already, or was to be.")


class DoctorBody(Body):
    """What `kensa doctor --json` prints."""

    ok: bool = Field(description="Whether nothing must be mended.")
    facts: dict[str, dict[str, Any]] = Field(
        description="By section: machine, software and storage."
    )
    models: list[FitBody]
    findings: list[FindingBody]


router = APIRouter(tags=["system"])


@router.get("/settings", dependencies=[needs("operator")], summary="How is it set up?")
async def settings(request: Request) -> SettingsBody:
    """Every setting: what is in force, its default, what it means. URLs of databases are hidden."""
    read: Settings = request.app.state.settings
    return SettingsBody(settings=[SettingBody(**asdict(one)) for one in in_force(read)])


@router.get("/doctor", dependencies=[needs("operator")], summary="What is wrong, and what to do?")
async def doctor(request: Request) -> DoctorBody:
    """Machine, software, disks and models: every file of these is read, which may take seconds."""
    examination: Examination = request.app.state.examination
    found = await examination.look()
    return DoctorBody(ok=found.ok, **asdict(found))
