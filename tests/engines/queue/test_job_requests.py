"""Claims about what a request for a job leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.errors import BadMeta
from engines.meta import FIRST, Meta
from engines.queue.job_requests import RetrainRequest
from engines.store.versions import Store
from support.plans import tiny_bundle

RESNET = {"backbone": "resnet18", "layers": ["layer2", "layer3"]}


def asked(**more: Any) -> RetrainRequest:
    return RetrainRequest(model="bolt", category="bolt", **more)


@pytest.mark.parametrize("kind", [None, "patchcore"])
@pytest.mark.parametrize(
    ("meta", "made"),
    [({}, FIRST), ({"image_size": 320}, {**FIRST, "image_size": 320}),
     ({"feature_power": 0.5}, {**FIRST, "feature_power": 0.5}),
     (RESNET, {**FIRST, **RESNET, "centre_weight": None, "feature_power": None}),
     ({**RESNET, "centre_weight": 0.4},
      {**FIRST, **RESNET, "centre_weight": 0.4, "feature_power": None})],
)  # fmt: skip
def test_a_first_training_takes_the_usual_keys_where_none_are_said(
    kind: Any, meta: dict[str, Any], made: dict[str, Any]
) -> None:
    assert asked(kind=kind, meta=meta).first_meta().model_dump(include={*made}) == made


@pytest.mark.parametrize(
    ("kind", "meta"),
    [("patchcore", {"backbone": "resnet18"}), ("patchcore", {"layers": ["layer2"]}),
     ("padim", {}), ("vae", {"image_size": 64}), ("efficientad", {})],
)  # fmt: skip
def test_layers_of_another_backbone_and_keys_of_another_kind_are_not_guessed(
    kind: Any, meta: dict[str, Any]
) -> None:
    with pytest.raises(BadMeta):
        asked(kind=kind, meta=meta).first_meta()


@pytest.mark.parametrize(
    "more",
    [{"meta": {"model": "padim"}}, {"meta": {"latent_dim": 8, "image_size": 64}},
     {"meta": {**RESNET, "n_features": 100}}, {"kind": "patchcore", "meta": {"model": "padim"}}],
)  # fmt: skip
def test_a_meta_of_another_kind_is_never_taken_for_patchcore(more: dict[str, Any]) -> None:
    with pytest.raises(BadMeta, match=r"padim|vae"):
        asked(**more).first_meta()


def test_what_goes_on_from_a_version_stays_of_its_kind() -> None:
    before = Meta.parse(FIRST)
    assert asked(kind="patchcore", meta={"coreset_ratio": 0.2}).meta_after(before) == before.with_(
        coreset_ratio=0.2
    )
    vae = {"model": "vae", "latent_dim": 8}
    for more in ({"kind": "padim"}, {"meta": vae}, {"meta": {"coreset_ratio": 5}}):
        with pytest.raises(BadMeta):
            asked(**more).meta_after(before)


@pytest.mark.parametrize(
    "changes",
    [{"feature_power": 0.5}, {"centre_weight": 0}, {"layers": ["blocks.2"]}, {"grid": "blocks.2"}],
)
def test_other_features_need_a_training_from_nothing(changes: dict[str, Any]) -> None:
    before, [key] = Meta.parse(FIRST), changes
    with pytest.raises(BadMeta, match=rf'bolt was learned with {key} .*with "update": false'):
        asked(meta=changes).meta_after(before)
    assert asked(meta=changes, update=False).meta_after(before) == before.with_(**changes)
    assert asked(meta={"coreset_ratio": 0.2, "feature_power": 0.7}).meta_after(before)


def test_what_is_said_and_what_is_absent_are_the_same_features() -> None:
    before = Meta.parse({**FIRST, "centre_weight": None, "feature_power": None})
    assert asked(meta={"centre_weight": 0, "feature_power": 1}).meta_after(before)


def test_where_every_version_was_held_nothing_begins_anew_unless_a_kind_is_said(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "models")
    assert asked().start(store) is None
    version = store.take_in("bolt", tiny_bundle(tmp_path / "bundle"), {})
    assert asked().start(store) == version
    store.record_gate("bolt", version, {"ok": False, "reasons": ["It sees nothing."]})
    with pytest.raises(BadMeta, match=f'"version": "{version}"; or say a kind, to begin anew'):
        asked().start(store)
    assert asked(kind="patchcore").start(store) is None
    assert asked(version=version).start(store) == version
