"""The report of a shift: one HTML page that loads nothing, to be printed and pinned to a wall."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from html import escape

import cv2
import numpy as np

from app.decisions.database import OF_MODELS, Kept, Line
from app.decisions.pictures import Pictures
from app.decisions.quarters import MS, SCORES, Quarter
from app.decisions.shift import MOST_LINES, WEEK, OfModel, Shift
from app.decisions.words import Words, number
from engines.errors import KensaError
from engines.image import ImageLimits
from engines.page import DASHED, GRID, Axes, data_uri, document, ticks, tile

WITHIN_S = 10.0  # pictures are drawn; the others are left out
GIVE_WAY = 3  # times as long as a picture took the cores are left to the line
MOST_HOURS = 13  # that are named below a chart
MOST_KINDS = 8  # of defects, in a row each
TOGETHER_MS = 120_000  # changes that are one mark in a chart
BARS = 50  # of the scores
FAR_RIGHT = 0.82  # a score whose limit's name would not fit at its right
SHARES = (0.5, 0.95, 0.99)
LEAST_PX = 2.0  # of a bar that stands for anything: one reject beside a thousand parts is seen

Picture = Callable[[int], str | None]  # number of a decision -> a URI that holds its picture

STYLE = """
h2 { font-size: 24px; margin: 38px 0 12px; padding-top: 18px; border-top: 3px solid var(--ink);
  overflow-wrap: anywhere; }
h3 { font-size: 16px; margin: 26px 0 6px; } h3 span { font-weight: 400; color: var(--soft); }
.pair h3:first-child { margin-top: 0; }
.tile small { overflow-wrap: anywhere; }
.list th { width: auto; font-weight: 400; border-top: 0; padding: 4px 16px 4px 0; font-size: 14px; }
.list td { padding: 6px 16px 6px 0; } .list tr > :last-child { padding-right: 0; }
.list .right { text-align: right; white-space: nowrap; } .list .time { white-space: nowrap; }
.mark { display: inline-block; height: 12px; border-radius: 2px; vertical-align: -1px;
  background: var(--anomaly); }
.mark.good { background: var(--good); } .mark.none { background: var(--line); }
.notes + table { margin-top: 18px; }
.over { margin-top: 22px; }
.shots { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; }
.shot { border: 1px solid var(--line); border-radius: 8px; overflow: hidden; break-inside: avoid; }
.shot img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  background: var(--pale); }
.shot p { margin: 0; padding: 7px 10px 8px; font-size: 14px; line-height: 1.35;
  overflow-wrap: anywhere; }
.shot small { display: block; color: var(--soft); font-size: 13px; }
.sign { display: grid; grid-template-columns: 2fr 1fr 1fr; gap: 10px; margin-top: 34px; }
.end { break-inside: avoid; }
.sign div { border: 1px solid var(--soft); border-radius: 8px; height: 104px; padding: 8px 12px;
  font-size: 14px; color: var(--soft); }
.foot { margin-top: 18px; font-size: 12px; color: var(--soft); overflow-wrap: anywhere; }
.foot p { margin: 0 0 3px; }
@page { size: A4; margin: 10mm 12mm; }
@media (max-width: 620px) { .shots, .sign { grid-template-columns: 1fr 1fr; } }
@media print { .notes + table { margin-top: 18px; }
.over { margin-top: 12px; } body { line-height: 1.35; } h1 { font-size: 24px; }
  .model + .model { break-before: page; } figcaption { font-size: 13px; }
  .under { margin-bottom: 12px; } h2 { font-size: 18px; margin: 16px 0 8px; padding-top: 9px; }
  h3 { margin: 13px 0 3px; font-size: 13px; break-after: avoid; }
  .tile { padding: 8px 10px; } .tile b { font-size: 21px; } .tile small { font-size: 11px; }
  .pair { grid-template-columns: 1fr 1fr; margin-top: 14px; gap: 22px; }
  table { font-size: 12px; } .list th { font-size: 11px; } .list td { padding: 3px 12px 3px 0; }
  .list th { padding: 2px 12px 2px 0; } .foot { margin-top: 10px; }
  .shots { grid-template-columns: repeat(4, 1fr); gap: 7px; }
  .shot img { aspect-ratio: 3 / 2; }
  .shot p { font-size: 11px; padding: 5px 7px; } .shot small { font-size: 10.5px; }
  .sign { grid-template-columns: 2fr 1fr 1fr; margin-top: 14px; }
  .sign div { font-size: 11px; height: 76px; } .foot { font-size: 9px; } }
