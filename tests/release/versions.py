"""Compare what is said of the version: in pyproject.toml, in the package, and in CHANGELOG.md.

Usage: python tests/release/versions.py [TAG]

With a tag, that has to say the same as `vX.Y.Z`.
"""

from __future__ import annotations

import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECTION = re.compile(r"^## \[(?P<name>[^\]]+)\](?: - (?P<date>.+))?$", re.MULTILINE)


class Disagreement(Exception):
    """Two places say something else of the version."""


def declared(pyproject: str) -> str:
    """The version that pyproject.toml gives the project."""
    project = pyproject.partition("\n[project]\n")[2].partition("\n[")[0]
    found = re.findall(r'^version = "(\d+\.\d+\.\d+)"$', project, re.MULTILINE)
    if len(found) != 1:
        raise Disagreement("pyproject.toml has no version of the form X.Y.Z in [project]")
    return str(found[0])


def released(changelog: str) -> dict[str, datetime.date]:
    """The released versions of the changelog with their dates, newest first."""
    headings = [(found["name"], found["date"]) for found in SECTION.finditer(changelog)]
    if not headings or headings[0] != ("Unreleased", None):
        raise Disagreement("the first section of CHANGELOG.md is not [Unreleased]")
    try:
        return {name: datetime.date.fromisoformat(date or "") for name, date in headings[1:]}
    except ValueError as error:
        raise Disagreement(f"a section of CHANGELOG.md has no date: {error}") from None


def compare(pyproject: str, package: str, changelog: str, tag: str = "") -> str:
    """Return in a sentence what all of them say.

    Raises:
        Disagreement: if they do not.
    """
    version = declared(pyproject)
    dates = released(changelog)
    if package != version:
        raise Disagreement(f"pyproject.toml says {version}, coalestra.__version__ {package}")
    if next(iter(dates), None) != version:
        raise Disagreement(f"{version} is not the newest dated section of CHANGELOG.md")
    if tag and tag != f"v{version}":
        raise Disagreement(f"the tag {tag} is not v{version}")
    tagged = f", tagged {tag}" if tag else ""
    return f"{version} of {dates[version]} everywhere{tagged}"


def main(tag: str = "") -> int:
    sys.path.insert(0, str(ROOT / "src"))
    import coalestra

    pyproject, changelog = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CHANGELOG.md")
    )
    try:
        print(compare(pyproject, coalestra.__version__, changelog, tag))
    except Disagreement as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:2]))
