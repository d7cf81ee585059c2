"""The result of a build or a session: values by key, and errors by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from coalestra.core.diagnostics import NOTHING_COUNTED, SnapshotDiagnostics
from coalestra.core.drafts import become, draft_of
from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.validation import instance
from coalestra.core.values import SnapshotValue

T = TypeVar("T")


@dataclass(frozen=True, slots=True, repr=False)
class Snapshot(Mapping[ResourceKey, SnapshotValue[Any]]):
    """An immutable mapping from keys to values, in the order in which they were asked for.

    Attributes:
        snapshot_id: the id of the build or session.
        created_at: when that began, in wall-clock seconds since the epoch.
        resources: the values; read-only.
        errors: why the keys without a value have none; read-only.
        diagnostics: what it took.
    """

    snapshot_id: str
    created_at: float
    resources: Mapping[ResourceKey, SnapshotValue[Any]]
    errors: Mapping[ResourceKey, Exception] = field(default_factory=FrozenDict)
    diagnostics: SnapshotDiagnostics = field(default_factory=lambda: NOTHING_COUNTED)

    def __post_init__(self) -> None:
        for name in ("resources", "errors"):
            mapping = getattr(self, name)
            if type(mapping) is not FrozenDict:
                object.__setattr__(self, name, FrozenDict(mapping))

    def __getitem__(self, key: ResourceKey) -> SnapshotValue[Any]:
        return self.resources[key]

    def __iter__(self) -> Iterator[ResourceKey]:
        return iter(self.resources)

    def __len__(self) -> int:
        return len(self.resources)

    def __contains__(self, key: object) -> bool:
        return key in self.resources

    @overload
    def value(self, key: ResourceKey) -> Any: ...

    @overload
    def value(self, key: ResourceKey, expected_type: type[T]) -> T: ...

    @overload
    def value(self, key: ResourceKey, expected_type: None) -> Any: ...

    def value(self, key: ResourceKey, expected_type: type[T] | None = None) -> T | Any:
        """Return the bare value of ``key``.

        Raises:
            KeyError: if it has none.
            TypeError: if it is not of the expected type.
        """
        found = self.resources[key].value
        if expected_type is not None:
            instance(f"value of {key}", found, expected_type)
        return found

    @overload
    def maybe_value(self, key: ResourceKey) -> Any: ...

    @overload
    def maybe_value(self, key: ResourceKey, expected_type: type[T]) -> T | None: ...

    @overload
    def maybe_value(self, key: ResourceKey, expected_type: None) -> Any: ...

    def maybe_value(self, key: ResourceKey, expected_type: type[T] | None = None) -> T | Any:
        """Return the bare value of ``key``, or None if it has none.

        Raises:
            TypeError: if it has one that is not of the expected type.
        """
        return self.value(key, expected_type) if key in self.resources else None

    def error_for(self, key: ResourceKey) -> Exception | None:
        """Return why ``key`` has no value, or None."""
        return self.errors.get(key)

    @property
    def stale_keys(self) -> tuple[ResourceKey, ...]:
        """The keys whose values were older than their time to live when they were delivered."""
        return tuple(key for key, value in self.resources.items() if value.stale)

    @property
    def complete(self) -> bool:
        """Whether nothing that was asked for has failed."""
        return not self.errors

    def __repr__(self) -> str:
        counts = f"resources={len(self.resources)}, errors={len(self.errors)}"
        stale = len(self.stale_keys)
        return f"Snapshot(snapshot_id={self.snapshot_id!r}, {counts}, stale={stale})"


_SnapshotDraft = draft_of(Snapshot)


def snapshot_of(
    snapshot_id: str,
    created_at: float,
    resources: FrozenDict[ResourceKey, SnapshotValue[Any]],
    errors: FrozenDict[ResourceKey, Exception] = EMPTY,
    diagnostics: SnapshotDiagnostics = NOTHING_COUNTED,
) -> Snapshot:
    """Return a `Snapshot` of mappings that are frozen already, faster than its constructor does."""
    snapshot = object.__new__(Snapshot)
    draft: Any = snapshot
    become(draft, _SnapshotDraft)
    draft.snapshot_id = snapshot_id
    draft.created_at = created_at
    draft.resources = resources
    draft.errors = errors
    draft.diagnostics = diagnostics
    draft.__class__ = Snapshot
    return snapshot
