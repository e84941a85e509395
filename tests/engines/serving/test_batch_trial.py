"""Is a batch faster? The clock is moved by the test, so nothing hangs on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.runtimes import ALONE, Batches
from engines.serving import batch_trial
from engines.serving.batch_trial import ROUNDS, Took, Trial, choose_batches, weigh
from engines.serving.opening import Opening, open_model
from engines.serving.resident import describe
from support.line import variant
from support.timed_runtime import Timed

MS = 1 / 1024  # a binary fraction, so that sums of it are exact


def chosen(engine: Timed) -> Batches:
    choose_batches(engine, engine.machine.watch)
    return engine.batches


def test_a_batch_is_kept_where_it_is_faster_and_from_how_many_on() -> None:
    engine = Timed(fixed_s=4 * MS, each_s=MS)  # alone 5 ms, four together 8 ms
    assert chosen(engine) == Batches(4, least=2)
    engine = Timed(fixed_s=2 * MS, each_s=4 * MS)  # alone 6 ms, four together 18 ms
    assert chosen(engine) == Batches(4, least=3)


def test_where_nothing_is_filled_up_a_batch_pays_from_two_on() -> None:
    engine = Timed(fixed_s=2 * MS, each_s=4 * MS)
    engine.pads = False
    assert chosen(engine) == Batches(4, least=2)


def test_the_size_that_is_fastest_for_each_image_is_kept() -> None:
    assert chosen(Timed(fixed_s=8 * MS, each_s=MS, sizes=(2, 8, 4))).size == 8


@pytest.mark.parametrize(("fixed", "size"), [(0, 1), (1, 1), (2, 4)])
def test_a_batch_that_is_hardly_faster_is_not_kept(fixed: int, size: int) -> None:
    """Of 8 ms for each image by itself a batch of four saves three quarters of what is fixed."""
    assert chosen(Timed(fixed_s=fixed * MS, each_s=(8 - fixed) * MS)).size == size


def test_no_batch_is_kept_where_it_scores_otherwise() -> None:
    assert chosen(Timed(fixed_s=5 * MS, together_off=0.01)) == ALONE


def test_an_image_that_takes_long_by_itself_is_not_tried_in_batches() -> None:
    engine = Timed(fixed_s=120 * MS)
    assert (chosen(engine), set(engine.ran), engine.prepared_by) == (ALONE, {1}, set())


def test_where_images_take_long_there_are_fewer_rounds() -> None:
    quick, slow = Timed(fixed_s=MS), Timed(fixed_s=90 * MS)
    chosen(quick)
    chosen(slow)
    assert (quick.ran.count(4), slow.ran.count(4)) == (1 + ROUNDS, 1 + 2)


def test_a_runtime_says_how_much_a_batch_must_gain() -> None:
    engine = Timed(fixed_s=0.08 * MS, each_s=MS)  # four in 0.944 of the time
    assert chosen(engine) == ALONE
    engine.worth = 1.0
    assert chosen(engine) == Batches(4, least=4)


def test_a_runtime_that_offers_no_batches_is_left_alone() -> None:
    assert chosen(Timed(sizes=())) == ALONE


def test_no_step_is_longer_than_one_batch_or_one_image() -> None:
    """A part that comes meanwhile waits for no more than that."""
    engine = Timed(fixed_s=MS, each_s=MS, sizes=(2, 4))
    for step in Trial(engine, engine.machine.watch).steps():
        before = len(engine.ran)
        step.work()
        assert len(engine.ran) - before == (0 if step.beside else 1)
    assert engine.batches == ALONE  # parts run as before until it is decided


# While others are at work


@pytest.mark.parametrize("fixed_s", [4 * MS, 0.0, 120 * MS])
@pytest.mark.parametrize("others", [0.2, 0.5, 3.0])
def test_what_was_found_while_others_had_the_cpu_is_provisional(
    fixed_s: float, others: float
) -> None:
    engine = Timed(fixed_s=fixed_s, each_s=MS)
    size = chosen(engine).size
    assert not engine.batches.provisional
    engine.machine.others = others
    assert chosen(engine).provisional
    assert engine.batches.size == size


def test_moments_of_waiting_as_there_are_on_any_machine_do_not_count() -> None:
    engine = Timed(fixed_s=4 * MS, each_s=MS)
    engine.machine.others = 0.05
    assert chosen(engine) == Batches(4, least=2)


def busy_in(engine: Timed, busy: Callable[[int], bool], **how: float) -> Trial:
    """A trial during which the machine is busy in some calls of the engine, by their number."""
    trial, infer, machine = Trial(engine, engine.machine.watch), engine.infer, engine.machine

    def watched(*images: Any) -> Any:
        for name, share in how.items():
            setattr(machine, name, share if busy(len(engine.ran)) else 0.0)
        return infer(*images)

    engine.infer = watched  # type: ignore[method-assign]
    for step in trial.steps():
        step.work()
    return trial


def round_of(call: int) -> int:
    """Which round a call belongs to: two single images and five that compare scores come before."""
    return (call - 7) // 5


@pytest.mark.parametrize("disturbed", [{0, 1}, {2, 4}])
def test_a_few_rounds_that_were_disturbed_are_not_counted(disturbed: set[int]) -> None:
    engine = Timed(fixed_s=MS, each_s=MS / 4)
    trial = busy_in(engine, lambda n: round_of(n) in disturbed, others=9.0)
    assert trial.found == Batches(4, least=2)
    assert engine.ran.count(4) == 1 + ROUNDS


def test_where_most_rounds_were_disturbed_all_are_counted_and_nothing_is_certain() -> None:
    engine = Timed(fixed_s=4 * MS, each_s=MS)
    trial = busy_in(engine, lambda n: round_of(n) in (0, 1, 2), others=9.0)
    assert trial.found == Batches(4, least=2, provisional=True)


def test_times_that_scatter_are_provisional_though_no_thread_waited() -> None:
    """As where another process has the GPU, or another guest the machine."""
    engine = Timed(fixed_s=4 * MS, each_s=MS)
    trial = busy_in(engine, lambda n: round_of(n) > 0, hidden=0.5)
    assert trial.found.provisional
    engine = Timed(fixed_s=4 * MS, each_s=MS)
    trial = busy_in(engine, lambda n: round_of(n) == 1, hidden=0.5)  # one of five
    assert not trial.found.provisional


def test_of_several_sizes_one_that_was_disturbed_makes_the_outcome_provisional() -> None:
    engine = Timed(fixed_s=4 * MS, each_s=MS, sizes=(2, 4))
    trial = busy_in(engine, lambda n: n < 10, others=9.0)
    assert not trial.found.provisional  # one round of five, of the first size
    engine = Timed(fixed_s=4 * MS, each_s=MS, sizes=(2, 4))
    trial = busy_in(engine, lambda n: n < 20, others=9.0)  # all rounds but one, of the first size
    assert trial.found == Batches(4, least=2, provisional=True)


def test_a_share_is_by_the_least_times_of_the_rounds_that_count() -> None:
    def took(seconds: float, delayed_s: float = 0.0) -> Took:
        return Took(seconds, delayed_s)

    quiet = [(took(3.0), took(4.0)), (took(2.9), took(4.2)), (took(3.1), took(4.1))]
    busy = [(took(2.0, 2.0), took(9.0, 5.0))]
    assert weigh([*quiet, *busy]) == (2.9 / 4.0, True)
    assert weigh([*busy, *quiet[:1]]) == (2.0 / 4.0, False)
    assert weigh(busy) == (2.0 / 9.0, False)


def test_until_its_last_step_a_trial_has_found_nothing_that_holds() -> None:
    engine = Timed(fixed_s=4 * MS, each_s=MS)
    trial = Trial(engine, engine.machine.watch)
    for step in trial.steps():
        assert trial.found == Batches(1, provisional=True)
        step.work()
    assert trial.found == Batches(4, least=2)


# When a model is opened


@pytest.mark.parametrize("batches", [Batches(2), Batches(2, provisional=True)])
def test_what_was_measured_of_a_model_holds_for_its_next_version(
    kensa_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: Batches
) -> None:
    """And is as provisional as it was."""
    measured: list[Any] = []

    def choose(runtime: Any) -> None:
        measured.append(runtime)
        runtime.take_together(batches)

    monkeypatch.setattr("engines.serving.opening.choose_batches", choose)
    how = Opening("f32")
    first = open_model(kensa_model, "bracket", "0001", how)
    learned = variant(kensa_model, tmp_path / "learned", bank=0.99)
    bank_alone = open_model(learned, "bracket", "0002", how, beside=first)
    assert bank_alone.bank_alone
    other = kensa_model / "model.onnx"
    monkeypatch.setattr("engines.serving.opening.sha256", lambda path: f"another {path == other}")
    whole = open_model(kensa_model, "bracket", "0003", how, beside=first)
    assert not whole.bank_alone
    assert [one.runtime.batches for one in (first, bank_alone, whole)] == [batches] * 3
    assert measured == [first.runtime]
    assert ("at once for now" in describe(whole)) == batches.provisional
    images = np.random.default_rng(0).integers(0, 255, (2, 256, 256, 3), np.uint8)
    for one in (first, bank_alone, whole):
        together = one.runtime.infer(images)[0]
        alone = np.concatenate([one.runtime.infer(image[None])[0] for image in images])
        np.testing.assert_allclose(together, alone, rtol=1e-3)
        one.runtime.close()


def test_batches_are_not_measured_where_they_are_switched_off(
    kensa_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_trial.Trial, "steps", lambda _: pytest.fail("measured"))
    with pytest.raises(pytest.fail.Exception):
        open_model(kensa_model, "bracket", "0001", Opening("f32"))
    model = open_model(kensa_model, "bracket", "0001", Opening("f32", batching=False))
    assert model.runtime.batches == ALONE
    model.runtime.close()


def test_where_parts_wait_for_the_model_batches_are_tried_later(
    kensa_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_trial.Trial, "steps", lambda _: pytest.fail("measured"))
    model = open_model(kensa_model, "bracket", "0001", Opening("f32", try_later=True))
    assert model.runtime.batches == replace(ALONE, provisional=True)
    assert "one at a time for now" in describe(model)
    model.runtime.close()
