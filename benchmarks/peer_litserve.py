"""LitServe around anomalib's inferencer, with what it does by itself: one worker, no batches.

A module of its own, because LitServe hands the class to another process by its name. It looks at
the annotation of `decode_request`, which must be no text.
"""

from pathlib import Path

import litserve
import numpy as np
from fastapi import Request
from numpy.typing import NDArray

from benchmarks.peer import decoded, open_anomalib


class Api(litserve.LitAPI):
    """A form with a file in, a score out: LitServe reads no raw bodies."""

    folder: Path

    def setup(self, device: str) -> None:
        self.score = open_anomalib(self.folder)

    def decode_request(self, request: Request) -> NDArray[np.uint8]:
        return decoded(request["file"].file.read())

    def predict(self, image: NDArray[np.uint8]) -> float:
        return self.score(image)

    def encode_response(self, output: float) -> dict[str, float]:
        return {"score": output}


def serve(folder: Path, port: int) -> None:
    """Serve on a port of this machine until the process ends."""
    api = Api(api_path="/infer")
    api.folder = folder
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)
