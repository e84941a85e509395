"""What the record does when something is wrong: with the disk, the clock, the file, a client."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from app.decisions import database as files
from app.decisions import recorder as recording
from app.decisions.database import FILE, note_once, open_or_make
from app.decisions.decision import Decision
from app.decisions.pictures import Map, Pictures
from app.decisions.recorder import MOST_WAITING_BYTES, Asked, Recorder, _Waiting
from app.decisions.repeats import Repeats
from app.serving.inspection import Inspection
from app.settings import Settings
from engines.errors import RuntimeFailed
from engines.verdict import Scale
from support.decisions import decision

DAY = 86_400_000


def recorder_in(folder: Path, **settings: Any) -> Recorder:
    return Recorder(Settings(data_dir=folder, **settings))


def pictures_in(recorder: Recorder) -> list[str]:
    return sorted(path.name for path in recorder.folder.glob("pictures/*/*"))


def test_a_clock_that_was_wrong_after_a_start_lets_no_newer_decision_be_deleted(
    tmp_path: Path,
) -> None:
    now = 20_000 * DAY
    with open_or_make(tmp_path) as database:
        for at in (now - 9 * DAY, now - 8 * DAY, now - DAY, 5_000, now):  # 5 s after 1970 began
            database.append([decision(at=at)])
        assert database.last_before(now - 7 * DAY) == 2
        database.prune(2, "older than 7 days")
        assert database.last_before(now - 7 * DAY) == 0
        assert database.last_before(now + DAY) == 5


def test_a_disk_with_no_room_for_pictures_has_the_lines_and_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was said to be well and unwell in turns, with a line in the log for each."""
    recorder, keep = recorder_in(tmp_path), Pictures.keep
    full = [2, 3, 4]

    def keep_some(self: Pictures, number: int, *picture: Any) -> int:
        taken = keep(self, number, *picture)
        if number in full:
            raise OSError(28, "No space left on device")
        return taken

    monkeypatch.setattr(Pictures, "keep", keep_some)
    recorder.start()
    for number in range(4):
        recorder.no_verdict(Asked(f"{number}", "", "", ""), "bad_image", b"broken")
        recorder.read(lambda it: it.span())
    assert "Pictures of decisions are not kept" in str(recorder.problem)
    monkeypatch.setattr(recording, "PICTURES_AGAIN_AFTER_S", 0)
    recorder._pictures_again = 0
    recorder.no_verdict(Asked("4", "", "", ""), "bad_image", b"broken")
    found = recorder.read(lambda it: it.find(files.Filter(), 10))
    assert [one.picture_bytes for one in found] == [6, 0, 0, 0, 6]
    assert pictures_in(recorder) == ["1.image", "5.image"]
    assert recorder.problem is None
    assert sum("are not kept" in one for one in caplog.messages) == 1
    recorder.close()


def test_that_pictures_find_room_again_is_known_before_the_next_one_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "PICTURES_AGAIN_AFTER_S", 0)
    monkeypatch.setattr(recording, "TIDY_EVERY_S", 0.1)
    recorder = recorder_in(tmp_path)
    folder = recorder.folder / "pictures"
    folder.parent.mkdir()
    folder.write_text("in the way")
    recorder.no_verdict(Asked("one", "", "", ""), "bad_image", b"broken")
    recorder.start()
    recorder.read(lambda it: it.span())
    assert "Pictures of decisions are not kept" in str(recorder.problem)
    folder.unlink()
    until = time.monotonic() + 10
    while recorder.problem is not None and time.monotonic() < until:
        time.sleep(0.02)
    assert recorder.problem is None
    recorder.close()
    assert pictures_in(recorder) == []


