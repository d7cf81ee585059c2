"""Renewing what the last full run found, in ``docs/explanation/performance.md``."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib import metadata
from pathlib import Path

from tests.benchmarks.processes import ROOT
from tests.benchmarks.subjects import RIVALS

PAGE = ROOT / "docs" / "explanation" / "performance.md"
PLOT = PAGE.with_name("cost-per-key.svg")


def renewed(page: str, blocks: dict[str, str]) -> str:
    """Return the page with new text between the comments that mark each block.

    Raises:
        ValueError: the page has no such block.
    """
    for name, text in blocks.items():
        marks = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
        parts = marks.split(page)
        if len(parts) != 4:
            raise ValueError(f"the page must have one block {name!r}, found {len(parts) // 3}")
        before, begin, end, after = parts
        page = f"{before}{begin}\n{text}\n\n{end}{after}"
    return page


def circumstances() -> str:
    """Return on what, with what and when it was measured."""
    versions = ", ".join(f"{name} {found}" for name in RIVALS if (found := _version(name)))
    return (
        f"Measured on {datetime.datetime.now(tz=datetime.timezone.utc):%Y-%m-%d}, "
        f"{platform.python_implementation()} {platform.python_version()} on {_machine()}. "
        f"Rivals: {versions or 'none installed'}."
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _machine() -> str:
    processor = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.exists():
        models = re.findall(r"^model name\s*:\s*(.+)$", described.read_text(), re.MULTILINE)
        processor = models[0] if models else processor
    return f"{platform.system()} {platform.machine()}, {processor}, {os.cpu_count()} cores"
