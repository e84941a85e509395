"""What the commands share: how they end, and how they tell what happened."""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from engines.errors import EXIT_CODE, INTERRUPTED, BadRequest, KensaError
from engines.files import print_anything, printable
from engines.limits import TRAINED
from engines.promise import FEW_FOUND, UNTRAINED
from engines.store.bundle import STRANGE
from workers.progress import Progress

# Threads of torch that wait must sleep: when they spin, training beside a server slows both down.
# It has to be said before torch is loaded, and the commands load torch after this file.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# torch and what comes with it make 600,000 objects, none of which is garbage: to look for some
# after each 700, as Python does, is a seventh of the time that it takes to load them, and to look
# through all of them at the end is a second.
gc.set_threshold(50_000)
atexit.register(gc.freeze)

AGAIN_S = 0.1  # after which Ctrl-C is heard that came while torch was loaded
FEW_PARTS = 20  # under so many a threshold says little


class Stopped(KeyboardInterrupt):
    """Ctrl-C, where something was changed: the sentence says what."""


def run(work: Callable[[], None], progress: Progress) -> int:
    """Do the work of a command; errors become one sentence and an exit code.

    Returns:
        0, 2 for what the user can mend (`KensaError`, a file or folder that cannot be written),
        130 after Ctrl-C. Anything else is a fault of ours and leaves with its traceback.
    """
    print_anything()
    hush_libraries()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _once_torch_is_loaded)
    try:
        work()
    except KensaError as error:
        progress.fail(str(error))
        return EXIT_CODE
    except OSError as error:
        if error.errno == errno.ENOSPC:
            progress.fail(f"The disk is full; nothing was changed. Free some space ({error}).")
        else:
            progress.fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
        return EXIT_CODE
    except KeyboardInterrupt as stopped:
        # Where it came inside an exec (dataclasses are made by one, on import), Python would end
        # a module that -m runs by the signal and not with the exit code, until the next exec.
        exec("")
        progress.fail(str(stopped) or "Stopped. Nothing was changed.")
        return INTERRUPTED
    return 0


