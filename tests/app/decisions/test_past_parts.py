"""Decisions of the record are shown to a new version before it judges."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app.decisions.past_parts import MOST, past_parts
from app.decisions.recorder import Recorder, _Waiting
from app.serving import gate_replay
from app.serving.gate_replay import GateReplay
from app.settings import Settings
from engines.meta import Meta
from engines.serving.gate import Past, Record
from engines.store.versions import Store
from support.damage import png
from support.decisions import decision
from support.in_process import in_process, settings_of
from support.plans import SIDE, tiny_bundle, tiny_score
from support.server import RAW

NAME = "part"
OLD, NEW = 110, 150  # the lightest grey that passes
SETTINGS: dict[str, Any] = {"record_near": 0.0, "record_sample": 1.0}  # all pictures are kept
Work = Callable[[httpx.AsyncClient, Any], Any]


def grey(value: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.full((SIDE, SIDE, 3), value, np.uint8)


def version_of(folder: Path, limit: int, offset: float) -> Path:
    """A model that rejects what is lighter than a limit."""
    bundle = tiny_bundle(folder, offset=offset)
    auto = tiny_score(grey(limit), offset=offset)
    Meta.read(bundle / "meta.json").with_(image_threshold_auto=auto).write(bundle / "meta.json")
    return bundle


class Shown:
    """A line whose parts are grey; some of them are marked, and then another version comes."""

    def __init__(self, folder: Path, marks: dict[int, str | None], **settings: Any) -> None:
        self.folder, self.marks = folder, marks
        self.settings = settings_of(folder, **SETTINGS, **settings)
        self.store = Store(self.settings.data / "models")
        self.old = self.store.take_in(NAME, version_of(folder / "old", OLD, 1.0), {})
        self.store.activate(NAME, self.old)
        self.new, self.live = "", ""
        self.gate: dict[str, Any] = {}

    def run(self, before: Work | None = None, after: Work | None = None, limit: int = NEW) -> None:
        async def work(client: httpx.AsyncClient, app: Any) -> None:
            for value, label in self.marks.items():
                await self._inspect(client, value, label)
            if before is not None:
                await before(client, app)
            bundle = version_of(self.folder / "new", limit, 2.0)
            self.new = self.store.take_in(NAME, bundle, {"activate": True})
            until = time.monotonic() + 30
            while (found := self.store.gate(NAME, self.new)) is None:
                assert time.monotonic() < until, "the gate decides nothing"
                await asyncio.sleep(0.05)
            self.gate = found
            while not found["reasons"] and self.store.pointer(NAME).live != self.new:  # type: ignore[union-attr]
                assert time.monotonic() < until, "it was let in, and does not go live"
                await asyncio.sleep(0.05)
            body = (await client.get(f"/models/{NAME}/versions/{self.new}")).json()
            assert body["gate"]["record"] == found["record"], body
            self.live = self.store.pointer(NAME).live  # type: ignore[union-attr]
            if after is not None:
                await after(client, app)

        in_process(self.settings, work)

    @staticmethod
    async def _inspect(client: httpx.AsyncClient, value: int, label: str | None) -> None:
        headers = {**RAW, "X-Request-ID": f"grey-{value}", "X-Part": f"P/{value}"}
        answer = await client.post("/infer", content=png(grey(value)), headers=headers)
        assert answer.json()["is_anomalous"] == (value > OLD), answer.text
        if label is not None:
            marked = await client.post(f"/decisions/grey-{value}/label", json={"label": label})
            assert marked.is_success, marked.text

    def flips(self) -> dict[str, tuple[str, str]]:
        return {one["id"]: (one["was"], one["becomes"]) for one in self.gate["record"]["flips"]}


# ---- what the gate says of them ------------------------------------------------------------------


def test_what_the_gate_says_of_each_decision_is_what_a_replay_by_each_version_says(
    tmp_path: Path,
) -> None:
    marks = {
        60: "good",
        80: None,
        120: "good",
        130: None,
        140: "unusable",
        180: None,
        200: "defect",
    }
    shown = Shown(tmp_path, marks)

    async def replayed(client: httpx.AsyncClient, _: Any) -> None:
        by_id = {one["id"]: one for one in shown.gate["record"]["flips"]}
        for value in marks:
            id_ = f"grey-{value}"
            said = []
            for version in (shown.old, shown.new):
                path = f"/decisions/{id_}/replay"
                answer = await client.post(path, params={"version": version})
                assert answer.is_success, answer.text
                said.append(answer.json())
            flips = said[0]["verdict"] != said[1]["verdict"]
            assert (id_ in by_id) == (flips and value != 140)  # of which nothing can be said
            for when, one in zip(("old", "new"), said, strict=True) if id_ in by_id else ():
                for name in ("score", "threshold", "raw_score", "raw_threshold"):
                    assert by_id[id_][f"{when}_{name}"] == one[name]
            assert (await client.get(f"/decisions/{id_}/image")).is_success

    shown.run(after=replayed)
    record = shown.gate["record"]
    assert shown.flips() == dict.fromkeys(("grey-120", "grey-130"), ("Anomaly", "Normal"))
    assert [(one["number"], one["part"], one["label"]) for one in record["flips"]] == [
        (3, "P/120", "good"), (4, "P/130", None),
    ]  # fmt: skip
    assert record["good"] == {"marked": 2, "rejected_before": 1, "rejected_now": 0}
    assert record["defect"] == {"marked": 1, "missed_before": 0, "missed_now": 0}
    assert record["unmarked"] == {"rejects": 2, "flips": 1}
    assert (record["left_out"], record["problem"]) == (0, None)
    assert shown.gate["groups"]["recent"] == {"images": 3, "flips": 1}  # of which nobody spoke


def test_a_marked_defect_that_was_found_and_passes_now_holds_the_version_and_is_named(
    tmp_path: Path,
) -> None:
    """However many verdicts may change."""
    shown = Shown(tmp_path, {140: "defect", 200: "defect"}, gate_flips=1.0)
    shown.run()
    assert shown.live == shown.old
    assert shown.gate["reasons"] == [
        "1 of 2 parts that were marked as defects were found, and pass now: grey-140."
    ]
    assert shown.gate["record"]["defect"] == {"marked": 2, "missed_before": 0, "missed_now": 1}


def test_good_parts_that_are_rejected_now_hold_a_version_where_they_are_too_many(
    tmp_path: Path,
) -> None:
    shown = Shown(tmp_path, {60: "good", 80: "good"})
    shown.run(limit=70)
    assert shown.live == shown.old
    assert shown.gate["reasons"] == [
        "1 of 2 parts that were marked as good are rejected now (allowed: 10%): grey-80."
    ]


@pytest.mark.parametrize(("limit", "label", "values"), [(NEW, "good", (120, 140)),
                                                        (70, "defect", (80, 100))])  # fmt: skip
def test_what_becomes_right_by_what_people_said_never_holds_a_version(
    tmp_path: Path, limit: int, label: str, values: tuple[int, ...]
) -> None:
    """Nor among the last parts of the line, where they still are: of these nobody knows."""
    shown = Shown(tmp_path, {60: None, **dict.fromkeys(values, label)}, gate_flips=0.0)
    shown.run(limit=limit)
    assert shown.gate["reasons"] == []
    assert shown.live == shown.new
    assert shown.flips().keys() == {f"grey-{value}" for value in values}
    assert shown.gate["groups"]["recent"] == {"images": 1, "flips": 0}


def test_rejects_that_nobody_marked_are_listed_and_hold_no_version_by_themselves(
    tmp_path: Path,
) -> None:
    shown = Shown(tmp_path, {120: None, 130: None}, gate_recent=0)
    shown.run()
    assert shown.live == shown.new
    assert shown.gate["record"]["unmarked"] == {"rejects": 2, "flips": 2}
    assert shown.flips().keys() == {"grey-120", "grey-130"}


# ---- what goes wrong ----------------------------------------------------------------------------


def test_a_version_goes_live_without_a_record(tmp_path: Path) -> None:
    shown = Shown(tmp_path, {120: None}, record="off", gate_recent=0)
    shown.run()
    assert shown.live == shown.new
    assert "KENSA_RECORD=on" in shown.gate["record"]["problem"]
    assert shown.gate["record"]["flips"] == []


def test_a_version_goes_live_where_the_record_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "decisions").write_text("in the way")
    shown = Shown(tmp_path, {120: None}, gate_recent=0)
    shown.run()
    assert shown.live == shown.new
    assert "not recorded" in shown.gate["record"]["problem"]


@pytest.mark.parametrize("how", ["slow", "raises"])
def test_a_version_goes_live_whatever_the_record_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(gate_replay, "AT_MOST_S", 0.3)
    let_go = threading.Event()

    def decisions_of(_: str) -> Record:
        if how == "raises":
            raise ValueError("nobody foresaw it")
        let_go.wait(60)
        return Record()

    async def broken(_: httpx.AsyncClient, app: Any) -> None:
        app.state.rollout.replay.decisions_of = decisions_of

    async def release(*_: Any) -> None:
        let_go.set()

    shown = Shown(tmp_path, {120: None}, gate_recent=0)
    shown.run(broken, release)
    assert shown.live == shown.new
    why = {"slow": "did not answer within", "raises": "nobody foresaw it"}[how]
    assert why in shown.gate["record"]["problem"]


def test_pictures_that_cannot_be_read_are_left_out_and_counted(tmp_path: Path) -> None:
    shown = Shown(tmp_path, {120: "good", 130: "good", 140: "good", 60: "good"})

    async def damage(client: httpx.AsyncClient, app: Any) -> None:
        await client.get("/decisions")  # all is written
        pictures = shown.settings.data / "decisions" / "pictures" / "0"
        (pictures / "1.image").write_bytes(b"no picture")
        (pictures / "2.image").unlink()
        numbers = [4]
        await asyncio.to_thread(app.state.recorder.read, lambda it: it.forget_pictures(numbers))

    shown.run(damage)
    assert shown.live == shown.new
    record = shown.gate["record"]
    assert record["left_out"] == 3
    assert record["good"] == {"marked": 1, "rejected_before": 1, "rejected_now": 0}
    assert shown.flips().keys() == {"grey-140"}


# ---- beside the line, within bounds -------------------------------------------------------------


class Looks:
    """An inspector that writes down what it is asked."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen

    async def look(self, data: bytes, _: Any) -> str:
        self.seen.append(f"judged {data.decode()}")
        return "said"