"""


def shift_page(shift: Shift, model: str | None, picture: Picture, say: Words, version: str) -> str:
    """The page.

    Args:
        model: the only one that was asked for.
        picture: draws a decision's; None where it cannot be read.
        version: of Kensa.
    """
    parts = [f"<h1>{say('title')}</h1>", _under(shift, model, say), _notes(shift, say)]
    if len(shift.models) > 1:
        parts.append(_overview(shift.models, say))
    marks = _marks(shift.lines)
    parts += [_section(shift, one, marks, picture, say) for one in shift.models]
    parts += [
        _changes(shift, say),
        f'<section class="end">{_signature(say)}{_foot(shift, say, version)}</section>',
    ]
    title = f"{say('title')} {shift.since:%Y-%m-%d %H:%M}"
    return document(title, "\n".join(filter(None, parts)), STYLE, say.language)


def overlays(pictures: Pictures, limits: ImageLimits, within_s: float = WITHIN_S) -> Picture:
    """Draws decisions' pictures, small, with what is anomalous over them, while there is time."""
    ends = time.monotonic() + within_s

    def draw(number: int) -> str | None:
        began = time.monotonic()
        if began > ends:
            return None
        try:
            png = pictures.drawn(number, limits, over_picture=True)
        except (KensaError, OSError, cv2.error):  # somebody has damaged it
            return None
        uri = data_uri(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR))
        time.sleep(GIVE_WAY * (time.monotonic() - began))
        return uri

    return draw


# ---- head and foot -------------------------------------------------------------------------------


def _under(shift: Shift, model: str | None, say: Words) -> str:
    ends = f"{shift.until:%H:%M}"
    if shift.until.date() != shift.since.date():
        ends = f"{_day(shift.until, say)} {ends}"
    zone = escape(str(shift.since.tzinfo))
    words = f"<b>{_day(shift.since, say)} {shift.since:%H:%M} – {ends}</b> ({zone})"
    if model is not None:
        words += f" · {say('of_model', model=model)}"
    return f'<p class="under">{words}</p>'


def _notes(shift: Shift, say: Words) -> str:
    notes = []
    if shift.made < shift.since:
        notes.append(say("coming"))
    elif not shift.models:
        notes.append(say("empty"))
    if shift.is_running:
        notes.append(say("running", time=f"{shift.made:%H:%M}"))
    notes += [
        say("pruned", model=one.name or "–", parts=one.total.parts, kept=one.kept)
        for one in shift.models
        if one.kept < one.total.parts
    ]
    listed = "".join(f"<li>{note}</li>" for note in notes)
    return f'<ul class="notes">{listed}</ul>' if notes else ""


def _overview(models: list[OfModel], say: Words) -> str:
    rows = [
        [_name(one, say), number(one.total.parts), number(one.total.rejects),
         _percent(one.total), number(one.total.unusable.total()), number(one.total.none.total())]
        for one in models
    ]  # fmt: skip
    names = ("model", "parts", "rejects", "reject_share", "unusable", "no_verdict")
    return _table([say(name) for name in names], rows, right=(1, 2, 3, 4, 5))


def _signature(say: Words) -> str:
    boxes = "".join(f"<div>{say(name)}</div>" for name in ("remarks", "leader", "signature"))
    return f'<section class="sign">{boxes}</section>'


