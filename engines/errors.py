"""Every error Kensa raises on purpose, as one tree.

Each carries the HTTP status and the `code` that clients may rely on. The message is one sentence
that a person can act on. Whoever lets a `KensaError` leave decides its form in one place:
`app.main` answers with JSON, the commands print it and exit with `EXIT_CODE`.

KensaError
├── BadImage              400  the bytes are damaged, or are not what they say they are
│   ├── UnsupportedImage  415  a kind of image that Kensa does not read
│   └── ImageTooLarge     413  more bytes or more pixels than allowed
├── BadRequest            422  the request itself is malformed
│   └── UnsupportedBody   415  a body of a content type that no route reads
├── BadSettings           500  a setting of the server is wrong; it does not start
├── BadMeta               422  meta.json is unreadable or contradicts itself
├── BadBundle             422  the files of a model are missing, damaged or do not fit together
├── BadDataset            422  a folder of images that cannot be learned from
├── BadWeights            422  weights that are missing or do not fit the backbone
├── BadShared             422  what lies in the shared store is missing or damaged
├── UnknownModel          404  no model of that name
├── UnknownVersion        404  the model has no such version
├── UnknownJob            404  no job of that id
├── UnknownDataset        404  no category or image of that name
├── Conflict              409  what is asked for collides with what is going on
├── UploadTooLarge        413  an upload of more bytes than allowed
├── NotReady              503  the model is not loaded (yet)
├── NoWorker              503  nothing here can learn or convert
├── NoShared              503  the shared store does not answer, or is full
├── DiskFull              507  there is no room left to write
├── OutOfMemory           507  a model does not fit into memory
└── RuntimeFailed         500  the inference runtime failed on a good image
"""

from __future__ import annotations

EXIT_CODE = 2  # what a command exits with after a KensaError; 1 is an error nobody foresaw


class KensaError(Exception):
    """The root: `str(error)` is the sentence for the user."""

    status = 500
    code = "internal_error"


class BadImage(KensaError):
    """The bytes are damaged, or are not what they say they are."""

    status = 400
    code = "bad_image"


class UnsupportedImage(BadImage):
    """A kind of image that Kensa does not read, such as WebP, CMYK or an animation."""

    status = 415
    code = "unsupported_image"


class ImageTooLarge(BadImage):
    """More bytes or more pixels than the limits allow."""

    status = 413
    code = "image_too_large"


class BadRequest(KensaError):
    """The request itself is malformed: no image in it, an unknown option."""

    status = 422
    code = "bad_request"


class UnsupportedBody(BadRequest):
    """A body whose content type says that it is neither an image nor a form."""

    status = 415
    code = "unsupported_body"


class BadSettings(KensaError):
    """A setting of the server is wrong, so it does not start. Never leaves over HTTP."""

    code = "bad_settings"


class BadMeta(KensaError):
    """meta.json is unreadable or contradicts itself."""

    status = 422
    code = "bad_meta"


class BadBundle(KensaError):
    """The files of a model are missing, damaged or do not fit together."""

    status = 422
    code = "bad_bundle"


class BadDataset(KensaError):
    """A folder of images that cannot be learned from."""

    status = 422
    code = "bad_dataset"


class BadWeights(KensaError):
    """Weights that are missing, or do not fit the backbone."""

    status = 422
    code = "bad_weights"


class BadShared(KensaError):
    """What another machine left in the shared store is missing or damaged."""

    status = 422
    code = "bad_shared"


class UnknownModel(KensaError):
    """No model of that name."""

    status = 404
    code = "unknown_model"


class UnknownVersion(KensaError):
    """The model has no such version."""

    status = 404
    code = "unknown_version"


class UnknownJob(KensaError):
    """No job of that id."""

    status = 404
    code = "unknown_job"


class UnknownDataset(KensaError):
    """No category, or no image in it, of that name."""

    status = 404
    code = "unknown_dataset"


class Conflict(KensaError):
    """What is asked for collides with what is going on."""

    status = 409
    code = "conflict"


class UploadTooLarge(KensaError):
    """An upload of more bytes, or of more files, than the settings allow."""

    status = 413
    code = "upload_too_large"


class NotReady(KensaError):
    """The model is not loaded, or not yet."""

    status = 503
    code = "not_ready"


class NoWorker(KensaError):
    """Nothing here can learn or convert: no worker runs, or the queue cannot be reached."""

    status = 503
    code = "no_worker"


class NoShared(KensaError):
    """The shared store does not answer, or is full. What is done with it is tried again."""

    status = 503
    code = "no_shared"


class DiskFull(KensaError):
    """There is no room left to write; what was there before is unchanged."""

    status = 507
    code = "disk_full"


class OutOfMemory(KensaError):
    """A model does not fit into memory beside what is there."""

    status = 507
    code = "out_of_memory"


class RuntimeFailed(KensaError):
    """The inference runtime failed on a good image."""

    status = 500
    code = "runtime_failed"
