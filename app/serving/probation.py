"""`Probation`: the first parts of versions that went live by themselves."""

from __future__ import annotations

from dataclasses import dataclass

from app.settings import Settings
from engines.serving.resident import Resident
from engines.verdict import Verdict


@dataclass
class _FirstParts:
    version: str
    parts: int = 0
    rejects: int = 0


class Probation:
    """Counts the first KENSA_ROLLBACK_PARTS parts of a version, and says whether it goes back."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._watched: dict[str, _FirstParts] = {}  # by model

    def begin(self, name: str, version: str) -> None:
        """Watch the first parts of a version, where the settings say so."""
        if self._settings.rollback_parts:
            self._watched[name] = _FirstParts(version)

    def end(self, name: str) -> None:
        """Watch no longer, whatever was found."""
        self._watched.pop(name, None)

    def count(self, model: Resident, verdict: Verdict) -> str | None:
        """Count a part; why the version must go back, once its last one was counted."""
        parts = self._watched.get(model.name)
        if parts is None or parts.version != model.version:
            return None
        parts.parts += 1
        parts.rejects += verdict.is_anomalous
        if parts.parts < self._settings.rollback_parts:
            return None
        self.end(model.name)
        low, high = self._settings.rollback_min_rejects, self._settings.rollback_max_rejects
        rate = parts.rejects / parts.parts
        if low <= rate <= high:
            return None
        return (
            f"Of its first {parts.parts} parts {rate:.1%} were rejected; allowed are {low:.1%} to"
            f" {high:.1%}."
        )
