"""A picture that is not usable gets a verdict of its own, and counts and teaches nowhere else."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.decisions.past_parts import past_parts
from app.serving.usable import FROZEN, LAST, Measured, Usable
from engines.camera import CODES, NAMES, Camera
from engines.serving.resident import Resident
from engines.store.datasets import Datasets
from engines.verdict import judge
from kensa_client.verdict import read_verdict
from support.camera import Picture, blurred, dark, learned, part, shifted, turned
from support.fake_model import fake_model
from support.in_process import in_process, settings_of
from support.server import RAW

NORMAL, ANOMALY = 0.5, 1.9  # raw scores below the limit of the fake model, and above
SHARE = {"record_sample": 1.0}  # keep the picture of each


@pytest.fixture(scope="module")
def known() -> Camera:
    return learned(map(part, range(24)))


def model(known: Camera | None, score: float = NORMAL, version: str = "0") -> Resident:
    found = fake_model(score)
    content = known.content() if known is not None else None
    return replace(found, meta=found.meta.with_(camera=content), version=version)


def png(picture: Picture) -> bytes:
    data: bytes = cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
    return data


def asked(
    folder: Path,
    resident: Resident,
    work: Callable[[httpx.AsyncClient, Any], Awaitable[Any]],
    unusable: str = "all",
    **settings: Any,
) -> Any:
    """Do something with an application that has this one model."""

    async def run(client: httpx.AsyncClient, app: Any) -> Any:
        app.state.inspector.residents.put(resident)
        return await work(client, app)

    return in_process(settings_of(folder, unusable=unusable, **settings), run)


def sent(
    folder: Path, resident: Resident, *pictures: Picture, **settings: Any
) -> list[dict[str, Any]]:
    """What is answered to some pictures, one after another."""

    async def work(client: httpx.AsyncClient, _: Any) -> list[dict[str, Any]]:
        return [
            (await client.post("/infer", content=png(one), headers=RAW)).json() for one in pictures
        ]

    found: list[dict[str, Any]] = asked(folder, resident, work, **settings)
    return found


# The verdict


@pytest.mark.parametrize("score", [NORMAL, ANOMALY])
def test_a_dark_picture_is_unusable_whatever_the_model_says_of_the_part(
    known: Camera, tmp_path: Path, score: float
) -> None:
    good, bad = sent(tmp_path, model(known, score), part(50), dark(part(51)))
    assert good["label"] == ("Normal" if score == NORMAL else "Anomaly")
    assert good["unusable"] is None
    assert (bad["label"], bad["is_anomalous"]) == ("Unusable", True)
    assert bad["raw_score"] == pytest.approx(score)
    assert bad["unusable"]["code"] == "camera_dark"
    assert bad["unusable"]["reason"].startswith("The picture is too dark: it has a brightness of")


def test_nothing_is_looked_at_where_nobody_asks(
    known: Camera, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.serving.inspection.measured", None)  # who calls it fails
    (found,) = sent(tmp_path, model(known), np.zeros((256, 256, 3), np.uint8), unusable="")
    assert (found["label"], found["unusable"]) == ("Normal", None)


def test_only_what_is_asked_for_is_named(known: Camera, tmp_path: Path) -> None:
    pictures = [dark(part(50)), blurred(part(51)), dark(blurred(part(52)))]
    found = sent(tmp_path, model(known), *pictures, unusable="blurred, shifted")
    assert [one["label"] for one in found] == ["Normal", "Unusable", "Unusable"]
    assert found[2]["unusable"]["code"] == "camera_blurred"


def test_a_plc_that_knows_two_words_reads_ng_and_one_that_knows_three_reads_why(
    known: Camera, tmp_path: Path
) -> None:
    async def work(client: httpx.AsyncClient, _: Any) -> list[tuple[str, str | None, str | None]]:
        said = []
        for picture in (dark(part(50)), part(51)):
            for query in ("", "?words=2", "?words=3"):
                answer = await client.post(
                    f"/infer{query}", content=png(picture), headers={**RAW, "Accept": "text/plain"}
                )
                heads = (answer.headers.get(f"X-Kensa-{one}") for one in ("Label", "Unusable"))
                said.append((answer.text, *heads))
        wrong = await client.post("/infer?words=4", content=png(part(51)), headers=RAW)
        assert (wrong.status_code, wrong.json()["code"]) == (422, "bad_request")
        return said

    dark_one, good_one = ("Unusable", "camera_dark"), ("Normal", None)
    score = f"{judge(NORMAL, model(known).scale).score:.4f}"
    assert asked(tmp_path, model(known), work, unusable="dark") == [
        (f"NG {score}\n", *dark_one), (f"NG {score}\n", *dark_one),
        ("UNUSABLE camera_dark\n", *dark_one),
        *[(f"OK {score}\n", *good_one)] * 3,
    ]  # fmt: skip


def test_the_open_inference_route_says_it_of_each_image(known: Camera, tmp_path: Path) -> None:
    pictures = np.stack([part(50), dark(part(51)), turned(90)(part(52))])
    image = {"name": "image", "datatype": "UINT8", "shape": list(pictures.shape)}
    parameters = {"binary_data_size": pictures.nbytes}

    async def work(client: httpx.AsyncClient, _: Any) -> Any:
        head = json.dumps({"inputs": [{**image, "parameters": parameters}]}).encode()
        answer = await client.post(
            "/v2/models/fake/infer",
            content=head + pictures.tobytes(),
            headers={"Inference-Header-Content-Length": str(len(head))},
        )
        decisions = (await client.get("/decisions")).json()["decisions"]
        return answer.json(), [(one["verdict"], one["code"]) for one in decisions]

    answer, decisions = asked(tmp_path, model(known), work)
    outputs = {one["name"]: one.get("data") for one in answer["outputs"]}
    assert outputs["label"] == ["Normal", "Unusable", "Unusable"]
    assert outputs["is_anomalous"] == [False, True, True]
    assert answer["parameters"]["unusable"] == "1 camera_dark, 2 camera_turned"
    assert decisions[::-1] == [
        ("normal", None), ("unusable", "camera_dark"), ("unusable", "camera_turned"),
    ]  # fmt: skip


def test_the_client_never_takes_it_for_a_good_part(known: Camera, tmp_path: Path) -> None:
    async def work(client: httpx.AsyncClient, _: Any) -> bytes:
        head = {**RAW, "X-Request-ID": "one"}
        return (await client.post("/infer", content=png(dark(part(50))), headers=head)).content

    body = asked(tmp_path, model(known), work)
    found = read_verdict(body, "one", "", None)
    assert not found
    assert (found.label, found.unusable) == ("Unusable", "camera_dark")
    for old, new in (
        (b'"Unusable"', b'"Normal"'),
        (b'"is_anomalous":true', b'"is_anomalous":false'),
    ):
        with pytest.raises(ValueError, match="label is"):
            read_verdict(body.replace(old, new), "one", "", None)


# Frozen


def frozen(parts: list[tuple[str, str]], asked_for: str = "camera_frozen") -> list[bool]:
    """Whether each is named: its picture, and what its part is called."""
    usable, resident = Usable(frozenset({asked_for})), fake_model(NORMAL)
    return [
        usable.why_not(resident, Measured(None, picture), name) is not None
        for picture, name in parts
    ]


def test_the_third_of_the_same_picture_is_frozen_and_so_is_each_after_it() -> None:
    assert FROZEN == 3
    assert frozen([("a", "")] * 5) == [False, False, True, True, True]
    assert frozen([("a", str(n)) for n in range(4)]) == [False, False, True, True]
    assert frozen([("a", ""), ("b", ""), ("a", ""), ("c", ""), ("a", "")])[-1]  # of two cameras


def test_a_part_that_is_sent_again_is_not_frozen_and_a_camera_that_goes_on_is_forgiven() -> None:
    assert not any(frozen([("a", "part 1")] * 10))
    others = [(str(n), "") for n in range(LAST)]
    assert frozen([*[("a", "")] * 3, *others, ("a", "")])[3:] == [False] * (LAST + 1)


def test_frozen_pictures_are_named_without_knowing_what_pictures_look_like(tmp_path: Path) -> None:
    still, other = part(60), part(61)
    found = sent(tmp_path, model(None), still, still, still, other, repeat_s=0)
    assert [one["label"] for one in found] == ["Normal", "Normal", "Unusable", "Normal"]
    assert found[2]["unusable"] == {
        "code": "camera_frozen",
        "reason": "The camera sends the same picture again and again: 3 times within the last 8"
        " parts.",
    }


def test_a_plc_that_asks_for_the_same_part_again_and_again_freezes_nothing(
    known: Camera, tmp_path: Path
) -> None:
    async def work(client: httpx.AsyncClient, _: Any) -> list[str]:
        query = "/infer?part=one"
        return [
            (await client.post(query, content=png(part(60)), headers=RAW)).json()["label"]
            for _ in range(6)
        ]

    for repeat_s in (0, 60):
        assert asked(tmp_path, model(known), work, repeat_s=repeat_s) == ["Normal"] * 6


def test_a_black_picture_that_comes_again_and_again_is_dark_first(
    known: Camera, tmp_path: Path
) -> None:
    black = np.zeros((256, 256, 3), np.uint8)
    found = sent(tmp_path, model(known), *[black] * 4)
    assert [one["unusable"]["code"] for one in found] == ["camera_dark"] * 4
    still = sent(tmp_path, model(known), *[black] * 4, unusable="frozen")
    assert [one["label"] for one in still] == ["Normal", "Normal", "Unusable", "Unusable"]


def test_a_new_version_begins_anew(known: Camera) -> None:
    usable = Usable(frozenset(CODES))
    seen = Measured(None, "a")
    old, new = model(known), model(known, version="1")
    assert [usable.why_not(one, seen, "") is None for one in (old, old, new, new, new)] == [
        True, True, True, True, False,
    ]  # fmt: skip


def test_a_part_of_several_views_says_why_it_is_unusable_and_so_does_the_view(
    known: Camera, tmp_path: Path
) -> None:
    async def work(client: httpx.AsyncClient, _: Any) -> list[httpx.Response]:
        sends = [("left", dark(part(61))), ("top", part(62))]
        found = [
            await client.post(f"/parts/A/views/{view}?of=2", content=png(one), headers=RAW)
            for view, one in sends
        ]
        text = {"Accept": "text/plain"}
        return [*found, await client.get("/parts/A/verdict", headers=text)]

    first, last, line = asked(tmp_path, model(known), work)
    assert [one["code"] for one in first.json()["views"]] == ["camera_dark"]
    assert "x-kensa-unusable" not in first.headers  # of the part, which is pending
    found = last.json()
    assert (found["verdict"], found["code"]) == ("unusable", "camera_dark")
    assert [(one["view"], one["code"]) for one in found["views"]] == [
        ("left", "camera_dark"), ("top", None),
    ]  # fmt: skip
    assert line.text.startswith("NG ")
    assert [one.headers["x-kensa-unusable"] for one in (last, line)] == ["camera_dark"] * 2


# What counts it, and what does not learn from it


def test_it_is_recorded_and_counted_by_its_code_and_nowhere_else(
    known: Camera, tmp_path: Path
) -> None:
    pictures = [part(50), dark(part(51)), dark(part(52)), shifted(right=40)(part(53))]

    async def work(client: httpx.AsyncClient, app: Any) -> Any:
        first = (await client.get("/metrics")).text
        for picture in pictures:
            await client.post("/infer", content=png(picture), headers=RAW)
        unusable = (await client.get("/decisions?verdict=unusable")).json()["decisions"]
        rejects = (await client.get("/decisions?verdict=anomaly")).json()["decisions"]
        spans = (await client.get("/statistics")).json()["spans"]
        table = (await client.get("/statistics.csv")).text
        page = (await client.get("/statistics.html?shift=running")).text
        japanese = (await client.get("/statistics.html?shift=running&lang=ja")).text
        health = (await client.get("/healthz")).json()
        last = (await client.get("/metrics")).text
        recent = len(app.state.inspector.recent("fake"))
        return (first, unusable, rejects, spans, table, page, japanese, health, last, recent)

    first, unusable, rejects, spans, table, page, japanese, health, last, recent = asked(
        tmp_path, model(known, ANOMALY), work
    )
    assert [one["code"] for one in unusable] == ["camera_shifted", "camera_dark", "camera_dark"]
    assert all(one["has_picture"] and one["score"] is not None for one in unusable)
    assert len(rejects) == 1
    (span,) = spans
    assert (span["parts"], span["rejects"], span["reject_share"]) == (1, 1, 1.0)
    assert span["unusable"] == {"camera_dark": 2, "camera_shifted": 1}
    assert "camera_dark 2" in table
    assert "camera_shifted 1" in table
    for text, words in ((page, ("Picture unusable", "too dark", "shifted")),
                        (japanese, ("画像が使用不可", "暗すぎる", "位置ずれ"))):  # fmt: skip
        assert all(word in text for word in words)
    assert health["inspections"] == {"normal": 0, "anomaly": 1, "unusable": 3, "refused": 0}
    assert series(first, "kensa_unusable_total") == dict.fromkeys(CODES, 0.0)
    assert series(last, "kensa_unusable_total") == {
        **dict.fromkeys(CODES, 0.0), "camera_dark": 2.0, "camera_shifted": 1.0,
    }  # fmt: skip
    assert series(last, "kensa_verdicts_total", "label") == {
        "Normal": 0.0, "Anomaly": 1.0, "Unusable": 3.0,
    }  # fmt: skip
    assert 'kensa_score_count{model="fake"} 1.0' in last
    assert recent == 1  # the gate is shown no other


def series(text: str, name: str, label: str = "code") -> dict[str, float]:
    return {
        one.labels[label]: one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if one.name == name
    }


def test_a_version_on_probation_is_not_judged_by_pictures_that_say_nothing(
    known: Camera, tmp_path: Path
) -> None:
    async def work(client: httpx.AsyncClient, app: Any) -> list[str]:
        counted: list[str] = []
        app.state.inspector.on_verdict = lambda _, verdict: counted.append(verdict.label)
        for seed in range(50, 53):
            await client.post("/infer", content=png(dark(part(seed))), headers=RAW)
        await client.post("/infer", content=png(part(53)), headers=RAW)
        return counted

    assert asked(tmp_path, model(known), work) == ["Normal"]


def test_nothing_is_learned_from_it_whatever_a_person_says(known: Camera, tmp_path: Path) -> None:
    async def work(client: httpx.AsyncClient, app: Any) -> Any:
        for picture in (part(50), dark(part(51))):
            answer = await client.post("/infer", content=png(picture), headers=RAW)
            said = {"label": "good"}
            await client.post(f"/decisions/{answer.json()['id']}/label", json=said)
        answer = await client.post("/datasets/fake/from-decisions", json={"test_share": 0})
        past = past_parts(app.state.recorder, "fake").past
        datasets: Datasets = app.state.datasets
        return answer.status_code, len(past), datasets.count("fake", "train")

    assert asked(tmp_path, model(known), work, **SHARE) == (201, 1, 1)


# Versions that know nothing of their pictures


def test_a_version_of_an_older_kensa_judges_as_ever_and_healthz_says_to_train_it_again(
    tmp_path: Path,
) -> None:
    async def work(client: httpx.AsyncClient, _: Any) -> Any:
        answer = await client.post("/infer", content=png(dark(part(50), 0.2)), headers=RAW)
        return answer.json()["label"], (await client.get("/healthz")).json()["degraded"]

    label, degraded = asked(tmp_path, model(None), work)
    assert label == "Normal"
    (sentence,) = [one for one in degraded if "look like" in one]
    assert sentence.startswith("fake 0: its training did not note what its pictures look like")
    assert sentence.endswith("Train it again.")
    _, quiet = asked(tmp_path, model(None), work, unusable="")
    assert not [one for one in quiet if "look like" in one]


def test_a_picture_of_which_nothing_is_told_is_no_drift(known: Camera) -> None:
    values = np.full(len(NAMES), np.nan)
    assert known.faults(values, [values] * 4) == []