def _once_torch_is_loaded(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: torch calls Python from C++ while it is loaded, and aborts where that raises."""
    torch = sys.modules.get("torch")
    if not getattr(getattr(torch, "__spec__", None), "_initializing", False):
        signal.default_int_handler(number, frame)
    elif not any(one.name == "ctrl-c" for one in threading.enumerate()):  # one is enough
        main = threading.main_thread().ident
        later = threading.Timer(AGAIN_S, signal.pthread_kill, [main, number])
        later.name, later.daemon = "ctrl-c", True
        later.start()


def show(summary: list[str]) -> None:
    """Print what a command did, for a person."""
    print(printable("\n".join(summary)), flush=True)  # noqa: T201


def must_be_there(flags: dict[str, Any], *names: str) -> None:
    """Raise BadRequest where a path that was given leads to nothing, before torch is loaded.

    Args:
        flags: the path of each flag, as text or not; None and the word 'untrained' name none.
    """
    for name in names:
        given = flags[name]
        if given not in (None, UNTRAINED) and not Path(given).exists():
            raise BadRequest(f"{given} does not exist: --{name} names nothing that is there.")


def cache_folder() -> Path | None:
    """Where this user's commands keep what only saves time; None for a user without a home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(home) / "kensa" if Path(home).is_absolute() else None


def hush_libraries() -> None:
    """Keep a terminal for what its user can act on."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("timm", "torch.onnx", "huggingface_hub", "httpx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)


def summarise_training(report: dict[str, Any], out_dir: Path) -> list[str]:
    """What was learned and measured, for a person."""
    images, seconds = report["images"], report["seconds"]
    skipped = f", {len(images['skipped'])} broken ones skipped" if images["skipped"] else ""
    skipped += f", {images['known']} known already" if images.get("known") else ""
    return [
        "",
        f"learned      {images['learned']} images{skipped} in {seconds['learn']:.1f} s",
        *_strange_lines(images.get("strange", []), out_dir),
        *_knowledge_lines(report, report.get("before", {})),
        *_calibration_lines(report["calibration"], report.get("threshold", {})),
        *(f"note         {note}" for note in report.get("notes", [])),
        f"seconds      load {seconds['load']:.1f}, learn {seconds['learn']:.1f},"
        f" verify {seconds['verify']:.1f}",
        f"written to   {out_dir}",
    ]


def _strange_lines(strange: list[str], out_dir: Path) -> list[str]:
    if not strange:
        return []
    names = ", ".join(Path(name).name for name in strange)
    return [
        f"not learned  {len(strange)} unlike the others and unlike what is known: {names}",
        f"             (look at {out_dir / STRANGE}; if these parts are good, learn them with"
        " --keep_strange)",
    ]


def _knowledge_lines(report: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """What the model knows now, beside its weights."""
    if bank := report.get("memory_bank"):
        size = f"{bank['rows']:,} x {bank['channels']} ({bank['mib']} MiB)"
        grown = bank["rows"] - before["memory_bank"]["rows"] if before else None
        return [f"memory bank  {size}{f', {grown:,} rows new' if before else ''}"]
    if stats := report.get("stats"):
        size = f"{stats['positions']:,} positions x {stats['features']} features"
        return [f"statistics   {size} of {stats['images']} images ({stats['mib']} MiB)"]
    return []


def _calibration_lines(found: dict[str, Any], in_force: dict[str, float]) -> list[str]:
    if found["method"] == "kept":
        kept = f"threshold    {found['threshold']:.4f} on the raw score, as before"
        return [f"{kept} (nothing says how other normal parts score)", *_by_hand(in_force)]
    return [
        f"threshold    {found['threshold']:.4f} on the raw score, {_source(found)}",
        *_by_hand(in_force),
        f"score range  {found['raw_min']:.4f} to {found['raw_max']:.4f}",
        *_promise(found),
        *_defect_lines(found),
        *_warnings(found),
    ]


def _by_hand(in_force: dict[str, float]) -> list[str]:
    """That another threshold judges than the one that was found."""
    if in_force.get("normalised", TRAINED) == TRAINED:
        return []
    return [
        f"in force     {in_force['raw']:.4f}, set by hand (image_threshold"
        f" {in_force['normalised']:g}); what is said below is of the one above"
    ]


def _source(found: dict[str, Any]) -> str:
    """Where the scores of normal parts come from."""
    how = {
        "left_out": "each judged by a model that had not learned it",
        "held_out": "held out of the training",
        "test": "of the test images",
    }[found["method"]]
    pictures, parts = found["normals"], found["parts"]
    count = f"{pictures} pictures" if pictures == parts else f"{pictures} pictures of {parts} parts"
    return f"from {count}, {how}"


def _promise(found: dict[str, Any]) -> list[str]:
    """What the number of parts can promise."""
    promised = (
        f"promise      at most {100 * found['at_most']:.1f} % false rejects, 95 % sure"
        f" ({found['rejected']} of {found['parts']} parts above it)"
    )
    if found["at_most"] <= found["false_rejects"]:
        return [promised]
    return [
        f"{promised}; for {_percent(found['false_rejects'])} show it {found['parts_needed']} parts"
    ]


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _defect_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    if found["defects"]:
        caught = found["defects"] - found["misses"]
        lines.append(
            f"defects      {caught} of {found['defects']} known ones found at this threshold;"
            f" AUROC {found['auroc']:.4f}, best F1 at any threshold {found['best_f1']:.4f}"
        )
        if found["misses"]:
            lines.append(
                f"             {found['misses']} score so low that finding them would reject over"
                f" {_percent(max(found['cap'], found['false_rejects']))} of the good parts"
            )
    if drawn := found.get("drawn"):
        lines.append(
            f"drawn ones   {drawn['found']} of {drawn['of']} found: scratches, stains, dents and"
            " missing pieces drawn onto good parts"
        )
    return lines


def _warnings(found: dict[str, Any]) -> list[str]:
    warnings = []
    if found["parts"] < FEW_PARTS:
        warnings.append(f"only {found['parts']} parts: show it {FEW_PARTS} or more")
    if abs(found.get("moved", 0)) > 1:
        warnings.append(
            f"the threshold moved from {found['before']:.4f}, by {abs(found['moved']):.1f} standard"
            " deviations of normal scores: look at what was learned"
        )
    drawn = found.get("drawn") or {}
    if drawn.get("share", 1) < FEW_FOUND:
        warnings.append("few of the drawn defects are found: it may be blind to real ones, too")
    if found.get("weights") == "untrained":
        warnings.append("the backbone is untrained: it sees strong colours and little else")
    return [f"note         {warning}" for warning in warnings]


def summarise_conversion(report: dict[str, Any], out_dir: Path) -> list[str]:
    """What was exported, how well it agrees, and with what; for a person."""
    export = report["export"]
    agreement = [
        f"parity       {name}: raw scores within {found['max_relative']:.1e} of torch,"
        f" {found['flips']} verdicts flip{'' if found['ok'] else ': not used'}"
        for name, found in report["parity"].items()
    ]
    return [
        "",
        f"exported     model.onnx, opset {export['opset']}, {export['precision']},"
        f" in {export['seconds']:.1f} s",
        *agreement,
        *_int8_lines(report.get("int8")),
        *(summarise_plan(report["plan"]) if "plan" in report else []),
        f"compared on  {report['parity_images']}",
        f"written to   {out_dir}",
    ]


def _int8_lines(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    lines = [
        f"int8         {found['convolutions']} of {found['of']} convolutions"
        f" ({100 * found['share']:.0f} % of their multiplications), ranges from {found['ranges']}",
        *(f"float32      {name}" for name in found["float32"]),
    ]
    if auroc := found.get("auroc"):
        lines.append(
            f"measured     AUROC {auroc['int8']:.4f} in int8, {auroc['float32']:.4f} in float32,"
            f" over {auroc['images']} test images, of which {auroc['flips']} verdicts flip"
        )
    return lines


def summarise_plan(found: dict[str, Any]) -> list[str]:
    """How the plan came to be, and how well it agrees; for a person."""
    rows = f", a bank of up to {found['bank_rows']:,} rows" if "bank_rows" in found else ""
    why = f" ({found['why'].rstrip('.')})" if "why" in found else ""
    lines = [
        f"plan         model.plan, {found['precision']}, {found['how']} in {found['seconds']:.1f} s"
        f"{why}",
        f"             for up to {found['max_batch']} images at once{rows}",
    ]
    if gpus := found.get("gpus"):
        lines.append(f"             for GPUs of {', '.join(gpus)}")
    if not found.get("proved", True):
        lines.append(
            "             not proved: the machine that serves compares it with the golden images"
        )
    if "max_relative" in found["parity"]:
        within = f"raw scores within {found['parity']['max_relative']:.1e} of torch"
        lines.append(f"parity       model.plan: {within}, {found['parity']['flips']} verdicts flip")
    return lines
