"""One file per model kind, each reading straight down. All have the same function names:

- `build(meta, weights)`: the torch model.
- `load(model, path)`: give it what an earlier training learned.
- `train(model, meta, batches, progress)` and `update(...)`: learn from nothing, or on top.
- `scores(model, batches)`: raw scores.
- `summary(model)`, `save(model, meta, folder)`: for report.json, and the files to retrain from.
- `graph(model)`: the module and the inputs that are exported; `SCORE_KIND`: what a score means.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

KINDS = ("patchcore",)


def module(kind: str) -> Any:
    """The module of a model kind; imported only now, because torch takes seconds to load."""
    return import_module(f"workers.models.{kind}")
