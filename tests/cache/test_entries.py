"""The entry store: bounds, counts, the truth of derived entries, and who hears of what."""

from __future__ import annotations

import random
from typing import Any

import pytest

from coalestra.cache.store import UNCHECKED, EntryStore, best_per_key, outdated_among
from coalestra.concurrency.pace import at_once
from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.values import Revision
from tests.contracts.samples import NOW, POLICY, A, B, C, Witness, revision_of


def found(store: EntryStore, *keys: ResourceKey) -> list[ResourceKey]:
    return [key for key in keys if store.find(key, NOW, POLICY) is not None]


def numbered(number: int) -> ResourceKey:
    return ResourceKey("test", "entry", str(number))


@pytest.mark.parametrize("max_entries", [2, None])
def test_a_rewritten_entry_does_not_hold_on_to_its_key_of_before(max_entries: int | None) -> None:
    store = EntryStore(max_entries)
    store.put(revision_of(numbered(1)))
    rewritten = revision_of(numbered(1), observed_at=NOW + 1)
    store.put(rewritten)
    assert [key is rewritten.key for key in store] == [True]


def test_a_write_of_several_values_looks_through_those(monkeypatch: pytest.MonkeyPatch) -> None:
    store = EntryStore(10_000)
    store.put_many(best_per_key([revision_of(numbered(number)) for number in range(1_000)]))
    hashed: list[ResourceKey] = []
    ask = ResourceKey.__hash__

    def hash_of(key: ResourceKey) -> int:
        hashed.append(key)
        return ask(key)

    offered = [revision_of(numbered(1), observed_at=NOW + 1), revision_of(numbered(2_000))]
    monkeypatch.setattr(ResourceKey, "__hash__", hash_of)
    store.put_many(best_per_key(offered))
    assert len(store) == 1_001
    assert len(hashed) < 50


@pytest.mark.parametrize("max_entries", [3, 5, 8, None])
@pytest.mark.parametrize("held", [0, 1, 3])
def test_what_is_written_together_is_told_as_if_singly(max_entries: int | None, held: int) -> None:
    """Also if it all is new and finds room, and so takes one step for all of it."""
    stores = EntryStore(max_entries), EntryStore(max_entries)
    witnesses = [Witness(), Witness()]
    before = [revision_of(numbered(number), observed_at=NOW - 1) for number in range(held)]
    offered = [revision_of(numbered(number)) for number in range(2, 6)]
    for store, witness in zip(stores, witnesses, strict=True):
        for revision in before:
            store.put(revision)
        store.listeners.subscribe(witness)
    together, one_by_one = stores
    outcomes = [one_by_one.put(revision) for revision in offered]
    assert together.put_many({revision.key: revision for revision in offered}) == outcomes
    assert list(together) == list(one_by_one)
    assert together.stats() == one_by_one.stats()
    assert witnesses[0].heard == witnesses[1].heard
    assert [what for what, *_ in witnesses[0].heard] == ["revised"] * len(offered)


@pytest.mark.parametrize("seed", range(60))
def test_what_is_weighed_first_is_written_as_if_it_were_not(seed: int) -> None:
    """Whatever is held of it by then, also by somebody who has written since it was weighed."""
    chance = random.Random(seed)
    most = chance.choice((None, 6, 3))
    stores = EntryStore(most), EntryStore(most)
    weighing, plain = stores

    def some(at_most: int) -> list[Revision]:
        keys = chance.sample([numbered(number) for number in range(8)], chance.randint(0, at_most))
        made: list[Revision] = []
        for key in keys:
            below = [made[-1]] if made and chance.random() < 0.2 else ()
            at, rank = NOW - chance.choice((0, 1, 1, 2)), chance.choice((0, 0, 0, 1))
            made.append(revision_of(key, observed_at=at, rank=rank, rests_on=below))
        return made

    for each in some(8):
        for store in stores:
            store.put(each)
    offered = {each.key: each for each in some(8)}
    rules: dict[str, Any] = {"now": NOW, "replace_equal": chance.random() < 0.5}
    held = at_once(weighing.weigh(offered, **rules))
    if chance.random() < 0.3:
        for each in some(2):
            for store in stores:
                store.put(each)
    before = [*weighing.newest(8)]
    weighed = weighing.put_many(offered, held=held, **rules)
    for each in before:
        each.checked = UNCHECKED  # by the other store
    assert weighed == plain.put_many(offered, **rules)
    assert list(weighing) == list(plain)
    assert weighing.stats() == plain.stats()
    assert found(weighing, *offered) == found(plain, *offered)


