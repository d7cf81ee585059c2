"""What is built can be installed anywhere, says the truth about itself, and is complete."""

from __future__ import annotations

import email.message
import email.parser
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import coalestra
from coalestra import SnapshotBuilder
from tests.release import contract
from tests.release.matrix import (
    ROOT,
    SUPPORTED,
    interpreter,
    is_usable,
    kinds_of_runs,
    requirements,
    run,
    total,
)
from tests.release.versions import Disagreement, compare, declared
from tests.support import PUBLIC

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
VERSION = declared(PYPROJECT)


@pytest.fixture(scope="session")
def distributions(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source distribution and a wheel: the one to verify, or a new one."""
    given = pytestconfig.getoption("--distributions")
    if given:
        return Path(given).resolve()
    folder = tmp_path_factory.mktemp("distributions")
    run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)])
    return folder


@pytest.fixture(scope="session")
def wheel(distributions: Path) -> Path:
    (found,) = distributions.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.parser.Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="session")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that holds the wheel and nothing else."""
    home = tmp_path_factory.mktemp("clean")
    run([sys.executable, "-m", "venv", str(home)])
    python = home / "bin" / "python"
    run([str(python), "-m", "pip", "install", "-qq", "--no-index", str(wheel)])
    return python


def test_the_wheel_holds_all_modules_the_type_marker_the_page_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    modules = {path.relative_to(source).as_posix() for path in source.rglob("coalestra/**/*.py")}
    assert held == modules | {"coalestra/py.typed", "coalestra/inspect/page.html"}


def test_the_wheel_is_for_every_python_3_and_carries_the_license(wheel: Path) -> None:
    assert wheel.name == f"coalestra-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        assert "The Coalestra authors" in archive.read(name).decode()


def test_the_source_distribution_can_build_the_wheel(distributions: Path) -> None:
    """`python -m build` makes the wheel from it, so this looks only for what people expect."""
    (source,) = distributions.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/coalestra/__init__.py"} <= held


def test_the_metadata_says_what_this_is(metadata: email.message.Message) -> None:
    classifiers = set(metadata.get_all("Classifier", []))
    assert metadata["Name"] == "coalestra"
    assert metadata["Version"] == VERSION
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Author"] == "The Coalestra authors"
    assert metadata["Summary"].startswith("Integration-ready consistent snapshots")
    assert {"snapshot", "single-flight", "asyncio"} <= set(metadata["Keywords"].split(","))
    assert metadata.get_all("Project-URL", []) == [], "the addresses of the name are another's"
    assert {f"Programming Language :: Python :: {version}" for version in SUPPORTED} <= classifiers
    assert "Typing :: Typed" in classifiers


def test_nothing_has_to_be_installed_beside_the_package(metadata: email.message.Message) -> None:
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert needed == []
    assert set(metadata.get_all("Provides-Extra", [])) >= {"dev"}


def test_the_wheel_works_in_an_empty_environment(clean_python: Path, tmp_path: Path) -> None:
    program = (
        "import importlib.metadata, importlib.resources, coalestra; "
        "assert importlib.resources.files('coalestra').joinpath('py.typed').is_file(); "
        "assert importlib.metadata.version('coalestra') == coalestra.__version__; "
        "print(coalestra.__version__)"
    )
    done = subprocess.run(
        [str(clean_python), "-I", "-W", "error", "-c", program], cwd=tmp_path, capture_output=True,
        encoding="utf-8", check=True,
    )  # fmt: skip
    assert done.stdout.strip() == VERSION


def test_every_part_of_the_wheel_that_needs_no_extra_can_be_imported_alone(
    clean_python: Path, metadata: email.message.Message
) -> None:
    extras = set(metadata.get_all("Provides-Extra", []))
    for part in sorted(path.stem for path in (ROOT / "src" / "coalestra").iterdir()):
        if not part.startswith(("_", "py")) and part not in extras:
            run([str(clean_python), "-I", "-W", "error", "-c", f"import coalestra.{part}"])


def test_the_wheel_keeps_the_contract_of_its_version(clean_python: Path) -> None:
    program = str(ROOT / "tests" / "release" / "contract.py")
    told = run([str(clean_python), "-I", "-W", "error", program])
    assert told == f"{len(contract.PROMISES)} promises kept by coalestra {VERSION}\n"


def test_the_wheel_offers_exactly_what_the_manifest_says(clean_python: Path) -> None:
    program = str(ROOT / "tests" / "architecture" / "public_api.py")
    told = run([str(clean_python), "-I", "-W", "error", program, "--installed"])
    assert told.endswith(" public names, 0 differences\n")


@pytest.mark.parametrize(
    "changed",
    [
        {"__version__": "0.6.1"},
        {"require_capabilities": lambda **wanted: None},
        {"SnapshotBuilder": partial(SnapshotBuilder, buffer_observability=True)},
        {"SnapshotBuilder": partial(SnapshotBuilder, payload_copier=lambda value: value)},
        {"SnapshotBuilder": partial(SnapshotBuilder, require_source_timeout_declarations=False)},
        {"ERROR_DIAGNOSTICS_SCHEMA_VERSION": 2},
    ],
    ids=lambda changed: "_".join(
        [*changed, *getattr(changed.get("SnapshotBuilder"), "keywords", "")]
    ),
)
def test_a_package_that_breaks_a_promise_is_noticed(changed: dict[str, Any]) -> None:
    exported = {name: getattr(coalestra, name) for name in PUBLIC}
    package = SimpleNamespace(**{**exported, **changed})
    with pytest.raises(AssertionError):
        for check in contract.PROMISES:
            check(package)


CHANGELOG = "## [Unreleased]\n\n## [1.2.3] - 2026-01-31\n\n## [1.2.2] - 2026-01-01\n"
PROJECT = '[build-system]\n\n[project]\nversion = "1.2.3"\n\n[tool]\nversion = "9.9.9"\n'


def test_a_version_is_the_same_in_all_places() -> None:
    assert compare(PROJECT, "1.2.3", CHANGELOG) == "1.2.3 of 2026-01-31 everywhere"
    assert compare(PROJECT, "1.2.3", CHANGELOG, "v1.2.3").endswith(", tagged v1.2.3")


@pytest.mark.parametrize("changed,complaint", [
    ({"tag": "v1.2.4"}, "the tag v1.2.4 is not v1.2.3"),
    ({"tag": "1.2.3"}, "the tag 1.2.3 is not v1.2.3"),
    ({"package": "1.2.4"}, "coalestra.__version__ 1.2.4"),
    ({"changelog": CHANGELOG.replace("1.2.3", "1.3.0")}, "not the newest dated section"),
    ({"changelog": CHANGELOG.replace(" - 2026-01-31", "")}, "no date"),
    ({"changelog": CHANGELOG.replace("2026-01-31", "2026-02-31")}, "no date"),
    ({"changelog": CHANGELOG.replace("## [Unreleased]\n", "")}, r"not \[Unreleased\]"),
    ({"pyproject": PROJECT.replace("1.2.3", "1.2")}, r"no version of the form X\.Y\.Z"),
    ({"pyproject": PROJECT.replace("version", "dynamic")}, r"no version of the form X\.Y\.Z"),
])  # fmt: skip
def test_versions_that_disagree_are_named(changed: dict[str, str], complaint: str) -> None:
    said = {"pyproject": PROJECT, "package": "1.2.3", "changelog": CHANGELOG, **changed}
    with pytest.raises(Disagreement, match=complaint):
        compare(**said)


def test_tests_are_counted_by_collecting_them(tmp_path: Path) -> None:
    """The program counts its own tests; here, those of a folder that holds three."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_n(n): raise AssertionError('collected, not run')\n"
        "def test_one(): pass\n"
    )
    program = "import sys; from tests.release.counting import count; print(count(*sys.argv[1:]))"
    told = run([sys.executable, "-c", program, "--rootdir", str(tmp_path), str(tmp_path)])
    assert told == "3\n"


def test_the_matrix_never_skips_the_python_it_runs_on() -> None:
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert interpreter(running) == Path(sys.executable)
    assert is_usable(Path(sys.executable), running)
    assert not is_usable(Path(sys.executable), "2.7")
    assert not is_usable(ROOT / "no-such-python", running)


@pytest.mark.parametrize("version, loop", [
    ("3.10", "shuffled"), ("3.11", "shuffled"), ("3.12", "eager"), ("3.14", "eager")
])  # fmt: skip
def test_every_python_runs_the_suite_in_order_and_eagerly_or_else_shuffled(
    version: str, loop: str
) -> None:
    in_order, differently = kinds_of_runs(version, slow=True)
    assert in_order == ["--worlds=50"]
    assert differently[0] == f"--loop={loop}"
    assert kinds_of_runs(version, slow=False) == [[*in_order, "-m", "not slow"], differently]


def test_the_closing_line_counts_the_tests_of_all_runs() -> None:
    one = "2 failed, 3 passed, 1 skipped in 1.20s"
    assert total([one, "10 passed in 0.50s"]) == "2 failed, 13 passed, 1 skipped"
    assert total(["nothing printed"]) == "1 error"


def test_the_test_tools_of_the_matrix_have_the_bounds_of_the_project() -> None:
    assert all(">=" in requirement for requirement in requirements())