def _foot(shift: Shift, say: Words, version: str) -> str:
    (decision, hash_), (line, line_hash) = shift.decisions_head, shift.trail_head
    made = f"{shift.made:%Y-%m-%d %H:%M:%S} ({shift.made.tzinfo})"
    heads = say("heads", decision=decision, hash=hash_, line=line, line_hash=line_hash)
    hold = ""  # to an empty record nothing can be held
    if decision:
        command = f"kensa verify --decision {decision} --hash {hash_}"
        hold = f"<p>{say('hold', command=command)}</p>"
    return (
        f'<footer class="foot"><p>{say("made", time=made, version=version)}</p>'
        f"<p>{heads}</p>{hold}</footer>"
    )


# ---- a model -------------------------------------------------------------------------------------


def _section(
    shift: Shift,
    one: OfModel,
    marks: dict[str, list[tuple[int, str]]],
    picture: Picture,
    say: Words,
) -> str:
    parts = ['<section class="model">', f"<h2>{_name(one, say)}</h2>", _tiles(one, say)]
    if one.total.parts:
        parts += [
            _by_time(shift, one, marks.get(one.name, []), say),
            f'<section class="pair">{_scores(one, say)}<div>{_quantiles(one, say)}'
            f"{_reasons(one, say)}</div></section>",
            _judged(one, say, shift),
            _marked(one, say),
            _worst(one, picture, say, shift),
        ]
    else:
        parts.append(_reasons(one, say))
    return "\n".join(filter(None, [*parts, "</section>"]))


def _tiles(one: OfModel, say: Words) -> str:
    def shown(name: str, value: Callable[[Quarter], str], week: str | None, look: str = "") -> str:
        before, days = one.day_before, len(one.week)
        details = (
            say("day_before", value=value(before)) if before else say("day_before_unknown"),
            say("week_unknown")
            if week is None
            else say("week" if days == WEEK else "week_of", days=days, value=week),
        )
        return tile(say(name), value(one.total), *details, look=look)

    def mean(count: Callable[[Quarter], int]) -> str | None:
        counts = [count(day) for day in one.week]
        return number(sum(counts) / len(counts)) if counts else None

    week = Quarter()
    for day in one.week:
        week += day
    return '<section class="tiles">' + "".join([
        shown("parts", lambda of: number(of.parts), mean(lambda of: of.parts)),
        shown("rejects", lambda of: number(of.rejects), mean(lambda of: of.rejects)),
        shown("reject_share", _percent, _percent(week) if one.week else None),
        shown("no_verdict", lambda of: number(of.none.total()), mean(lambda of: of.none.total()),
              "bad" if one.total.none else "good"),
    ]) + "</section>"  # fmt: skip


def _by_time(shift: Shift, one: OfModel, marks: list[tuple[int, str]], say: Words) -> str:
    """Parts above, rejects below on an axis of their own, and when what was changed."""
    begin, end = (round(one.timestamp() * 1000) for one in (shift.since, shift.until))
    width = 940 * MS / (end - begin)
    drawing = []
    for top, height, name, colour in (
        (26, 130, "parts", "normal"),
        (186, 80, "rejects", "anomaly"),
    ):
        counts = [getattr(quarter, name) for _, quarter in one.quarters]
        axes = Axes(52, top, 940, height, (begin, end), (0, max([1, *counts]) * 1.08))
        drawing.append(_whole_levels(axes, 4 if name == "parts" else 3))
        for (at, _), count in zip(one.quarters, counts, strict=True):
            words = f"{_clock(at, shift)} – {_clock(at + MS, shift)}: {number(count)}"
            drawing.append(_bar(axes, axes.at(at, 0)[0], width, count, colour, words))
    drawing += [_hours(axes, shift), *(_change_line(axes, at, text) for at, text in marks)]
    legend = (
        f'<span class="normal">&#9632; {say("parts")}</span>,'
        f' <span class="anomaly">&#9632; {say("rejects")}</span>'
    )
    return (
        f'<figure class="over"><figcaption>{say("by_time")}: {legend}'
        f" <span>({say('by_time_of')})</span></figcaption>"
        f'<svg viewBox="0 0 1010 292" role="img" aria-label="{say("by_time")}">'
        f"{''.join(drawing)}</svg></figure>"
    )


