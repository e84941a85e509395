"""What a training starts from: a version, or weights that a request names."""

from __future__ import annotations

from pathlib import Path

from engines.errors import BadMeta, BadWeights
from engines.queue.job_requests import RetrainRequest
from engines.store.versions import Store


def start_version(data: Path, request: RetrainRequest) -> str | None:
    """The version to start from; None for a first training.

    Raises:
        UnknownModel, UnknownVersion: there is no such version.
        BadMeta: there is none, and the request does not say what to make.
    """
    parent = Store(data / "models").to_start_from(request.model, request.version)
    if parent is None and request.kind is None:
        raise BadMeta(
            f"{request.model} was never trained, or each of its versions was held or rolled back"
            " from: name one as version, or say the kind and, in meta, its hyper-parameters, such"
            " as backbone, layers and image_size."
        )
    return parent


def named_weights(data: Path, request: RetrainRequest) -> str | None:
    """The weights that a request names, in a data folder. Raises BadWeights where they are not."""
    if request.pretrained in (None, "untrained"):
        return request.pretrained
    path = data / "weights" / str(request.pretrained)
    if not path.is_file():
        raise BadWeights(f"{path} does not exist: put the weights there, or leave pretrained out.")
    return str(path)
