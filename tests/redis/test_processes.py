"""Several real processes over one server: one call, one truth, and who takes over from the dead."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.redis.processes import processes
from tests.redis.servers import Server
from tests.redis.stock import PATIENT_SECONDS

pytestmark = [pytest.mark.server, pytest.mark.slow]


def number(server: Server, name: str) -> int:
    """A number that the workers keep on the server."""
    text = server.command("GET", name)
    return 0 if text.startswith(b"$-1") else int(text.split(b"\r\n")[1])


def questions(server: Server) -> int:
    """How often the server was asked for values or leases."""
    told = server.command("INFO", "commandstats").decode()
    return int(told.partition("cmdstat_evalsha:calls=")[2].partition(",")[0] or 0)


def let_through(server: Server, prefix: str, calls: int) -> None:
    """Let so many calls of sources that are held come to their end."""
    server.command("RPUSH", f"{prefix}-gate", *["go"] * calls)


def wait_for(condition: Callable[[], object], seconds: float = PATIENT_SECONDS) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come true in time"
        time.sleep(0.005)


def test_eight_processes_with_fifty_readers_each_make_one_call(server: Server, prefix: str) -> None:
    names = [f"n{index}" for index in range(20)]
    with processes(server.url, prefix, 8) as workers:
        for each in workers:
            each.do("set", held=True)
        asked = questions(server)
        for each in workers:
            each.order("read", names=names, readers=50)
        wait_for(lambda: questions(server) >= asked + 8)
        let_through(server, prefix, 8)
        for each in workers:
            answer = each.answer()
            assert answer["errors"] == []
            assert answer["values"] == [[0] * 20] * 50
        assert number(server, f"{prefix}-calls") == 1


def test_a_derived_value_is_derived_once_for_all(server: Server, prefix: str) -> None:
    with processes(server.url, prefix, 4) as workers:
        for _ in range(3):
            for each in workers:
                each.order("read", names=["a+b", "a", "b"], readers=5)
            for each in workers:
                assert each.answer()["errors"] == []
        assert number(server, f"{prefix}-derivations") == 1
        assert number(server, f"{prefix}-calls") == 1
        workers[0].do("change", name="a", how="publish")
        for each in workers:
            each.order("read", names=["a+b"], readers=5)
        assert [each.answer()["values"] for each in workers] == [[[1]] * 5] * 4
        assert number(server, f"{prefix}-derivations") == 2


def test_when_the_holder_is_killed_in_mid_fetch_the_next_one_takes_over(
    server: Server, prefix: str
) -> None:
    with processes(server.url, prefix, 4, lease_seconds=1.0) as workers:
        first, *others = workers
        first.do("set", held=True)
        first.order("read", names=["a"])
        wait_for(lambda: number(server, f"{prefix}-calls") == 1)
        asked = questions(server)
        for each in others:
            each.order("read", names=["a"], readers=5)
        wait_for(lambda: questions(server) >= asked + 3)
        first.kill()
        for each in others:
            assert each.answer()["values"] == [[0]] * 5
        assert number(server, f"{prefix}-calls") == 2


def test_a_reader_whose_deadline_ends_awaits_no_holder(server: Server, prefix: str) -> None:
    with processes(server.url, prefix, 2) as [holder, other]:
        holder.do("set", held=True)
        holder.order("read", names=["a"])
        wait_for(lambda: number(server, f"{prefix}-calls") == 1)
        answer = other.do("read", names=["a"], deadline=0.5)
        assert "deadline" in answer["errors"][0]
        let_through(server, prefix, 1)
        assert holder.answer()["values"] == [[0]]
        assert number(server, f"{prefix}-calls") == 1


def test_a_source_that_fails_is_not_asked_in_a_row(server: Server, prefix: str) -> None:
    """Who has waited for one that failed goes on alone, at once, not one after the other."""
    with processes(server.url, prefix, 4, lease_seconds=60) as workers:
        for each in workers:
            each.do("set", held=True, fails=True)
        asked = questions(server)
        for each in workers:
            each.order("read", names=["a"], readers=5)
        wait_for(lambda: questions(server) >= asked + 4)
        wait_for(lambda: number(server, f"{prefix}-calls") == 1)
        let_through(server, prefix, 2)  # it is tried twice
        wait_for(lambda: number(server, f"{prefix}-calls") == 2 + 3)
        let_through(server, prefix, 3 * 2)
        for each in workers:
            assert len(each.answer()["errors"]) == 5


@pytest.mark.parametrize("how", ["publish", "invalidate"])
def test_what_was_changed_is_seen_by_all_at_once(server: Server, prefix: str, how: str) -> None:
    with processes(server.url, prefix, 3) as workers:
        for each in workers:
            each.do("read", names=["a"])
        for turn in range(20):
            changed = workers[turn % 3].do("change", name="a", how=how)
            assert changed["error"] is None
            for each in workers:
                assert each.do("read", names=["a"])["values"] == [[changed["value"]]]


@pytest.mark.parametrize("how", ["publish", "invalidate"])
def test_a_fetch_under_way_undoes_no_others_change(server: Server, prefix: str, how: str) -> None:
    with processes(server.url, prefix, 2) as [reader, changer]:
        reader.do("set", held=True)
        reader.order("read", names=["a"])
        wait_for(lambda: number(server, f"{prefix}-calls") == 1)
        changed = changer.do("change", name="a", how=how)
        assert changer.do("read", names=["a"])["values"] == [[changed["value"]]]
        let_through(server, prefix, 2)
        reader.answer()
        for each in (reader, changer):
            assert each.do("read", names=["a"])["values"] == [[changed["value"]]]


def test_clocks_that_are_apart_by_seconds_change_nothing(server: Server, prefix: str) -> None:
    """Neither who is newer, nor how old a value is."""
    with processes(server.url, prefix, 3, offsets=(-30.0, 0.0, 30.0)) as workers:
        for each in workers:
            each.order("read", names=["a"], readers=3)
        for each in workers:
            each.answer()
        assert number(server, f"{prefix}-calls") == 1
        for turn in range(9):
            changed = workers[turn % 3].do("change", name="a", how="publish")
            for each in workers:
                assert each.do("read", names=["a"])["values"] == [[changed["value"]]]
        assert number(server, f"{prefix}-calls") == 1


# A random history, and whether it keeps the laws -------------------------------------------------


def broken_laws(events: list[dict[str, Any]], names: list[str]) -> list[str]:
    """Check what several processes did and saw, on one clock.

    A change to a value ends at a time; who begins to read after that must not see an earlier
    value. And nobody sees a value before somebody has begun to make it the truth. A derived value
    is the sum of what it rests on, so the same holds for the sums.
    """
    changes = [event for event in events if event["event"] != "read"]
    bounds = {
        name: sorted((each["ended"], each["value"]) for each in changes if each["name"] == name)
        for name in names
        if "+" not in name
    }
    begun = {
        name: sorted((each["began"], each["value"]) for each in changes if each["name"] == name)
        for name in bounds
    }

    def least(name: str, moment: float) -> int:
        return max((value for ended, value in bounds[name] if ended < moment), default=0)

    def most(name: str, moment: float) -> int:
        return max((value for began, value in begun[name] if began < moment), default=0)

    broken = []
    for event in events:
        if event["event"] != "read":
            if event["error"]:
                broken.append(f"{event['event']} failed: {event['error']}")
            continue
        parts = event["name"].split("+")
        low = sum(least(part, event["began"]) for part in parts)
        high = sum(most(part, event["ended"]) for part in parts)
        for [value] in event["values"]:
            if not low <= value <= high:
                broken.append(f"{event['name']} was {value}, not between {low} and {high}: {event}")
        broken += [f"{event['name']}: {error}" for error in event["errors"]]
    return broken


def test_the_checker_sees_what_is_wrong() -> None:
    change = {"event": "publish", "name": "a", "value": 2, "began": 1, "ended": 2, "error": None}
    read = {"event": "read", "name": "a", "values": [[1]], "began": 3, "ended": 4, "errors": []}
    assert broken_laws([change, read], ["a"])
    assert not broken_laws([change, {**read, "values": [[0]], "began": 1.5}], ["a"])
    assert broken_laws([change, {**read, "values": [[3]]}], ["a"])
    assert not broken_laws([change, {**read, "values": [[2]]}], ["a"])


HISTORY = 50
"""What each of four readers in each of four processes does one after the other."""


CUTS = {"connected": [], "news cut again and again": [0.02, 0.05, 0.1], "news seldom up": [0.001]}
"""After how many seconds the connections on which news are told are cut, each time."""


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_random_history_keeps_the_laws(
    server: Server, prefix: str, seed: int, cuts: list[float]
) -> None:
    names = ["a", "b", "c", "a+b", "b+c"]
    dice = random.Random(seed)
    with processes(server.url, prefix, 4, offsets=(-3.0, 0.0, 3.0, 0.0)) as workers:
        for index, each in enumerate(workers):
            each.do("set", delay=0.002 * index)
            each.order("history", seed=seed * 10 + index, length=HISTORY, names=names)
        while cuts and number(server, f"{prefix}-ended") < 4:
            time.sleep(dice.choice(cuts))
            server.command("CLIENT", "KILL", "TYPE", "pubsub")
        events = [event for each in workers for event in each.answer()["events"]]
    assert len(events) == 4 * 4 * HISTORY
    assert broken_laws(events, names)[:5] == []
