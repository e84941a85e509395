"""Every setting of the server: its default, its unit and its meaning, in one table.

They come from environment variables with the prefix `KENSA_`. Nobody else reads the environment;
`create_app` takes a `Settings`. docs/settings.md holds the same table, and a test compares them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from engines.errors import BadSettings

PREFIX = "KENSA_"
NAME = r"^[A-Za-z0-9_-]{1,64}$"  # of a model


def _setting(default: Any, unit: str, meaning: str, **rules: Any) -> Any:
    return Field(default, description=meaning, json_schema_extra={"unit": unit}, **rules)


def _cache_home() -> Path | None:
    """Where this user's caches are; None for a user without a home, as in some containers."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111
    return home / "kensa" if home.is_absolute() else None  # Path.expanduser would raise


class Settings(BaseSettings):
    """The settings of one server process, read once and never changed."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,  # KENSA_MODEL_DIR= in a compose file means: not set
        frozen=True,
        protected_namespaces=(),
    )

    model_dir: Path | None = _setting(
        None,
        "folder",
        "The model, as convtrt.py leaves it: meta.json, model.onnx and, for PatchCore,"
        " memory_bank.npz.",
    )
    model_name: str | None = _setting(
        None,
        "name",
        "What answers call the model. Without it, the name of the folder.",
        pattern=NAME,
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
    precision: Literal["auto", "f32", "bf16"] = _setting(
        "auto",
        "",
        "What is computed in: f32, or bf16 (the search in a memory bank, or the network of a model"
        " without one). auto takes bf16 where the CPU has it and the export found it accurate.",
    )
    threads: int = _setting(
        0, "threads", "CPU threads of the inference engine; 0 for all cores.", ge=0, le=1024
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

    @classmethod
    def read(cls) -> Settings:
        """The settings in the environment.

        Raises:
            BadSettings: a value is wrong; the sentence names the variable.
        """
        try:
            return cls()
        except ValidationError as error:
            problem = error.errors()[0]
            name = f"{PREFIX}{problem['loc'][0]}".upper()
            message = f"{name} is {problem['input']!r}, which is wrong: {problem['msg']}."
            raise BadSettings(message) from None

    @property
    def served_name(self) -> str:
        """What the model is called over HTTP: `model_name`, else made from its folder's name."""
        if self.model_name is not None:
            return self.model_name
        folder = self.model_dir.resolve().name if self.model_dir is not None else ""
        return re.sub(r"[^A-Za-z0-9_-]+", "-", folder).strip("-")[:64] or "default"

    @property
    def compiled_dir(self) -> Path | None:
        """Where compiled networks are kept, None where there is no place for them."""
        return self.cache_dir or _cache_home()


def unknown_variables() -> list[str]:
    """Variables that look like settings and are none: usually a spelling mistake."""
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    return sorted(
        name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known
    )


def table() -> list[tuple[str, str, str, str]]:
    """One row for each setting: variable, default ("" for none), unit, meaning."""
    rows = []
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        unit = str(extra["unit"]) if isinstance(extra, dict) else ""
        default = "" if field.default is None else str(field.default)
        rows.append((f"{PREFIX}{name}".upper(), default, unit, field.description or ""))
    return rows