def _hours(axes: Axes, shift: Shift) -> str:
    """The hours of the clock below a chart; every second or third one of a long shift."""
    begin, end = (round(at) for at in axes.x)
    hours = [at for at in range(begin, end + 1, MS) if _local(at, shift).minute == 0]
    step = -(-len(hours) // MOST_HOURS)
    bottom, parts = axes.top + axes.height, []
    for at in hours[::step]:
        x, _ = axes.at(at, 0)
        parts.append(
            f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 4}" {GRID}/>'
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_clock(at, shift)}</text>'
        )
    return "".join(parts)


def _change_line(axes: Axes, at: int, text: str) -> str:
    x, _ = axes.at(at, 0)
    bottom = axes.top + axes.height
    return (
        f'<line x1="{x:.1f}" y1="20" x2="{x:.1f}" y2="{bottom}" {DASHED}/>'
        f'<text x="{x:.1f}" y="14" text-anchor="middle" style="fill: var(--ink)">{text}</text>'
    )


def _scores(one: OfModel, say: Words) -> str:
    per_bar = SCORES // BARS
    counts = [sum(one.total.scores[bar * per_bar + step] for step in range(per_bar))
              for bar in range(BARS)]  # fmt: skip
    limits = sorted({judged.threshold for judged in one.judged})
    axes = Axes(56, 24, 400, 200, (0, 1), (0, max([1, *counts]) * 1.05))
    drawing = [_whole_levels(axes, 4)]
    for bar, count in enumerate(counts):
        middle = (bar + 0.5) / BARS
        colour = "normal"
        if limits and middle > limits[0]:
            colour = "anomaly" if middle > limits[-1] else "soft"
        words = f"{bar / BARS:g} – {(bar + 1) / BARS:g}: {number(count)}"
        drawing.append(_bar(axes, axes.at(bar / BARS, 0)[0], 400 / BARS, count, colour, words))
    bottom = axes.top + axes.height
    for value in ticks(0, 1):
        x, _ = axes.at(value, 0)
        drawing.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{value:g}</text>')
    drawing.append(f'<text x="456" y="{bottom + 33}" text-anchor="end">{say("score")}</text>')
    for limit in {*limits[:1], *limits[-1:]}:  # those in between stand in the table
        is_left = len(limits) > 1 and limit == limits[0]
        drawing.append(_limit_line(axes, limit, say, is_left=is_left or limit > FAR_RIGHT))
    return (
        f"<figure><figcaption>{say('scores')} <span>({say('scores_of')})</span></figcaption>"
        f'<svg viewBox="0 0 470 262" role="img" aria-label="{say("scores")}">'
        f"{''.join(drawing)}</svg></figure>"
    )


def _limit_line(axes: Axes, limit: float, say: Words, *, is_left: bool) -> str:
    x, _ = axes.at(limit, 0)
    anchor, shift = ("end", -5) if is_left else ("start", 5)
    return (
        f'<line x1="{x:.1f}" y1="8" x2="{x:.1f}" y2="{axes.top + axes.height}" {DASHED}/>'
        f'<text x="{x + shift:.1f}" y="18" text-anchor="{anchor}" style="fill: var(--ink)">'
        f"{say('limit', limit=f'{limit:.4g}')}</text>"
    )


def _quantiles(one: OfModel, say: Words) -> str:
    scores = [one.total.score_at(share) for share in SHARES]
    times = [one.total.ms_at(share) for share in SHARES]
    rows = [
        [say("score_within"), *("–" if at is None else f"{at:.4f}" for at in scores)],
        [say("ms_within"), *("–" if at is None else f"{at:.2f} ms" for at in times)],
    ]
    shares = [f"{100 * share:.0f} %" for share in SHARES]
    return f"<h3>{say('quantiles')}</h3>" + _table(
        [say("of_parts"), *shares], rows, right=(1, 2, 3)
    )


