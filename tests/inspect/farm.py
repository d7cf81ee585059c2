"""A builder with something to see: what the browser tests and the pictures in the docs show."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from coalestra import (
    CallableBatchSource,
    CallableDerivedSource,
    CallableSource,
    CircuitBreakerPolicy,
    FreshnessPolicy,
    ResourceKey,
    RetryPolicy,
    SnapshotBuilder,
    SourceResiliencePolicy,
)
from coalestra.inspect import app, serve


class Farm:
    """A farm at work on a loop of its own, with the page of its builder served beside it.

    Attributes:
        url: where the page is.
        weather_fails: whether the weather service is down.
    """

    def __init__(
        self,
        *,
        trace: bool = True,
        recovery_seconds: float = 30.0,
        name: str = "soil-sensors",
        more: int = 0,
        deadline_seconds: float = 5.0,
        **settings: Any,
    ) -> None:
        self.url = ""
        self._port = 0
        self._trace = trace
        self._resilience = SourceResiliencePolicy(
            retry=RetryPolicy(max_attempts=1),
            circuit=CircuitBreakerPolicy(
                failure_threshold=2, recovery_timeout_seconds=recovery_seconds
            ),
        )
        self.weather_fails = True
        self._settings = {"title": "Farm", "interval_seconds": 0.1, **settings}
        self._name = name
        self._more = more
        self._deadline_seconds = deadline_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._served = threading.Event()
        self._gate = asyncio.Event()
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()))

    @contextlib.contextmanager
    def open(self) -> Iterator[Farm]:
        """Be at work for the length of a ``with`` block."""
        self._thread.start()
        assert self._served.wait(20)
        try:
            yield self
        finally:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._gate.set)
            self._thread.join(20)

    def close_builder(self) -> None:
        """Close the builder, while the page is still served."""
        self._do(self.builder.aclose())

    def stop_serving(self) -> None:
        """Be out of reach."""
        self._do(self._server.aclose())

    def serve_again(self) -> None:
        """Be back at the same address."""
        self._do(self._serve())

    async def _serve(self) -> None:
        self._server = await serve(self._page, port=self._port).__aenter__()
        self._port = self._server.port

    def _do(self, work: Coroutine[Any, Any, object]) -> None:
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with SnapshotBuilder(
            self._sources(), default_policy=FreshnessPolicy(0.4, 60.0), trace=self._trace
        ) as self.builder:
            self._page = app(self.builder, **self._settings)
            await self._serve()
            self.url = self._server.url
            work = [asyncio.create_task(each) for each in (self._water(), self._look_up())]
            self._served.set()
            await self._gate.wait()
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            await self._server.aclose()

    async def _water(self) -> None:
        while not self.builder.closed:
            number = next(self._numbers)
            plots = [ResourceKey("farm", "cost", f"plot-{number % 3}")]
            await self.builder.build(plots, strict=False, deadline_seconds=self._deadline_seconds)
            await asyncio.sleep(0.1)

    async def _look_up(self) -> None:
        """Wait for ever for the level of a well."""
        await self.builder.build([ResourceKey("farm", "water-level", "well-1")], strict=False)

    def _sources(self) -> list[Any]:
        async def soil(key: ResourceKey, context: Any) -> Any:
            await asyncio.sleep(0.012)
            return {"moisture": 0.31}

        async def forecast(keys: Any, context: Any) -> Any:
            await asyncio.sleep(0.02)
            if self.weather_fails:
                raise ConnectionError("no route to the weather of plot-1")
            return {key: {"rain_mm": 3} for key in keys}

        async def archive(keys: Any, context: Any) -> Any:
            await asyncio.sleep(0.004)
            return {key: {"rain_mm": 2} for key in keys}

        async def level(key: ResourceKey, context: Any) -> Any:
            await self._gate.wait()

        async def price(key: ResourceKey, context: Any) -> Any:
            await asyncio.sleep(0.03)
            return 1.8

        async def plan(key: ResourceKey, values: Any, context: Any) -> Any:
            return {"litres": 12}

        def of_plot(*kinds: tuple[str, str]) -> Callable[[ResourceKey], Any]:
            return lambda key: [ResourceKey(*kind, key.subject) for kind in kinds]

        def ways(name: str, kind: str, **more: Any) -> dict[str, Any]:
            return {"name": name, "priority": 10, "supports": lambda key: key.name == kind, **more}

        weather = ways("weather", "rain", fetcher=forecast, resilience_policy=self._resilience)
        needs = of_plot(("farm", "soil"), ("sky", "rain"))
        rests_on = of_plot(("farm", "need"), ("market", "price"))
        idle = [ways(f"{'a-long-name-' * 8}{number}", "-") for number in range(self._more)]
        return [
            *(CallableSource(**each, fetcher=soil) for each in idle),
            CallableSource(**ways(self._name, "soil", fetcher=soil, timeout_seconds=2.0)),
            CallableBatchSource(**weather),
            CallableBatchSource(
                **ways("weather-archive", "rain", fetcher=archive) | {"priority": 5}
            ),
            CallableSource(**ways("well-pump", "water-level", fetcher=level, max_concurrency=2)),
            CallableSource(**ways("prices", "price", fetcher=price)),
            CallableDerivedSource(
                **ways("irrigation-plan", "need", dependencies=needs, deriver=plan)
            ),
            CallableDerivedSource(
                **ways("cost-model", "cost", dependencies=rests_on, deriver=plan)
            ),
        ]
