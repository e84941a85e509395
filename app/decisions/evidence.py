"""`write_evidence`: all that is known of a part as one zip, for whoever asks long afterwards."""

from __future__ import annotations

import hashlib
import json
import zipfile
from contextlib import suppress
from typing import IO, Any

from app.decisions.database import Kept, Line
from app.decisions.decision import ENDINGS, OfViews, View
from app.decisions.recorder import Recorder
from engines.errors import KensaError
from engines.image import ImageLimits
from engines.store.bundle import REPORT
from engines.store.versions import META, Store

README = """What Kensa recorded of the part {part!r}.

decisions/NUMBER-ID.json   what was decided, and when; `hash` is SHA-256 of it and of the one before
decisions/NUMBER-ID.*      the picture as it was sent (its SHA-256 is `sha256`), what was strange
decisions/NUMBER-ID.VIEW.* the same of another view of the part, where there are several
versions/...               of each that judged: its meta.json, report of training, gate
trail.json                 what people said of these decisions
sha256.txt                 of each file in this zip
"""


class _Zip:
    """A zip that knows the hash of each of its files."""

    def __init__(self, file: IO[bytes]) -> None:
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED)
        self._hashes: list[str] = []

    def add(self, name: str, data: bytes) -> None:
        self._zip.writestr(name, data)
        self._hashes.append(f"{hashlib.sha256(data).hexdigest()}  {name}\n")

    def close(self) -> None:
        self._zip.writestr("sha256.txt", "".join(self._hashes))
        self._zip.close()


def write_evidence(
    file: IO[bytes],
    part: str,
    found: list[tuple[Kept, list[Line]]],
    recorder: Recorder,
    store: Store,
    limits: ImageLimits,
) -> None:
    """Write the zip: of each decision its record, picture and overlay, and of each version why.

    What is not kept any more is left out.

    Args:
        found: the decisions of the part, and what the trail says of each.
    """
    whole = _Zip(file)
    whole.add("README.txt", README.format(part=part).encode(errors="replace"))
    versions: set[tuple[str, str]] = set()
    for kept, _ in found:
        one = kept.decision
        place = f"decisions/{kept.number}-{one.id}"  # clients choose ids, and may choose one twice
        about = {"number": kept.number, **one.values(), "hash": kept.hash, "label": kept.label,
                 "defect": kept.defect}  # fmt: skip
        if not one.views:  # as its hash is made of it
            del about["views"]
        whole.add(f"{place}.json", _json(about))
        with suppress(FileNotFoundError):
            image = recorder.pictures.image(kept.number)
            whole.add(f"{place}{ENDINGS.get(one.format, '.bin')}", image)
            with suppress(KensaError):
                overlay = recorder.pictures.drawn(kept.number, limits, over_picture=True)
                whole.add(f"{place}.overlay.png", overlay)
        if (of_views := OfViews.read(one.views)) is not None:
            for view in of_views.views:
                if view.view != of_views.decided_by:  # whose picture is the one above
                    _add_view(whole, f"{place}.{view.view}", kept.number, view, recorder, limits)
                if view.version:
                    versions.add((view.model, view.version))
        if one.version:
            versions.add((one.model, one.version))
    for name, version in sorted(versions):
        with suppress(KensaError):
            folder = store.folder(name, version)
            for file_name in (META, REPORT):
                with suppress(FileNotFoundError):
                    whole.add(f"versions/{name}/{version}/{file_name}",
                              (folder / file_name).read_bytes())  # fmt: skip
            if (gate := store.gate(name, version)) is not None:
                whole.add(f"versions/{name}/{version}/gate.json", _json(gate))
    whole.add("trail.json", _json([line._asdict() for _, lines in found for line in lines]))
    whole.close()


def _add_view(
    whole: _Zip, place: str, number: int, view: View, recorder: Recorder, limits: ImageLimits
) -> None:
    with suppress(FileNotFoundError):
        image = recorder.pictures.image(number, view.view)
        whole.add(f"{place}{ENDINGS.get(view.format, '.bin')}", image)
        with suppress(KensaError):
            drawn = recorder.pictures.drawn(number, limits, over_picture=True, view=view.view)
            whole.add(f"{place}.overlay.png", drawn)


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode(errors="replace")
