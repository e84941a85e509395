"""What TensorRT for RTX makes of a plan for the GPU that is here: kept, so that the next start is
faster.

It stands in the folder of compiled networks, sealed and pruned with them, and not in that of the
version: a version never changes, and this belongs to one machine.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from engines.files import sha256, write_atomically
from engines.runtimes.compiled_cache import read_sealed, seal_cache
from engines.runtimes.cuda import Gpu

log = logging.getLogger("kensa.tensorrt")


class KernelCache:
    """The kernels of one engine; `config` is what its contexts are made with."""

    def __init__(self, gpu: Gpu, trt: Any, engine: Any, plan: Path, folder: Path | None) -> None:
        """Take what was kept of a plan. What is of another GPU, driver or version the library
        refuses, and makes anew.
        """
        self._folder = folder
        self._path = None if folder is None else folder / f"rtx-{sha256(plan)}.blob"
        self._kept = 0  # bytes
        self.config = engine.create_runtime_config()
        # A kernel for just this shape when it is first met: no part meets one, see `compile`.
        strategy = trt.DynamicShapesKernelSpecializationStrategy
        self.config.dynamic_shapes_kernel_specialization_strategy = strategy.EAGER
        self._cache = self.config.create_runtime_cache()
        data = None if self._path is None else read_sealed(self._path)
        if data is not None and gpu.call(lambda: self._cache.deserialize(data)):  # wants a context
            self._kept = len(data)
        self.config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write down what there is now. A model that runs is not lost because this fails."""
        if self._path is None or self._folder is None:
            return
        data = bytes(self._cache.serialize())
        if len(data) == self._kept:
            return
        try:
            self._path.with_suffix(".sha256").unlink(missing_ok=True)
            write_atomically(self._path, data)
        except OSError as error:
            log.warning("The next start will be slower: %s (%s)", self._path, error.strerror)
            return
        seal_cache(self._folder)
        self._kept = len(data)
