"""Every section of the behaviour contract has tests, in files that exist."""

from __future__ import annotations

from pathlib import Path

from tests.contract_map import SECTIONS

HERE = Path(__file__).parent


def test_the_table_has_every_section_once_and_in_order() -> None:
    assert list(SECTIONS) == list(range(1, 20))
    titles = [section.about for section in SECTIONS.values()]
    assert all(titles)
    assert len(set(titles)) == len(titles)


def test_every_section_is_tested_in_files_that_exist_and_hold_tests() -> None:
    for number, section in SECTIONS.items():
        assert section.files
        assert len(set(section.files)) == len(section.files)
        for name in section.files:
            path = HERE / name
            assert path.is_file(), f"section {number} ({section.about}) names the missing {name}"
            assert "def test_" in path.read_text(), f"{name} holds no tests"


def test_every_test_of_the_library_belongs_to_a_section() -> None:
    """Tests of the tests, the documents, the package and its inner shape stand for themselves."""
    of_the_contract = {name for section in SECTIONS.values() for name in section.files}
    apart = {
        "architecture", "docs", "release", "support", "benchmarks", "regressions", "simulation",
        "inspect", "opentelemetry", "redis", "prometheus",
    }  # fmt: skip
    internal = {
        "cache/test_fan_out.py", "cache/test_lanes.py", "concurrency/test_pace.py",
        "concurrency/test_threads.py", "concurrency/test_waiting.py",
        "concurrency/test_waits_for.py", "core/test_validation.py",
    }  # fmt: skip
    found = {
        path.relative_to(HERE).as_posix()
        for path in HERE.glob("*/test_*.py")
        if path.parent.name not in apart
    }
    assert found - of_the_contract - internal == set()
