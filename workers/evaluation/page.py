"""The page of an evaluation: one HTML file that loads nothing."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import (
    precision_recall_curve,
    roc_curve,
)

from engines import image
from engines.meta import Meta
from workers.evaluation import threshold_origin
from workers.evaluation.measures import AUPRO_LIMIT, Group, Seen, scores_of, with_truth

SHOWN_PX = 480  # the longer side of a picture in the page
BARS = 28  # of the histogram
NAMES: dict[Group, str] = {"normal": "normal", "anomaly": "defective"}
Decode = Callable[[bytes], NDArray[np.uint8]]

STYLE = """
:root { color-scheme: light; --ink: #17202b; --soft: #5b6675; --line: #d9dee5; --pale: #f4f6f8;
  --normal: #2f6fae; --anomaly: #d2571c; --good: #1d7a46; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 28px 24px 48px; color: var(--ink);
  background: #fff; font: 16px/1.45 system-ui, "Segoe UI", "Noto Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-print-color-adjust: exact;
  print-color-adjust: exact; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; }
h2 { font-size: 19px; margin: 34px 0 12px; }
.under { color: var(--soft); margin: 4px 0 22px; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 10px; }
.tile { background: var(--pale); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 26px; line-height: 1.2; font-weight: 650; }
.tile.bad b { color: var(--anomaly); } .tile.good b { color: var(--good); }
.tile span { font-size: 14px; } .tile small { display: block; color: var(--soft); }
.notes { margin: 18px 0 0; padding: 10px 14px 10px 32px; border-left: 4px solid #e0a21b;
  background: #fdf8ea; border-radius: 0 8px 8px 0; font-size: 15px; overflow-wrap: anywhere; }
figure { margin: 0; } figcaption { font-size: 15px; font-weight: 600; margin-bottom: 4px; }
figcaption span { font-weight: 400; color: var(--soft); }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--soft); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 28px; margin-top: 24px; }
.cases { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 18px; }
.case { border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
  break-inside: avoid; }
