"""`Decision`: what is kept of an inspection, and the one line that its hash is of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
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
        views: of a part that several cameras saw: what was decided of each, as `OfViews` writes it.
            The numbers are those of the worst view then. Empty for any other.
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
    views: str = ""

    def values(self) -> dict[str, Any]:
        """Each by its name, in the order of the columns."""
        return asdict(self)


COLUMNS = tuple(field.name for field in fields(Decision))


@dataclass(frozen=True)
class View:
    """One view of a part, as the part's line has it: what is empty there is empty here.

    Attributes:
        verdict: `none` where there was none in time; then `code` says why: `view_missing` where no
            picture of it came.
    """

    view: str  # "?" where nobody has said what the missing one is called
    id: str
    at: int
    model: str
    version: str
    verdict: Verdict
    code: str
    raw_score: float | None
    score: float | None
    threshold: float | None
    raw_threshold: float | None
    sha256: str
    format: str
    width: int
    height: int

    @classmethod
    def of(cls, view: str, decided: Decision) -> View:
        """What was decided of a view, as if it were a part."""
        known = decided.values()
        names = [field.name for field in fields(cls) if field.name != "view"]
        return cls(view=view, **{name: known[name] for name in names})


@dataclass(frozen=True)
class OfViews:
    """What `Decision.views` says."""

    line: str  # which of several lines of one key; empty where the requests named none
    of: int  # how many views there should have been
    decided_by: str  # the view whose verdict is the part's
    views: tuple[View, ...]

    def text(self) -> str:
        """As the record holds it."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def read(cls, text: str) -> OfViews | None:
        """None of what is no part of several views."""
        if not text:
            return None
        known = cls(**json.loads(text))
        return replace(known, views=tuple(View(**one) for one in known.views))  # type: ignore[arg-type]

    def view(self, name: str) -> View | None:
        return next((one for one in self.views if one.view == name), None)


def hash_after(before: str, content: dict[str, Any]) -> str:
    """The hash of a line: SHA-256 of the hash before it and of the content as sorted JSON.

    `views` is in it only where there are some: lines are older than it.
    """
    content = {name: one for name, one in content.items() if one or name != "views"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(f"{before}\n{text}".encode(errors="surrogatepass")).hexdigest()


def short_sha256(names: tuple[str | None, ...]) -> str:
    """Twelve digits that stand for all of these."""
    return hashlib.sha256("\n".join(map(str, names)).encode()).hexdigest()[:12]
