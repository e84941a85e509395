"""Training images over HTTP: send them, look at them, delete them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as InPath
from fastapi.concurrency import iterate_in_threadpool, run_in_threadpool
from pydantic import Field

from app.decisions.recorder import Recorder
from app.http.access import needs, who
from app.http.base_body import Body, error_response
from app.http.uploads import Part, receive, upload_folder
from app.settings import Settings
from engines.errors import BadRequest, Conflict, KensaError
from engines.image import ImageLimits, kind_of, readable_kind
from engines.store.datasets import Datasets, Split, read_file
from engines.store.image_names import checked_name
from engines.store.image_zip import is_zip, unzip
from engines.store.versions import NAME, NAME_LENGTH


class CategoryBody(Body):
    """A category of training images, and how many it has."""

    category: str
    train: int = Field(description="Images to learn from.")
    normal: int = Field(description="Normal images to test with.")
    anomaly: int = Field(description="Anomalous images to test with.")


class DatasetsBody(Body):
    """All training images, counted."""

    datasets: list[CategoryBody] = Field(description="Sorted by name.")


class ImageFileBody(Body):
    """A training image."""

    name: str
    bytes: int


class ImagesBody(Body):
    """A page of the images of a split."""

    category: str
    split: Split
    total: int = Field(description="Images in the split, on this page or not.")
    offset: int = Field(description="Images before this page.")
    images: list[ImageFileBody] = Field(description="Sorted by name.")


class RefusedBody(Body):
    """An image that was not taken."""

    name: str = Field(description="As it was sent; in a zip, with its folders where they matter.")
    error: str = Field(description="One sentence that a person can act on.")
    code: str = Field(description="What programs may rely on; it does not change.")


class SkippedBody(Body):
    """Files of a zip that are no images."""

    reason: str
    count: int
    names: list[str] = Field(description="The first ten.")


class UploadBody(Body):
    """What became of an upload."""

    category: str
    split: Split
    added: list[str] = Field(description="Images that are stored now.")
    already_there: list[str] = Field(description="Images that were there with the same bytes.")
    refused: list[RefusedBody]
    skipped: list[SkippedBody]
    images: int = Field(description="Images in the split now.")


router = APIRouter(tags=["datasets"])

MANY = 1000  # images on one page of a list
NAMED = 10  # names of files that were passed over, for each reason

Category = Annotated[
    str,
    InPath(
        pattern=NAME,
        max_length=NAME_LENGTH,
        description="What the images show.",
        examples=["bracket"],
    ),
]
Which = Annotated[
    Split,
    InPath(description="`train`: to learn from. `normal` and `anomaly`: to test with."),
]
Name = Annotated[
    str, InPath(description="The name of an image, with its ending.", examples=["01.png"])
]

_ZIP_TYPES = ("application/zip", "application/x-zip-compressed")
_IMAGE_TYPES = ("image/jpeg", "image/png", "image/bmp", "image/tiff", "application/octet-stream")
_MEDIA_TYPES = {
    ".bmp": "image/bmp",
    ".dib": "image/bmp",
    ".jfif": "image/jpeg",
    ".jpe": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
}
_BINARY = {"type": "string", "format": "binary"}
_FORM = {
    "schema": {
        "type": "object",
        "properties": {
            "file": {
                "type": "array",
                "items": _BINARY,
                "description": "JPEG, PNG, BMP or TIFF images, or zips of them. The parts may have"
                " any name; each needs a file name.",
            }
        },
    }
}
_REQUEST_BODY = {
    "required": True,
    "description": "A form with images or zips; or one image or zip as the body itself.",
    "content": {
        "multipart/form-data": _FORM,
        **{media_type: {"schema": _BINARY} for media_type in (*_IMAGE_TYPES, *_ZIP_TYPES)},
    },
}
_UNKNOWN = error_response(
    "No such category or image.",
    unknown_dataset="There is no category bolt; there is: bracket.",
)
_MALFORMED = error_response(
    "The request is malformed.",
    bad_request="The path parameter split is wrong: Input should be 'train', 'normal' or"
    " 'anomaly'.",
)
_DAMAGED = error_response(
    "The image is damaged.", bad_image="The PNG image is damaged: a checksum does not match."
)
_TOO_LARGE = error_response(
    "The image has too many bytes or pixels.",
    image_too_large="The image is 30000 x 30000 pixels; allowed are 16,000,000 in all and 65,535 a"
    " side.",
)
_UNSUPPORTED = error_response(
    "Not an image that Kensa reads.",
    unsupported_image="This is not a JPEG, PNG, BMP or TIFF image; send one of these.",
)
_UPLOAD_RESPONSES: dict[int | str, dict[str, Any]] = {
    201: {"description": "At least one image was stored, or was there already."},
    400: error_response("The image is damaged.", bad_image="01.png: The PNG image is cut short."),
    404: error_response(
        "The folder on the server is a link to somewhere else.",
        unknown_dataset="bracket/train is a link that leads out of the data folder.",
    ),
    409: error_response(
        "Another image has this name.",
        conflict="01.png: bracket/train has another image of the name 01.png: send this one under a"
        " new name, or with ?replace=true.",
    ),
    413: error_response(
        "The upload, or the image, is too large.",
        upload_too_large="The upload has more than the 2,147,483,648 bytes allowed: send it in"
        " parts, or raise KENSA_MAX_UPLOAD_BYTES.",
        image_too_large="01.png: The image is 30000 x 30000 pixels; allowed are 16,000,000 in all"
        " and 65,535 a side.",
    ),
    415: error_response(
        "Not an image that Kensa reads.",
        unsupported_image="01.jpg: This is not a JPEG, PNG, BMP or TIFF image; send one of these.",
        unsupported_body="Kensa does not read a body of type text/html: send ...",
    ),
    422: error_response(
        "The request, the name of an image or a zip is malformed.",
        bad_request="There is no image in the upload.",
    ),
    507: error_response(
        "There is no room on the disk.",
        disk_full="The disk of the data folder is full: delete images or models that are not"
        " needed.",
        read_only="Nothing was changed, because the data folder cannot be written (...): ...",
    ),
}


@router.get("/datasets", dependencies=[needs("line")], summary="Which categories are there?")
async def categories(request: Request) -> DatasetsBody:
    """Every category, with the number of images in each of its splits."""
    counts = await run_in_threadpool(_datasets(request).categories)
    return DatasetsBody(
        datasets=[
            CategoryBody(
                category=name,
                train=images["train"],
                normal=images["normal"],
                anomaly=images["anomaly"],
            )
            for name, images in counts.items()
        ]
    )


@router.post(
    "/datasets/{category}/{split}",
    dependencies=[needs("operator")],
    summary="Send training images",
    status_code=201,
    responses=_UPLOAD_RESPONSES,
    openapi_extra={"requestBody": _REQUEST_BODY},
)
async def upload(
    request: Request,
    category: Category,
    split: Which,
    name: Annotated[
        str, Query(description="What an image that is the body is called.", examples=["01.png"])
    ] = "",
    replace: Annotated[
        bool, Query(description="Replace other images that have the same names.")
    ] = False,
) -> UploadBody:
    """Send images as a form, as a zip, or one image as the body with its `name` in the query.

    Every image is decoded before it is stored; one that is damaged is refused by name, and does not
    stop the others. Nothing is stored before the whole request has arrived. The category is made
    where there is none.
    """
    settings: Settings = request.app.state.settings
    datasets = _datasets(request)
    limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels)
    intake = Intake(datasets, category, split, limits, settings.max_upload_bytes, replace)
    async with upload_folder(datasets) as folder:
        for part in await receive(request, folder, name, settings.max_upload_bytes):
            # One image at a time goes to a thread, so that a stop waits for no more than one.
            async for _ in iterate_in_threadpool(intake.take(part)):
                pass
    return await run_in_threadpool(intake.answer)


@router.get(
    "/datasets/{category}/{split}",
    dependencies=[needs("line")],
    summary="Which images are there?",
    responses={404: _UNKNOWN, 422: _MALFORMED},
)
async def images(
    request: Request,
    category: Category,
    split: Which,
    offset: Annotated[int, Query(ge=0, description="Images to pass over.")] = 0,
    limit: Annotated[int, Query(ge=1, le=MANY, description="The most images to name.")] = 100,
) -> ImagesBody:
    """The images of a split, sorted by name."""
    page = await run_in_threadpool(_datasets(request).images, category, split, offset, limit)
    return ImagesBody(
        category=category,
        split=split,
        total=page.total,
        offset=offset,
        images=[ImageFileBody(name=image.name, bytes=image.bytes) for image in page.images],
    )


@router.get(
    "/datasets/{category}/{split}/{name}",
    dependencies=[needs("line")],
    summary="An image as it was sent",
    response_class=Response,
    responses={
        200: {
            "description": "The file.",
            "content": {kind: {"schema": _BINARY} for kind in _IMAGE_TYPES[:4]},
        },
        404: _UNKNOWN,
        413: _TOO_LARGE,
        422: _MALFORMED,
    },
)
async def image(request: Request, category: Category, split: Which, name: Name) -> Response:
    """The very bytes that were sent."""
    datasets, limits = _datasets(request), _limits(request)
    data = await run_in_threadpool(datasets.read, category, split, name, limits)
    return Response(data, media_type=_MEDIA_TYPES[Path(name).suffix.lower()])


@router.get(
    "/datasets/{category}/{split}/{name}/thumbnail",
    dependencies=[needs("line")],
    summary="An image, small",
    response_class=Response,
    responses={
        200: {"description": "A JPEG.", "content": {"image/jpeg": {"schema": _BINARY}}},
        400: _DAMAGED,
        404: _UNKNOWN,
        413: _TOO_LARGE,
        415: _UNSUPPORTED,
        422: _MALFORMED,
    },
)
async def thumbnail(request: Request, category: Category, split: Which, name: Name) -> Response:
    """A JPEG, upright, its longer side at most 256 pixels."""
    datasets, limits = _datasets(request), _limits(request)
    data = await run_in_threadpool(datasets.thumbnail, category, split, name, limits)
    return Response(data, media_type="image/jpeg")


@router.delete(
    "/datasets/{category}/{split}/{name}",
    dependencies=[needs("operator")],
    summary="Delete an image",
    status_code=204,
    response_class=Response,
    responses={404: _UNKNOWN, 422: _MALFORMED},
)
async def delete_image(request: Request, category: Category, split: Which, name: Name) -> None:
    """Delete one image. What models have learned from it stays learned."""
    await run_in_threadpool(_datasets(request).delete_image, category, split, name)
    _note_deletion(request, category, split=split, name=name)


@router.delete(
    "/datasets/{category}/{split}",
    dependencies=[needs("operator")],
    summary="Delete the images of a split",
    status_code=204,
    response_class=Response,
    responses={404: _UNKNOWN, 422: _MALFORMED},
)
async def delete_split(request: Request, category: Category, split: Which) -> None:
    """Delete all images of a split."""
    await run_in_threadpool(_datasets(request).delete_split, category, split)
    _note_deletion(request, category, split=split)


@router.delete(
    "/datasets/{category}",
    dependencies=[needs("operator")],
    summary="Delete a category",
    status_code=204,
    response_class=Response,
    responses={404: _UNKNOWN, 422: _MALFORMED},
)
async def delete(request: Request, category: Category) -> None:
    """Delete a category with all its images."""
    await run_in_threadpool(_datasets(request).delete, category)
    _note_deletion(request, category)


def _note_deletion(request: Request, category: str, **what: str) -> None:
    recorder: Recorder = request.app.state.recorder
    recorder.note("deleted", who(request), category, "", **what)


def _datasets(request: Request) -> Datasets:
    datasets: Datasets = request.app.state.datasets
    return datasets


def _limits(request: Request) -> ImageLimits:
    settings: Settings = request.app.state.settings
    return ImageLimits(settings.max_image_bytes, settings.max_image_pixels)


# Storing


@dataclass
class Intake:
    """What becomes of the files of one upload."""

    datasets: Datasets
    category: str
    split: Split
    limits: ImageLimits
    left: int  # bytes that zips may still unpack
    replace: bool
    added: list[str] = field(default_factory=list)
    already_there: list[str] = field(default_factory=list)
    refused: list[tuple[str, KensaError]] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason -> names
    names: set[str] = field(default_factory=set)  # that this upload has used

    def take(self, part: Part) -> Iterator[None]:
        """Store the images of a part, one with each step. Errors are kept, not raised."""
        try:
            if is_zip(part.path) or part.name.lower().endswith(".zip"):
                yield from self._take_zip(part.path)
            else:
                self._store(part.name, read_file(part.path, self.limits))
                yield
        except KensaError as error:
            self.refused.append((part.name, error))
        part.path.unlink()  # so that the disk need not hold everything twice

    def answer(self) -> UploadBody:
        """What to tell the client.

        Raises:
            KensaError: no image was stored or there already; the first that was refused, and why.
        """
        if not self.added and not self.already_there:
            raise self._first_refusal()
        return UploadBody(
            category=self.category,
            split=self.split,
            added=self.added,
            already_there=self.already_there,
            refused=[
                RefusedBody(name=name, error=str(error), code=error.code)
                for name, error in self.refused
            ],
            skipped=[
                SkippedBody(reason=reason, count=len(names), names=names[:NAMED])
                for reason, names in self.skipped.items()
            ],
            images=self.datasets.count(self.category, self.split),
        )

    def _take_zip(self, path: Path) -> Iterator[None]:
        for name, found in unzip(path, self.limits, self.left):
            if isinstance(found, bytes):
                self.left -= len(found)
                try:
                    self._store(name, found)
                except KensaError as error:
                    self.refused.append((name, error))
            elif isinstance(found, KensaError):
                self.refused.append((name, found))
            else:
                self.skipped.setdefault(found, []).append(name)
            yield

    def _store(self, name: str, data: bytes) -> None:
        if kind_of(data) != "unknown":
            readable_kind(data)  # WebP is named before its name, which may be missing, is judged
        name = checked_name(name)
        first = name not in self.names
        place = (self.category, self.split, name)
        try:
            stored = self.datasets.add(
                *place, data, limits=self.limits, replace=self.replace and first
            )
        except Conflict:
            if first:
                raise
            raise Conflict(f"Two different images of this upload are called {name}.") from None
        self.names.add(name)
        (self.already_there if stored.already_there else self.added).append(stored.name)

    def _first_refusal(self) -> KensaError:
        if self.refused:
            name, error = self.refused[0]
            return type(error)(f"{name[:200]}: {error}" if name else str(error))
        what = "; ".join(f"{reason}: {len(names)}" for reason, names in self.skipped.items())
        return BadRequest(
            f"There is no image in the upload ({what})."
            if what
            else "There is no image in the upload: send file parts of a form, a zip, or an image as"
            " the body."
        )
