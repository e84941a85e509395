"""The scores that a plan gives for images, to be compared with those of its graph.

Only loaded where TensorRT is, by `workers.converting.plan.build`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.nvidia import driver
from engines.nvidia.library import here
from workers.converting.plan.tensorrt_log import failure, logger

trt = here().load()

Scores = NDArray[np.float32]


def score_images(
    engine: Any, images: NDArray[np.uint8], bank: NDArray[np.float32] | None, batch: int
) -> Scores:
    """Raw scores (n,): of the first image alone, of the others as many at once as may be."""
    cuda = driver.load()
    context = engine.create_execution_context()
    if context is None:
        raise failure(logger().lines, *cuda.mem_get_info())
    held = _Buffers(engine, context, cuda)
    try:
        if bank is not None:
            held.put("memory_bank", bank)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        if "keep" in names:  # older graphs have none
            held.put("keep", np.ones(tuple(engine.get_tensor_shape("keep")), np.float32))
        parts = [images[:1], *(images[at : at + batch] for at in range(1, len(images), batch))]
        return np.concatenate([held.score(part) for part in parts if len(part)])
    finally:
        held.free()


class _Buffers:
    """Device memory for one context's tensors."""

    def __init__(self, engine: Any, context: Any, cuda: Any) -> None:
        self._engine, self._context, self._cuda = engine, context, cuda
        self._stream = cuda.Stream()
        self._held: dict[str, Any] = {}

    def put(self, name: str, array: NDArray[Any]) -> None:
        """Copy an input to the device."""
        array = np.ascontiguousarray(array)
        memory = self._room(name, array.nbytes)
        if not self._context.set_input_shape(name, array.shape):
            raise failure(logger().lines, *self._cuda.mem_get_info())
        self._cuda.memcpy_htod(memory, array)

    def score(self, images: NDArray[np.uint8]) -> Scores:
        self.put("image", images)
        results = {}
        for name in ("score", "map"):
            shape = tuple(self._context.get_tensor_shape(name))
            results[name] = np.empty(shape, trt.nptype(self._engine.get_tensor_dtype(name)))
            self._room(name, results[name].nbytes)
        if not self._context.execute_async_v3(self._stream.handle):
            raise failure(logger().lines, *self._cuda.mem_get_info())
        self._stream.synchronize()
        for name, array in results.items():
            self._cuda.memcpy_dtoh(array, self._held[name])
        whole = np.isfinite(results["map"]).all()
        return np.where(whole, results["score"], np.float32(np.nan))

    def _room(self, name: str, nbytes: int) -> Any:
        if name in self._held:
            self._held.pop(name).free()
        self._held[name] = self._cuda.mem_alloc(nbytes)
        self._context.set_tensor_address(name, int(self._held[name]))
        return self._held[name]

    def free(self) -> None:
        for memory in self._held.values():
            memory.free()
        self._held.clear()
