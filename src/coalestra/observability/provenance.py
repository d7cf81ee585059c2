"""Where a value came from, as far as a report tells it."""

from __future__ import annotations

from typing import Protocol

from coalestra.core.keys import ResourceKey


class Provenance(Protocol):
    """What revisions and snapshot values have in common, and reports are made of."""

    @property
    def key(self) -> ResourceKey:
        """What it is a value of."""

    @property
    def source(self) -> str:
        """The name of the source or publisher."""

    @property
    def observed_at(self) -> float:
        """When it held true, in wall seconds."""

    @property
    def latency_ms(self) -> float:
        """How long the call that brought it took, in milliseconds."""

    @property
    def attempts(self) -> int:
        """How many tries it took; none for a published value."""

    @property
    def authority_rank(self) -> int:
        """The rank of its source for this key."""