def past(number: int, picture: Callable[[], bytes]) -> Past:
    return Past(number, f"id-{number}", "", "good", "", f"{number}", picture)


def asked_again(looks: Looks, *decisions: Past) -> list[int]:
    replay = GateReplay(None, looks)  # type: ignore[arg-type]
    return list(asyncio.run(replay.ask_again(None, decisions)))  # type: ignore[arg-type]


def test_one_picture_is_in_memory_at_a_time() -> None:
    seen: list[str] = []

    def read(number: int) -> bytes:
        seen.append(f"read {number}")
        return str(number).encode()

    looks = Looks(seen)
    assert asked_again(looks, *(past(n, lambda n=n: read(n)) for n in (1, 2))) == [1, 2]
    assert seen == ["read 1", "judged 1", "read 2", "judged 2"]


def test_a_disk_that_is_slow_keeps_a_version_waiting_for_a_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gate_replay, "AT_MOST_S", 0.2)

    def slow() -> bytes:
        time.sleep(0.5)
        return b"2"

    found = asked_again(Looks([]), past(1, lambda: b"1"), past(2, slow), past(3, lambda: b"3"))
    assert found == [1]


def test_no_part_waits_for_a_picture_that_is_judged_again_to_be_decoded(tmp_path: Path) -> None:
    shown = Shown(tmp_path, {120: "good"})
    threads = []

    async def watch(_: httpx.AsyncClient, app: Any) -> None:
        inspector, see = app.state.inspector, app.state.inspector._see

        def seen(*what: Any) -> Any:
            threads.append(threading.current_thread().name)
            return see(*what)

        inspector._see = seen

    shown.run(watch)
    assert len(threads) == 2
    assert not any(name.startswith("decode") for name in threads)


