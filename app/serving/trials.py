"""`Trials`: the first parts of versions that went live by themselves."""

from __future__ import annotations

from dataclasses import dataclass

from app.settings import Settings
from engines.serving.resident import Resident
from engines.verdict import Verdict


@dataclass
class _Trial:
    version: str
    parts: int = 0
    rejects: int = 0


class Trials:
    """Counts the first KENSA_ROLLBACK_PARTS parts of a version, and says whether it goes back."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._trials: dict[str, _Trial] = {}  # by model

    def begin(self, name: str, version: str) -> None:
        """Watch the first parts of a version, where the settings say so."""
        if self._settings.rollback_parts:
            self._trials[name] = _Trial(version)

    def end(self, name: str) -> None:
        """Watch no longer, whatever was found."""
        self._trials.pop(name, None)

    def count(self, model: Resident, verdict: Verdict) -> str | None:
        """Count a part; why the version must go back, once its last one was counted."""
        trial = self._trials.get(model.name)
        if trial is None or trial.version != model.version:
            return None
        trial.parts += 1
        trial.rejects += verdict.is_anomalous
        if trial.parts < self._settings.rollback_parts:
            return None
        self.end(model.name)
        low, high = self._settings.rollback_min_rejects, self._settings.rollback_max_rejects
        rate = trial.rejects / trial.parts
        if low <= rate <= high:
            return None
        return (
            f"Of its first {trial.parts} parts {rate:.1%} were rejected; allowed are {low:.1%} to"
            f" {high:.1%}."
        )