def test_pictures_of_decisions_that_could_not_be_written_do_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk would be filled to its last byte, with files that nobody counts."""
    recorder = recorder_in(tmp_path)

    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(files.DecisionDatabase, "_count", full)  # after pictures and lines
        recorder.no_verdict(Asked("one", "", "", ""), "bad_image", b"broken")
        recorder.start()
        recorder.opened.wait(10)
        deadline = time.monotonic() + 10
        while recorder.problem is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert "disk is full" in str(recorder.problem)
        assert pictures_in(recorder) == []
    recorder.close()
    assert recorder.written == 1
    assert pictures_in(recorder) == ["1.image"]


@pytest.mark.parametrize("by", ["a person", "age", "room", "room for pictures"])
def test_what_comes_while_much_is_deleted_is_written_after_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Two million lines take half a minute: a kill would take all that came meanwhile."""
    monkeypatch.setattr(recording, "PRUNE_AT_ONCE", 2)
    monkeypatch.setattr(recording, "PRUNE_SHARE", 1)
    changed = {"age": {"record_days": 1}, "room for pictures": {"record_pictures_mib": 1}}
    recorder = recorder_in(tmp_path, **changed.get(by, {}))
    of_pictures = 50_000 if by == "room for pictures" else 0
    with open_or_make(recorder.folder) as database:
        database.append([decision(at=1000)] * 640, lambda *_: of_pictures)
    if by == "room":
        used = files.DecisionDatabase.bytes_used
        monkeypatch.setattr(
            files.DecisionDatabase, "bytes_used",
            lambda it: 2**31 if it.span() == (1, 640) else used(it),
        )  # fmt: skip
    written = []  # of those that came before each step, how many the disk had then

    def and_one_comes(step: Any) -> Any:
        def stepped(*arguments: Any) -> Any:
            if len(written) < 4:
                written.append(recorder.written)
                recorder.no_verdict(Asked("new", "", "", ""), "bad_image")
            return step(*arguments)

        return stepped

    for name in ("prune", "forget_pictures"):
        step = getattr(files.DecisionDatabase, name)
        monkeypatch.setattr(files.DecisionDatabase, name, and_one_comes(step))
    recorder.start()
    if by == "a person":
        recorder.delete_before(2000, "anna", "as agreed")
    else:
        until = time.monotonic() + 30
        while len(written) < 3 and time.monotonic() < until:
            time.sleep(0.02)
    recorder.close()
    assert written[:3] == [0, 1, 2]


@pytest.mark.parametrize(("image", "room"), [(b"", 2048), (b"broken", 0)])
def test_an_empty_picture_and_one_that_has_no_room_leave_no_file(
    tmp_path: Path, image: bytes, room: int
) -> None:
    recorder = recorder_in(tmp_path, record_pictures_mib=room)
    recorder.no_verdict(Asked("one", "", "", ""), "bad_image", image)
    recorder.start()
    recorder.close()
    assert recorder.written == 1
    assert pictures_in(recorder) == []


def test_a_picture_that_no_decision_counts_is_gone_after_the_next_start(tmp_path: Path) -> None:
    recorder = recorder_in(tmp_path)
    with open_or_make(recorder.folder) as database:
        database.append([decision()])
    recorder.pictures.keep(1, b"nobody's", None)
    recorder.start()
    recorder.read(lambda it: it.span())
    recorder.close()
    assert pictures_in(recorder) == []


def test_the_maps_of_pictures_that_wait_are_counted_too(tmp_path: Path) -> None:
    recorder = recorder_in(tmp_path)  # not started: as good as a disk that takes nothing
    heat = np.zeros((1024, 1024), np.float32)
    for number in range(2 * MOST_WAITING_BYTES // heat.nbytes):
        recorder._add(_waiting(f"{number}", heat))
    waiting = [one for one in recorder._waiting if isinstance(one, _Waiting)]
    held = [one.seen.raw for one in waiting if one.seen is not None]
    assert sum(one.nbytes for one in held) <= MOST_WAITING_BYTES
    assert held


def _waiting(id_: str, heat: Any) -> Any:
    return _Waiting(decision(id=id_), b"small", Map(heat, Scale(1, 0, 2, 0.5), 8, None))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 1.0, 1e-310])
def test_of_the_other_parts_as_many_are_kept_as_the_setting_says(
    tmp_path: Path, share: float
) -> None:
    recorder = recorder_in(tmp_path, record_sample=share, record_near=0)
    part = decision(score=0.1, threshold=0.5)
    assert sum(recorder._is_wanted(part) for _ in range(1000)) == pytest.approx(1000 * share, abs=1)


def test_a_command_never_puts_aside_a_file_that_a_server_writes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_or_make(tmp_path) as database:
        database.append([replace(decision(), id="x" * 9000) for _ in range(50)])
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    note_once(tmp_path, "key_added", "anna")
    assert not list(tmp_path.glob("*.damaged-*"))


def test_a_repair_that_finds_no_room_leaves_the_damaged_file_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_or_make(tmp_path) as database:
        database.append([decision() for _ in range(500)])
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: -len(whole) // 4])

    def full(*_: Any) -> int:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(files, "_take_over", full)
        with pytest.raises(sqlite3.OperationalError):
            open_or_make(tmp_path)
    with open_or_make(tmp_path) as database:
        assert database.lines(1)[0].what == "repair"
        assert database.span()[1] > 100  # of 500 in a file that lost its last quarter
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1


