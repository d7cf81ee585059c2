"""Hold the importable package to the 0.6 contract: what it offers, and what it keeps safe.

Usage: python -I contract.py [FOLDER]

Needs nothing but the package, which it takes from FOLDER if there is one, so that it can be run on
a checkout and on a wheel alone in its environment.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import operator
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

FEATURES = {
    "automatic_observability_buffering", "blocking_source_timeout_guarantees",
    "builder_health_assessment", "builder_health_serialization",
    "controlled_payload_copy_shutdown", "payload_copy_health", "payload_copy_offload",
    "snapshot_acceptance", "snapshot_consistency", "snapshot_requests", "source_authority",
    "sync_submission_backlog", "transactional_revalidation", "versioned_error_diagnostics",
}  # fmt: skip
SCHEMAS = {
    "builder_health": 1, "builder_health_assessment": 1, "capabilities": 1, "error_diagnostics": 1,
}  # fmt: skip
DEFAULTS = {
    "allow_unsafe_blocking_sources": False,
    "buffer_observability": "auto",
    "require_source_timeout_declarations": True,
}
PROMISES: list[Callable[[Any], None]] = []


def promise(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """Add a check; its docstring is what is promised."""
    PROMISES.append(check)
    return check


def source(lib: Any, fetcher: Any, **settings: Any) -> Any:
    """A source of every key."""
    return lib.CallableSource(
        name="store", priority=1, supports=lambda key: True, fetcher=fetcher, **settings
    )


def raised(kind: type[BaseException], call: Callable[[], Any]) -> Any:
    """The exception of that kind that a call raises."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} was raised")


@promise
def capabilities(lib: Any) -> None:
    """Fourteen features, four schemas and three safe defaults are reported by their names."""
    told = lib.capabilities().to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["package_version"] == lib.__version__
    assert (told["api_stability"], told["stability"]) == ("0.6", "beta")
    assert (set(told["features"]), told["schemas"]) == (FEATURES, SCHEMAS)
    assert told["defaults"] == DEFAULTS


@promise
def requirements(lib: Any) -> None:
    """An application that needs more than is there is told so, with all that is missing."""
    lib.require_capabilities(features=FEATURES, schemas=SCHEMAS)
    error = raised(
        lib.CapabilityRequirementError,
        lambda: lib.require_capabilities(features=["warp"], schemas={"builder_health": 2}),
    )
    assert error.missing_features == ("warp",)
    assert error.schema_mismatches == {"builder_health": (2, 1)}


@promise
def defaults(lib: Any) -> None:
    """The defaults that are reported are those that a builder has."""
    parameters = inspect.signature(lib.SnapshotBuilder).parameters
    actual = {name: parameters[name].default for name in parameters.keys() & DEFAULTS}
    assert actual == {**DEFAULTS, "buffer_observability": None}  # which stands for "auto"


@promise
def declarations(lib: Any) -> None:
    """A source that may block for ever, or does not say whether it may, is refused by name."""

    class Silent:
        name, priority, timeout_seconds = "silent", 1, None

        def supports(self, key: Any) -> bool:
            return True

        async def fetch(self, key: Any, context: Any) -> Any:
            return None

    async def severity() -> str:
        async with lib.SnapshotBuilder([blocking], allow_unsafe_blocking_sources=True) as builder:
            return str((await builder.health_snapshot()).assess().severity.value)

    blocking = source(lib, lambda key, context: 1, blocking_io=True)
    assert "silent" in str(raised(ValueError, partial(lib.SnapshotBuilder, [Silent()])))
    assert "store" in str(raised(ValueError, partial(lib.SnapshotBuilder, [blocking])))
    assert asyncio.run(severity()) == "critical"


@promise
def violations(lib: Any) -> None:
    """A call that outlives the limit that its source declared is noticed while it runs."""
    ended = threading.Event()

    def fetch(key: Any, context: Any) -> None:
        ended.wait(30)

    late = source(
        lib, fetch, blocking_io=True, transport_timeout_seconds=0.01, timeout_seconds=0.05
    )

    async def run() -> Any:
        builder = lib.SnapshotBuilder([late])
        await builder.build([lib.ResourceKey("a", "b")], strict=False)
        health = await builder.health_snapshot()
        ended.set()
        await builder.aclose()
        return health

    assert asyncio.run(run()).source_transport_timeout_violations["store"] > 0


@promise
def isolation(lib: Any) -> None:
    """What a reader does to a snapshot or to a value in it, no other reader sees."""
    key = lib.ResourceKey("a", "b")

    async def fetch(key: Any, context: Any) -> Any:
        return {"price": 1}

    async def run() -> None:
        async with lib.SnapshotBuilder([source(lib, fetch)]) as builder:
            first = await builder.build([key])
            first.value(key)["price"] = 2
            assert (await builder.build([key])).value(key) == {"price": 1}
            raised(TypeError, lambda: operator.setitem(first, key, 3))

    asyncio.run(run())


@promise
def order(lib: Any) -> None:
    """An event that is older than what is known is rejected."""
    key, now = lib.ResourceKey("a", "b"), time.time()

    async def fetch(key: Any, context: Any) -> Any:
        return "fetched"

    async def run() -> None:
        async with lib.SnapshotBuilder([source(lib, fetch)]) as builder:
            for value, observed_at in (("new", now), ("old", now - 1)):
                await builder.publisher.publish(key, value, source="news", observed_at=observed_at)
            assert (await builder.build([key])).value(key) == "new"

    asyncio.run(run())


@promise
def diagnostics(lib: Any) -> None:
    """Errors and health are plain data with a version, and an error keeps what was found."""

    async def fetch(key: Any, context: Any) -> Any:
        if key.subject == "lost":
            raise ConnectionError("down")
        return 1

    async def run() -> tuple[Any, Any]:
        async with lib.SnapshotBuilder([source(lib, fetch)]) as builder:
            outcomes = await asyncio.gather(builder.build(keys), return_exceptions=True)
            return outcomes[0], await builder.health_snapshot()

    keys = [lib.ResourceKey("a", "b", subject) for subject in ("found", "lost")]
    error, health = asyncio.run(run())
    assert isinstance(error, lib.SnapshotBuildError)
    assert error.snapshot.value(keys[0]) == 1
    told = json.loads(json.dumps(error.to_dict()))
    assert told["schema_version"] == lib.ERROR_DIAGNOSTICS_SCHEMA_VERSION == 1
    assert told["partial_snapshot_available"] is True
    assert json.loads(json.dumps(health.to_dict()))["schema_version"] == 1


def main(folder: str = "") -> int:
    if folder:
        sys.path.insert(0, folder)
    import coalestra

    for check in PROMISES:
        check(coalestra)
    print(f"{len(PROMISES)} promises kept by coalestra {coalestra.__version__}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:2]))
