"""Claims about the gate, the labels of golden images, and what memory there is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.errors import BadBundle, BadMeta
from engines.machine import memory
from engines.machine.memory import MIB, free_bytes
from engines.machine.memory_needs import bytes_needed
from engines.meta import Meta
from engines.serving.gate import (
    GROUPS,
    Group,
    OtherRegions,
    Past,
    Record,
    Replay,
    Replayed,
    flipped,
    overtaken,
    replays,
    weigh,
)
from engines.store.bundle import write_bank
from engines.store.golden import EACH, GOLDEN, Golden
from engines.verdict import Scale, judge
from support.project import write_meta

GOOD = {"parity": {"openvino_f32": {"ok": True}, "openvino_bf16": {"ok": False}}}
SCALE = Scale(threshold_auto=10.0, raw_min=0.0, raw_max=20.0, threshold=0.5)
NORMAL, ANOMALY = 8.0, 12.0  # raw scores


def picture(size: int = 8, value: int = 0) -> NDArray[np.uint8]:
    return np.full((size, size, 3), value, np.uint8)


def pictures(count: int, size: int = 8) -> NDArray[np.uint8]:
    """(count, size, size, 3), each of another grey."""
    return np.stack([picture(size, value) for value in range(count)])


def asked(group: Group, old: float, new: float) -> Replayed:
    return Replayed(Replay(group, picture()), judge(old, SCALE), judge(new, SCALE))


def many(group: Group, same: int, flips: int) -> list[Replayed]:
    """Known parts that both judge rightly, and some that the new version does not."""
    right, wrong = (ANOMALY, NORMAL) if group == "defect" else (NORMAL, ANOMALY)
    return [asked(group, right, right)] * same + [asked(group, right, wrong)] * flips


# Other regions


def test_other_regions_are_said_and_hold_no_version_by_themselves() -> None:
    other = OtherRegions(was=0.0, becomes=0.25)
    found = weigh(many("normal", 8, 0), GOOD, "0001", 0.1, regions=other)
    assert (found["ok"], found["regions"]) == (True, {"was": 0.0, "becomes": 0.25})
    assert weigh(many("normal", 8, 0), GOOD, "0001", 0.1)["regions"] is None


def test_what_a_job_made_of_another_version_may_not_take_regions_back() -> None:
    """A person changed them while the job ran."""
    other, job = OtherRegions(was=0.25, becomes=0.0), {"job": "retrain-1", "parent": "0001"}
    (doubt,) = overtaken(job, "0002", other)
    assert doubt.startswith("It was made of 0001, whose regions are not those of 0002, which is")
    assert "of a picture 0.0% never count, and not 25.0%" in doubt
    assert overtaken(job, "0002", None) == []
    assert overtaken(job, "0001", other) == []  # such as one that retrain.py was given
    assert overtaken({"upload": True, "parent": "0001"}, "0002", other) == []
    assert overtaken({"regions_of": "0001", "parent": "0001"}, "0002", other) == []


# Which flips count


@pytest.mark.parametrize(
    ("group", "old", "new", "counts"),
    [
        ("normal", NORMAL, ANOMALY, True),
        ("normal", ANOMALY, NORMAL, False),  # the old one was wrong
        ("defect", ANOMALY, NORMAL, True),
        ("defect", NORMAL, ANOMALY, False),
        ("recent", NORMAL, ANOMALY, True),  # nobody knows who is right
        ("recent", ANOMALY, NORMAL, True),
    ],
)
def test_of_known_parts_only_what_became_wrong_counts_and_of_others_every_change(
    group: Group, old: float, new: float, counts: bool
) -> None:
    assert asked(group, old, new).flipped is counts


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("score", [NORMAL, ANOMALY])
def test_another_score_with_the_same_verdict_is_no_flip(group: Group, score: float) -> None:
    assert not asked(group, score, score + 0.5).flipped


def test_each_verdict_is_by_the_threshold_of_its_own_version() -> None:
    """One that was retrained may score in other units."""
    other = Scale(threshold_auto=1000.0, raw_min=0.0, raw_max=2000.0, threshold=0.5)
    assert not Replayed(
        Replay("recent", picture()), judge(NORMAL, SCALE), judge(900.0, other)
    ).flipped


# How many may


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_may_flip_up_to_the_limit_and_no_more(group: Group) -> None:
    assert weigh(many(group, 18, 2), GOOD, "0001-a", 0.1)["ok"] is True
    found = weigh(many(group, 17, 3), GOOD, "0001-a", 0.1)
    assert found["ok"] is False
    assert found["groups"][group] == {"images": 20, "flips": 3}


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        ("normal", "3 of 20 known normals are rejected now (allowed: 10%)."),
        ("defect", "3 of 20 known defects pass now (allowed: 10%)."),
        ("recent", "3 of the last 20 parts get another verdict (allowed: 10%)."),
    ],
)
def test_the_reason_says_how_many_of_what(group: Group, reason: str) -> None:
    assert weigh(many(group, 17, 3), GOOD, None, 0.1)["reasons"] == [reason]


def test_a_small_group_is_not_outvoted_by_a_large_one() -> None:
    found = weigh([*many("normal", 100, 0), *many("defect", 1, 1)], GOOD, None, 0.1)
    assert found["reasons"] == ["1 of 2 known defects pass now (allowed: 10%)."]


def test_every_group_that_fails_has_its_reason() -> None:
    replayed = [one for group in GROUPS for one in many(group, 0, 1)]
    assert len(weigh(replayed, {}, None, 0.1)["reasons"]) == 4  # the report's too


@pytest.mark.parametrize("group", GROUPS)
def test_at_a_limit_of_nothing_one_flip_is_too_many(group: Group) -> None:
    assert weigh(many(group, 5, 0), GOOD, None, 0.0)["ok"] is True
    assert weigh(many(group, 1000, 1), GOOD, None, 0.0)["ok"] is False


def test_at_a_limit_of_all_everything_passes() -> None:
    assert weigh(many("defect", 0, 7), GOOD, None, 1.0)["ok"] is True


@pytest.mark.parametrize("percent", range(1, 100))
def test_the_limit_itself_is_allowed_whatever_its_binary_fraction(percent: int) -> None:
    """0.29 * 100 is a little less than 29."""
    limit = percent / 100
    assert weigh(many("recent", 100 - percent, percent), GOOD, None, limit)["ok"] is True
    assert weigh(many("recent", 99 - percent, percent + 1), GOOD, None, limit)["ok"] is False


def test_where_nothing_can_be_replayed_the_report_decides() -> None:
    found = weigh([], GOOD, None, 0.1)
    assert found["ok"] is True
    assert found["groups"] == {group: {"images": 0, "flips": 0} for group in GROUPS}
    assert weigh([], {}, None, 0.1)["ok"] is False


# What people said of parts


def remembered(*decisions: tuple[str, float, float]) -> Record:
    """Decisions with these labels, and these scores by the live version and the new one."""
    record = Record()
    for number, (label, old, new) in enumerate(decisions):
        one = Past(number, f"id-{number}", "", label, "", f"{number}", bytes)  # type: ignore[arg-type]
        record.past.append(one)
        record.old[number], record.new[number] = judge(old, SCALE), judge(new, SCALE)
    return record


def reasons(record: Record, limit: float = 0.1) -> list[str]:
    found: list[str] = weigh([], GOOD, "0001-a", limit, (), record)["reasons"]
    return found


@pytest.mark.parametrize("limit", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("label", "old", "new", "allowed"),
    [
        ("good", ANOMALY, NORMAL, 0.0),  # a false reject that is accepted
        ("good", NORMAL, ANOMALY, 1.0),
        ("defect", NORMAL, ANOMALY, 0.0),  # a miss that is found
        ("defect", ANOMALY, NORMAL, 2.0),  # never, whatever the limit
        ("", ANOMALY, NORMAL, 0.0),
        ("", NORMAL, ANOMALY, 0.0),
    ],
)
def test_of_marked_parts_only_what_became_wrong_holds_a_version(
    label: str, old: float, new: float, allowed: float, limit: float
) -> None:
    assert (reasons(remembered((label, old, new)), limit) == []) is (limit >= allowed)


def test_marked_good_parts_are_a_group_of_their_own_and_may_flip_up_to_the_limit() -> None:
    wrong, right = ("good", NORMAL, ANOMALY), ("good", NORMAL, NORMAL)
    others = [("", NORMAL, NORMAL), ("defect", ANOMALY, ANOMALY)] * 50
    assert reasons(remembered(*[wrong] * 2, *[right] * 18, *others)) == []
    assert reasons(remembered(*[wrong] * 3, *[right] * 17, *others)) == [
        "3 of 20 parts that were marked as good are rejected now (allowed: 10%): id-0, id-1, id-2."
    ]


def test_one_defect_that_is_missed_now_is_not_made_good_by_others_that_are_found() -> None:
    found = reasons(remembered(*[("defect", NORMAL, ANOMALY)] * 9, ("defect", ANOMALY, NORMAL)))
    assert found == ["1 of 10 parts that were marked as defects were found, and pass now: id-9."]


def test_a_sentence_names_a_few_and_the_record_of_the_gate_all() -> None:
    record = remembered(*[("defect", ANOMALY, NORMAL)] * 8)
    (reason,) = reasons(record)
    assert reason.endswith(": id-0, id-1, id-2, id-3, id-4 and 3 more.")
    flips = weigh([], GOOD, "0001-a", 0.1, (), record)["record"]["flips"]
    assert [one["id"] for one in flips] == [f"id-{number}" for number in range(8)]


def test_what_one_of_both_was_not_asked_about_is_left_out_and_counted() -> None:
    record = remembered(*[("defect", ANOMALY, NORMAL)] * 3)
    record.without_picture = 4
    del record.new[0], record.old[1], record.new[1]
    found = weigh([], GOOD, "0001-a", 0.1, (), record)["record"]
    assert [one["id"] for one in found["flips"]] == ["id-2"]
    assert found["left_out"] == 6
    assert found["defect"] == {"marked": 1, "missed_before": 0, "missed_now": 1}


def test_where_there_is_no_live_version_nothing_is_said_of_the_record() -> None:
    assert weigh([], GOOD, None, 0.1)["record"] is None


# The report


@pytest.mark.parametrize(
    "report",
    [{}, {"parity": {}}, {"parity": None}, {"parity": "good"}, {"parity": [1]}, {"parity": True}],
)
def test_without_a_parity_report_a_version_is_held(report: dict[str, Any]) -> None:
    found = weigh(many("normal", 9, 0), report, None, 0.1)
    assert found["ok"] is False
    assert found["reasons"] == [
        "It was never compared with the trained model: convert it with this Kensa."
    ]


@pytest.mark.parametrize(
    "served",
    [{"ok": False}, {"ok": None}, {"ok": "true"}, {"ok": 1}, {}, None, "ok", True, [{"ok": True}]],
)
def test_a_graph_that_does_not_agree_is_held(served: Any) -> None:
    """report.json may come from anywhere, in a zip: it holds a version, it breaks nothing."""
    for parity in ({"openvino_f32": served}, {"onnx": {"ok": True}}):
        found = weigh([], {"parity": parity}, None, 0.1)
        assert found["reasons"] == ["Its graph does not agree with the trained model."]


def test_the_report_that_convtrt_writes_passes(kensa_model: Path) -> None:
    report = json.loads((kensa_model / "report.json").read_text())
    assert weigh([], report, None, 0.1)["ok"] is True


def test_the_report_that_retrain_writes_says_nothing_of_a_graph(trained: Path) -> None:
    report = json.loads((trained / "report.json").read_text())
    assert "never compared" in weigh([], report, None, 0.1)["reasons"][0]


# What a person reads


def test_every_flip_is_described_by_number_and_in_the_order_of_its_picture() -> None:
    replayed = [
        asked("normal", 2.0, 3.0),
        asked("normal", 9.123456, 15.0),
        asked("defect", 11.0, 10.0),
        asked("defect", 9.0, 12.0),
        asked("recent", 40.0, -3.0),
    ]
    found = weigh(replayed, GOOD, "0001-aaaaaaaaaaaa", 0.1)
    assert found["against"] == "0001-aaaaaaaaaaaa"
    assert found["limit"] == 0.1
    assert [one["group"] for one in found["flips"]] == ["normal", "defect", "recent"]
    assert [one.replay.group for one in flipped(replayed)] == ["normal", "defect", "recent"]
    assert found["flips"][0] == {
        "number": 0, "group": "normal", "was": "Normal", "becomes": "Anomaly",
        "old_score": 0.4562, "new_score": 0.75, "old_raw_score": 9.123456, "new_raw_score": 15.0,
    }  # fmt: skip
    assert [one["number"] for one in found["flips"]] == [0, 1, 2]
    last = found["flips"][2]
    assert (last["was"], last["becomes"]) == ("Anomaly", "Normal")
    assert (last["old_score"], last["new_score"]) == (1.0, 0.0)


def test_what_was_found_can_be_written_down() -> None:
    found = weigh(many("recent", 3, 2), GOOD, "0001-aaaaaaaaaaaa", 0.1)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


# Which images are replayed


def test_golden_images_are_replayed_by_what_they_are_and_recent_ones_after_them() -> None:
    golden = Golden(pictures(3), np.array([False, False, True]))
    unlabelled = Golden(pictures(4)[3:])
    found = list(replays([golden, None, unlabelled], [picture(value=9)], 8))
    groups: list[Group] = ["normal", "normal", "defect", "recent", "recent"]
    assert [one.group for one in found] == groups
    assert [int(one.image[0, 0, 0]) for one in found] == [0, 1, 2, 3, 9]


def test_golden_images_that_both_versions_keep_are_replayed_once() -> None:
    golden = Golden(pictures(3), np.array([False, False, True]))
    recent = [picture(value=9), picture(value=9)]  # a standing line is a fact about the line
    found = list(replays([golden, golden], recent, 8))
    assert [one.group for one in found] == ["normal", "normal", "defect", "recent", "recent"]


def test_images_of_other_sizes_are_left_out() -> None:
    """The version before may have been trained at another size."""
    old = Golden(pictures(2, 16), np.array([False, True]))
    new = Golden(pictures(2, 8), np.array([False, True]))
    found = list(replays([old, new], [picture(16), picture(8), picture(4)], 8))
    assert [one.group for one in found] == ["normal", "defect", "recent"]
    assert all(one.image.shape == (8, 8, 3) for one in found)


def test_without_golden_or_recent_images_nothing_is_replayed() -> None:
    assert list(replays([None, None], [], 8)) == []


# Golden images and what they are


def test_which_golden_images_are_defective_is_kept(tmp_path: Path) -> None:
    defective = np.array([False, True, False, True])
    Golden(pictures(4), defective).write(tmp_path)
    found = Golden.read(tmp_path, 8)
    assert found is not None
    assert found.defective is not None
    assert found.defective.dtype == bool
    np.testing.assert_array_equal(found.defective, defective)
    np.testing.assert_array_equal(found.images, pictures(4))


def test_golden_images_of_an_older_tool_are_read_without_labels(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / GOLDEN, images=pictures(2))
    found = Golden.read(tmp_path, 8)
    assert found is not None
    assert found.defective is None
    found.write(tmp_path)
    with np.load(tmp_path / GOLDEN) as file:
        assert list(file) == ["images"]


def test_a_folder_without_golden_images_has_none(tmp_path: Path) -> None:
    assert Golden.read(tmp_path, 8) is None


@pytest.mark.parametrize(
    "defective",
    [np.zeros(3, bool), np.zeros((2, 1), bool), np.zeros(2, np.uint8), np.zeros(2), np.bool_(True),
     np.array(["no", "yes"])],
    ids=["too many", "a column", "numbers", "floats", "one for all", "words"],
)  # fmt: skip
def test_labels_that_do_not_fit_the_images_are_refused_by_name(
    defective: Any, tmp_path: Path
) -> None:
    np.savez_compressed(tmp_path / GOLDEN, images=pictures(2), defective=defective)
    with pytest.raises(BadBundle, match=r"golden\.npz does not say of each image"):
        Golden.read(tmp_path, 8)


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 4), np.uint8),
     np.zeros((2, 8, 4, 3), np.uint8), np.zeros((2, 8, 8, 3)),
     np.zeros((0, 8, 8, 3), np.uint8), np.uint8(3)],
    ids=["grey", "RGBA", "not square", "floats", "none", "a number"],
)  # fmt: skip
def test_golden_images_that_are_none_are_refused_by_name(images: Any, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / GOLDEN, images=images)
    with pytest.raises(BadBundle, match=r"golden\.npz holds .*, not 8 x 8 RGB"):
        Golden.read(tmp_path, 8)


def test_labels_are_never_unpickled(tmp_path: Path) -> None:
    labels = np.array([False, True], dtype=object)
    np.savez_compressed(tmp_path / GOLDEN, images=pictures(2), defective=labels)
    with pytest.raises(BadBundle, match=r"golden\.npz is damaged"):
        Golden.read(tmp_path, 8)


@pytest.mark.parametrize(("normals", "defects"), [(3, 2), (EACH, 0), (50, 0), (50, 30), (0, 4)])
def test_chosen_images_are_labelled_as_they_came(normals: int, defects: int) -> None:
    good, bad = pictures(normals + 1)[:normals], pictures(defects + 1)[:defects] + np.uint8(100)
    scores = np.random.default_rng(0).random(normals + defects).astype(np.float32)
    chosen = Golden.choose(good, scores[:normals], bad, scores[normals:])
    assert chosen.defective is not None
    assert len(chosen.images) == len(chosen.defective) == min(normals, EACH) + min(defects, EACH)
    np.testing.assert_array_equal(chosen.images[:, 0, 0, 0] >= 100, chosen.defective)


def test_what_retrain_leaves_says_of_its_images_what_they_are(trained: Path) -> None:
    found = Golden.read(trained, 256)
    assert found is not None
    assert found.defective is not None
    assert {bool(one) for one in found.defective} == {False, True}


# Memory: what a version needs


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """A graph of 4 MB and a bank of 2 MB."""
    write_meta(tmp_path / "meta.json")
    (tmp_path / "model.onnx").write_bytes(bytes(4 * MIB))
    write_bank(tmp_path / "memory_bank.npz", np.zeros((1024, 512), np.float32), 1.0)
    return tmp_path


def test_more_memory_is_needed_for_a_larger_graph_and_a_larger_bank(version: Path) -> None:
    before = bytes_needed(version)
    assert before > 6 * MIB
    (version / "model.onnx").write_bytes(bytes(24 * MIB))
    with_graph = bytes_needed(version)
    assert with_graph - before >= 20 * MIB
    write_bank(version / "memory_bank.npz", np.zeros((10240, 512), np.float32), 1.0)
    assert with_graph + 18 * MIB <= bytes_needed(version) <= with_graph + 36 * MIB


def test_more_memory_is_needed_for_larger_images(version: Path) -> None:
    needed = []
    for size in (128, 256, 512):
        write_meta(version / "meta.json", image_size=size)
        needed.append(bytes_needed(version))
    assert needed == sorted(set(needed))


def test_what_is_missing_needs_no_memory_and_a_kind_without_a_bank_no_bank(version: Path) -> None:
    whole = bytes_needed(version)
    bank = (version / "memory_bank.npz").stat().st_size
    write_meta(version / "meta.json", model="vae", latent_dim=8, memory_bank=None)
    assert bytes_needed(version) < whole - bank
    (version / "model.onnx").unlink()
    assert 0 < bytes_needed(version) < whole


def test_the_need_of_what_is_no_version_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(BadMeta):
        bytes_needed(tmp_path)


def test_a_real_model_needs_more_than_its_files_and_less_than_a_gigabyte(own_model: Path) -> None:
    files = sum((own_model / name).stat().st_size for name in ("model.onnx", "memory_bank.npz"))
    assert files < bytes_needed(own_model) < 1024 * MIB
    shutil.copyfile(own_model / "memory_bank.npz", own_model / "bank.npz")
    Meta.read(own_model / "meta.json").with_(memory_bank="bank.npz").write(own_model / "meta.json")
    assert bytes_needed(own_model) > files  # wherever meta.json says that the bank is


# Memory: what is free


def test_some_memory_is_free_and_no_more_than_the_machine_has() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    assert 0 < free_bytes() < total


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_of_the_machine", lambda: 1000 * MIB)
    return tmp_path


def limited(cgroup: Path, limit: object, used: object, stat: str | None = None) -> int:
    (cgroup / "memory.max").write_text(f"{limit}\n")
    (cgroup / "memory.current").write_text(f"{used}\n")
    if stat is not None:
        (cgroup / "memory.stat").write_text(stat)
    return free_bytes()


def test_no_more_is_free_than_the_container_may_still_take(cgroup: Path) -> None:
    assert free_bytes() == 1000 * MIB
    assert limited(cgroup, 500 * MIB, 200 * MIB) == 300 * MIB
    assert limited(cgroup, 5000 * MIB, 200 * MIB) == 1000 * MIB
    assert limited(cgroup, "max", 200 * MIB) == 1000 * MIB


def test_files_that_were_read_are_not_memory_that_is_taken(cgroup: Path) -> None:
    """Or a container that has read many images would take in no model any more."""
    stat = f"anon {90 * MIB}\nfile {400 * MIB}\ninactive_file {350 * MIB}\nactive_file {50 * MIB}\n"
    assert limited(cgroup, 500 * MIB, 495 * MIB, stat) == 355 * MIB
    assert limited(cgroup, 500 * MIB, 495 * MIB, "anon 1\n") == 5 * MIB


def test_a_container_that_is_full_has_nothing_free_rather_than_less(cgroup: Path) -> None:
    assert limited(cgroup, 500 * MIB, 501 * MIB) == 0


def test_where_the_system_does_not_say_memory_is_not_limited(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreadable(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert free_bytes() > 1 << 50
