"""The screen: the files of `app/web`, which a browser loads from here and from nowhere else."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

import engines.page

FOLDER = Path(__file__).parent.parent / "web"
INDEX = "index.html"
_PAGE_CSS = "page.css"  # which the pages of evaluations and shifts have inside of them
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# No inline code, nothing of other servers, in no frame; blob: are pictures that came with a key.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
    " connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class _File:
    data: bytes
    packed: bytes  # with gzip
    media_type: str
    tag: str


@cache
def files() -> dict[str, _File]:
    """Every file of the screen by its name below /web, read once."""
    found = {
        str(path.relative_to(FOLDER)): path.read_bytes()
        for path in sorted(FOLDER.rglob("*"))
        if path.suffix in _MEDIA_TYPES
    }
    found[_PAGE_CSS] = engines.page.STYLE.encode()
    return {name: _file(name, data) for name, data in found.items()}


def _file(name: str, data: bytes) -> _File:
    tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
    return _File(data, gzip.compress(data, mtime=0), _MEDIA_TYPES[Path(name).suffix], tag)


@router.get("/")
async def index(request: Request) -> Response:
    return _answer(request, files()[INDEX])


@router.get("/web/{name:path}")
async def file(request: Request, name: str) -> Response:
    found = files().get(name)
    if found is None:
        raise HTTPException(404)
    return _answer(request, found)


def _answer(request: Request, file: _File) -> Response:
    """The file; 304 where the browser has it. It asks each time: another Kensa has other files."""
    headers = {
        "ETag": file.tag,
        "Cache-Control": "no-cache",
        "Vary": "Accept-Encoding",
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    if file.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers["Content-Encoding"] = "gzip"
        return Response(file.packed, headers=headers, media_type=file.media_type)
    return Response(file.data, headers=headers, media_type=file.media_type)
