"""Every setting of the server: its default, its unit and its meaning, in one table.

They come from environment variables with the prefix `KENSA_`. Nobody else reads the environment;
`create_app` takes a `Settings`. docs/settings.md holds the same table, and a test compares them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import time
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize
from zoneinfo import ZoneInfo

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from engines.errors import BadSettings
from engines.files import name_of_folder
from engines.promise import FEW_FOUND
from engines.queue.fleet import Fleet, device_name, this_machine
from engines.queue.postgres import Postgres

PREFIX = "KENSA_"
NAME = r"^[A-Za-z0-9_-]{1,64}$"  # of a key
_MODEL_NAME = r"^[\w-]+$"  # as in engines.store.versions, which would load numpy here
_HOST = r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?"
_HOSTS = rf"^({_HOST}( *, *{_HOST})*)?$"
_NAMES = r"^([\w-]{1,64}( *, *[\w-]{1,64})*)?$"
_FAULT = "(dark|bright|blurred|shifted|turned|size|frozen)"
_FAULTS = rf"^(all|{_FAULT}( *, *{_FAULT})*)?$"
_ORIGIN = rf"https?://{_HOST}(:[0-9]{{1,5}})?"
_ORIGINS = rf"^({_ORIGIN}( *, *{_ORIGIN})*)?$"


def _setting(default: Any, unit: str, meaning: str, **rules: Any) -> Any:
    return Field(default, description=meaning, json_schema_extra={"unit": unit}, **rules)


def _home(variable: str, folder: str) -> Path | None:
    """Where this user's caches or data are; None for a user without a home, as in containers."""
    home = Path(os.environ.get(variable) or os.path.expanduser(folder))  # noqa: PTH111
    return home / "kensa" if home.is_absolute() else None  # Path.expanduser would raise