def _reasons(one: OfModel, say: Words) -> str:
    tables = []
    for name, counts in (("unusable", one.total.unusable), ("reasons", one.total.none)):
        if counts:
            rows = [[say.reason(code), number(count)] for code, count in counts.most_common()]
            tables.append(f"<h3>{say(name)}</h3>" + _table([], rows, right=(1,)))
    return "".join(tables)


def _judged(one: OfModel, say: Words, shift: Shift) -> str:
    if not one.judged:
        return ""
    rows = [
        [escape(by.version), f"{_clock(by.first, shift)} – {_clock(by.last, shift)}",
         f"{by.threshold:.4g} ({by.raw_threshold:.4f})", number(by.parts), number(by.rejects),
         _percent_of(by.rejects, by.parts)]
        for by in one.judged
    ]  # fmt: skip
    names = ("version", "first_last", "limit_column", "parts", "rejects", "reject_share")
    head = [say(name) for name in names]
    return f"<h3>{say('judged')}</h3>" + _table(head, rows, right=(2, 3, 4, 5))


def _marked(one: OfModel, say: Words) -> str:
    rejects = sum(count for *_, count in one.rejects)
    if not rejects and not one.missed:
        return ""
    by = {label: sum(count for name, _, count in one.rejects if name == label)
          for label in ("good", "unusable", "")}  # fmt: skip
    kinds = [(kind, count) for label, kind, count in one.rejects if label == "defect"]
    rows = [
        _counted("good", say("good"), by["good"], rejects),
        *(
            _counted("", say("defect_of", kind=kind) if kind else say("defect"), count, rejects)
            for kind, count in kinds[:MOST_KINDS]
        ),
        *(
            [_counted("", say("more_defects"), sum(count for _, count in more), rejects)]
            if (more := kinds[MOST_KINDS:])
            else []
        ),
        _counted("none", say("unusable"), by["unusable"], rejects),
        _counted("none", say("unmarked"), by[""], rejects),
    ]
    if one.missed:
        rows.append([f'<b class="anomaly">{say("missed")}</b>', number(one.missed), "", ""])
    head = f"<h3>{say('marked')}</h3>"
    return head + _table([], rows, right=(1, 2), widths=(34, 9, 10, 47))


def _counted(look: str, words: str, count: int, of: int) -> list[str]:
    share = count / of if of else 0.0
    bar = f'<i class="mark {look}" style="width: {100 * share:.1f}%"></i>' if count else ""
    return [words, number(count), f"{100 * share:.0f} %", bar]


def _worst(one: OfModel, picture: Picture, say: Words, shift: Shift) -> str:
    cards = [card for kept in one.worst if (card := _card(kept, picture(kept.number), say, shift))]
    if not cards:
        return ""
    of = say("worst_of", shown=len(cards), rejects=one.total.rejects)
    return (
        f"<h3>{say('worst')} <span>({of})</span></h3>"
        f'<section class="shots">{"".join(cards)}</section>'
    )


def _card(kept: Kept, uri: str | None, say: Words, shift: Shift) -> str:
    if uri is None:
        return ""
    part = escape(kept.decision.part) or say("unnamed")
    said = say(kept.label or "unmarked")
    if kept.defect:
        said = say("defect_of", kind=kept.defect)
    score, limit = kept.decision.score or 0.0, kept.decision.threshold or 0.0
    numbers = say("score_limit", score=f"{score:.4f}", limit=f"{limit:.4g}")
    when = _clock(kept.decision.at, shift, seconds=True)
    return (
        f'<article class="shot"><img alt="{part}" src="{uri}"><p><b>{part}</b>'
        f"<small>{when} {said}</small><small>{numbers}</small></p></article>"
    )


