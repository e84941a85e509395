"""How groups of pictures score: a histogram that the evaluation's page and the screen share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.page import DASHED, DOTTED, Axes, ticks

BARS = 28
WIDTH = 1010  # px, as a page has it
LANE = 18  # px, of one group's ticks below the bars


@dataclass(frozen=True)
class Words:
    """What stands in it."""

    label: str = "Histogram of raw scores"
    axis: str = "raw score"
    share: str = "% of each"
    threshold: str = "threshold"
    further_right: str = "further right"
    further_left: str = "further left"
    limit: str = "limit for {} of good parts"


ENGLISH = Words()
JAPANESE = Words(
    label="生スコアの分布",
    axis="生スコア",
    share="各群に占める割合(%)",
    threshold="しきい値",
    further_right="さらに右",
    further_left="さらに左",
    limit="良品の {} を不良とする限界",
)


@dataclass(frozen=True)
class Group:
    """Pictures that belong together, by their scores."""

    name: str
    colour: str  # of the common style: normal, anomaly, good, soft
    scores: NDArray[np.float64]


def histogram(
    groups: Sequence[Group],
    threshold: float,
    limits: dict[str, float],
    say: Words = ENGLISH,
    *,
    shares: bool = False,
    within: Sequence[float] = (),
    width: int = WIDTH,
) -> str:
    """SVG of how many pictures of each group have which raw score, with a tick for every picture.

    Its data- attributes say which px across stand for which scores.

    Args:
        groups: one of them has a score, unless `within` says what is in sight.
        threshold: which is in sight always; where it is far away, at the side, with a word.
        limits: more of them by what is said of each, as far as they are in sight.
        shares: bars are % of their group, for groups of which one has far more pictures.
        within: scores that are in sight whatever is there.
        width: of the whole drawing, px; its height does not depend on it.
    """
    low, high, line = _sight(groups, threshold, limits, within)
    counts = np.array([np.histogram(group.scores, BARS, (low, high))[0] for group in groups])
    of = np.array([len(group.scores) / 100 if shares else 1 for group in groups])
    tall = counts / np.maximum(of, 0.01)[:, None]
    axes = Axes(52, 24, width - 70, 210, (low, high), (0, max(1.0, float(tall.max())) * 1.05))
    height = round(axes.top + axes.height) + 64 + LANE * len(groups)
    parts = [_frame(axes, say, shares), *_bars(axes, groups, counts, tall), *_lanes(axes, groups)]
    parts.append(_threshold_line(axes, line, threshold, height - 20, say))
    parts += _limit_lines(axes, limits, height, say)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{say.label}"'
        f' data-left="{axes.left}" data-width="{axes.width}" data-low="{low!r}"'
        f' data-high="{high!r}">{"".join(parts)}</svg>'
    )


def legend(groups: Sequence[Group]) -> str:
    """HTML that says which colour is whose, and how many there are."""
    return ", ".join(
        f'<span class="{group.colour}">&#9632; {len(group.scores)} {group.name}</span>'
        for group in groups
    )


def _sight(
    groups: Sequence[Group], threshold: float, limits: dict[str, float], within: Sequence[float]
) -> tuple[float, float, float]:
    """The lowest and the highest score in sight, and where the threshold's line is."""
    scores = np.concatenate([*(group.scores for group in groups), np.array(within, float)])
    low, high = float(scores.min()), float(scores.max())
    span = high - low or max(abs(low), 1.0) / 10
    line = min(max(threshold, low - span), high + span)  # it may be far away
    low, high = min(low, line), max(high, line)
    near = [score for score in limits.values() if low - span / 4 < score < high + span / 4]
    return min([low, *near]) - 0.03 * span, max([high, *near]) + 0.03 * span, line


def _frame(axes: Axes, say: Words, shares: bool) -> str:
    """Whole pictures only at its side."""
    bottom, end = axes.top + axes.height, axes.left + axes.width
    parts = []
    for value in ticks(*axes.x, about=max(4, round(axes.width / 118))):
        px, _ = axes.at(value, 0)
        parts.append(f'<text x="{px:.1f}" y="{bottom + 17}" text-anchor="middle">{value:g}</text>')
    parts.append(axes.levels(value for value in ticks(*axes.y, about=4) if value == int(value)))
    parts.append(f'<text x="{end}" y="{bottom + 33}" text-anchor="end">{say.axis}</text>')
    if shares:
        parts.append(f'<text x="{axes.left}" y="{axes.top - 8}">{say.share}</text>')
    return "".join(parts)


def _bars(
    axes: Axes,
    groups: Sequence[Group],
    counts: NDArray[np.int64],
    tall: NDArray[np.float64],
) -> list[str]:
    """Beside each other where groups share a range of scores.

    Args:
        counts, tall: (groups, BARS) pictures, and what their bars are as high as.
    """
    width, parts = axes.width / BARS, []
    for bar in range(BARS):
        shown = [group for group in range(len(groups)) if counts[group, bar]]
        for place, group in enumerate(shown):
            wide = width / len(shown)
            left = axes.left + bar * width + place * wide
            words = f"{counts[group, bar]} {groups[group].name}"
            parts.append(axes.bar(left, wide, float(tall[group, bar]), groups[group].colour, words))
    return parts


def _lanes(axes: Axes, groups: Sequence[Group]) -> list[str]:
    """A row of ticks for each group, one for each picture."""
    parts = []
    for lane, group in enumerate(groups):
        top = axes.top + axes.height + 44 + LANE * lane
        marks = "".join(f"M{axes.at(score, 0)[0]:.1f} {top}v13" for score in group.scores)
        parts.append(
            f'<path d="{marks}" stroke="var(--{group.colour})" stroke-width="1.5" opacity="0.75"/>'
        )
    return parts


def _threshold_line(axes: Axes, line: float, threshold: float, bottom: float, say: Words) -> str:
    x, _ = axes.at(line, 0)
    beyond = f" ({say.further_right})" * (threshold > line)
    beyond += f" ({say.further_left})" * (threshold < line)
    anchor = "end" if x > axes.left + 0.7 * axes.width else "start"
    shift = -6 if anchor == "end" else 6
    return (
        f'<g class="threshold"><line x1="{x:.1f}" y1="8" x2="{x:.1f}" y2="{bottom}" {DASHED}/>'
        f'<text class="now" x="{x + shift:.1f}" y="18" text-anchor="{anchor}">'
        f"{say.threshold} {threshold:.4f}{beyond}</text></g>"
    )


def _limit_lines(axes: Axes, limits: dict[str, float], bottom: float, say: Words) -> list[str]:
    """Where as many good parts would be rejected, as far as it is in sight; below all the rest."""
    lines = []
    for number, (share, score) in enumerate(sorted(limits.items(), key=lambda one: one[1])):
        if axes.x[0] <= score <= axes.x[1]:
            x, _ = axes.at(score, 0)
            left = number == 0 and len(limits) > 1  # two names never meet: one on either side
            shift, anchor = (-6, "end") if left else (6, "start")
            if not left and x > axes.left + 0.8 * axes.width:
                shift, anchor = -6, "end"
            lines.append(
                f'<line x1="{x:.1f}" y1="{axes.top}" x2="{x:.1f}" y2="{bottom}" {DOTTED}/>'
                f'<text x="{x + shift:.1f}" y="{bottom}" text-anchor="{anchor}">'
                f"{say.limit.format(share)}</text>"
            )
    return lines
