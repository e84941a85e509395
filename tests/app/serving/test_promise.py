"""Claims about versions that should not judge unseen: held, let through by a person, and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings
from app.watching.doctor.command import examine
from engines.meta import Meta
from engines.store.versions import META
from support.line import NAME, Line, line
from support.plans import tiny_bank, tiny_bundle
from support.server import RAW, serving

ASKS = {"KENSA_GATE_FOUND": "0.2"}  # which is the default
SEES: dict[str, Any] = {
    "normals": 20, "parts": 20, "false_rejects": 0.01, "cap": 0.05, "rejected": 0, "at_least": 0.0,
    "at_most": 0.14, "parts_needed": 299, "defects": 0,
    "drawn": {"found": 4, "of": 16, "scores": [20.0] * 12 + [40.0] * 4},
}  # fmt: skip
BLIND = {"drawn": {"found": 1, "of": 16, "scores": [20.0] * 15 + [40.0]}}
DOUBTFUL: dict[str, tuple[dict[str, Any], str]] = {
    "blind": (BLIND, "It finds only 1 of 16 drawn defects"),
    "untrained": ({"weights": "untrained"}, "weights of its backbone are untrained"),
    "rejects": ({"rejected": 5, "at_least": 0.104}, "It rejects 5 of 20 good parts"),
}


def bundle(folder: Path, seed: int = 1, **calibration: Any) -> Path:
    """A tiny model whose training says so; its threshold is raw 30, of 0 to 100."""
    made = tiny_bundle(folder, tiny_bank(seed))
    meta = Meta.read(made / META)
    meta.with_(calibration={**SEES, **calibration}).write(made / META)
    return made


def degraded(running: Line) -> str:
    return " ".join(running.server.client.get("/healthz").json()["degraded"])


def findings(folder: Path) -> str:
    settings = Settings(data_dir=folder / "data", cache_dir=folder / "cache", port=1)
    found = examine(settings, folder / "no such root").findings
    return " ".join(one.what for one in found if one.level == "wrong")


def published(running: Line, made: Path) -> dict[str, Any]:
    """The first version, once the gate has seen it."""
    running.wait(running.publish(made), "live", "held")
    found: dict[str, Any] = running.model()["versions"][0]
    return found


def test_a_first_version_that_sees_goes_live_and_says_what_it_can_promise(tmp_path: Path) -> None:
    with line(tmp_path, **ASKS) as running:
        found = published(running, bundle(tmp_path / "new"))
        assert found["state"] == "live"
        assert found["calibration"] == {
            "normals": 20, "parts": 20, "false_rejects": 0.01, "rejected": 0, "at_most": 0.14,
            "parts_needed": 299, "defects": 0, "misses": None, "drawn": 16, "found": 4,
            "untrained": False,
        }  # fmt: skip
        assert degraded(running) == ""
    assert findings(tmp_path) == ""


@pytest.mark.parametrize("why", DOUBTFUL)
def test_a_first_version_that_is_doubted_waits_for_a_person_and_is_named_while_it_judges(
    why: str, tmp_path: Path
) -> None:
    calibration, sentence = DOUBTFUL[why]
    with line(tmp_path, **ASKS) as running:
        found = published(running, bundle(tmp_path / "new", **calibration))
        assert found["state"] == "held"
        assert len(found["gate"]["reasons"]) == 1
        assert sentence in found["gate"]["reasons"][0]
        assert running.model()["live"] is None
        held = f"No version of {NAME} judges yet: {found['version']} is held. "
        client = running.server.client
        judged = client.post(f"/infer?model={NAME}", content=b"any", headers=RAW)
        assert (judged.status_code, judged.json()["code"]) == (503, "not_ready")
        for said in (judged.json()["error"], client.get("/readyz").json()["error"],
                     running.model()["problem"], degraded(running)):  # fmt: skip
            assert held in said
            assert sentence in said
        assert held in findings(tmp_path)
        assert running.activate(found["version"]).status_code == 200
        assert running.state(found["version"]) == "live"
        assert f"{NAME} {found['version']}: " in degraded(running)
        assert sentence in degraded(running)
    assert sentence in findings(tmp_path)


@pytest.mark.parametrize(("why", "state"), [("blind", "live"), ("untrained", "live"),
                                            ("rejects", "held")])  # fmt: skip
def test_with_a_share_of_nothing_nobody_asks_whether_it_sees(
    why: str, state: str, tmp_path: Path
) -> None:
    with line(tmp_path, KENSA_GATE_FOUND="0") as running:
        assert published(running, bundle(tmp_path / "new", **DOUBTFUL[why][0]))["state"] == state
        assert ("is held" in degraded(running)) == (state == "held")


def test_after_a_restart_it_still_says_that_its_only_version_is_held(tmp_path: Path) -> None:
    with line(tmp_path, **ASKS) as running:
        held = published(running, bundle(tmp_path / "new", **BLIND))
    with serving(tmp_path, **ASKS) as server:
        said = server.client.get("/readyz")
        assert said.status_code == 503
        assert f"{held['version']} is held. It finds only 1 of 16" in said.json()["error"]


def test_the_folder_of_the_setting_goes_live_and_is_named(tmp_path: Path) -> None:
    """KENSA_MODEL_DIR is what a person wants."""
    made = bundle(tmp_path / "new", **BLIND)
    settings = {"KENSA_MODEL_DIR": str(made), "KENSA_MODEL_NAME": NAME}
    with line(tmp_path, **ASKS, **settings) as running:
        assert running.model()["versions"][0]["state"] == "live"
        assert "may be blind" in degraded(running)


def test_an_update_whose_threshold_moved_far_waits_and_a_change_of_the_threshold_does_not(
    tmp_path: Path,
) -> None:
    before = bundle(tmp_path / "before")
    meta = Meta.read(before / META).with_(image_threshold_auto=28.0)
    meta.write(before / META)
    moved = bundle(tmp_path / "moved", before=28.0, moved=2.4)
    with line(tmp_path, before, **ASKS) as running:
        held = published(running, moved)
        assert held["state"] == "held"
        assert held["gate"]["reasons"][0].startswith("The threshold moved from 28 to 30, by 2.4")
        assert running.activate(held["version"]).status_code == 200
        assert degraded(running) == ""  # a person has looked
        answer = running.server.client.put(
            f"/models/{NAME}/threshold", json={"raw": 33.0, "reason": "Scratches.", "gate": True}
        )
        assert answer.status_code == 200, answer.text
        assert running.wait(answer.json()["version"], "live", "held") == "live"


def test_sight_is_that_of_the_threshold_in_force(tmp_path: Path) -> None:
    """A lower one makes a blind model see, a higher one makes one blind; both are said at once."""
    with line(tmp_path, bundle(tmp_path / "new"), **ASKS) as running:

        def changed(raw: float) -> dict[str, Any]:
            answer = running.server.client.put(
                f"/models/{NAME}/threshold", json={"raw": raw, "reason": "To see."}
            )
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        told = running.server.client.get(f"/models/{NAME}/threshold").json()
        assert (told["found"], told["drawn"]) == (4, 16)
        assert changed(45.0)["found"] == 0
        assert "finds only 0 of 16" in degraded(running)
        assert changed(15.0)["found"] == 16
        assert degraded(running) == ""
        assert running.model()["versions"][0]["calibration"]["found"] == 16


def test_of_a_version_of_an_older_kensa_nothing_is_said(tmp_path: Path) -> None:
    made = tiny_bundle(tmp_path / "new", tiny_bank(1))
    old = {"method": "best_f1", "normals": 3, "defects": 3, "false_rejects": 1, "misses": 0}
    Meta.read(made / META).with_(calibration=old).write(made / META)
    with line(tmp_path, **ASKS) as running:
        found = published(running, made)
        assert (found["state"], found["calibration"]) == ("live", None)
        assert degraded(running) == ""
