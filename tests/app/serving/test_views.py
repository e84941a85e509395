"""Claims about `Views`: when a part of several views is decided, how, and what is held of it."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from app.serving import views as module
from app.serving.inference_statistics import Timing
from app.serving.inspection import Inspection, Seen
from app.serving.views import MISSING, MOST_VIEWS, Key, Look, Of, Part, Views
from app.settings import Settings
from engines.errors import Conflict, LateView, Overloaded, RuntimeFailed, UnknownDecision
from engines.verdict import judge
from support.fake_model import fake_model

ME = Key("", "", "P-1")
TIMING = Timing(0.1, 2.0, 20.0, 22.1)
MODEL = fake_model(0.5)


def inspection(raw: float, picture: bytes = b"") -> Inspection:
    """Its scale has the limit 1, and 0.5 for it as a score."""
    seen = Seen("PNG", 64, 64, None, hashlib.sha256(picture).hexdigest())
    return Inspection(MODEL, seen, judge(raw, MODEL.scale), np.zeros((8, 8), "f4"), None, TIMING)


class Line:
    """Sends views as the route does."""

    def __init__(self, **settings: Any) -> None:
        self.views = Views(Settings(**settings))
        self.decided: list[Part] = []
        self.views.on_decided = self.decided.append
        self._ids = 0

    async def send(
        self,
        view: str,
        raw: float | Exception,
        of: Of = Of(2),  # noqa: B008 (it is a tuple)
        *,
        key: Key = ME,
        picture: bytes = b"",
        within_s: float = 60.0,
        takes_s: float = 0.0,
    ) -> tuple[Part, str | None]:
        """The part, and which request this one repeats. `raw`: the score, or why there is none."""
        self._ids += 1
        look = Look(view, f"r{self._ids}", "fake")
        part = self.views.part(key, of, view, look.id, within_s)
        data = picture or f"{view} {raw}".encode()

        async def inspect() -> Inspection:
            await asyncio.sleep(takes_s)
            if isinstance(raw, Exception):
                raise raw
            return inspection(raw, data)

        look.sha256 = hashlib.sha256(data).hexdigest()
        try:
            _, repeat_of = await self.views.judge(part, look, data, inspect)
        except Conflict:
            raise
        except Exception as error:
            self.views.failed(part, look, getattr(error, "code", "x"), data)
            raise
        return part, repeat_of


def run(scene: Callable[[Line], Awaitable[None]], **settings: Any) -> None:
    async def all_of_it() -> None:
        await scene(Line(**settings))

    asyncio.run(all_of_it())


BROKEN = RuntimeFailed("The model gave a score that is no number.")


# ---- when, and how ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "state", "decided_by"),
    [
        ({"left": 0.2, "top": 0.3}, "normal", "top"),
        ({"left": 1.2, "top": 0.3}, "anomaly", "left"),
        ({"left": 1.2, "top": 1.5}, "anomaly", "top"),
    ],
)
def test_any_view_that_is_ng_is_ng_for_the_part_and_the_worst_one_decides(
    scores: dict[str, float], state: str, decided_by: str
) -> None:
    async def scene(line: Line) -> None:
        for view, raw in scores.items():
            part, _ = await line.send(view, raw)
        assert (part.state, part.decided_by, part.missing) == (state, decided_by, [])
        assert line.decided == [part]

    run(scene)


def test_of_views_with_limits_of_their_own_the_one_nearest_to_its_limit_is_the_worst() -> None:
    part = Part(ME, "r1", Of(2), 0.0)
    for view, score, threshold in (("left", 0.5, 0.9), ("top", 0.3, 0.4)):
        found = inspection(0.2)
        verdict = replace(found.verdict, score=score, threshold=threshold)
        part.looks[view] = Look(view, view, "m", inspection=replace(found, verdict=verdict))
    assert part.worst is not None
    assert part.worst.view == "top"


def test_a_part_waits_for_its_last_view_also_where_one_is_ng_already() -> None:
    async def scene(line: Line) -> None:
        part, _ = await line.send("left", 1.9)
        assert (part.state, part.missing, line.views.open) == ("pending", ["?"], 1)
        await line.send("top", 0.1)
        assert (part.state, line.views.open) == ("anomaly", 0)

    run(scene)


@pytest.mark.parametrize(
    ("of", "names"), [(Of(3), ["top", "?"]), (Of(3, ("left", "top", "rear")), ["top", "rear"])]
)
def test_a_view_that_is_missing_at_the_deadline_is_ng_with_its_name(
    of: Of, names: list[str]
) -> None:
    async def scene(line: Line) -> None:
        part, _ = await line.send("left", 0.1, of, within_s=0.05)
        with pytest.raises(RuntimeFailed):
            await line.send("top", BROKEN, of)
        assert not part.is_decided
        await asyncio.wait_for(part.decided.wait(), 5)
        assert (part.state, part.missing) == ("none", names)
        assert part.decided_by == "top"
        assert part.looks["top"].code == "runtime_failed"

    run(scene)


def test_an_anomaly_stays_one_where_another_view_is_missing() -> None:
    async def scene(line: Line) -> None:
        part, _ = await line.send("left", 1.4, within_s=0.02)
        await part.decided.wait()
        assert (part.state, part.decided_by, part.missing) == ("anomaly", "left", ["?"])

    run(scene)


def test_a_missing_view_is_called_as_in_the_last_whole_part_of_its_line() -> None:
    async def scene(line: Line) -> None:
        for view in ("left", "top", "rear"):
            await line.send(view, 0.1, Of(3))
        names = []
        for name, of, view in (("P-2", 3, "top"), ("P-3", 2, "top"), ("P-4", 3, "below")):
            part, _ = await line.send(view, 0.1, Of(of), key=ME._replace(part=name), within_s=0.01)
            await part.decided.wait()
            names.append(part.missing)
        assert names == [["left", "rear"], ["?"], ["?", "?"]]
        other, _ = await line.send("top", 0.1, Of(3), key=Key("", "B", "P-9"), within_s=0.01)
        assert other.missing == ["?", "?"]

    run(scene)


def test_the_deadline_is_that_of_the_first_request_also_where_it_got_no_verdict() -> None:
    async def scene(line: Line) -> None:
        with pytest.raises(RuntimeFailed):
            await line.send("left", BROKEN, within_s=0.05)
        part, _ = await line.send("top", 0.1, within_s=60)
        await asyncio.wait_for(part.decided.wait(), 5)
        assert part.id == "r1"

    run(scene)


# ---- views that come twice, late, or do not fit --------------------------------------------------


def test_a_view_without_a_verdict_may_be_sent_again() -> None:
    async def scene(line: Line) -> None:
        with pytest.raises(RuntimeFailed):
            await line.send("left", BROKEN)
        await line.send("left", 0.1)
        part, _ = await line.send("top", 0.1)
        assert (part.state, part.looks["left"].code) == ("normal", "")

    run(scene)


@pytest.mark.parametrize("repeats", ["replace", "refuse"])
def test_the_same_picture_again_gets_the_same_answer_before_and_after_the_verdict(
    repeats: str,
) -> None:
    async def scene(line: Line) -> None:
        slow = line.send("left", 0.1, takes_s=0.05)
        (part, first), (_, second) = await asyncio.gather(slow, line.send("left", 0.1))
        assert (first, second) == (None, "r1")
        assert (len(part.looks), part.state) == (1, "pending")
        await line.send("top", 0.2)
        again, repeat_of = await line.send("left", 0.1)
        assert (again, repeat_of, len(line.decided)) == (part, "r1", 1)

    run(scene, view_repeats=repeats)


def test_another_picture_of_a_view_takes_its_place_also_where_it_gets_no_verdict() -> None:
    async def scene(line: Line) -> None:
        of = Of(3)
        await line.send("left", 1.9, of)
        await line.send("left", 0.1, of)
        await line.send("top", 0.1, of)
        with pytest.raises(RuntimeFailed):
            await line.send("top", BROKEN, of)
        part, _ = await line.send("rear", 0.1, of)
        assert (part.state, part.missing) == ("pending", ["top"])
        await line.send("top", 0.3, of)
        assert (part.state, part.decided_by) == ("normal", "top")

    run(scene)


def test_the_picture_that_came_last_counts_however_long_the_one_before_takes() -> None:
    async def scene(line: Line) -> None:
        slow = asyncio.create_task(line.send("left", 1.9, takes_s=0.1))
        await asyncio.sleep(0.02)
        await line.send("left", 0.1)
        await slow
        part, _ = await line.send("top", 0.1)
        assert part.state == "normal"

    run(scene)


def test_another_picture_of_a_view_is_refused_where_that_is_set() -> None:
    async def scene(line: Line) -> None:
        part, _ = await line.send("left", 0.1)
        with pytest.raises(Conflict, match="KENSA_VIEW_REPEATS"):
            await line.send("left", 1.9)
        assert [look.id for look in part.judged] == ["r1"]
        await line.send("top", 0.1)
        assert part.state == "normal"

    run(scene, view_repeats="refuse")


def test_a_late_view_is_refused_with_the_decision_and_begins_no_new_part() -> None:
    async def scene(line: Line) -> None:
        part, _ = await line.send("left", 0.1, within_s=0.02)
        await part.decided.wait()
        with pytest.raises(LateView, match=r"NG, because a view was missing .*/decisions/r1"):
            await line.send("top", 0.1)
        assert (len(line.decided), line.views.open) == (1, 0)

    run(scene)


def test_a_view_that_is_judged_too_late_is_late() -> None:
    async def scene(line: Line) -> None:
        await line.send("left", 0.1, within_s=0.05)
        with pytest.raises(LateView):
            await line.send("top", 0.1, takes_s=0.1)
        (part,) = line.decided
        assert (part.state, part.missing, len(part.judged)) == ("none", ["top"], 1)

    run(scene)


def test_a_name_begins_anew_when_its_part_is_forgotten() -> None:
    async def scene(line: Line) -> None:
        for _ in range(2):
            for view in ("left", "top"):
                await line.send(view, 0.1)
        first, second = line.decided
        assert first is not second
        with pytest.raises(UnknownDecision):
            line.views.known(ME)

    run(scene, repeat_s=0)


def test_what_does_not_fit_to_a_part_is_refused_and_changes_nothing() -> None:
    async def scene(line: Line) -> None:
        await line.send("left", 0.1)
        with pytest.raises(Conflict, match="of=2"):
            await line.send("top", 0.1, Of(3))
        named = Key("", "", "P-2"), Of(2, ("left", "top"))
        for _ in range(2):
            with pytest.raises(Conflict, match=r"left,top, and no rear"):
                await line.send("rear", 0.1, named[1], key=named[0])
        assert line.views.open == 1
        slow = asyncio.create_task(line.send("top", 0.1, takes_s=0.05))
        await asyncio.sleep(0.01)
        with pytest.raises(Conflict, match="has 2 views already"):
            await line.send("rear", 0.1)
        part, _ = await slow
        assert (part.state, {*part.looks}) == ("normal", {"left", "top"})

    run(scene)


def test_a_view_under_a_wrong_name_without_a_verdict_takes_nobodys_place() -> None:
    async def scene(line: Line) -> None:
        with pytest.raises(RuntimeFailed):
            await line.send("lfet", BROKEN)
        for view in ("left", "top"):
            part, _ = await line.send(view, 0.1)
        assert part.state == "normal"

    run(scene)


def test_views_without_a_verdict_each_under_another_name_are_held_in_bounds() -> None:
    async def scene(line: Line) -> None:
        await line.send("left", 0.1)
        for number in range(3 * MOST_VIEWS):
            with pytest.raises(RuntimeFailed):
                await line.send(f"top-{number}", BROKEN)
        part, _ = await line.send("top", 0.1)
        assert (part.state, part.decided_by) == ("normal", "left")
        assert len(part.looks) == MOST_VIEWS
        assert line.views._held == 0

    run(scene)


def test_parts_of_the_same_name_of_two_lines_never_meet() -> None:
    async def scene(line: Line) -> None:
        keys = [Key("", "A", "P-1"), Key("", "B", "P-1"), Key("plc-3", "", "P-1")]
        for view in ("left", "top"):
            for raw, key in zip((0.1, 1.9, 0.3), keys, strict=True):
                await line.send(view, raw, key=key)
        assert [(part.key, part.state) for part in line.decided] == [
            (keys[0], "normal"), (keys[1], "anomaly"), (keys[2], "normal"),
        ]  # fmt: skip

    run(scene)


# ---- what is held ----------------------------------------------------------------------------


def test_parts_that_wait_are_bounded_and_the_end_of_the_server_decides_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOST_OPEN", 3)

    async def scene(line: Line) -> None:
        for number in range(3):
            await line.send("left", 0.1, key=ME._replace(part=f"{number}"))
        with pytest.raises(Overloaded, match="3 parts wait"):
            await line.send("left", 0.1, key=ME._replace(part="one more"))
        await line.send("top", 0.1, key=ME._replace(part="0"))
        line.views.close()
        assert [part.state for part in line.decided] == ["normal", "none", "none"]

    run(scene)


def test_pictures_are_there_until_the_verdict_and_no_longer_and_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOST_HELD_BYTES", 3000)

    async def scene(line: Line) -> None:
        seen: list[list[int]] = []
        line.views.on_decided = lambda part: seen.append(
            [len(look.image or b"") for look in part.looks.values()]
        )
        for view, size in (("a", 1000), ("a", 1200), ("b", 900), ("c", 1500), ("d", 10)):
            part, _ = await line.send(view, 0.1, Of(4), picture=bytes(size))
        assert seen == [[1200, 900, 0, 10]]
        assert part.state == "normal"
        assert [look.image for look in part.looks.values()] == [None] * 4
        assert line.views._held == 0
        assert all(look.inspection.anomaly_map.size == 0 for look in part.judged if look.inspection)

    run(scene)


@pytest.mark.parametrize("settings", [{"record": "off"}, {"record_pictures_mib": 0}])
def test_no_picture_is_held_where_none_is_kept(settings: dict[str, Any]) -> None:
    async def scene(line: Line) -> None:
        part, _ = await line.send("left", 1.9)
        assert (part.looks["left"].image, line.views._held) == (None, 0)

    run(scene, **settings)


def test_what_a_closed_model_has_passed_is_forgotten_and_nothing_else() -> None:
    async def scene(line: Line) -> None:
        keys = [Key("", "", name) for name in ("passed", "rejected", "waits")]
        for key, raw in zip(keys, (0.1, 1.9, 0.2), strict=True):
            await line.send("left", raw, key=key)
        for key in keys[:2]:
            await line.send("top", 0.1, key=key)
        line.views.forget({"another"})
        assert [line.views.known(key).state for key in keys] == ["normal", "anomaly", "pending"]
        line.views.forget({MODEL.name})
        with pytest.raises(UnknownDecision, match="challenged"):
            line.views.known(keys[0])
        assert line.views.known(keys[1]).state == "anomaly"
        waits, _ = await line.send("top", 0.1, key=keys[2])
        assert (waits.state, waits.missing, waits.looks["left"].code) == (
            "pending", ["left"], "not_released",
        )  # fmt: skip
        _, repeat_of = await line.send("left", 0.2, key=keys[2])
        assert (waits.state, repeat_of) == ("normal", None)
        assert line.views._held == 0

    run(scene)


def test_decided_parts_are_remembered_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_DECIDED", 10)

    async def scene(line: Line) -> None:
        for number in range(50):
            await line.send("only", 0.1, Of(1), key=ME._replace(part=f"{number}"))
        assert len(line.views._decided) <= 11
        assert line.views.known(ME._replace(part="49")).state == "normal"

    run(scene)


@pytest.mark.parametrize("seed", range(3))
def test_parts_of_two_lines_in_any_order_with_repeats_and_losses_are_decided_once_each(
    seed: int,
) -> None:
    """Each is what its own pictures say: the raw score says whose they are."""
    draw = random.Random(seed)

    async def scene(line: Line) -> None:
        sends, expected = [], {}
        for number in range(100):
            for name in ("A", "B"):
                key = Key("", name, f"P-{number}")
                scores = {view: draw.choice([0.1, 0.2, 0.3, 1.5]) for view in "abcd"}
                lost = draw.sample("abcd", draw.choice([0, 0, 0, 1]))
                came = {view: raw for view, raw in scores.items() if view not in lost}
                worst = max(came.values())
                whole = "normal" if not lost else "none"
                expected[key] = "anomaly" if worst > 1 else whole, came, lost
                sends += [(key, one) for one in came.items()]
                sends += [(key, one) for one in came.items() if draw.random() < 0.2]
        draw.shuffle(sends)
        names = Of(4, tuple("abcd"))
        await asyncio.gather(*(
            line.send(view, raw, names, key=key, within_s=0.5, takes_s=draw.random() / 50)
            for key, (view, raw) in sends
        ))  # fmt: skip
        await asyncio.sleep(0.6)
        assert Counter(part.key for part in line.decided) == Counter([*expected])
        for part in line.decided:
            state, came, lost = expected[part.key]
            found = {
                look.view: look.inspection.verdict.raw_score
                for look in part.judged
                if look.inspection is not None
            }
            assert (part.state, found, part.missing) == (state, came, lost)

    run(scene)


def test_the_code_of_a_missing_view_is_what_the_pages_say() -> None:
    assert MISSING == "view_missing"
