"""``python -m coalestra.inspect``, as a process of its own and as a function."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import coalestra
from coalestra.inspect.__main__ import main

SOURCE = Path(str(coalestra.__file__)).parents[1]
PROGRAM = """\
import asyncio
from coalestra import CallableSource, SnapshotBuilder, SyncSnapshotBuilder

source = CallableSource(name="rates", priority=1, supports=lambda key: True, fetcher=None or print)
builder = SnapshotBuilder([source])

class made:
    @staticmethod
    def plain(): return SnapshotBuilder([source])
    @staticmethod
    async def later():
        await asyncio.sleep(0)
        return SnapshotBuilder([source])

def threaded(): return SyncSnapshotBuilder(SnapshotBuilder([source]))
def wrong(): return 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with that program, in which everything runs."""
    (tmp_path / "farm_of_the_test.py").write_text(PROGRAM, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-W", "error", "-m", "coalestra.inspect", *arguments, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8",
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
            assert found, line + process.stdout.read()
            yield process, int(found[1])
        finally:
            process.kill()


def status(port: int, path: str, **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers=headers)
    with connection.getresponse() as response:
        response.read()
        return response.status


@pytest.mark.slow
@pytest.mark.parametrize("name", ["builder", "made.plain", "made.later", "threaded"])
def test_a_builder_or_what_makes_one_is_served_until_a_signal(folder: Path, name: str) -> None:
    with running(folder, f"farm_of_the_test:{name}") as (process, port):
        assert status(port, "/") == status(port, "/state.json") == 200
        assert status(port, "/", Host="evil.example") == 403
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert process.stdout is not None
        assert process.stdout.read() == "", "nothing was left behind"


@pytest.mark.slow
def test_ctrl_c_ends_it_also_while_somebody_watches(folder: Path) -> None:
    with running(folder, "farm_of_the_test:builder", "--open", "--title", "Farm") as (
        process,
        port,
    ):
        assert status(port, "/", Host="evil.example") == 200
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/events")
        watching = connection.getresponse()
        assert watching.readline() == b"retry: 500\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        connection.close()


@pytest.mark.parametrize("path,words", [
    ("farm_of_the_test", "MODULE:NAME"), (":builder", "MODULE:NAME"),
    (".farm_of_the_test:builder", "MODULE:NAME"), ("farm_of_the_test:", "MODULE:NAME"),
    ("no_such_module:builder", "there is no module 'no_such_module'"),
    ("farm_of_the_test.deep:builder", "there is no module 'farm_of_the_test.deep'"),
    ("farm_of_the_test:nothing", "has no 'nothing'"),
    ("farm_of_the_test:made.nothing", "has no 'made.nothing'"),
    ("farm_of_the_test:wrong", "must be a SnapshotBuilder or SyncSnapshotBuilder"),
    ("farm_of_the_test:source", "must be a SnapshotBuilder or SyncSnapshotBuilder"),
])  # fmt: skip
@pytest.mark.usefixtures("folder")
def test_what_cannot_be_served_is_told_in_one_line(path: str, words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        main([path, "--port", "0"])


def test_a_module_says_which_one_it_misses(folder: Path) -> None:
    (folder / "needy_of_the_test.py").write_text("import no_such_driver", encoding="utf-8")
    with pytest.raises(ModuleNotFoundError, match="no_such_driver"):
        main(["needy_of_the_test:builder"])


@pytest.mark.usefixtures("folder")
def test_an_address_not_to_be_had_is_told() -> None:
    with pytest.raises(SystemExit, match=r"cannot serve at 127\.0\.0\.1, port 70000"):
        main(["farm_of_the_test:made.plain", "--port", "70000"])