def test_a_derived_entry_ends_when_a_dependency_is_replaced_dropped_expired_or_evicted() -> None:
    def replaced(store: EntryStore) -> None:
        store.put(revision_of(A), force=True)

    def replaced_once_weighed(store: EntryStore) -> None:
        offered = {A: revision_of(A, observed_at=NOW + 1)}
        held = at_once(store.weigh(offered, now=NOW))
        assert held
        store.put_many(offered, held=held)

    def dropped(store: EntryStore) -> None:
        store.drop([A])

    def expired(store: EntryStore) -> None:
        store.find(A, NOW + 99, POLICY)

    def evicted(store: EntryStore) -> None:
        for number in range(3):
            store.find(B, NOW, POLICY)
            store.put(revision_of(numbered(number)))

    for ending in (replaced, replaced_once_weighed, dropped, expired, evicted):
        store = EntryStore(3)
        base = revision_of(A)
        store.put(base)
        store.put(revision_of(B, rests_on=[base]))
        assert found(store, B) == [B], ending
        ending(store)
        assert found(store, B) == [], ending


def test_a_judgement_elsewhere_does_not_make_a_store_forget_what_rests_on_what() -> None:
    """As of one that was on its way into a cache when its reading began, and is in memory now."""
    store = EntryStore(None)
    base = revision_of(A)
    derived, other = revision_of(B, rests_on=[base]), revision_of(C, rests_on=[base])
    store.put(base)
    store.put(derived)
    assert found(store, B) == [B]
    assert outdated_among({A: base, C: other}) == []
    store.drop((A,))
    assert found(store, B) == []


def test_entries_that_claim_to_rest_on_each_other_are_never_current() -> None:
    store = EntryStore(None)
    one, two = revision_of(A), revision_of(B)
    circular = revision_of(A, rests_on=[two])
    circular.version = one.version
    two_on_one = revision_of(B, rests_on=[one])
    two_on_one.version = two.version
    store.put(circular)
    store.put(two_on_one)
    assert found(store, A, B) == []


class CountedVersions(FrozenDict[ResourceKey, str]):
    """Dependency versions that count how often they are walked."""

    walks = 0

    def items(self) -> Any:
        CountedVersions.walks += 1
        return super().items()


def test_each_derived_entry_is_walked_once_however_many_are_asked_for() -> None:
    store = EntryStore(None)
    last = revision_of(A)
    store.put(last)
    expired = [revision_of(ResourceKey("old", str(n)), observed_at=NOW - 99) for n in range(500)]
    for each in expired:
        store.put(each)
    keys = [numbered(number) for number in range(500)]
    for key in keys:
        last = revision_of(key, rests_on=[last])
        last.dependency_versions = CountedVersions(last.dependency_versions)
        store.put(last)
    CountedVersions.walks = 0
    for key, old in zip(keys, expired, strict=True):
        assert store.find(key, NOW, POLICY) is not None
        assert store.find(old.key, NOW, POLICY) is None
    assert CountedVersions.walks == 500
    store.put(revision_of(A), force=True)
    for key in reversed(keys):
        assert store.find(key, NOW, POLICY) is None
    assert CountedVersions.walks == 1_000


@pytest.mark.parametrize("seed", range(20))
def test_validity_agrees_with_looking_at_everything(seed: int) -> None:
    chance = random.Random(seed)
    store = EntryStore(None)
    held: dict[ResourceKey, Revision] = {}
    keys = [numbered(number) for number in range(16)]

    def current(key: ResourceKey) -> bool:
        return key in held and all(
            current(each) and held[each].version == version
            for each, version in held[key].dependency_versions.items()
        )

    for _ in range(300):
        level = chance.randrange(16)
        key = keys[level]
        below = [held[each] for each in keys[:level] if each in held]
        action = chance.random()
        if action < 0.7:
            rests_on = chance.sample(below, min(len(below), chance.randrange(3)))
            held[key] = revision_of(key, rests_on=rests_on)
            store.put(held[key], force=True)
        elif action < 0.8:
            store.drop([key])
            held.pop(key, None)
        elif action < 0.9 or not current(key):
            assert (store.find(key, NOW, POLICY) is not None) == current(key)
            if not current(key):
                held.pop(key, None)
        else:
            store.find(key, NOW + 99, POLICY)
            held.pop(key)
        for each in chance.sample(keys, 5):
            assert (store.peek(each) is not None) == current(each)


def test_a_rule_that_fails_changes_nothing() -> None:
    store = EntryStore(2)
    store.put(revision_of(A))

    def fail(_: ResourceKey) -> bool:
        raise LookupError("no idea")

    with pytest.raises(LookupError):
        store.drop_where(fail)
    assert found(store, A) == [A]


def test_the_store_describes_itself() -> None:
    assert repr(EntryStore(5)) == "EntryStore(0 entries, max 5)"
    assert repr(EntryStore(None)) == "EntryStore(0 entries, unbounded)"
    assert repr(EntryStore(5).listeners) == "Listeners(0)"