.case div { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; background: var(--line); }
.case img { display: block; width: 100%; height: 100%; object-fit: contain; background: #fff; }
.case p { margin: 0; padding: 9px 12px; font-size: 15px; overflow-wrap: anywhere; }
.case small { display: block; color: var(--soft); font-size: 14px; }
.sheet { display: block; width: 100%; max-width: 780px; }
.normal { color: var(--normal); } .anomaly { color: var(--anomaly); }
table { border-collapse: collapse; font-size: 15px; width: 100%; }
th, td { text-align: left; padding: 6px 0; border-top: 1px solid var(--line); font-weight: 400;
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--soft); width: 190px; padding-right: 16px; }
@media (max-width: 620px) { .pair { grid-template-columns: 1fr; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .cases { grid-template-columns: 1fr; } }
@media print { body { padding: 0; font-size: 13px; max-width: none; }
  .cases { grid-template-columns: 1fr 1fr; }
  figure, .tile, .notes, tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def evaluation_page(
    report: dict[str, Any],
    seen: list[Seen],
    overlays: Path,
    worst: int,
    meta: Meta,
    strange: bytes | None = None,
    limits: image.ImageLimits = image.DEFAULT_LIMITS,
) -> str:
    """One HTML page that loads nothing: measures, charts, the worst mistakes, the model.

    Args:
        report: as evaluation.json holds it.
        seen: the images that were judged.
        overlays: the folder of their overlays.
        worst: how many mistakes are shown.
        meta: of the model.
        strange: a JPEG of the pictures that its training left out.
        limits: within which pictures are read.
    """
    threshold = report["threshold"]["raw"]
    decode = partial(image.decode, limits=limits, bit_depth=meta.bit_depth)
    normal, defective = scores_of(seen, "normal"), scores_of(seen, "anomaly")
    images, category = report["images"], escape(report["category"])
    curves = ""
    if len(normal) and len(defective):
        charts = _roc_chart(normal, defective, report), _pr_chart(normal, defective, report)
        curves = f'<section class="pair">{"".join(charts)}</section>'
    notes = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{category}: evaluation</title><style>{STYLE}{threshold_origin.STYLE}</style></head><body>
<h1>{category}</h1>
<p class="under">{report["model"]["kind"]} on {images["normal"]} normal and {images["anomaly"]}
defective test images, {escape(report["created"][:16].replace("T", " "))} UTC</p>
<section class="tiles">{_tiles(report)}</section>
{f'<ul class="notes">{notes}</ul>' if notes else ""}
<h2>Scores</h2>
{_histogram(normal, defective, threshold, threshold_origin.limits_of(meta))}
{curves}
<h2>Where the threshold comes from</h2>
<table>{_rows({name.capitalize(): words for name, words in report["origin"].items()})}</table>
{threshold_origin.drawn_chart(meta, threshold)}
{_left_out(strange)}
{_cases(seen, threshold, overlays, worst, decode)}
<h2>Model</h2>
<table>{_rows(_facts(report))}</table>
</body></html>
"""


def _tiles(report: dict[str, Any]) -> str:
    """The measures, the ones that a line feels first."""
    found, pixel, images = report["image"], report["pixel"] or {}, report["images"]
    at = f"at {report['threshold']['raw']:.4f}, the threshold"
    best_at = f"would be reached at {found['best_f1_threshold'] or 0:.4f}"
    regions = f"{pixel.get('regions')} regions, {pixel.get('masks')} masks"
    tiles = [
        _error_tile("Misses", found["misses"], images["anomaly"], found["misses_at_most"]),
        _error_tile(
            "False rejects",
            found["false_rejects"],
            images["normal"],
            found["false_rejects_at_most"],
        ),
        _tile("F1", found["f1"], at),
        _tile("Best F1", found["best_f1"], best_at),
        _tile("Image AUROC", found["auroc"], "of no threshold; 0.5 is chance"),
        _tile("Average precision", found["average_precision"], "of no threshold"),
        _tile("Pixel AUROC", pixel.get("auroc"), regions),
        _tile("AUPRO", pixel.get("aupro"), f"up to {100 * AUPRO_LIMIT:.0f} % false positives"),
    ]
    return "".join(tiles)


def _tile(name: str, value: float | None, detail: str) -> str:
    if value is None:
        return ""
    return f'<div class="tile"><span>{name}</span><b>{value:.4f}</b><small>{detail}</small></div>'


def _error_tile(name: str, errors: int | None, images: int, at_most: float | None) -> str:
    if errors is None or at_most is None:
        return ""
    how, limit = "bad" if errors else "good", f"at most {100 * at_most:.1f} % (95 % sure)"
    value = f"<b>{errors} of {images}</b><small>{limit}</small>"
    return f'<div class="tile {how}"><span>{name}</span>{value}</div>'


def _facts(report: dict[str, Any]) -> dict[str, str]:
    facts, times = report["model"], report["milliseconds"]
    backbone = " ".join([facts.get("backbone", ""), ", ".join(facts.get("layers", []))]).strip()
    exported = {"f32": "float32", "f16": "half-precision backbone"}.get(facts.get("exported"), "")
    trained = facts.get("trained", "")
    here = ", converted for this evaluation" * facts["converted_for_this"]
    return {
        "Kind": facts["kind"],
        "Backbone": backbone,
        "Features kept": str(facts.get("n_features", "")),
        "Model size": facts.get("model_size", ""),
        "Latent size": str(facts.get("latent_dim", "")),
        "Image size": f"{facts['image_size']} x {facts['image_size']} px",
        "Memory bank": f"{facts['bank_rows']:,} patches" if "bank_rows" in facts else "",
        "Export": exported,
        "Ran on": f"{facts['runtime']}, {facts['precision']}",
        "Time per image": f"{times['infer']:.1f} ms to infer, {times['decode']:.1f} ms to read and"
        " decode (medians, on the machine that made this page)",
        "Threshold": f"{report['threshold']['raw']:.4f} on the raw score"
        f" ({report['threshold']['of']})",
        "Trained": f"{trained[:16].replace('T', ' ')} UTC" if trained else "",
        "Folder": facts["dir"] + here,
    }


def _rows(facts: dict[str, str]) -> str:
    """Rows of a table, without those that say nothing."""
    return "".join(
        f"<tr><th>{name}</th><td>{escape(value)}</td></tr>"
        for name, value in facts.items()
        if value
    )


def _left_out(strange: bytes | None) -> str:
    if strange is None:
        return ""
    uri = "data:image/jpeg;base64," + base64.b64encode(strange).decode()
    return (
        "<h2>Not learned: unlike the others, and unlike what is known</h2>"
        f'<img class="sheet" alt="Each picture, and what is strange about it" src="{uri}">'
    )


def _cases(seen: list[Seen], threshold: float, overlays: Path, worst: int, decode: Decode) -> str:
    """The worst mistakes, or where there are none the closest calls, as pictures."""
    wrong = sorted(
        (part for part in seen if not part.correct),
        key=lambda part: -abs(part.raw_score - threshold),
    )
    close = sorted(seen, key=lambda part: abs(part.raw_score - threshold))
    shown = (wrong or close)[:worst]
    if not shown:
        return ""
    title = "No mistakes; the closest calls"
    if wrong:
        title = f"The worst mistakes ({len(shown)} of {len(wrong)})"
    cards = "".join(_case(part, threshold, overlays, decode) for part in shown)
    return f'<h2>{title}</h2><section class="cases">{cards}</section>'


def _case(part: Seen, threshold: float, overlays: Path, decode: Decode) -> str:
    picture = decode(part.path.read_bytes())[..., ::-1]
    overlay = cv2.imread(str(overlays / part.overlay))
    what = {
        ("normal", "Normal"): "Good part, passed",
        ("normal", "Anomaly"): "False reject",
        ("anomaly", "Normal"): "Missed defect",
        ("anomaly", "Anomaly"): "Defect, found",
    }[part.group, part.label]
    name = escape(part.name)
    return (
        f'<article class="case"><div><img alt="{name}" src="{_data_uri(picture)}">'
        f'<img alt="{name}, overlay" src="{_data_uri(overlay)}"></div>'
        f'<p><b class="{part.group}">{what}</b> {part.group}/{name}'
        f"<small>raw score {part.raw_score:.4f}, threshold {threshold:.4f}</small></p></article>"
    )


def _data_uri(picture: Any) -> str:
    """A small JPEG of a picture (H, W, 3) BGR, as a URI that holds it."""
    scale = min(1.0, SHOWN_PX / max(picture.shape[:2]))
    width, height = (max(1, round(side * scale)) for side in (picture.shape[1], picture.shape[0]))
    small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


# ---- the charts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axes:
    """A rectangle of an SVG, in px, and the values that its sides stand for."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Values -> px."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def line(self, x: NDArray[np.float64], y: NDArray[np.float64], look: str) -> str:
        points = " ".join(
            "{:.1f},{:.1f}".format(*self.at(*point)) for point in zip(x, y, strict=True)
        )
        return f'<polyline points="{points}" fill="none" {look}/>'

    def dot(self, x: float, y: float, words: str) -> str:
        """A point with a label that stays inside the rectangle."""
        px, py = self.at(x, y)
        right = px > self.left + 0.6 * self.width
        above = py > self.top + 0.75 * self.height
        anchor, shift = ("end", -9) if right else ("start", 9)
        return (
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="var(--ink)"/>'
            f'<text x="{px + shift:.1f}" y="{py + (-9 if above else 18):.1f}"'
            f' text-anchor="{anchor}">{words}</text>'
        )

    def frame(self, x_name: str, y_name: str) -> str:
        """Grid lines, ticks and the names of both sides."""
        bottom, right = self.top + self.height, self.left + self.width
        parts = []
        for value in _ticks(*self.x):
            px, _ = self.at(value, self.y[0])
            parts.append(
                f'<line x1="{px:.1f}" y1="{bottom}" x2="{px:.1f}" y2="{bottom + 4}" {GRID}/>'
                f'<text x="{px:.1f}" y="{bottom + 17}" text-anchor="middle">{value:g}</text>'
            )
        for value in _ticks(*self.y):
            _, py = self.at(self.x[0], value)
            parts.append(
                f'<line x1="{self.left}" y1="{py:.1f}" x2="{right}" y2="{py:.1f}" {GRID}/>'
                f'<text x="{self.left - 7}" y="{py + 4:.1f}" text-anchor="end">{value:g}</text>'
            )
        middle = self.top + self.height / 2
        parts.append(
            f'<text x="{right}" y="{bottom + 33}" text-anchor="end">{x_name}</text>'
            f'<text transform="translate({self.left - 36} {middle}) rotate(-90)"'
            f' text-anchor="middle">{y_name}</text>'
        )
        return "".join(parts)


GRID = 'stroke="var(--line)" stroke-width="1"'
CURVE = 'stroke="var(--normal)" stroke-width="2.5" stroke-linejoin="round"'
DOTTED = 'stroke="var(--soft)" stroke-width="1.2" stroke-dasharray="1.5 3.5"'
DASHED = 'stroke="var(--ink)" stroke-width="1.5" stroke-dasharray="5 4"'


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _histogram(
    normal: NDArray[np.float64],
    defective: NDArray[np.float64],
    threshold: float,
    limits: dict[str, float],
) -> str:
    """How many images of each group have which raw score, and below a tick for every image."""
    scores = np.concatenate([normal, defective])
    low, high = float(scores.min()), float(scores.max())
    span = high - low or max(abs(low), 1.0) / 10
    line = min(max(threshold, low - span), high + span)  # it may be far away
    low, high = min(low, line), max(high, line)
    near = [score for score in limits.values() if low - span / 4 < score < high + span / 4]
    low, high = min([low, *near]) - 0.03 * span, max([high, *near]) + 0.03 * span
    groups: dict[Group, NDArray[np.float64]] = {"normal": normal, "anomaly": defective}
    counts = {group: np.histogram(found, BARS, (low, high))[0] for group, found in groups.items()}
    most = max(1, *(int(found.max()) for found in counts.values()))
    axes = _Axes(52, 24, 940, 210, (low, high), (0, most * 1.05))
    parts = [_frame_with_lanes(axes)]
    width = axes.width / BARS
    shared = (counts["normal"] > 0) & (counts["anomaly"] > 0)
    for lane, (group, found) in enumerate(groups.items()):
        for bar, count in enumerate(counts[group]):
            if count:
                wide = width / 2 if shared[bar] else width
                x = axes.left + bar * width + lane * (width - wide)
                _, y = axes.at(low, count)
                parts.append(
                    f'<rect x="{x + 0.5:.1f}" y="{y:.1f}" width="{wide - 1:.1f}"'
                    f' height="{axes.top + axes.height - y:.1f}" fill="var(--{group})">'
                    f"<title>{count} {NAMES[group]}</title></rect>"
                )
        top = axes.top + axes.height + 44 + 18 * lane
        marks = "".join(f"M{axes.at(score, 0)[0]:.1f} {top}v13" for score in found)
        parts.append(
            f'<path d="{marks}" stroke="var(--{group})" stroke-width="1.5" opacity="0.75"/>'
        )
    parts += [_threshold_line(axes, line, threshold), *_limit_lines(axes, limits)]
    legend = ", ".join(
        f'<span class="{group}">&#9632; {len(found)} {NAMES[group]}</span>'
        for group, found in groups.items()
    )
    return (
        f"<figure><figcaption>Raw scores of {legend}"
        " <span>(bars: images; the ticks below: every image)</span></figcaption>"
        f'<svg viewBox="0 0 1010 334" role="img" aria-label="Histogram of raw scores">'
        f"{''.join(parts)}</svg></figure>"
    )


def _frame_with_lanes(axes: _Axes) -> str:
    """The frame of the histogram; whole images only at its side, the lanes' names at theirs."""
    bottom = axes.top + axes.height
    parts = []
    for value in _ticks(*axes.x, about=8):
        px, _ = axes.at(value, 0)
        parts.append(f'<text x="{px:.1f}" y="{bottom + 17}" text-anchor="middle">{value:g}</text>')
    for value in _ticks(*axes.y, about=4):
        if value == int(value):
            _, py = axes.at(axes.x[0], value)
            end = axes.left + axes.width
            parts.append(
                f'<line x1="{axes.left}" y1="{py:.1f}" x2="{end}" y2="{py:.1f}" {GRID}/>'
                f'<text x="{axes.left - 7}" y="{py + 4:.1f}" text-anchor="end">{value:g}</text>'
            )
    end = axes.left + axes.width
    parts.append(f'<text x="{end}" y="{bottom + 33}" text-anchor="end">raw score</text>')
    return "".join(parts)


def _threshold_line(axes: _Axes, line: float, threshold: float) -> str:
    x, _ = axes.at(line, 0)
    bottom = axes.top + axes.height + 76
    beyond = " (further right)" * (threshold > line) + " (further left)" * (threshold < line)
    anchor = "end" if x > axes.left + 0.7 * axes.width else "start"
    shift = -6 if anchor == "end" else 6
    return (
        f'<line x1="{x:.1f}" y1="8" x2="{x:.1f}" y2="{bottom}" {DASHED}/>'
        f'<text x="{x + shift:.1f}" y="18" text-anchor="{anchor}" style="fill: var(--ink)">'
        f"threshold {threshold:.4f}{beyond}</text>"
    )


def _limit_lines(axes: _Axes, limits: dict[str, float]) -> list[str]:
    """Where as many good parts would be rejected, as far as it is in sight; below all the rest."""
    bottom, lines = axes.top + axes.height + 96, []
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
                f"limit for {share} of good parts</text>"
            )
    return lines


def _roc_chart(
    normal: NDArray[np.float64], defective: NDArray[np.float64], report: dict[str, Any]
) -> str:
    scores, truth = with_truth(normal, defective)
    rejected, found, _ = roc_curve(truth, scores)
    axes = _Axes(56, 12, 400, 300, (0, 1), (0, 1))
    threshold = report["threshold"]["raw"]
    here = float((normal > threshold).mean()), float((defective > threshold).mean())
    diagonal = np.array([0.0, 1.0])
    drawing = (
        axes.frame("normal parts rejected", "defects found")
        + axes.line(diagonal, diagonal, GRID)
        + axes.line(rejected, found, CURVE)
        + axes.dot(*here, "at the threshold")
    )
    return _square("ROC", f"area {report['image']['auroc']:.4f}", drawing)


def _pr_chart(
    normal: NDArray[np.float64], defective: NDArray[np.float64], report: dict[str, Any]
) -> str:
    scores, truth = with_truth(normal, defective)
    precision, recall, _ = precision_recall_curve(truth, scores)
    axes = _Axes(56, 12, 400, 300, (0, 1), (0, 1))
    threshold = report["threshold"]["raw"]
    rejects = scores > threshold
    drawing = axes.frame("defects found (recall)", "rejects that are defects (precision)")
    stairs = np.repeat(recall, 2)[1:], np.repeat(precision, 2)[:-1]  # average precision's own area
    drawing += axes.line(*stairs, CURVE)
    if rejects.any():
        here = float((defective > threshold).mean()), float(truth[rejects].mean())
        drawing += axes.dot(*here, "at the threshold")
    area = f"AP {report['image']['average_precision']:.4f}"
    return _square("Precision and recall", area, drawing)


def _square(name: str, area: str, drawing: str) -> str:
    return (
        f"<figure><figcaption>{name} <span>({area})</span></figcaption>"
        f'<svg viewBox="0 0 470 352" role="img" aria-label="{name}, {area}">{drawing}</svg>'
        "</figure>"
    )
