"""What the server and the worker agree on: what a job is asked for, and where it says how it goes.

The queue (DBOS, in a database) holds which jobs there are and who has them. What changes many times
a second stands in files beside it, which cost no flash memory its life:

    jobs/ID/progress.json   how far it is
    jobs/ID/log.txt         what it said
    jobs/ID/result.json     how it ended
    jobs/ID/work/           what it makes; gone when it ends

What is learned again and again stands in schedules/NAME.json, and so outlives a damaged queue.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

from dbos import EnqueueOptions, Serializer, WorkflowStatus
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from engines.files import write_atomically
from engines.meta import Kind
from engines.queue.fleet import Fleet
from engines.store.versions import NAME

APPLICATION = "kensa"
QUEUE = "jobs"
WORKFLOW = "job"
TRAINING = "train"  # the part of a retraining that any machine of a fleet may do, in QUEUE
APP_VERSION = "1"  # of what a job's rows mean; another one leaves old jobs alone
DATABASE = "jobs.sqlite"
RUNNING = "jobs/running"  # a file: the process of the job that runs
PACE = "KENSA_JOB_PACE"  # the server's setting, which its worker inherits
PARENT = "KENSA_PARENT"  # the process that started this one, and whose death ends it
META_LEVELS = 8  # of lists and objects in each other; a meta.json has two
ATTEMPTS = 3  # the first, and twice more when its process died
ACTIVE = ["ENQUEUED", "DELAYED", "PENDING"]  # in DBOS's words: waiting or running

JobKind = Literal["retrain", "convert"]


class JobRequest(BaseModel):
    """What jobs have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model: str = Field(pattern=NAME, description="The model's name in this server.")
    version: str | None = Field(
        None, description="The version to start from; without it, the live one, or the newest."
    )
    activate: bool = Field(
        True, description="Let the result go live when it passes the gate; else it is only kept."
    )
    max_flips: float | None = Field(
        None, ge=0, le=1, description="Instead of KENSA_GATE_FLIPS, for this job."
    )
    queue: bool = Field(
        False, description="Wait behind a job of the same model, rather than be refused with 409."
    )


class RetrainRequest(JobRequest):
    """Learn from the images of a category, and put the result in the place of the live version."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "bracket", "category": "bracket"}]}
    )

    category: str = Field(pattern=NAME, description="The dataset, as in /datasets.")
    kind: Kind | None = Field(None, description="Needed for the first training of a model.")
    meta: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys of meta.json: all hyper-parameters for a first training, else those that"
        " change.",
    )
    update: bool = Field(
        True,
        description="Keep what the model knows, and add to it; false learns anew. An EfficientAD or"
        " VAE goes on from its weights.",
    )
    pretrained: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="For a first training: a file in the folder weights of the data folder, or the"
        " word untrained. Without it, timm's weights.",
    )
    epochs: int = Field(1, ge=1, le=10_000, description="Passes over the images.")
    batch: int = Field(4, ge=1, le=256, description="Images at once.")
    convert: bool = Field(True, description="Make an engine of it; without one it cannot go live.")

    @field_validator("meta")
    @classmethod
    def _can_be_sent_back(cls, meta: dict[str, Any]) -> dict[str, Any]:
        if not _is_plain(meta, META_LEVELS):
            raise ValueError(
                f"it may hold what JSON has, in UTF-8, at most {META_LEVELS} levels deep, and no"
                " NaN or Infinity"
            )
        return meta


class ConvertRequest(JobRequest):
    """Make an engine of a version that has weights, as convtrt.py does."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "bracket"}]})

    opset: Literal[17, 18] = Field(17, description="Of the ONNX graph.")
    fp16: bool = Field(False, description="The backbone in half precision.")
    int8: bool = Field(
        False,
        description="Convolutions in int8, with ranges from the golden images, and from those of"
        " category; refused where it scores or judges otherwise.",
    )
    category: str | None = Field(
        None, pattern=NAME, description="For int8: the dataset to measure ranges and AUROC on."
    )
    workspace: int = Field(4096, ge=1, le=1_048_576, description="MiB for building a plan.")
    use_dla: bool = Field(False, description="Use the accelerator of a Jetson that has one.")
    from_onnx: bool = Field(
        False,
        description="Build the plan again from the version's own model.onnx: needs no training"
        " packages.",
    )

    @model_validator(mode="after")
    def _fits(self) -> ConvertRequest:
        if self.fp16 and self.int8:
            raise ValueError("either fp16 or int8: what is not in int8 stays in float32")
        if self.category is not None and not self.int8:
            raise ValueError("category is for int8")
        if self.from_onnx and (self.fp16 or self.int8):
            raise ValueError("from_onnx takes the graph as it is: leave out fp16 and int8")
        return self