def test_a_copy_that_was_restored_is_read_while_it_is_written(tmp_path: Path) -> None:
    with open_or_make(tmp_path / "old") as database:
        database.append([decision()])
    (tmp_path / "new").mkdir()
    with closing(sqlite3.connect(tmp_path / "old" / FILE)) as copied:
        copied.execute("VACUUM INTO ?", [str(tmp_path / "new" / FILE)])
    with open_or_make(tmp_path / "new") as database:
        assert database.last("decisions")[0] == 1
        mode = database._connection.execute("PRAGMA journal_mode").fetchone()[0]
    assert mode == "wal"


def test_of_several_that_wait_for_one_that_got_no_verdict_only_one_is_judged() -> None:
    began, judged = asyncio.Event(), []

    async def fails() -> Any:
        began.set()
        await asyncio.sleep(0.05)
        raise RuntimeFailed("The model gave a score that is no number.")

    async def judges() -> Any:
        judged.append(1)
        await asyncio.sleep(0.05)
        return Inspection(*[cast("Any", None)] * 6)

    async def scene() -> list[str | None]:
        repeats, key = Repeats(60), ("part", "KB-1", "0" * 64)
        first = asyncio.create_task(repeats.once(key, "first", fails))
        await began.wait()
        others = [repeats.once(key, f"{number}", judges) for number in range(5)]
        found = [repeat_of for _, repeat_of in await asyncio.gather(*others)]
        assert isinstance(first.exception(), RuntimeFailed)
        return found

    assert asyncio.run(scene()) == [None, "0", "0", "0", "0"]
    assert len(judged) == 1


def test_a_damaged_picture_is_hashed_beside_the_event_loop(tmp_path: Path) -> None:
    recorder = recorder_in(tmp_path, record_pictures_mib=0)
    recorder.no_verdict(Asked("one", "", "", ""), "bad_image", b"broken")
    entry = recorder._waiting[0].entry
    assert isinstance(entry, Decision)
    assert entry.sha256 == ""
    recorder.start()
    found = recorder.read(lambda it: it.one("one"))
    recorder.close()
    assert found is not None
    assert found.decision.sha256 == hashlib.sha256(b"broken").hexdigest()


def test_names_of_models_that_there_are_not_grow_no_statistics(tmp_path: Path) -> None:
    recorder = recorder_in(tmp_path)
    for number in range(50):
        asked = Asked(f"{number}", "", f"{number}" * 5000, "")
        recorder.no_verdict(asked, "unknown_model")
    recorder.start()
    found = recorder.read(lambda it: list(it.quarters(0, 2**62)))
    longest = recorder.read(lambda it: it.find(files.Filter(), 100))
    recorder.close()
    assert {name for name, _, _ in found} == {""}
    assert sum(quarter.none["unknown_model"] for _, _, quarter in found) == 50
    assert max(len(one.decision.model) for one in longest) == 64


def test_what_no_database_takes_is_left_out_and_holds_nothing_up(tmp_path: Path) -> None:
    recorder = recorder_in(tmp_path)
    for part in ("before", "half a character: \ud800", "after"):
        recorder.no_verdict(Asked(part[:6], part, "", ""), "overloaded")
    recorder.start()
    kept = recorder.read(lambda it: it.find(files.Filter(), 10))
    lost = recorder.lost
    recorder.close()
    assert [one.decision.part for one in kept] == ["after", "before"]
    assert lost == 1


def test_who_asks_waits_for_what_was_told_before_and_not_for_what_comes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line never stops: there is always something that waits."""
    recorder = recorder_in(tmp_path)
    append = files.DecisionDatabase.append

    def and_more_comes(self: files.DecisionDatabase, *given: Any) -> None:
        recorder.no_verdict(Asked("meanwhile", "", "", ""), "overloaded")
        recorder._wake.set()
        append(self, *given)

    monkeypatch.setattr(files.DecisionDatabase, "append", and_more_comes)
    recorder.no_verdict(Asked("before", "", "", ""), "overloaded")
    recorder.start()
    assert recorder.opened.wait(10)
    for _ in range(5):
        assert recorder.flush()
    assert recorder.read(lambda it: it.one("before")) is not None
    recorder.close()
