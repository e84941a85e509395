"""`Decision`: what is kept of an inspection, and the one line that its hash is of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Verdict = Literal["normal", "anomaly", "unusable", "none"]
Label = Literal["good", "defect", "unusable"]

ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "BMP": ".bmp", "TIFF": ".tif", "BigTIFF": ".tif"}
FIRST_HASH = "0" * 64  # what the first line of a chain follows


@dataclass(frozen=True)
class Decision:
    """An inspection, as it was decided. Nothing of it changes afterwards.

    Attributes:
        at: milliseconds since 1970, UTC.
        scorer: short SHA-256 of the files that the raw score comes from: versions with the same one
            give the same raw scores, and differ in the threshold alone. Empty without a verdict.
        verdict: `none` where there was no verdict; then `code` says why, and the numbers are null.
            `unusable` where the picture was not usable; then `code` says why.
        sha256: of the image as it was sent; empty where none arrived whole, or where a damaged one
            was let go because too many waited for the disk.
        who: the name of the API key; empty where none was needed.
    """

    id: str
    part: str
    at: int
    model: str
    version: str
    scorer: str
    verdict: Verdict
    code: str
    raw_score: float | None
    score: float | None
    threshold: float | None
    raw_threshold: float | None
    queue_ms: float | None
    decode_ms: float | None
    infer_ms: float | None
    total_ms: float | None
    sha256: str
    format: str
    width: int
    height: int
    who: str

    def values(self) -> dict[str, Any]:
        """Each by its name, in the order of the columns."""
        return asdict(self)


COLUMNS = tuple(field.name for field in fields(Decision))


def hash_after(before: str, content: dict[str, Any]) -> str:
    """The hash of a line: SHA-256 of the hash before it and of the content as sorted JSON."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(f"{before}\n{text}".encode(errors="surrogatepass")).hexdigest()


def short_sha256(names: tuple[str | None, ...]) -> str:
    """Twelve digits that stand for all of these."""
    return hashlib.sha256("\n".join(map(str, names)).encode()).hexdigest()[:12]
