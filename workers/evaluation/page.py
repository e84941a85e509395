"""The page of an evaluation: one HTML file that loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Callable
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
from engines.histogram import Group, histogram, legend
from engines.meta import Meta
from engines.page import CURVE, GRID, Axes, data_uri, document, tile
from workers.evaluation import threshold_origin
from workers.evaluation.measures import AUPRO_LIMIT, Seen, scores_of, with_truth

Decode = Callable[[bytes], NDArray[np.uint8]]


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
    body = f"""<h1>{category}</h1>
<p class="under">{report["model"]["kind"]} on {images["normal"]} normal and {images["anomaly"]}
defective test images, {escape(report["created"][:16].replace("T", " "))} UTC</p>
<section class="tiles">{_tiles(report)}</section>
{f'<ul class="notes">{notes}</ul>' if notes else ""}
<h2>Scores</h2>
{_scores(normal, defective, threshold, threshold_origin.limits_of(meta))}
{curves}
<h2>Where the threshold comes from</h2>
<table>{_rows({name.capitalize(): words for name, words in report["origin"].items()})}</table>
{threshold_origin.drawn_chart(meta, threshold)}
{_left_out(strange)}
{_cases(seen, threshold, overlays, worst, decode)}
<h2>Model</h2>
<table>{_rows(_facts(report))}</table>"""
    return document(f"{category}: evaluation", body, threshold_origin.STYLE)


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
    return tile(name, f"{value:.4f}", detail)


def _error_tile(name: str, errors: int | None, images: int, at_most: float | None) -> str:
    if errors is None or at_most is None:
        return ""
    how, limit = "bad" if errors else "good", f"at most {100 * at_most:.1f} % (95 % sure)"
    return tile(name, f"{errors} of {images}", limit, look=how)


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
        "Never counts": f"{facts['never_counts']:.1%} of a picture"
        if "never_counts" in facts
        else "",
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
        f'<article class="case"><div><img alt="{name}" src="{data_uri(picture)}">'
        f'<img alt="{name}, overlay" src="{data_uri(overlay)}"></div>'
        f'<p><b class="{part.group}">{what}</b> {part.group}/{name}'
        f"<small>raw score {part.raw_score:.4f}, threshold {threshold:.4f}</small></p></article>"
    )


# ---- the charts ----------------------------------------------------------------------------------


def _scores(
    normal: NDArray[np.float64],
    defective: NDArray[np.float64],
    threshold: float,
    limits: dict[str, float],
) -> str:
    """How many images of each group have which raw score, and below a tick for every image."""
    groups = [Group("normal", "normal", normal), Group("defective", "anomaly", defective)]
    return (
        f"<figure><figcaption>Raw scores of {legend(groups)}"
        " <span>(bars: images; the ticks below: every image)</span></figcaption>"
        f"{histogram(groups, threshold, limits)}</figure>"
    )


def _roc_chart(
    normal: NDArray[np.float64], defective: NDArray[np.float64], report: dict[str, Any]
) -> str:
    scores, truth = with_truth(normal, defective)
    rejected, found, _ = roc_curve(truth, scores)
    axes = Axes(56, 12, 400, 300, (0, 1), (0, 1))
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
    axes = Axes(56, 12, 400, 300, (0, 1), (0, 1))
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
