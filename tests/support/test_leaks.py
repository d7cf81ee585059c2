"""A builder at work is told from a builder at rest."""

from __future__ import annotations

import pytest

from coalestra import CallableSource, FetchContext, ResourceKey, SnapshotBuilder
from tests.support import Gate, begun, no_leaks


async def test_a_builder_that_still_holds_something_is_found() -> None:
    gate = Gate()

    async def fetch(key: ResourceKey, context: FetchContext) -> int:
        await gate.pass_()
        return 1

    source = CallableSource(name="slow", priority=1, supports=lambda key: True, fetcher=fetch)
    async with SnapshotBuilder(sources=[source]) as builder:
        await no_leaks(builder)
        build = await begun(builder.build([ResourceKey("a", "b")]), gate)
        with pytest.raises(AssertionError, match="slots of __global__"):
            await no_leaks(builder)
        gate.open()
        await build
        await no_leaks(builder)
