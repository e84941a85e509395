"""Claims about engines.limits: a table that can be relied on, and limits that are asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engines.errors import BadMeta, BadRequest
from engines.limits import Limits, asked_for, in_force
from engines.meta import Meta

ROWS = [
    {"false_rejects": 0.001, "raw": 3.2, "at_most": 0.12},
    {"false_rejects": 0.01, "raw": 2.7, "at_most": 0.14},
    {"false_rejects": 0.1, "raw": 2.0, "at_most": 0.3},
]


def model(limits: Any = ROWS, **keys: Any) -> Meta:
    """Raw scores from 0.7 to 4.7 can be expressed."""
    made = {
        "model": "padim", "backbone": "resnet18", "layers": ["layer1"], "n_features": 9,
        "image_size": 64, "image_threshold_auto": 2.7, "raw_image_min": 1.0, "raw_image_max": 5.0,
        "calibration": {"false_rejects": 0.01, "limits": limits}, **keys,
    }  # fmt: skip
    return Meta.parse(made)


def test_the_limit_in_force_is_told_in_all_forms() -> None:
    found = in_force(model())
    assert (found.threshold, found.raw) == (0.5, 2.7)
    assert (found.false_rejects, found.at_most) == (0.01, 0.14)
    assert [row.raw for row in found.rows] == [3.2, 2.7, 2.0]


@pytest.mark.parametrize("budget", [0.001, 0.0011, 0.005, 0.01, 0.02, 0.0999, 0.1])
def test_a_budget_that_is_asked_for_is_the_one_in_force(budget: float) -> None:
    found = in_force(asked_for(model(), {"false_rejects": budget}))
    assert found.false_rejects == pytest.approx(budget, rel=1e-9)
    assert 2.0 - 1e-9 <= found.raw <= 3.2 + 1e-9


def test_between_two_rows_it_goes_linearly_with_the_logarithm() -> None:
    found = in_force(asked_for(model(), {"false_rejects": math.sqrt(0.001 * 0.01)}))
    assert found.raw == pytest.approx((3.2 + 2.7) / 2)
    assert found.at_most == 0.14, "the bound of the lower limit holds, that of the higher does not"


def test_outside_of_the_table_no_share_is_known() -> None:
    strict, lax = (in_force(asked_for(model(), {"raw": raw})) for raw in (1.9, 3.3))
    assert (strict.false_rejects, strict.at_most) == (None, None)
    assert (lax.false_rejects, lax.at_most) == (None, 0.12)


def test_of_several_shares_with_one_limit_the_stated_one_is_in_force_else_the_least() -> None:
    rows = [{"false_rejects": share, "raw": 2.7} for share in (0.001, 0.01, 0.02)]
    assert in_force(model(rows)).false_rejects == 0.01
    unsaid = model(calibration={"limits": rows})
    assert in_force(unsaid).false_rejects == 0.001
    assert in_force(unsaid).at_most is None


def test_a_single_row_is_a_table() -> None:
    one = model(ROWS[1:2])
    assert in_force(asked_for(one, {"false_rejects": 0.01})).raw == pytest.approx(2.7)
    with pytest.raises(BadRequest, match=r"from 0\.01 to 0\.01"):
        asked_for(one, {"false_rejects": 0.02})


@pytest.mark.parametrize(
    "damaged",
    [
        None, [], {}, "limits", [None], [1], [{}], [{"raw": 1.0}], [{"false_rejects": 0.1}],
        [{**ROWS[0], "raw": float("nan")}], [{**ROWS[0], "raw": float("inf")}],
        [{**ROWS[0], "raw": True}], [{**ROWS[0], "raw": "3.2"}], [{**ROWS[0], "raw": 10**400}],
        [{**ROWS[0], "false_rejects": 0}], [{**ROWS[0], "false_rejects": 1}],
        [{**ROWS[0], "false_rejects": -0.1}], ROWS[::-1], [ROWS[0], ROWS[0]],
        [ROWS[0], {**ROWS[1], "raw": 3.3}], [*ROWS, None],
        [{**ROWS[0], "raw": 1e308}, {**ROWS[1], "raw": -1e308}],
        [{**ROWS[0], "false_rejects": 5e-324}],
    ],
)  # fmt: skip
def test_a_damaged_table_is_unknown_and_no_crash(damaged: Any) -> None:
    meta = model(damaged)
    assert Limits.of(meta) is None
    found = in_force(meta)
    assert (found.false_rejects, found.at_most, found.rows) == (None, None, ())
    for budget in (0.01, "1%"):
        with pytest.raises(BadRequest, match="train it again, or say threshold or raw"):
            asked_for(meta, {"false_rejects": budget})
    assert in_force(asked_for(meta, {"raw": 3.7})).threshold == 0.75


@pytest.mark.parametrize("calibration", [None, {}, {"method": "best_f1"}])
def test_a_model_of_before_has_no_table(calibration: Any) -> None:
    assert in_force(model(calibration=calibration)).false_rejects is None


@pytest.mark.parametrize("bound", [float("nan"), "0.1", True, -1, 2])
def test_a_bound_that_is_none_is_left_out_alone(bound: Any) -> None:
    found = in_force(model([{**ROWS[1], "at_most": bound}]))
    assert (found.false_rejects, found.at_most) == (0.01, None)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({}, "Say exactly one of threshold (a number from 0 to 1), raw (a number from 0.7 to 4.7)"
             " and false_rejects (a number from 0.001 to 0.1), not none."),
        ({"threshold": None}, "not none."),
        ({"threshold": 0.5, "raw": 2.0}, "not threshold and raw."),
        ({"threshold": 1.01}, "threshold is 1.01; it must be a number from 0 to 1."),
        ({"threshold": -0.01}, "it must be a number from 0 to 1."),
        ({"threshold": float("nan")}, "threshold must be a number from 0 to 1, not 'nan'."),
        ({"threshold": True}, "threshold must be a number from 0 to 1, not 'True'."),
        ({"threshold": "0.5"}, "threshold must be a number from 0 to 1, not '0.5'."),
        ({"threshold": [0.5]}, "threshold must be a number from 0 to 1, not '[0.5]'."),
        ({"raw": 4.71}, "raw is 4.71; for this model it must be a number from 0.7 to 4.7."),
        ({"raw": 0.69}, "it must be a number from 0.7 to 4.7."),
        ({"raw": float("-inf")}, "raw must be a number from 0.7 to 4.7, not '-inf'."),
        ({"raw": 10**400}, "raw must be a number from 0.7 to 4.7"),
        ({"false_rejects": 0}, "false_rejects is 0; it must be a number from 0.001 to 0.1."),
        ({"false_rejects": 0.11}, "false_rejects is 0.11; it must be a number from 0.001 to 0.1."),
        ({"false_rejects": "1%"}, "false_rejects must be a number from 0.001 to 0.1, not '1%'."),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_what_can(wanted: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadRequest) as refused:
        asked_for(model(), wanted)
    assert sentence in str(refused.value)


def test_a_budget_whose_limit_cannot_be_expressed_says_so() -> None:
    far = model([{"false_rejects": 0.01, "raw": 9.0}])
    with pytest.raises(BadRequest, match=r"needs a raw limit of 9; .* from 0\.7 to 4\.7"):
        asked_for(far, {"false_rejects": 0.01})


@pytest.mark.parametrize("raw", [0.7, 4.7, 1.2345, 2.7])
def test_the_ends_of_the_range_can_be_asked_for(raw: float) -> None:
    assert in_force(asked_for(model(), {"raw": raw})).raw == pytest.approx(raw, abs=1e-12)


def test_only_the_limit_of_the_hand_changes() -> None:
    before = model(of_somebody={"kept": 1})
    after = asked_for(before, {"threshold": 0.75})
    assert after.with_(image_threshold=0.5) == before


def test_a_model_that_was_never_verified_has_no_limit() -> None:
    for act in (in_force, lambda meta: asked_for(meta, {"threshold": 0.5})):
        with pytest.raises(BadMeta, match="no score can be judged"):
            act(model(image_threshold_auto=None))
