"""The first run tells a true story, and would fail if it were not."""

from __future__ import annotations

import asyncio
import importlib
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.running import EXAMPLES, printed_by


@pytest.fixture(name="first_run")
def imported_first_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import the example as its own directory sees it, and forget it afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("first_run")
    for name in [name for name in sys.modules if name.split(".")[0] in {"first_run", "farm"}]:
        del sys.modules[name]


@pytest.fixture(name="story", scope="module")
def printed_story(tmp_path_factory: pytest.TempPathFactory) -> str:
    return printed_by("first_run.py", tmp_path_factory.mktemp("story"))


LINES = [
    "  look: each value (here of one field) says who gave it, how old it is, and how it came",
    "    need of the south      20.0  planner    0 min  computed from 3 others, all fresh",
    "    moisture of the south  18.0  probes     0 min  told by an event; nobody asked",
    "    target of the south    40.0  registry   0 min  fetched, attempt 1",
    "ok  one request brought the rain of all three fields",
    "ok  asked again, no source is called",
    "ok  the look before the deed saw the 30 mm: 8 mm will do",
    "  ! rain of the south       2.0  forecast  40 min  STALE: the last one known, because "
    "ConnectionRefusedError",
    "refused: weather:rain:north must be fresh, got a stale value observed",
    "health: degraded, circuit_open of forecast",
    "  ! rain of the north       4.0  forecast  40 min  STALE: the last one known, because "
    "CircuitOpenError",
    "health: degraded, circuit_half_open of forecast",
    "    rain of the north       9.0  forecast   0 min  fetched, attempt 1",
    "ok  the south gets its 8 mm",
]


def test_the_story_has_its_key_lines(story: str) -> None:
    assert [line for line in LINES if line not in story] == []


def test_a_value_that_rests_on_old_ones_is_as_old_though_it_is_computed_anew(story: str) -> None:
    (line,) = (line for line in story.splitlines() if "computed just now" in line)
    assert line == (
        "  ! need of the south       8.0  planner   40 min  "
        "STALE: computed just now, but from rain that is"
    )


def test_the_story_is_short(story: str) -> None:
    assert len(story.splitlines()) <= 55


def test_health_goes_and_comes_with_the_service(story: str) -> None:
    states = [line.split()[1].rstrip(",") for line in story.splitlines() if "health: " in line]
    assert states == ["healthy", "degraded", "degraded", "healthy"]


def test_an_untrue_sentence_is_an_error(first_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    first_run.tell("the sun rises", True)
    with pytest.raises(SystemExit, match="NOT AS TOLD: the moon is made of cheese") as ended:
        first_run.tell("the moon is made of cheese", False)
    assert ended.value.code not in (0, None)
    assert capsys.readouterr().out == "ok  the sun rises\n"


def test_the_story_notices_a_service_that_does_not_come_back(
    first_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start_service(farm: Any, **rain_mm: float) -> None:
        farm.service.asked.clear()

    monkeypatch.setattr(first_run.Farm, "start_service", start_service)
    with pytest.raises(SystemExit, match="one request made everything fresh"):
        asyncio.run(first_run.main())
    assert "ok  it is not asked as long as the circuit is open" in capsys.readouterr().out


def test_the_service_listens_on_loopback_only(first_run: Any, tmp_path: Path) -> None:
    async def address() -> tuple[str, int]:
        farm = first_run.Farm(tmp_path)
        try:
            host, port = farm.service.server_address
            return host, port
        finally:
            await farm.close()

    host, port = asyncio.run(address())
    assert host == "127.0.0.1"
    assert port > 0


def test_the_database_keeps_the_limit_its_source_declares(first_run: Any, tmp_path: Path) -> None:
    registry_class = importlib.import_module("farm.registry").Registry
    registry = registry_class(tmp_path / "farm.sqlite", seconds=0.05)
    assert registry.source().transport_timeout_seconds == 0.05
    counting = "SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000000"
    slow = f"WITH RECURSIVE n(i) AS ({counting}) SELECT max(i) FROM n"
    began = time.monotonic()
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        with registry.opened() as db:
            db.execute(slow).fetchone()
    with registry.opened() as writer:
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            registry.waterings()
    assert time.monotonic() - began < 10.0
