"""What is built can be installed anywhere, says the truth about itself, and is complete."""

from __future__ import annotations

import email.message
import email.parser
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.release.matrix import ROOT, SUPPORTED, interpreter, is_usable, requirements, run

VERSION_FILE = ROOT / "src" / "coalestra" / "_version.py"
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', VERSION_FILE.read_text("utf-8"), re.MULTILINE)


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that was built from it."""
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


def test_the_wheel_holds_every_module_the_type_marker_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    modules = {path.relative_to(source).as_posix() for path in source.rglob("coalestra/**/*.py")}
    assert held == modules | {"coalestra/py.typed"}


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
    assert {f"Programming Language :: Python :: {version}" for version in SUPPORTED} <= classifiers
    assert "Typing :: Typed" in classifiers


def test_nothing_has_to_be_installed_beside_the_package(metadata: email.message.Message) -> None:
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert needed == []
    assert set(metadata.get_all("Provides-Extra", [])) == {"dev", "bench"}


def test_the_wheel_works_in_an_empty_environment(clean_python: Path, tmp_path: Path) -> None:
    program = (
        "import importlib.metadata, importlib.resources, coalestra; "
        "assert importlib.resources.files('coalestra').joinpath('py.typed').is_file(); "
        "assert importlib.metadata.version('coalestra') == coalestra.__version__; "
        "print(coalestra.__version__)"
    )
    done = subprocess.run(
        [str(clean_python), "-I", "-W", "error", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout.strip() == VERSION


def test_every_part_of_the_wheel_can_be_imported_alone(clean_python: Path) -> None:
    for part in sorted(path.stem for path in (ROOT / "src" / "coalestra").iterdir()):
        if not part.startswith(("_", "py")):
            run([str(clean_python), "-I", "-W", "error", "-c", f"import coalestra.{part}"])


def test_the_version_has_one_source_and_the_changelog_knows_it() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", VERSION)
    copies = [
        path
        for path in (ROOT / "src").rglob("*.py")
        if f'"{VERSION}"' in path.read_text(encoding="utf-8") and path != VERSION_FILE
    ]
    assert copies == []
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    unreleased = changelog.partition("## [Unreleased]")[2].partition("\n## ")[0]
    assert headings[0] == "Unreleased"
    assert VERSION in headings or VERSION in unreleased


def test_the_matrix_never_skips_the_python_it_runs_on() -> None:
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert interpreter(running) == Path(sys.executable)
    assert is_usable(Path(sys.executable), running)
    assert not is_usable(Path(sys.executable), "2.7")
    assert not is_usable(ROOT / "no-such-python", running)


def test_the_test_tools_of_the_matrix_have_the_bounds_of_the_project() -> None:
    assert all(">=" in requirement for requirement in requirements())