# ---- which ones ---------------------------------------------------------------------------------


def recorded(folder: Path, parts: list[dict[str, Any]]) -> Recorder:
    """A record of parts: what differs of each, its label, and whether its picture is kept."""
    recorder = Recorder(Settings(data_dir=folder))
    recorder.start()
    for number, part in enumerate(parts):
        changes = {"id": f"{number}", "sha256": f"{number:064x}", **part}
        label, kept = changes.pop("label", ""), changes.pop("kept", True)
        recorder._add(_Waiting(decision(**changes), b"a picture" if kept else None))
        if label:
            recorder.read(
                lambda it, n=number, said=label: it.mark(it.one(f"{n}"), said, "", "", "")
            )
    return recorder


def chosen(folder: Path, parts: list[dict[str, Any]]) -> tuple[list[str], int]:
    recorder = recorded(folder, parts)
    found = past_parts(recorder, NAME)
    recorder.close()
    assert all(one.picture() == b"a picture" for one in found.past)
    return [one.id for one in found.past], found.without_picture


def test_marked_defects_come_first_then_good_ones_then_rejects_newest_first(tmp_path: Path) -> None:
    parts: list[dict[str, Any]] = [
        {"label": "good"}, {"label": "defect"}, {"verdict": "anomaly"}, {},
        {"verdict": "anomaly"}, {"verdict": "anomaly", "label": "good"}, {"label": "defect"},
        {"label": "unusable"}, {"label": "good", "model": "other"},
    ]  # fmt: skip
    assert chosen(tmp_path, parts) == (["6", "1", "5", "0", "4", "2"], 0)