class Settings(BaseSettings):
    """The settings of one server process, read once and never changed."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,  # KENSA_MODEL_DIR= in a compose file means: not set
        frozen=True,
        protected_namespaces=(),
    )

    data_dir: Path | None = _setting(
        None,
        "folder",
        "Where models, datasets and jobs are kept. Without it, kensa in the user's data folder.",
    )
    model_dir: Path | None = _setting(
        None,
        "folder",
        "A model to take in at the start, as convtrt.py leaves it. It judges, unless these very"
        " files were taken in at the start before: then what was learned since stays live, and the"
        " log says so.",
    )
    model_name: str | None = _setting(
        None,
        "name",
        "What the model in KENSA_MODEL_DIR is called. Without it, the name of the folder.",
        pattern=_MODEL_NAME,
        max_length=64,
    )
    max_upload_bytes: int = _setting(
        2 * 1024**3,
        "bytes",
        "The most that one upload of training images or of a model may have, unpacked.",
        ge=1024,
        le=1024**4,
    )
    keep_versions: int = _setting(
        5,
        "versions",
        "How many of the newest versions of a model are kept, besides the live one and the one"
        " before it.",
        ge=1,
        le=1000,
    )
    gate_flips: float = _setting(
        0.1,
        "share",
        "How many verdicts may change before a new version is held for a person: of the known"
        " normals, the known defects, the parts marked as good and the last parts, each by itself.",
        ge=0,
        le=1,
    )
    gate_found: float = _setting(
        FEW_FOUND,
        "share",
        "Of the defects that training draws onto normal parts: how many a new version has to find,"
        " else it is held for a person. 0: it is not asked whether a model sees at all, so that"
        " untrained weights pass as well.",
        ge=0,
        le=1,
    )
    gate_recent: int = _setting(
        32,
        "parts",
        "How many of the last parts of each model are kept in memory, to be shown to new versions.",
        ge=0,
        le=1000,
    )
    rollback_parts: int = _setting(
        0,
        "parts",
        "After so many parts a new version's reject rate is looked at; outside its band the version"
        " before takes over. 0: never.",
        ge=0,
        le=1_000_000,
    )
    rollback_min_rejects: float = _setting(
        0.0, "share", "The least share of these parts that must be rejected.", ge=0, le=1
    )
    rollback_max_rejects: float = _setting(
        0.2, "share", "The largest share of these parts that may be rejected.", ge=0, le=1
    )
    model_memory_mib: int = _setting(
        0,
        "MiB",
        "The most memory that the models may take together; 0 for what is free on the machine. More"
        " than the machine has lets a model be tried that is reckoned to need so much.",
        ge=0,
    )
    unload_first: Literal["on", "off"] = _setting(
        "off",
        "",
        "What happens when a new version does not fit into memory beside the live one: on takes the"
        " live one away first, and requests in between get 503; off refuses the new one.",
    )
    rest: Literal["on", "off"] = _setting(
        "off",
        "",
        "What happens when a model does not fit into memory beside the others: on puts those to"
        " rest that got no part for longest, until it fits, and a part brings them back; off"
        " refuses it.",
    )
    rest_s: int = _setting(
        60,
        "seconds",
        "How long a model that came into memory stays there at least, so that models that do not"
        " fit together do not take turns with every part.",
        ge=0,
        le=86_400,
    )
    pinned: str = _setting(
        "",
        "names",
        "Models that are never put to rest, separated by commas.",
        pattern=_NAMES,
    )
    job_memory: Literal["refuse", "wait", "off"] = _setting(
        "refuse",
        "",
        "What happens to a job that needs more memory than is free: refuse answers with 507, or"
        " ends it when it is its turn; wait lets it wait for memory, visibly; off begins it all"
        " the same.",
    )
    job_spare: Literal["auto", "off"] = _setting(
        "auto",
        "",
        "Whether a process that has loaded what learning takes waits for the next job, which so"
        " begins seconds earlier: auto where 5 GiB are free, until they are less than 4; or off.",
    )
    worker: Literal["on", "convert", "off"] = _setting(
        "on",
        "",
        "Whether this server starts a worker process for its jobs and looks after it; off where one"
        " runs elsewhere, or nothing is to be learned here. convert, where several machines share a"
        " queue: it leaves learning to the others.",
    )
    queue_url: SecretStr | None = _setting(
        None,
        "URL",
        "The PostgreSQL database that holds the queue of several machines, such as"
        " postgresql://user:password@host/kensa. Without it, a file in the data folder.",
    )
    shared_url: SecretStr | None = _setting(
        None,
        "folder or URL",
        "Through what machines with the same KENSA_QUEUE_URL exchange images and models: a folder"
        " that all of them see, or a URL that fsspec reads, such as s3://bucket/kensa.",
    )
    device: str | None = _setting(
        None,
        "name",
        "What this machine is called in the queue and in the collected record; no two have the same"
        " name. Without it, the name of the host.",
    )
    job_pace: Literal["pause", "idle", "full"] = _setting(
        "pause",
        "",
        "How jobs give way to the line: pause stops them while a part is inspected, idle lets them"
        " have what the line leaves over, full lets both compete.",
    )
    host: str = _setting(
        "127.0.0.1",
        "address",
        "The address to listen on; 0.0.0.0 for every network of the machine.",
        min_length=1,
    )
    port: int = _setting(
        8000,
        "TCP port",
        "The port to listen on; 0 takes a free one and logs it.",
        ge=0,
        le=65_535,
    )
    access: Literal["auto", "keys", "anyone"] = _setting(
        "auto",
        "",
        "Who may ask. auto: who sends an API key, once there is one; until then everybody on this"
        " machine. keys: only who sends a key. anyone: everybody who reaches the port may do"
        " everything.",
    )
    keys_file: Path | None = _setting(
        None,
        "file",
        "Where the API keys are kept. Without it, keys.json in the data folder.",
    )
    hosts: str = _setting(
        "",
        "names",
        "Further names, separated by commas, under which this server is asked. It always answers"
        " to its addresses, to localhost and to the machine's own name.",
        pattern=_HOSTS,
    )
    origins: str = _setting(
        "",
        "origins",
        "Web pages of other servers that may ask this one, separated by commas, such as"
        " http://gateway:8080.",
        pattern=_ORIGINS,
    )
    max_connections: int = _setting(
        512,
        "connections",
        "The most connections at a time. When one more comes, the one that has been idle longest"
        " is closed.",
        ge=8,
        le=100_000,
    )
    receive_s: int = _setting(
        10,
        "seconds",
        "How long the head of a request may take to arrive, and how long its body may stand still"
        " or come slower than 64 KiB a second.",
        ge=1,
        le=3600,
    )
    runtime: Literal["auto", "openvino", "tensorrt"] = _setting(
        "auto",
        "",
        "What runs the models. auto: TensorRT (on a PC: TensorRT for RTX) where it is installed and"
        " finds a GPU, else OpenVINO."
        " With openvino the GPU is left alone; with tensorrt nothing else is taken where there is"
        " none.",
    )
    fallback: Literal["openvino", "none"] = _setting(
        "openvino",
        "",
        "What answers for a model that TensorRT has no plan for, or a stale one, until a job has"
        " built it: OpenVINO, on the CPU; or none, so that requests get 503.",
    )
    keep_warm_s: float = _setting(
        2.0,
        "seconds",
        "How long TensorRT's GPU may be idle before the last image is computed once more, for"
        " nobody, so that the next part does not wait for a GPU that fell asleep. 0: never.",
        ge=0,
        le=3600,
    )
    precision: Literal["auto", "f32", "bf16"] = _setting(
        "auto",
        "",
        "What OpenVINO computes models without a memory bank in: f32 or bf16. auto takes bf16 where"
        " the CPU has it and the export found it accurate. With a bank it is f32.",
    )
    threads: int = _setting(
        0, "threads", "CPU threads of the inference engine; 0 for all cores.", ge=0, le=1024
    )
    batching: Literal["on", "off"] = _setting(
        "on",
        "",
        "Whether parts that wait at the same time are computed together where that is faster, which"
        " is measured when a model is opened, and in gaps of the line: at the start of the server,"
        " and where the machine was busy.",
    )
    queue_size: int = _setting(
        64,
        "requests",
        "How many requests may wait for their verdict at once; one more gets 503.",
        ge=1,
        le=100_000,
    )
    deadline_ms: int = _setting(
        5000,
        "milliseconds",
        "How long a request may wait for its verdict before it gets 504; a request can ask for"
        " less.",
        ge=1,
        le=3_600_000,
    )
    not_released: Literal["refuse", "ng"] = _setting(
        "refuse",
        "",
        "What a part of a model gets that failed a challenge with known pictures: refuse answers"
        " with 503, not_released; ng says NG of every part, whatever its score.",
    )
    decode_threads: int = _setting(
        2, "threads", "Threads that decode images and draw overlays.", ge=1, le=64
    )
    max_image_bytes: int = _setting(
        32 * 1024 * 1024, "bytes", "The largest image file that is read.", ge=1024, le=1024**3
    )
    max_image_pixels: int = _setting(
        16_000_000,
        "pixels",
        "The most pixels (width x height) that are decoded; each takes 3 bytes of memory.",
        ge=1024,
        le=10**9,
    )
    view_repeats: Literal["replace", "refuse"] = _setting(
        "replace",
        "",
        "What another picture of a view does that was sent before, until its part is decided:"
        " replace takes the new one; refuse answers 409.",
    )
    unusable: str = _setting(
        "",
        "names",
        "What makes a picture unusable rather than the part a reject, separated by commas: dark,"
        " bright, blurred, shifted, turned, size, frozen; or all. Empty: nothing is looked at.",
        pattern=_FAULTS,
    )
    drift_parts: int = _setting(
        0,
        "parts",
        "Of so many of the last parts of each model scores and pictures are compared with those of"
        " the training; /healthz warns where they differ. 0: never.",
        ge=0,
        le=10_000,
    )
    record: Literal["on", "off"] = _setting(
        "on",
        "",
        "Whether each inspection leaves a record in the data folder: what was decided of which part"
        " and why, and an audit trail of who changed what.",
    )
    record_mib: int = _setting(
        1024,
        "MiB",
        "The most disk that decisions may take, without their pictures; the oldest go first. About"
        " 2,000 are 1 MiB.",
        ge=1,
        le=1024**2,
    )
    record_days: int = _setting(
        0,
        "days",
        "How long decisions are kept; 0: as long as there is room.",
        ge=0,
        le=36_500,
    )
    record_pictures_mib: int = _setting(
        2048,
        "MiB",
        "The most disk that their pictures may take; the oldest go first, and those that somebody"
        " has marked last. 0: none is kept.",
        ge=0,
        le=1024**2,
    )
    record_near: float = _setting(
        0.1,
        "score",
        "The pictures of all rejects are kept, and of parts whose score is this near to the"
        " threshold.",
        ge=0,
        le=1,
    )
    record_sample: float = _setting(0.01, "share", "And of so many of the other parts.", ge=0, le=1)
    record_url: SecretStr | None = _setting(
        None,
        "URL",
        "A PostgreSQL database in which the records of several lines are collected, each under its"
        " KENSA_DEVICE, such as postgresql://user:password@host/kensa.",
    )
    shifts: str = _setting(
        "06:00,14:00,22:00",
        "times",
        "When shifts begin, for statistics: at quarters of an hour, separated by commas.",
    )
    timezone: str = _setting(
        "UTC", "name", "The time zone of shifts and days, such as Asia/Tokyo.", max_length=100
    )
    repeat_s: int = _setting(
        60,
        "seconds",
        "How long the same picture of the same part, sent again, gets its first decision back and"
        " is counted once; 0: never.",
        ge=0,
        le=86_400,
    )
    cache_dir: Path | None = _setting(
        None,
        "folder",
        "Where compiled networks are kept, so that the next start is faster. Without it, kensa in"
        " the user's cache folder.",
    )
    keep_alive_s: int = _setting(
        75,
        "seconds",
        "How long an idle connection stays open for the client's next request.",
        ge=1,
        le=3600,
    )
    shutdown_grace_s: int = _setting(
        5,
        "seconds",
        "How long requests under way may still take when the server is told to stop.",
        ge=0,
        le=3600,
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "", "The least severe lines that are logged."
    )
    log_format: Literal["text", "json"] = _setting(
        "text", "", "How lines are logged: as text, or each as a JSON object for a program."
    )

    @classmethod
    def read(cls) -> Settings:
        """The settings in the environment.

        Raises:
            BadSettings: a value is wrong; the sentence names the variable.
        """
        try:
            settings = cls()
        except ValidationError as error:
            problem = error.errors()[0]
            name = f"{PREFIX}{problem['loc'][0]}".upper()
            message = f"{name} is {problem['input']!r}, which is wrong: {problem['msg']}."
            raise BadSettings(message) from None
        settings.fleet  # noqa: B018 (raises what is wrong with it)
        settings.collected_in  # noqa: B018
        settings.served_name  # noqa: B018 (the same)
        settings.zone  # noqa: B018 (the same)
        settings.shift_times  # noqa: B018 (the same)
        return settings

    @property
    def served_name(self) -> str:
        """What the model is called over HTTP: `model_name`, else made from its folder's name.

        Raises:
            BadSettings: there is nothing in that name to make one of.
        """
        if self.model_name is not None or self.model_dir is None:
            return normalize("NFC", self.model_name or "default")
        name = name_of_folder(self.model_dir)
        if not name:
            raise BadSettings(
                f"KENSA_MODEL_DIR is {str(self.model_dir)!r}, and of that no name of a model can be"
                " made: set KENSA_MODEL_NAME."
            )
        return name

    @property
    def zone(self) -> ZoneInfo:
        """The time zone of shifts.

        Raises:
            BadSettings: there is none of this name.
        """
        try:
            return ZoneInfo(self.timezone)
        except (KeyError, ValueError, OSError):
            raise BadSettings(
                f"KENSA_TIMEZONE is {self.timezone!r}, and there is no such zone: say Asia/Tokyo or"
                " UTC, for example."
            ) from None

    @property
    def shift_times(self) -> list[time]:
        """The times in `shifts`.

        Raises:
            BadSettings: one is no time at a quarter of an hour, or there is none.
        """
        times = _listed(self.shifts)
        for one in times or [self.shifts]:
            if not re.fullmatch(r"([01]\d|2[0-3]):(00|15|30|45)", one):
                raise BadSettings(
                    f"KENSA_SHIFTS is {self.shifts!r}, and {one!r} is no time at a quarter of an"
                    " hour: say 06:00,14:00,22:00, for example."
                )
        return [time.fromisoformat(one) for one in times]

    @property
    def host_names(self) -> list[str]:
        """The names in `hosts`."""
        return _listed(self.hosts)

    @property
    def pinned_names(self) -> set[str]:
        """The names in `pinned`."""
        names = normalize("NFC", self.pinned).split(",")
        return {name.strip() for name in names if name.strip()}

    @property
    def unusable_codes(self) -> frozenset[str]:
        """The codes of what makes a picture unusable."""
        names = _FAULT.strip("()").split("|") if self.unusable == "all" else _listed(self.unusable)
        return frozenset(f"camera_{name}" for name in names)

    @property
    def origin_names(self) -> list[str]:
        """The origins in `origins`."""
        return _listed(self.origins)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the address to listen on."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def keys_path(self) -> Path:
        """The file of API keys. Raises BadSettings as `data`."""
        return self.keys_file.absolute() if self.keys_file else self.data / "keys.json"

    @property
    def fleet(self) -> Fleet | None:
        """The machines that share this one's queue, and how; None where it has one of its own.

        Raises:
            BadSettings: one of the four variables is wrong, or missing beside the others.
        """
        queue_url, shared_url = (
            one.get_secret_value() if one else None for one in (self.queue_url, self.shared_url)
        )
        return Fleet.of(queue_url, shared_url, self.device, self.worker)

    @property
    def collected_in(self) -> Postgres | None:
        """Where the records of several lines are collected; None where that is nowhere.

        Raises:
            BadSettings: KENSA_RECORD_URL or KENSA_DEVICE is wrong.
        """
        if self.record_url is None:
            return None
        device_name(self.device)
        return Postgres.of("KENSA_RECORD_URL", self.record_url.get_secret_value())

    @property
    def compiled_dir(self) -> Path | None:
        """Where compiled networks are kept, None where there is no place for them."""
        return self.cache_dir or _home("XDG_CACHE_HOME", "~/.cache")

    @property
    def data(self) -> Path:
        """Where models, datasets and jobs are kept.

        Raises:
            BadSettings: none is set, and this user has no home.
        """
        data = self.data_dir or _home("XDG_DATA_HOME", "~/.local/share")
        if data is None:
            raise BadSettings("This user has no home: set KENSA_DATA_DIR to a folder.")
        return data.absolute()


def _listed(names: str) -> list[str]:
    return [name.strip().lower() for name in names.split(",") if name.strip()]


def unknown_variables() -> list[str]:
    """Variables that look like settings and are none: usually a spelling mistake."""
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    return sorted(
        name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known
    )


GROUPS = {  # of the table, by the setting that each begins with
    "data_dir": "Models and their versions",
    "gate_flips": "The gate, and the first parts of a new version",
    "model_memory_mib": "Memory",
    "job_memory": "Jobs",
    "host": "Who may ask, and how many",
    "runtime": "Inference",
    "queue_size": "Parts",
    "record": "The record",
    "cache_dir": "The process",
}


def table() -> list[tuple[str, str, str, str]]:
    """One row for each setting: variable, default ("" for none), unit, meaning."""
    rows = []
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        unit = str(extra["unit"]) if isinstance(extra, dict) else ""
        default = "" if field.default is None else str(field.default)
        rows.append((f"{PREFIX}{name}".upper(), default, unit, field.description or ""))
    return rows


@dataclass(frozen=True)
class InForce:
    """A setting as it is now."""

    variable: str
    value: str | None  # None where it is not set, or not to be shown
    default: str | None
    unit: str
    meaning: str
    group: str
    changed: bool  # from its default
    secret: bool  # a URL with a password, perhaps: it is never shown


def in_force(settings: Settings) -> list[InForce]:
    """Every setting as it is now; where one that is not set is found out, what was found."""
    found_out = {
        "data_dir": settings.data,
        "model_name": settings.served_name if settings.model_dir else None,
        "device": this_machine(),
        "keys_file": settings.keys_path,
        "cache_dir": settings.compiled_dir,
    }
    rows, group = [], ""
    for row, (name, field) in zip(table(), Settings.model_fields.items(), strict=True):
        variable, default, unit, meaning = row
        group = GROUPS.get(name, group)
        value = getattr(settings, name)
        secret = isinstance(value, SecretStr) or "SecretStr" in str(field.annotation)
        shown = None if secret else found_out.get(name) if value is None else value
        rows.append(InForce(
            variable, None if shown is None else str(shown), default or None, unit, meaning, group,
            changed=value != field.default, secret=secret,
        ))  # fmt: skip
    return rows


def version() -> str:
    """Kensa's version; 0 in a checkout that was never installed."""
    try:
        return metadata.version("kensa")
    except metadata.PackageNotFoundError:
        return "0"
