"""Pacing gives the loop back."""

from __future__ import annotations

import asyncio

import pytest

from coalestra.concurrency.pace import SLICE_SECONDS, Pace


async def test_a_used_up_slice_lets_others_run_and_starts_a_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    pace = Pace()
    assert not pace.due
    now += SLICE_SECONDS
    assert pace.due
    ran: list[str] = []
    asyncio.get_running_loop().call_soon(ran.append, "other")
    await pace.rest()
    assert ran == ["other"]
    assert not pace.due


async def test_keeping_pace_rests_only_when_it_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    pace = Pace()
    assert repr(pace) == "<Pace +0.0020 s left>"
    assert not await pace.keep()
    now += SLICE_SECONDS
    assert await pace.keep()
    assert not await pace.keep()