# ---- the audit trail -----------------------------------------------------------------------------


def _changes(shift: Shift, say: Words) -> str:
    rows = [
        [str(place), _clock(line.at, shift, seconds=True), say.change(line.what),
         _subject(line), escape(line.who) or say("no_key"), escape(line.reason)]
        for place, line in enumerate(shift.lines[:MOST_LINES], 1)
    ]  # fmt: skip
    parts = [f"<h2>{say('changes')}</h2>"]
    names = ("number", "time", "what", "subject", "who", "why")
    parts.append(_table([say(name) for name in names], rows, widths=(7, 10, 21, 25, 13, 24))
                 if rows else f"<p>{say('no_changes')}</p>")  # fmt: skip
    if len(shift.lines) > MOST_LINES:
        parts.append(f"<p>{say('more_changes')}</p>")
    if shift.markers:
        people = [f"{who or say('no_key')} ({number(count)})" for who, count in shift.markers]
        parts.append(f"<p>{say('marks_given', who=', '.join(people))}</p>")
    return "".join(parts)


def _subject(line: Line) -> str:
    """What was changed, and what the line says of it besides, by the names that it has there."""
    details = ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in line.details.items()
        if name != "hash" and type(value) in (int, float, str) and value != ""
    )
    return escape(line.subject) + (f"<br><small>{escape(details)}</small>" if details else "")


def _marks(lines: list[Line]) -> dict[str, list[tuple[int, str]]]:
    """Model -> when something of it was changed, and the numbers of these lines in the list."""
    found: dict[str, list[tuple[int, str]]] = {}
    for place, line in enumerate(lines[:MOST_LINES], 1):
        if line.what in OF_MODELS:
            marks = found.setdefault(line.subject, [])
            if marks and line.at - marks[-1][0] < TOGETHER_MS:
                marks[-1] = (marks[-1][0], f"{marks[-1][1]}, {place}")
            else:
                marks.append((line.at, str(place)))
    return found


# ---- words and drawing ---------------------------------------------------------------------------


def _name(one: OfModel, say: Words) -> str:
    return escape(one.name) or say("no_model")


def _percent(total: Quarter) -> str:
    return _percent_of(total.rejects, total.parts)


def _percent_of(some: int, of: int) -> str:
    return f"{100 * some / of:.2f} %" if of else "–"


def _day(moment: datetime, say: Words) -> str:
    return f"{moment:%Y-%m-%d} ({say('days').split()[moment.weekday()]})"


def _local(at: int, shift: Shift) -> datetime:
    return datetime.fromtimestamp(at / 1000, shift.since.tzinfo)


def _clock(at: int, shift: Shift, *, seconds: bool = False) -> str:
    return f"{_local(at, shift):{'%H:%M:%S' if seconds else '%H:%M'}}"


def _table(
    head: list[str],
    rows: Iterable[list[str]],
    right: Sequence[int] = (),
    widths: Sequence[int] = (),
) -> str:
    """Cells are HTML; columns in `right` are numbers, `widths` are per cent."""

    right_side = ' class="right"'

    def row(cells: list[str], kind: str) -> str:
        return "".join(
            f"<{kind}{right_side if place in right else ''}>{cell}</{kind}>"
            for place, cell in enumerate(cells)
        )

    columns = "".join(f'<col style="width: {width}%">' for width in widths)
    first = f"<tr>{row(head, 'th')}</tr>" if head else ""
    others = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f'<table class="list">{columns}{first}{others}</table>'


def _whole_levels(axes: Axes, about: int) -> str:
    return axes.levels(at for at in ticks(*axes.y, about=about) if at == int(at))


def _bar(axes: Axes, left: float, width: float, count: int, colour: str, words: str) -> str:
    least = LEAST_PX * (axes.y[1] - axes.y[0]) / axes.height
    return axes.bar(left, width, max(count, least), colour, words) if count else ""
