"""Runs every ``async def`` test on a fresh loop in virtual time."""

from __future__ import annotations

import asyncio
import functools
import gc
import importlib.util
import inspect
import os
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support import Leak, ShuffledLoop, VirtualLoop, run_real, run_virtual
from tests.support.leaks import at_rest_in_the_end
from tests.support.running import closes_loops_and_tells, until_logged

# Examples are timed on the clock of a machine that may be busy with something else. Continuous
# integration asks for `--hypothesis-profile=thorough`.
for profile, examples in {"brief": 10, "thorough": 100}.items():
    settings.register_profile(
        profile,
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        print_blob=True,
    )
settings.load_profile("brief")

LOOPS = ("virtual", "debug", "shuffled", "eager")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--loop",
        choices=LOOPS,
        default="virtual",
        help="the loop of async tests: virtual time; also in debug, shuffled or eager-task mode",
    )
    parser.addoption(
        "--loop-seed", type=int, default=0, help="the seed of --loop=shuffled (default: 0)"
    )
    parser.addoption(
        "--worlds",
        type=int,
        default=10,
        help="how many random worlds each test of the simulation lives through (default: 10)",
    )
    parser.addoption(
        "--distributions",
        metavar="FOLDER",
        help="verify the distributions in this folder instead of building some",
    )
    parser.addoption(
        "--pictures", action="store_true", help="renew the pictures of the live page in docs/images"
    )
    parser.addoption(
        "--installed",
        action="store_true",
        help="refuse to start unless coalestra comes from an installation, not from src",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--loop") == "eager" and not hasattr(asyncio, "eager_task_factory"):
        raise pytest.UsageError("--loop=eager: eager tasks came with Python 3.12")
    if config.getoption("--installed"):
        found = importlib.util.find_spec("coalestra")
        origin = "nowhere" if found is None or found.origin is None else found.origin
        if "site-packages" not in origin:
            raise pytest.UsageError(f"--installed, but coalestra comes from {origin}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """With `-n auto`, one more than there are processors: some tests wait for other processes."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With another loop than the usual one, run only those tests to which it makes a difference."""
    if config.getoption("--loop") == "virtual":
        return
    chosen = [item for item in items if _runs_on_the_loop(item)]
    if config.getoption("--loop") == "eager":
        chosen = [item for item in chosen if item.get_closest_marker("late_tasks") is None]
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen


def pytest_collection_finish() -> None:
    """Keep the tests themselves out of what is collected, and copied by forks, as they run."""
    gc.collect()
    gc.freeze()


def _runs_on_the_loop(item: pytest.Item) -> bool:
    function = getattr(item, "obj", None)
    function = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    real = item.get_closest_marker("real_loop") is not None
    return inspect.iscoroutinefunction(function) and not real


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    function = pyfuncitem.obj
    property_test = getattr(function, "hypothesis", None)
    if property_test is not None:
        if inspect.iscoroutinefunction(property_test.inner_test):
            property_test.inner_test = _plain(pyfuncitem, property_test.inner_test)
        return None
    if not inspect.iscoroutinefunction(function):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    _plain(pyfuncitem, function)(**{name: pyfuncitem.funcargs[name] for name in names})
    return True


under_way: list[str] = []
"""The tasks under way on loops that this test has closed, if it did not mean to."""

asyncio.BaseEventLoop.close = closes_loops_and_tells(  # type: ignore[assignment,method-assign]
    asyncio.BaseEventLoop.close, under_way
)


@pytest.fixture(autouse=True)
def _leave_nothing_for_the_log_of_another_test() -> Iterator[None]:
    under_way.clear()
    yield
    until_logged()
    if under_way:
        raise Leak("a loop was closed, and not by `drop`, under\n  " + "\n  ".join(under_way))


def _plain(
    item: pytest.Function, function: Callable[..., Coroutine[Any, Any, object]]
) -> Callable[..., None]:
    """The same test as a plain function that brings its own loop."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        if item.get_closest_marker("real_loop") is not None:
            run_real(function(*args, **kwargs))
            return
        loop = _loop_for(item.config)
        leaks_allowed = item.get_closest_marker("expects_leaks") is not None
        test = function(*args, **kwargs)
        if not leaks_allowed:
            test = at_rest_in_the_end(test)
        run_virtual(test, loop=loop, leaks_allowed=leaks_allowed)

    return run


def _loop_for(config: pytest.Config) -> VirtualLoop:
    kind = config.getoption("--loop")
    if kind == "shuffled":
        return ShuffledLoop(config.getoption("--loop-seed"))
    loop = VirtualLoop()
    loop.set_debug(kind == "debug")
    if kind == "eager":
        loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009 - not in 3.11
    return loop
