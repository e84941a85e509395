"""A histogram shows every picture of every group, and where the threshold lies among them."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from engines.histogram import BARS, JAPANESE, Group, histogram, legend


def group(*scores: float, name: str = "normal", colour: str = "normal") -> Group:
    return Group(name, colour, np.array(scores, np.float64))


def read(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def bars(svg: str) -> list[tuple[str, float]]:
    """What is said of each bar, and how high it is."""
    found = read(svg).iter("rect")
    return [(one[0].text or "", float(one.get("height", ""))) for one in found]


def test_every_picture_is_in_a_bar_and_has_a_tick() -> None:
    good, bad = group(*np.linspace(1, 2, 40)), group(2.5, 3.0, name="bad", colour="anomaly")
    svg = histogram([good, bad], 2.2, {})
    counted = {"normal": 0, "bad": 0}
    for words, _ in bars(svg):
        count, name = words.split()
        counted[name] += int(count)
    assert counted == {"normal": 40, "bad": 2}
    assert [path.get("d", "").count("M") for path in read(svg).iter("path")] == [40, 2]


def test_the_threshold_stands_at_its_score_as_the_attributes_say() -> None:
    svg = read(histogram([group(1, 2, 4)], 3.1, {}))
    left, width, low, high = (
        float(svg.get(f"data-{key}", "")) for key in ("left", "width", "low", "high")
    )
    line = svg.find("g[@class='threshold']/line")
    assert line is not None
    at = left + (3.1 - low) / (high - low) * width
    assert float(line.get("x1", "")) == pytest.approx(at, abs=0.06)


@pytest.mark.parametrize(("threshold", "words"), [(1e9, "further right"), (-1e9, "further left")])
def test_a_threshold_far_away_is_in_sight_with_a_word(threshold: float, words: str) -> None:
    svg = histogram([group(1, 2)], threshold, {})
    assert words in svg
    assert float(read(svg).get("data-high", "")) < 10


def test_shares_make_few_pictures_as_high_as_many() -> None:
    many, few = group(*[1.0] * 900), group(3.0, 3.0, name="bad", colour="anomaly")
    heights = [height for _, height in bars(histogram([many, few], 2, {}, shares=True))]
    assert heights[0] == pytest.approx(heights[1])
    heights = [height for _, height in bars(histogram([many, few], 2, {}))]
    assert heights[0] > 100 * heights[1]


def test_groups_that_share_a_range_stand_beside_each_other() -> None:
    svg = histogram([group(1, 5), group(1, 5, name="bad", colour="anomaly")], 3, {})
    places = [
        (float(one.get("x", "")), float(one.get("width", ""))) for one in read(svg).iter("rect")
    ]
    ends = sorted((x, x + width) for x, width in places)
    assert len(ends) == 4
    assert all(end <= begin + 1.01 for (_, end), (begin, _) in pairwise(ends))
    assert all(width < 940 / BARS for _, width in places)


def test_an_empty_group_and_scores_that_are_all_alike_are_drawn() -> None:
    assert bars(histogram([group(), group(2, 2, 2)], 2, {}))[0][0] == "3 normal"
    assert bars(histogram([group()], 2, {}, within=(1, 3))) == []


def test_limits_in_sight_have_their_names_and_others_none() -> None:
    svg = histogram([group(1, 2)], 1.5, {"1 %": 1.9, "5 %": 1.6, "0.1 %": 99})
    assert len(re.findall("limit for [15] % of good parts", svg)) == 2
    assert "0.1 %" not in svg


def test_it_speaks_japanese() -> None:
    svg = histogram([group(1, 2)], 99, {"1 %": 1.9}, JAPANESE, shares=True)
    assert {"生スコア", "さらに右"} <= set(re.findall(r"[ぁ-んァ-ン一-龥]+", svg))
    assert not re.search(
        "[A-Za-z]{4,}", " ".join(text for one in read(svg).iter("text") for text in one.itertext())
    )


def test_the_legend_counts_each_group() -> None:
    assert legend([group(1, 2), group(3, name="bad", colour="anomaly")]) == (
        '<span class="normal">&#9632; 2 normal</span>, <span class="anomaly">&#9632; 1 bad</span>'
    )
