"""Workers over a shared cache, each with a process of its own, for one test after another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tests.redis.stock import PATIENT_SECONDS
from tests.support.workers import Process

_idle: list[Process] = []


@contextlib.contextmanager
def processes(
    url: str, prefix: str, number: int, *, offsets: tuple[float, ...] = (), **settings: Any
) -> Iterator[list[Process]]:
    """So many workers, all of them ready; those that live on are kept for the next who asks."""
    settings = {"time_limit_seconds": PATIENT_SECONDS, **settings}
    shifts = [*offsets, *[0.0] * number][:number]
    used = [_idle.pop() if _idle else Process("tests.redis.worker") for _ in range(number)]
    left = list(used)
    try:
        for each, offset in zip(used, shifts, strict=True):
            each.order("begin", url=url, prefix=prefix, offset=offset, settings=settings)
        for each in used:
            each.answer()
        yield used
        living = [each for each in used if each.alive]
        for each in living:
            each.order("end")
        for each in living:
            each.answer()
            left.remove(each)
            _idle.append(each)
    finally:
        for each in left:
            each.kill()


def dismiss() -> None:
    """End the workers that were kept."""
    while _idle:
        _idle.pop().end()