def test_no_more_than_so_many_of_each_are_shown(tmp_path: Path) -> None:
    parts: list[dict[str, Any]] = [{"label": "good"}] * (MOST + 2)
    parts += [{"verdict": "anomaly"}] * (MOST + 3)
    found, _ = chosen(tmp_path, parts)
    newest_good = [str(n) for n in range(MOST + 1, 1, -1)]
    newest_rejects = [str(n) for n in range(2 * MOST + 4, MOST + 4, -1)]
    assert found == [*newest_good, *newest_rejects]


def test_marked_parts_without_a_picture_are_counted_and_keep_no_other_from_being_shown(
    tmp_path: Path,
) -> None:
    parts: list[dict[str, Any]] = [{"label": "good"}, *[{"label": "good", "kept": False}] * 40]
    parts += [{"verdict": "anomaly", "kept": False}]
    assert chosen(tmp_path, parts) == (["0"], 40)


def test_of_a_picture_that_was_judged_several_times_the_last_word_counts(tmp_path: Path) -> None:
    """As in what is learned of them; where nobody spoke of the last one, of the one before."""
    parts: list[dict[str, Any]] = [
        {"sha256": "a", "label": "defect"}, {"sha256": "a", "label": "good"},
        {"sha256": "b", "label": "good"}, {"sha256": "b", "label": "unusable"},
        {"sha256": "c", "label": "good"}, {"sha256": "c", "verdict": "anomaly"},
        {"sha256": "d", "verdict": "anomaly"}, {"sha256": "d", "verdict": "anomaly"},
    ]  # fmt: skip
    assert chosen(tmp_path, parts)[0] == ["4", "1", "7"]
