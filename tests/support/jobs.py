"""Requests for jobs that are as small as a training can be."""

from __future__ import annotations

CATEGORY = "sample_bracket"


# As small as a training can be, so that it can be done again and again.
META = {"backbone": "resnet18", "layers": ["layer1"], "coreset_ratio": 0.01, "image_size": 64}


FIRST = {"model": "part", "category": CATEGORY, "kind": "patchcore", "meta": META,
         "pretrained": "untrained", "max_flips": 1.0}  # fmt: skip


AGAIN = {"model": "part", "category": CATEGORY, "max_flips": 1.0}


ENDED = ("succeeded", "failed", "cancelled", "interrupted")
