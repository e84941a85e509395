"""`kensa doctor`: look at machine, software, disks and models, and print what was found.

It only looks, and needs no server. Files are read below a root folder, so that a test can lay down
those of a Jetson.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from app.settings import Settings
from app.watching.doctor.disks import disk_facts, disk_findings
from app.watching.doctor.findings import Report, wrong
from app.watching.doctor.machine import is_jetson, machine_facts, machine_findings
from app.watching.doctor.models import look_at_models
from app.watching.doctor.software import (
    backbone_findings,
    software_facts,
    tensorrt_findings,
    tensorrt_here,
)
from engines.errors import BadSettings
from engines.machine.memory import Free
from engines.machine.sensors import Device
from engines.serving.opening import Opening, gpu_memory


def command(arguments: list[str]) -> int:
    """`kensa doctor`: print what was found. 0 when all is well, 1 when something must be mended."""
    parser = argparse.ArgumentParser(
        prog="kensa doctor",
        description="What this machine has, which models fit into its memory, what is wrong, and"
        " what to type for it. Reads the server's settings; exit code 1 when something is wrong.",
    )
    parser.add_argument("--json", action="store_true", help="for a program, rather than a person")
    as_json = parser.parse_args(arguments).json
    settings: Settings | None = None
    problem = None
    try:
        settings = Settings.read()
        settings.data  # noqa: B018 (raises where there is no place for it)
    except BadSettings as error:
        settings, problem = None, str(error)
    report = examine(settings)
    if problem is not None:
        report.findings.insert(0, wrong(problem, "See docs/settings.md."))
    print(_as_json(report) if as_json else as_text(report))  # noqa: T201
    _give_back()
    return 0 if report.ok else 1


def examine(settings: Settings | None, root: Path = Path("/"), serving: bool = False) -> Report:
    """Look at everything.

    Args:
        serving: whether this very process serves. Then TensorRT is not loaded into it where only
            OpenVINO may run models.
    """
    report, found = Report(), Device.read(root)
    jetson = is_jetson(root)
    report.facts["machine"] = dict(machine_facts(root, found))
    report.findings += machine_findings(root, found)
    left_alone = serving and settings is not None and settings.runtime == "openvino"
    tensorrt, problem = (None, None) if left_alone else tensorrt_here()
    opening = Opening(runtime=settings.runtime if settings else "auto")
    gpu = gpu_memory(opening) if tensorrt else None
    report.facts["software"] = dict(software_facts(root, tensorrt, gpu))
    report.findings += tensorrt_findings(root, jetson, settings, problem)
    report.findings += backbone_findings()
    if settings is not None:
        report.facts["storage"] = dict(disk_facts(settings))
        report.findings += disk_findings(settings)
        look_at_models(report, settings, opening, tensorrt, Free.now(gpu), serving)
    return report


def _give_back() -> None:
    """The context that a look at the GPU's memory took."""
    cuda = sys.modules.get("engines.runtimes.cuda")
    if cuda is not None:
        cuda.close()


def _as_json(report: Report) -> str:
    return json.dumps({"ok": report.ok, **asdict(report)}, indent=2, ensure_ascii=False)


def as_text(report: Report) -> str:
    """For a person."""
    lines: list[str] = []
    for section, facts in report.facts.items():
        lines += [
            section.capitalize(),
            *(f"  {name:<11} {value}" for name, value in facts.items()),
            "",
        ]
    lines.append("Models")
    for one in report.models:
        fits = {True: "fits", False: "does not fit", None: "served"}[one.fits]
        lines.append(
            f"  {one.name:<11} {one.version}, {one.kind}, about {one.needs_mib} MiB, {fits}"
        )
        lines.append(f"  {'':<11} plan: {one.plan}")
    lines += [] if report.models else ["  none"]
    for level, title in (("wrong", "What is wrong"), ("note", "Worth knowing")):
        found = [finding for finding in report.findings if finding.level == level]
        lines += ["", title] if found else []
        for finding in found:
            lines.append(f"  - {finding.what}")
            lines += [f"      {finding.do}"] if finding.do else []
    return "\n".join([*lines, "", "All is well." if report.ok else "Something must be mended."])
