"""The workflow tests before it builds, builds before it releases, and may do only what it must."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.release.matrix import ROOT, SUPPORTED

FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEXT = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
JOBS = {
    block.partition(":")[0]: block
    for block in re.split(r"^  (?=[a-z]+:$)", TEXT.partition("\njobs:\n")[2], flags=re.MULTILINE)[
        1:
    ]
}


def needs(job: str) -> set[str]:
    """The jobs that have to succeed first, all of them."""
    found = re.search(r"^    needs: (.+)$", JOBS[job], re.MULTILINE)
    direct = re.findall(r"\w+", found[1]) if found else []
    return {*direct, *(other for each in direct for other in needs(each))}


def test_nothing_is_built_for_keeps_before_every_python_has_passed() -> None:
    assert needs("tests") == set()
    assert needs("distributions") == {"tests", "quality"}
    assert needs("release") == {"tests", "quality", "distributions"}
    assert needs("publish") == {"tests", "quality", "distributions", "release"}
    matrix = re.search(r"python: \[(.+)\]", JOBS["tests"])
    assert matrix is not None
    assert tuple(re.findall(r"[\d.]+", matrix[1])) == SUPPORTED


def test_only_the_free_threaded_python_may_fail() -> None:
    assert re.findall(r'"([\w.]+)", may-fail: true', JOBS["tests"]) == ["3.14t"]
    assert TEXT.count("continue-on-error") == 1


def test_a_tag_is_compared_with_the_version_before_anything_is_uploaded() -> None:
    steps = JOBS["distributions"]
    assert steps.index("versions.py") < steps.index("make distributions") < steps.index("upload")
    for job in ("release", "publish"):
        assert "checkout" not in JOBS[job], "what was verified is released as it is"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_action_is_pinned_to_a_commit_and_says_of_which_version(path: Path) -> None:
    used = re.findall(r"uses: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert used
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each) for each in used)


def test_a_job_may_write_only_what_it_makes() -> None:
    assert "\npermissions: {}\n" in TEXT
    granted = {job: set(re.findall(r"^      ([\w-]+: write)", JOBS[job], re.M)) for job in JOBS}
    assert granted == {
        "tests": set(),
        "quality": set(),
        "distributions": set(),
        "release": {"contents: write", "id-token: write", "attestations: write"},
        "publish": {"id-token: write"},
    }
