"""The small applications do what they tell, and tell what a reader should take from them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.docs.running import EXAMPLES, printed_by
from tests.redis.servers import binary


def told_by(application: str, directory: Path) -> list[str]:
    """The lines that an application prints."""
    return [line.strip() for line in printed_by(application, directory).splitlines()]


def test_a_read_model_has_a_status_code_for_each_state_of_its_services(tmp_path: Path) -> None:
    told = told_by("read_model.py", tmp_path)
    codes = [line.split()[1] for line in told if line.partition(":")[0][-3:].isdecimal()]
    assert codes == ["200:", "404:", "200:", "503:", "409:"]
    assert "ok  each service was called once for all of them" in told
    assert told[-1].startswith("shop:stock:lamp must be at most 30 s old, got 60.")


def test_a_trading_loop_decides_on_one_moment_and_looks_again(tmp_path: Path) -> None:
    told = told_by("trading_loop.py", tmp_path)
    assert "ok  no moment mixed an old price with a new exposure" in told
    assert "ok  the newest price has won, whatever the order of arrival" in told
    assert "ok  a price that runs away between decision and deed is noticed" in told
    assert told[-1] == "ok  nothing is done on a price that is no longer known"


@pytest.mark.slow
def test_a_batch_job_over_many_keys_is_bounded_and_survives_part_failures(tmp_path: Path) -> None:
    told = told_by("batch_job.py", tmp_path)
    assert told[0].endswith("answers: {'ledger': 99900, 'archive': 90}")
    assert any(line.startswith("the last of them: cannot resolve account:") for line in told)
    assert "ok  no call asked for more than a thousand" in told
    assert "ok  the second half needs no more memory than the first" in told


@pytest.mark.slow
def test_an_agent_gathers_what_it_can_within_one_deadline(tmp_path: Path) -> None:
    told = told_by("agent_context.py", tmp_path)
    assert told[0] == "Ada, an engineer; hot water pushes; a page about steam"
    assert "ok  a search that is too slow is left out" in told
    assert "ok  what came in meanwhile is news for the next turn only" in told
    assert "ok  the deadline is named as the reason" in told


def test_a_cache_of_its_own_brings_a_service_through_a_restart(tmp_path: Path) -> None:
    told = told_by("own_cache.py", tmp_path)
    assert told[:2] == ["ok  3 of 3 values had to be made", "ok  0 of 3 values had to be made"]
    assert told[-1] == "ok  what the second life found is what the first left"


@pytest.mark.slow
def test_two_processes_share_a_cache_whose_server_stops_and_starts(tmp_path: Path) -> None:
    told = told_by("shared_cache.py", tmp_path)
    if binary() is None or importlib.util.find_spec("redis") is None:
        assert "needs" in told[0]
        return
    assert told[1] == "ok  ... out of one call"
    assert told[4] == "--  the server is stopped"
    assert told[-1] == "ok  ... and both read it"


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_listed_run_and_small(example: Path) -> None:
    assert f"[{example.name}]({example.name})" in (EXAMPLES / "README.md").read_text("utf-8")
    tests = [Path(__file__), Path(__file__).with_name("test_first_run.py")]
    assert any(f'"{example.name}"' in each.read_text("utf-8") for each in tests)
    assert 50 <= len(example.read_text("utf-8").splitlines()) <= 150
