"""How parts score: the numbers, and the histogram of them. Over HTTP."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest

from app.decisions.database import Filter, open_or_make
from engines.meta import Meta
from engines.store.known_scores import KnownScores
from support.decisions import decision
from support.line import NAME, Line, line, variant
from support.server import agreed
from support.waiting import until

CATEGORY = "sample_bracket"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def pictures(sample_data: Path) -> list[bytes]:
    """Four good ones, then four defects."""
    folder = sample_data / "test" / CATEGORY
    kinds = [sorted((folder / group).iterdir())[:4] for group in ("normal", "anomaly")]
    return [path.read_bytes() for paths in kinds for path in paths]


@pytest.fixture(scope="module")
def running(
    kensa_model: Path, pictures: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Line]:
    """After eight parts, of which the first is marked as good and the last as a defect."""
    with line(tmp_path_factory.mktemp("scores"), kensa_model) as found:
        for number, picture in enumerate(pictures):
            answer = found.server.infer(picture, **{"X-Request-ID": f"part-{number}"})
            assert answer.status_code == 200, answer.text
        until(lambda: len(decisions(found)) == len(pictures))
        for number, label in ((0, "good"), (7, "defect")):
            path, body = f"/decisions/part-{number}/label", {"label": label}
            assert found.server.client.post(path, json=body).status_code == 200
        yield found


def decisions(running: Line) -> list[dict[str, Any]]:
    """Oldest first."""
    found: list[dict[str, Any]] = running.server.client.get("/decisions").json()["decisions"]
    return found[::-1]


def scores(running: Line) -> dict[str, Any]:
    answer = running.server.client.get(f"/models/{NAME}/scores")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def drawing(running: Line, **query: str) -> httpx.Response:
    return running.server.client.get(f"/models/{NAME}/scores.svg", params=query)


def test_the_scores_of_training_and_of_the_last_parts_are_told(
    running: Line, kensa_model: Path
) -> None:
    found, meta = scores(running), Meta.read(kensa_model / "meta.json")
    known = meta.calibration or {}
    assert found["normals"] == KnownScores.read(kensa_model).highest().tolist()
    assert found["drawn"] == known["drawn"]["scores"]
    assert len(found["defects"]) == known["defects"] > 0
    assert sum(one <= meta.image_threshold_auto for one in found["defects"]) == known["misses"]
    raw = [one["raw_score"] for one in decisions(running)]
    assert found["marked_good"] == raw[:1]
    assert found["marked_defect"] == raw[-1:]
    assert found["parts"] == raw[-2:0:-1]  # the newest first
    limit = running.server.client.get(f"/models/{NAME}/threshold").json()
    assert (found["version"], found["raw_threshold"]) == (limit["version"], limit["raw"])


def test_a_limit_can_be_set_from_low_to_high_and_no_farther(running: Line) -> None:
    found = scores(running)
    span = found["high"] - found["low"]
    path = f"/models/{NAME}/threshold/preview"
    for raw, status in (
        (found["low"], 200), (found["high"], 200),
        (found["low"] - 0.01 * span, 422), (found["high"] + 0.01 * span, 422),
    ):  # fmt: skip
        assert running.server.client.get(path, params={"raw": raw}).status_code == status


def test_parts_that_another_model_scored_are_left_out_and_those_of_another_limit_are_not(
    kensa_model: Path, pictures: list[bytes], tmp_path: Path
) -> None:
    with line(tmp_path, kensa_model) as running:
        running.score(pictures[0])
        body = {"threshold": 0.6, "reason": "as this test needs it"}
        assert running.server.client.put(f"/models/{NAME}/threshold", json=body).status_code == 200
        running.score(pictures[1])
        until(lambda: len(scores(running)["parts"]) == 2)
        other = running.publish(variant(kensa_model, tmp_path / "other", bank=1.05))
        assert running.activate(other).status_code == 200
        assert scores(running)["parts"] == []
        running.score(pictures[1])
        until(lambda: len(scores(running)["parts"]) == 1)


def test_without_a_record_there_are_the_scores_of_training(
    kensa_model: Path, tmp_path: Path
) -> None:
    with line(tmp_path, kensa_model, KENSA_RECORD="off") as running:
        assert scores(running)["normals"]
        assert scores(running)["parts"] == []
        assert drawing(running).status_code == 200


@pytest.mark.parametrize("damage", ["x", [1, "x"], {"scores": [float("nan")]}, {"scores": "x"}])
def test_a_calibration_that_says_nothing_of_scores_leaves_them_out(
    damage: Any, kensa_model: Path, tmp_path: Path
) -> None:
    model = variant(
        kensa_model, tmp_path / "model",
        calibration={"drawn": damage, "defect_scores": damage},
    )  # fmt: skip
    with line(tmp_path, model) as running:
        found = scores(running)
        assert (found["drawn"], found["defects"]) == ([], [])
        assert drawing(running).status_code == 200


def test_the_histogram_is_an_svg_whose_attributes_say_where_scores_lie(running: Line) -> None:
    answer, found = drawing(running), scores(running)
    assert answer.headers["content-type"] == "image/svg+xml"
    svg = ElementTree.fromstring(answer.text)
    left, width, low, high = (
        float(svg.get(f"data-{name}", "")) for name in ("left", "width", "low", "high")
    )
    assert low < found["low"] < found["high"] < high
    line_at = svg.find(f"{SVG}g[@class='threshold']/{SVG}line")
    assert line_at is not None
    across = (found["raw_threshold"] - low) / (high - low)
    assert float(line_at.get("x1", "")) == pytest.approx(left + across * width, abs=0.06)
    marks = [path.get("d", "").count("M") for path in svg.iter(f"{SVG}path")]
    groups = ("normals", "defects", "drawn", "parts", "marked_good", "marked_defect")
    assert marks == [len(found[name]) for name in groups if found[name]]


def test_a_score_far_away_does_not_squeeze_the_others(kensa_model: Path, tmp_path: Path) -> None:
    found = Meta.read(kensa_model / "meta.json").calibration or {}
    model = variant(kensa_model, tmp_path / "model", calibration={**found, "defect_scores": [1e6]})
    with line(tmp_path, model) as running:
        svg, known = drawing(running).text, scores(running)
        (high,) = re.findall(r'data-high="([^"]+)"', svg)
        assert float(high) < known["high"] + (known["high"] - known["low"])
        assert known["defects"] == [1e6]


def test_the_histogram_speaks_japanese(running: Line) -> None:
    assert "しきい値" in drawing(running, lang="ja").text
    assert "threshold" in drawing(running).text
    assert agreed(drawing(running, lang="de")) == "bad_request"


def test_a_model_that_is_not_in_memory_or_not_there_is_told_so(
    kensa_model: Path, tmp_path: Path
) -> None:
    with line(tmp_path, kensa_model) as running:
        client = running.server.client
        assert client.post(f"/v2/repository/models/{NAME}/unload").status_code == 200
        for path in ("scores", "scores.svg"):
            assert agreed(client.get(f"/models/{NAME}/{path}")) == "not_ready"
            assert agreed(client.get(f"/models/nope/{path}")) == "unknown_model"


def test_of_very_many_parts_the_last_are_told_and_quickly(
    kensa_model: Path, pictures: list[bytes], tmp_path: Path
) -> None:
    with line(tmp_path, kensa_model) as running:
        running.score(pictures[0])
        until(lambda: len(decisions(running)) == 1)
    with open_or_make(tmp_path / "data" / "decisions") as database:
        one = database.find(Filter(), 1)[0].decision
        many = [
            decision(**{**one.values(), "at": one.at + n, "id": f"p{n}", "raw_score": float(n)})
            for n in range(1, 5001)
        ]
        database.append(many)
    with line(tmp_path) as running:
        began = time.perf_counter()
        found = scores(running)["parts"]
        assert time.perf_counter() - began < 1
        assert found == [float(n) for n in range(5000, 3000, -1)]
