"""Traces made by hand: one of everything that can happen, and one of very many keys."""

from __future__ import annotations

from typing import Any

from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.trace import (
    AttemptTrace,
    CallTrace,
    Foundation,
    KeyTrace,
    Obtained,
    SourceRefusal,
    StageTrace,
    Trace,
    Wait,
    WaitReason,
)
from tests.support.clocks import EPOCH


def price(of: str) -> ResourceKey:
    return ResourceKey("price", "last", of)


def rate(of: str) -> ResourceKey:
    return ResourceKey("fx", "rate", of)


RISK = ResourceKey("risk", "exposure", "desk-7")


def attempt(
    number: int = 1,
    start: float = 0.0,
    called: float | None = 0.0,
    end: float = 0.01,
    outcome: str = "success",
    **more: Any,
) -> AttemptTrace:
    return AttemptTrace(number, start, called, end, outcome, **more)


def call(*attempts: AttemptTrace, source: str = "quotes", **more: Any) -> CallTrace:
    """A call that began and ended with its attempts, successful unless said otherwise."""
    given = {
        "kind": "single", "snapshot_id": "b1", "keys": 1,
        "start": attempts[0].start if attempts else 0.0,
        "end": attempts[-1].end if attempts else 0.0,
        "outcome": attempts[-1].outcome if attempts else "circuit_open", **more,
    }  # fmt: skip
    return CallTrace(source, attempts=attempts, **given)


def traced(*keys: KeyTrace, calls: tuple[CallTrace, ...] = (), **more: Any) -> Trace:
    given: dict[str, Any] = {
        "snapshot_id": "b1", "kind": "build", "parent_snapshot_id": None, "started_at": EPOCH,
        "duration_seconds": max((each.end for each in keys), default=0.0), **more,
    }  # fmt: skip
    return Trace(keys=FrozenDict({each.key: each for each in keys}), calls=calls, **given)


QUOTES = call(
    attempt(
        1, 0.0006, 0.0126, 0.0226, "failure",
        holders=(("news", 3),), error_type="TimeoutError", error="no answer in 10 ms",
        pause_seconds=0.005,
    ),
    attempt(2, 0.0276, 0.0277, 0.0419),
    kind="batch", keys=120, start=0.0005, end=0.042,
)  # fmt: skip
RATES = call(attempt(1, -0.004, -0.0039, 0.0301), source="rates", snapshot_id="a9", end=0.0302)
NEWS = call(
    attempt(1, 0.0008, 0.0008, 0.0508, "timeout", error_type="SourceTimeoutError", error="50 ms"),
    source="news",
)
BOOK = call(source="book", start=0.001, end=0.0011, error_type="CircuitOpenError", error="open")
DERIVING = call(attempt(1, 0.0431, 0.0431, 0.0561), source="risk", kind="derived", end=0.0562)

EVERYTHING = traced(
    KeyTrace(price("CACHED"), Obtained.CACHE, 0.0002, 0.0003, source="quotes", version="v1"),
    KeyTrace(price("NEAR"), Obtained.NEAR_CACHE, 0.0002, 0.0003, source="quotes", version="v2"),
    KeyTrace(
        price("STALE"), Obtained.STALE, 0.0002, 0.0004, source="quotes", version="v3",
        refresh="scheduled",
    ),
    KeyTrace(price("PINNED"), Obtained.PINNED, 0.0, 0.0001, source="quotes", version="v4"),
    KeyTrace(
        price("AAPL"), Obtained.FETCHED, 0.0003, 0.0421, source="quotes", version="v5",
        waits=(Wait(WaitReason.CACHE, 0.0003, 0.0005),), calls=(0,),
    ),
    KeyTrace(
        rate("EUR"), Obtained.FETCHED, 0.0003, 0.0303, requested=False, source="rates",
        version="v6", joined="a9", waits=(Wait(WaitReason.FLIGHT, 0.0003, 0.0302, "a9"),),
        calls=(1,),
    ),
    KeyTrace(
        price("PUSHED"), Obtained.PUBLISHED, 0.0003, 0.02, source="feed", version="v7",
        waits=(Wait(WaitReason.PUBLICATION, 0.018, 0.02),),
    ),
    KeyTrace(
        RISK, Obtained.DERIVED, 0.0002, 0.0565, source="risk", version="v8",
        waits=(
            Wait(WaitReason.DEPENDENCIES, 0.0003, 0.0431),
            Wait(WaitReason.STORE, 0.0561, 0.0565),
        ),
        calls=(4,),
        rests_on=(
            Foundation(price("AAPL"), "v5", "quotes", EPOCH + 0.04),
            Foundation(rate("EUR"), "v6", "rates", EPOCH - 12.0),
        ),
    ),
    KeyTrace(
        ResourceKey("news", "headline", "AAPL"), Obtained.FALLBACK, 0.0004, 0.0511,
        source="news", version="v9", calls=(2,), error_type="ResourceResolutionError",
        error="every source failed",
        refusals=(
            SourceRefusal("news", 0.0508, "failure", "SourceTimeoutError", "50 ms"),
            SourceRefusal("archive", 0.051, "stale", "StaleSourceData", "3 h old"),
        ),
    ),
    KeyTrace(
        ResourceKey("book", "depth", "<b>&\u202e"), Obtained.FAILED, 0.0004, 0.0012, calls=(3,),
        error_type="ResourceResolutionError", error="cannot resolve it",
        refusals=(
            SourceRefusal("book", 0.0011, "circuit_open", "CircuitOpenError", "open"),
            SourceRefusal("paper", 0.0012, "absent", "Absent", "no such book"),
        ),
    ),
    calls=(QUOTES, RATES, NEWS, BOOK, DERIVING),
    duration_seconds=0.057,
    stages=(StageTrace("build", 0.0, 0.0568, 9), StageTrace("delivery", 0.0568, 0.057, 9)),
)  # fmt: skip


def of_many(keys: int = 1000) -> Trace:
    """Prices from the cache and in batches of 100, with a few that failed."""
    calls = tuple(
        call(
            attempt(1, 0.001, 0.001 + 0.004 * batch, 0.012 + 0.004 * batch),
            kind="batch", keys=100, end=0.0121 + 0.004 * batch,
        )
        for batch in range(keys // 100)
    )  # fmt: skip

    def one(number: int) -> KeyTrace:
        key = price(f"S{number:04}")
        if number % 500 == 499:
            return KeyTrace(
                key, Obtained.FAILED, 0.0004, 0.06, error_type="LookupError", error="unknown"
            )
        if number % 2:
            return KeyTrace(key, Obtained.CACHE, 0.0002, 0.0003, source="quotes", version="v")
        mine = number // 100
        end = calls[mine].end + number % 7 / 10_000
        return KeyTrace(
            key, Obtained.FETCHED, 0.0004, end, source="quotes", version="v", calls=(mine,)
        )

    return traced(*map(one, range(keys)), calls=calls, duration_seconds=0.0612)
