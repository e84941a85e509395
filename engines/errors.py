"""Every error Kensa raises on purpose, as one tree.

Each carries the HTTP status and the `code` that clients may rely on. The message is one sentence
that a person can act on. Whoever lets a `KensaError` leave decides its form in one place:
`app.main` answers with JSON, the commands print it and exit with `EXIT_CODE`.

KensaError
├── BadImage              400  the bytes are damaged, or are not what they say they are
│   ├── UnsupportedImage  415  a kind of image that Kensa does not read
│   └── ImageTooLarge     413  more bytes or more pixels than allowed
├── UnknownHost           400  asked under a name that is not this server's
├── BadHttp               400  what came is not HTTP that Kensa reads
├── Unauthorized          401  no API key, or one that is not known
├── Forbidden             403  the API key's role does not allow it
├── ForeignOrigin         403  the web page of another server asks for a change
├── TooSlow               408  the request did not arrive in time
├── BodyTooLarge          413  a body of more bytes than the route reads
├── HeadTooLarge          431  a request line and headers of more bytes than are read
├── BadRequest            422  the request itself is malformed
│   └── UnsupportedBody   415  a body of a content type that no route reads
├── BadSettings           500  a setting of the server is wrong; it does not start
├── BadMeta               422  meta.json is unreadable or contradicts itself
├── BadBundle             422  the files of a model are missing, damaged or do not fit together
│   └── Unreadable        503  the system does not give one of them, which may be whole
├── BadDataset            422  a folder of images that cannot be learned from
├── BadWeights            422  weights that are missing or do not fit the backbone
├── BadRecord             422  the record of decisions is not as it was written
├── BadShared             422  what lies in the shared store is missing or damaged
├── UnknownModel          404  no model of that name
├── UnknownVersion        404  the model has no such version
├── UnknownJob            404  no job of that id
├── UnknownDataset        404  no category or image of that name
├── UnknownKey            404  no API key of that name
├── UnknownDecision       404  no decision of that id, or its picture is not kept
├── Conflict              409  what is asked for collides with what is going on
│   └── LateView          409  a view of a part that was decided without it
├── UploadTooLarge        413  an upload of more bytes than allowed
├── NotReady              503  the model is not loaded (yet)
│   └── StalePlan         503  its plan was built for something else, and nothing stands in for it
├── NotReleased           503  the model failed a challenge with known pictures
├── Overloaded            503  more requests than can be answered in time
├── BadKeys               503  the file of API keys cannot be read; nobody is let in
├── TooManyConnections    503  none of the connections that are open is idle
├── NoWorker              503  nothing here can learn or convert
├── NoShared              503  the shared store does not answer, or is full
├── NoTensorRT            503  TensorRT or a part of it is missing, or finds no GPU
├── DeadlineExceeded      504  there is no verdict within the time that was given
├── DiskFull              507  there is no room left to write
├── ReadOnly              507  the data folder cannot be written
├── RuntimeFailed         500  the inference runtime failed on a good image
│   └── GpuLost           503  the GPU failed for good; the process ends and is started again
├── BuildFailed           500  TensorRT made no plan of a graph that it takes
└── OutOfMemory           507  a model or a job does not fit into memory
"""

from __future__ import annotations

import errno

EXIT_CODE = 2  # what a command exits with after a KensaError; 1 is an error nobody foresaw
INTERRUPTED = 130  # after Ctrl-C, as shells expect it


_MAY_PASS = {
    errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EBUSY,
    errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.ENXIO, errno.EREMOTEIO,
}  # fmt: skip


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


class UnknownHost(KensaError):
    """Asked under a name that is not this server's: perhaps by a page that rebinds its name."""

    status = 400
    code = "unknown_host"


class BadHttp(KensaError):
    """What came is not HTTP, or a part of HTTP that Kensa does not read."""

    status = 400
    code = "bad_http"


class Unauthorized(KensaError):
    """No API key came with the request, or one that is not known."""

    status = 401
    code = "unauthorized"


class Forbidden(KensaError):
    """The API key is known, and its role does not allow what is asked for."""

    status = 403
    code = "forbidden"


class ForeignOrigin(KensaError):
    """The web page of another server asks for a change, in the browser of somebody."""

    status = 403
    code = "foreign_origin"


