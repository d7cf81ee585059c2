"""The write order: which revision of a resource may replace which.

Laws, for revisions of one key:

1. A forced write always wins.
2. A higher authority rank wins, whatever was observed when.
3. A lower authority rank loses, whatever was observed when.
4. Between equal ranks the later observation wins; equal observations keep what is there, unless
   the writer asked to replace equals.

Everything here is a pure function of its arguments.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, TypeVar

from coalestra.core.keys import ResourceKey
from coalestra.core.records import CacheWriteStatus

_STORED = CacheWriteStatus.STORED
_LOWER = CacheWriteStatus.IGNORED_LOWER_AUTHORITY
_OLDER = CacheWriteStatus.IGNORED_OLDER
_DUPLICATE = CacheWriteStatus.IGNORED_DUPLICATE


class Ranked(Protocol):
    """What the write order looks at: a key, an authority rank and an observation time."""

    @property
    def key(self) -> ResourceKey:
        """The resource the candidate is a revision of."""

    @property
    def authority_rank(self) -> int:
        """Higher ranks replace lower ones."""

    @property
    def observed_at(self) -> float:
        """Wall-clock seconds since the epoch at which the value was true."""


_R = TypeVar("_R", bound=Ranked)


def decide(
    candidate: Ranked,
    current: Ranked | None,
    *,
    force: bool = False,
    replace_equal: bool = False,
) -> CacheWriteStatus:
    """Say what becomes of ``candidate`` when ``current`` is what the cache holds."""
    if current is None or force:
        return _STORED
    rank, held = candidate.authority_rank, current.authority_rank
    if rank != held:
        return _STORED if rank > held else _LOWER
    if candidate.observed_at > current.observed_at:
        return _STORED
    if candidate.observed_at < current.observed_at:
        return _OLDER
    return _STORED if replace_equal else _DUPLICATE


def best_of(first: _R, second: _R) -> _R:
    """Choose between two candidates of one batch; the second wins a tie."""
    standing = (first.authority_rank, first.observed_at)
    return second if (second.authority_rank, second.observed_at) >= standing else first


def best_per_key(candidates: Collection[_R]) -> dict[ResourceKey, _R]:
    """Reduce a batch to its best candidate per key, keys in order of first appearance."""
    best = {candidate.key: candidate for candidate in candidates}
    if len(best) < len(candidates):  # the last per key is there; now every other one competes
        for candidate in candidates:
            best[candidate.key] = best_of(best[candidate.key], candidate)
    return best