class JobFolder:
    """The files of one job."""

    def __init__(self, data: Path, job_id: str) -> None:
        self.root = data / "jobs" / job_id
        self.work = self.root / "work"
        self.log = self.root / "log.txt"

    def progress(self) -> dict[str, Any]:
        """How far it is; empty before it began."""
        return _read(self.root / "progress.json") or {}

    def write_progress(self, content: dict[str, Any]) -> None:
        """In whole or not at all, but not flushed: after a power cut the job begins again."""
        temporary = self.root / ".progress"
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(self.root / "progress.json")

    def result(self) -> dict[str, Any] | None:
        """How it ended; None before that."""
        return _read(self.root / "result.json")

    def write_result(self, content: dict[str, Any]) -> None:
        write_atomically(self.root / "result.json", json.dumps(content).encode())

    def attempts(self) -> int:
        """How often it was begun."""
        found = _read(self.root / "attempts.json") or {}
        return int(found.get("attempts", 0))

    def begin(self) -> int:
        """Count one more attempt, flushed to the disk before it begins."""
        self.root.mkdir(parents=True, exist_ok=True)
        attempts = self.attempts() + 1
        write_atomically(self.root / "attempts.json", json.dumps({"attempts": attempts}).encode())
        return attempts

    def say(self, line: str) -> None:
        """Add a line to the log."""
        self.root.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def go_on_with(self, text: str) -> None:
        """Let the log be what it was at the first call, and then what another machine says."""
        before = self.root / "before.txt"
        if not before.exists():
            write_atomically(before, self.log.read_bytes() if self.log.exists() else b"")
        temporary = self.root / ".log"
        temporary.write_bytes(before.read_bytes() + text.encode())
        temporary.replace(self.log)

    def lines(self, after: int = 0) -> tuple[list[str], int]:
        """Whole lines of the log from a byte on, and the byte after the last of them."""
        try:
            with self.log.open("rb") as file:
                file.seek(after)
                text = file.read()
        except FileNotFoundError:
            return [], after
        whole = text[: text.rfind(b"\n") + 1]
        return whole.decode("utf-8", "replace").splitlines(), after + len(whole)

    def clean(self) -> None:
        """Remove what was being made."""
        shutil.rmtree(self.work, ignore_errors=True)


class Schedules:
    """What is learned again and again: a file each."""

    def __init__(self, data: Path) -> None:
        self._folder = data / "schedules"

    def all(self) -> dict[str, dict[str, Any]]:
        """Name -> cron, timezone, retrain. A damaged one is not there."""
        found = {path.stem: _read(path) or {} for path in sorted(self._folder.glob("*.json"))}
        return {name: one for name, one in found.items() if _is_schedule(one)}

    def write(self, name: str, content: dict[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / f"{name}.json", json.dumps(content).encode())

    def remove(self, name: str) -> None:
        (self._folder / f"{name}.json").unlink(missing_ok=True)


def _is_plain(value: Any, levels: int) -> bool:
    """Whether a value that a client sent can be sent back, inside another one, as JSON in UTF-8."""
    if isinstance(value, dict):
        keys = all(_is_plain(key, 0) for key in value)
        return keys and levels > 0 and all(_is_plain(one, levels - 1) for one in value.values())
    if isinstance(value, list):
        return levels > 0 and all(_is_plain(one, levels - 1) for one in value)
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return not isinstance(value, float) or math.isfinite(value)


def _is_schedule(found: dict[str, Any]) -> bool:
    """Whether a schedule's file holds what it should; somebody may have written it by hand."""
    if not all(isinstance(found.get(key), str) for key in ("cron", "timezone")):
        return False
    try:
        RetrainRequest.model_validate(found.get("retrain"))
    except ValidationError:
        return False
    return True


def last_due(cron: str, zone: str, now: float) -> datetime:
    """The last moment before `now` (seconds since 1970) that a cron expression names, in UTC.

    Raises:
        ValueError, KeyError, OSError: there is no such expression, moment or time zone.
    """
    from croniter import croniter

    local = datetime.fromtimestamp(now, ZoneInfo(zone))
    due: datetime = croniter(cron, local).get_prev(datetime)
    return due.astimezone(timezone.utc)


def scheduled_id(name: str, due: datetime | None = None, fleet: Fleet | None = None) -> str:
    """The id of the job that a schedule begins at a moment, or what all of its ids begin with."""
    whole = f"{fleet.device}.{name}" if fleet else name  # no name of either kind has a dot
    return f"scheduled-{whole}-{due:%Y%m%dT%H%M}" if due else f"scheduled-{whole}-"


def training_of(job_id: str) -> str:
    """The id of that part of a retraining that any machine of a fleet may do."""
    return f"{job_id}.train"


def job_of(training_id: str) -> str:
    """The job of a training; a job itself is its own."""
    return training_id.removesuffix(".train")


def enqueue_options(
    job_id: str, once: str | None, active: list[WorkflowStatus], fleet: Fleet | None = None
) -> EnqueueOptions:
    """What the queue is told of a job. While a job of the same `once` waits or runs, it refuses.

    The place in the line is counted: DBOS goes by the clock, which may be set back in between. In a
    fleet a job waits in the line of the machine that it belongs to.
    """
    options: EnqueueOptions = {
        "workflow_name": WORKFLOW,
        "queue_name": fleet.own_queue if fleet else QUEUE,
        "workflow_id": job_id,
        "app_version": APP_VERSION,
        "application_name": APPLICATION,
        "priority": 1 + max((job.priority or 0 for job in active), default=0),
    }
    if once is not None:
        options["deduplication_id"] = once
    if fleet is not None:
        options["attributes"] = dict(fleet.mark)
    return options


class JsonSerializer(Serializer):
    """The queue holds JSON. DBOS's own choice is pickle, which would run what others wrote."""

    def serialize(self, data: Any) -> str:
        return json.dumps(data, default=_as_text)

    def deserialize(cls, serialized_data: str) -> Any:  # noqa: N805 (as DBOS declares it)
        return json.loads(serialized_data)

    def name(self) -> str:
        return "kensa_json"


def database_url(data: Path, fleet: Fleet | None = None) -> str:
    return fleet.database_url if fleet else f"sqlite:///{data / DATABASE}"


def _as_text(value: Any) -> str:
    return f"{type(value).__name__}: {value}"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # missing, not JSON, or absurdly so
        return None
    return found if isinstance(found, dict) else None