class TooSlow(KensaError):
    """The request did not arrive in time."""

    status = 408
    code = "too_slow"


class BodyTooLarge(KensaError):
    """A body of more bytes than the route reads."""

    status = 413
    code = "body_too_large"


class HeadTooLarge(KensaError):
    """A request line and headers of more bytes than are read."""

    status = 431
    code = "head_too_large"


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


class Unreadable(BadBundle):
    """The system does not give a file of a model: that may pass, and the file may be whole."""

    status = 503
    code = "unreadable"

    @classmethod
    def check(cls, path: object, error: BaseException) -> None:
        """Raise it where an error says so, rather than that a file is missing or damaged."""
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in _MAY_PASS:
            why = getattr(error, "strerror", None) or "memory was short"
            raise cls(
                f"{path} cannot be read at the moment ({why}): look at who may read it, at the"
                " disk, and at the limit of open files."
            ) from error


class BadDataset(KensaError):
    """A folder of images that cannot be learned from."""

    status = 422
    code = "bad_dataset"


class BadWeights(KensaError):
    """Weights that are missing, or do not fit the backbone."""

    status = 422
    code = "bad_weights"


class BadRecord(KensaError):
    """The record of decisions is not as it was written, or cannot be read."""

    status = 422
    code = "bad_record"


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


class UnknownKey(KensaError):
    """There is no API key of that name."""

    status = 404
    code = "unknown_key"


class UnknownDecision(KensaError):
    """No decision of that id, or its picture is not kept."""

    status = 404
    code = "unknown_decision"


class Conflict(KensaError):
    """What is asked for collides with what is going on."""

    status = 409
    code = "conflict"


class LateView(Conflict):
    """A view of a part that was decided without it, or with another picture of it."""

    code = "late_view"


class UploadTooLarge(KensaError):
    """An upload of more bytes, or of more files, than the settings allow."""

    status = 413
    code = "upload_too_large"


class NotReady(KensaError):
    """The model is not loaded, or not yet."""

    status = 503
    code = "not_ready"


class StalePlan(NotReady):
    """A model.plan that was built for another machine, TensorRT or graph, or that is missing."""

    code = "stale_plan"


class NotReleased(KensaError):
    """The model failed a challenge with known pictures: no part passes for now."""

    status = 503
    code = "not_released"


class Overloaded(KensaError):
    """More requests than can be answered in time; nothing was computed for this one."""

    status = 503
    code = "overloaded"


class BadKeys(KensaError):
    """The file of API keys is damaged or cannot be read. Nobody is let in until it is mended."""

    status = 503
    code = "bad_keys"


class TooManyConnections(KensaError):
    """As many connections are open as may be, and none of them is idle."""

    status = 503
    code = "too_many_connections"


class NoWorker(KensaError):
    """Nothing here can learn or convert: no worker runs, or the queue cannot be reached."""

    status = 503
    code = "no_worker"


class DeadlineExceeded(KensaError):
    """There is no verdict within the time that was given for it."""

    status = 504
    code = "deadline_exceeded"


class NoShared(KensaError):
    """The shared store does not answer, or is full. What is done with it is tried again."""

    status = 503
    code = "no_shared"


class NoTensorRT(KensaError):
    """TensorRT, or something that it needs, is not on this machine: the sentence says what."""

    status = 503
    code = "no_tensorrt"


class DiskFull(KensaError):
    """There is no room left to write; what was there before is unchanged."""

    status = 507
    code = "disk_full"


class ReadOnly(KensaError):
    """The data folder cannot be written; what was there before is unchanged."""

    status = 507
    code = "read_only"


class OutOfMemory(KensaError):
    """A model, or a job, does not fit into memory beside what is there."""

    status = 507
    code = "out_of_memory"


class BuildFailed(KensaError):
    """TensorRT made no plan of a graph that it takes; the sentence has its own words."""

    code = "build_failed"


class RuntimeFailed(KensaError):
    """The inference runtime failed on a good image."""

    status = 500
    code = "runtime_failed"


class GpuLost(RuntimeFailed):
    """CUDA failed in a way that only a new process mends: nothing more is computed in this one."""

    status = 503
    code = "gpu_lost"
