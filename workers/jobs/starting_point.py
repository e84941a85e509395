"""What a training starts from."""

from __future__ import annotations

from pathlib import Path

from engines.errors import BadMeta
from engines.queue.job_requests import RetrainRequest
from engines.store.versions import Store


def start_version(data: Path, request: RetrainRequest) -> str | None:
    """The version to start from; None for a first training.

    Raises:
        UnknownModel, UnknownVersion: there is no such version.
        BadMeta: each was held or rolled back from, and the request does not say to begin anew.
    """
    store = Store(data / "models")
    parent = store.to_start_from(request.model, request.version)
    if parent is None and request.kind is None and (versions := store.versions(request.model)):
        raise BadMeta(
            f"Every version of {request.model} was held by the gate or rolled back from: name the"
            f' one to start from, such as "version": "{versions[-1]}"; or say a kind, to begin'
            " anew."
        )
    return parent
