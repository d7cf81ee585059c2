"""What ``PayloadCopies`` promises about one payload: who gets the same object, who a copy."""

from __future__ import annotations

import array
import asyncio
import collections
import copy
import copyreg
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import ipaddress
import pathlib
import re
import sys
import threading
import uuid
import zoneinfo
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import pytest

from coalestra.concurrency import sealing
from coalestra.concurrency.copying import (
    OFFLOADED,
    PayloadCopies,
    PayloadIsolator,
    deepcopy_payload,
)
from coalestra.concurrency.sealing import DeepSeal, Seal
from coalestra.core.errors import PayloadCopySubsystemClosedError, PayloadIsolationError
from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.values import SnapshotValue
from tests.support import Panic, ThreadGate


class Side(enum.Enum):
    BUY = "buy"


class Color(enum.Flag):
    RED = 1
    BLUE = 2


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Trade:
    price: Any
    size: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class SlimTrade:
    price: Any


@dataclasses.dataclass(frozen=True)
class Remembering:
    price: int

    @functools.cached_property
    def rows(self) -> list[int]:
        return []


class Loosened(Trade):
    """A subclass of a frozen dataclass that is not one itself: it takes new attributes."""


@dataclasses.dataclass(frozen=True)
class Noting:
    """Fills itself in, past its own guard."""

    title: str

    def notes(self) -> list[str]:
        if "_notes" not in self.__dict__:
            object.__setattr__(self, "_notes", [])
        return self.__dict__["_notes"]  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True, slots=True)
class SlimNoting:
    """Has a slot to fill in later."""

    title: str
    _notes: Any = None

    def notes(self) -> list[str]:
        if self._notes is None:
            object.__setattr__(self, "_notes", [])
        return self._notes  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True, slots=True)
class Computing:
    """Keeps what a property has computed."""

    price: int
    _rows: Any = None

    @property
    def rows(self) -> list[int]:
        if self._rows is None:
            object.__setattr__(self, "_rows", [])
        return self._rows  # type: ignore[no-any-return]


class Notes:
    """A class to be mixed in."""

    __slots__ = ()

    def note(self) -> None:
        object.__setattr__(self, "price", [])


@dataclasses.dataclass(frozen=True, slots=True)
class Mixing(Notes):
    """Its code is a base's."""

    price: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
    """Its only code runs as it is made."""

    price: int

    def __post_init__(self) -> None:
        assert self.price


T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Priced(Generic[T]):
    """A generic class has code of the standard library's."""

    price: T


class Remark(Point):
    """A named tuple with a dictionary."""


class Marked(str):
    """A string that can carry more than its characters."""


class OddZone(datetime.tzinfo):
    def utcoffset(self, when: datetime.datetime | None) -> datetime.timedelta:
        return datetime.timedelta(0)

    def dst(self, when: datetime.datetime | None) -> None:
        return None

    def tzname(self, when: datetime.datetime | None) -> None:
        return None


@dataclasses.dataclass
class Quote:
    bid: float
    levels: list[int]


@dataclasses.dataclass(unsafe_hash=True)
class Named:
    name: str


class Watched:
    __slots__ = ("level",)
    level: int

    def __setattr__(self, name: str, value: int) -> None:
        object.__setattr__(self, name, value + 1)


class Stubborn:
    """Cannot be copied."""

    def __deepcopy__(self, memo: object) -> Stubborn:
        raise ValueError("one of a kind")


class Foreign:
    """Copied by its own rule only, and remembers where."""

    def __init__(self, thread: str = "") -> None:
        self.thread = thread

    def __deepcopy__(self, memo: object) -> Foreign:
        return Foreign(threading.current_thread().name)


IMMUTABLE = [
    None, True, 1, 1.5, 2j, "text", b"bytes", range(3), len, int, decimal.Decimal("1.0"),
    uuid.UUID(int=1), datetime.date(2024, 1, 2), datetime.timedelta(1), datetime.timezone.utc,
    datetime.datetime(2024, 1, 2), datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc),
    datetime.time(1, 2, tzinfo=zoneinfo.ZoneInfo("UTC")), Side.BUY, Color.RED | Color.BLUE,
    (1, (2, "three")), frozenset({1, (2, 3)}), Point(1, (2,)), SlimTrade((1, Side.BUY)),
    SlimTrade(SlimTrade(Point(1, 2))), Checked(1), Priced(1), pathlib.PurePosixPath("/srv/a"),
    pathlib.Path("a"), re.compile("a+"), ipaddress.ip_address("10.0.0.1"),
    ipaddress.ip_address("::1"), fractions.Fraction(1, 3),
]  # fmt: skip

MUTABLE = [
    [], {}, set(), bytearray(b"x"), Marked("m"), ([],), Point(1, []), Trade(1), Trade([1]),
    SlimTrade([1]), SlimTrade(Trade(1)), (Trade(1),), Remembering(1), Loosened(1), Noting("q3"),
    SlimNoting("q3"), Computing(1), Mixing(1), Remark(1, 2), collections.deque([1]),
    collections.OrderedDict(a=1), collections.defaultdict(list, a=[1]),
    ipaddress.ip_network("10.0.0.0/8"), datetime.datetime(2024, 1, 2, tzinfo=OddZone()),
    Quote(1.0, [1]), {"deep": [{"er": (1, {2})}]},
]  # fmt: skip


@pytest.fixture
def copies() -> PayloadCopies:
    return PayloadCopies("builder")


def opened(copies: PayloadCopies, value: Any) -> Any:
    """What a reader receives of a payload that is sealed and opened right here."""
    sealed = copies.seal_now(value, context="test")
    assert sealed is not None
    return copies.open_now(*sealed, context="test")


async def seal(copies: PayloadCopies, value: Any, context: str = "test") -> tuple[Any, Seal]:
    """Seal as the library does: at once if that is possible."""
    sealed = copies.seal_now(value, context=context)
    return await copies.seal(value, context=context) if sealed is None else sealed


async def unseal(copies: PayloadCopies, payload: Any, seal: Seal) -> Any:
    """Open as the library does: at once if that is possible."""
    result = copies.open_now(payload, seal, context="test")
    return await copies.open(payload, seal, context="test") if result is OFFLOADED else result


@pytest.mark.parametrize("value", IMMUTABLE, ids=repr)
def test_an_immutable_payload_is_passed_as_it_is(copies: PayloadCopies, value: Any) -> None:
    """Copying what nobody can change would cost and give nothing."""
    sealed = copies.seal_now(value, context="test")
    assert sealed == (value, Seal.SHARED)
    assert sealed[0] is value
    assert copies.open_now(*sealed, context="test") is value


@pytest.mark.parametrize("value", MUTABLE, ids=lambda value: type(value).__name__)
async def test_what_could_be_changed_is_copied_both_ways(copies: PayloadCopies, value: Any) -> None:
    """In doubt, as with a subclass of ``str`` or a cached property, there is a copy."""
    payload, kind = await seal(copies, value)
    first, second = await unseal(copies, payload, kind), await unseal(copies, payload, kind)
    assert len({id(value), id(payload), id(first), id(second)}) == 4
    assert type(first) is type(value)
    assert repr(first) == repr(copy.deepcopy(value)) or isinstance(value, datetime.datetime)


@pytest.mark.parametrize("value", [
    {Named("a"): 1}, {Named("a")}, [{Named("a")}], {Named("a"): [Named("b")], "c": 1},
    dict.fromkeys([*range(20), Named("a")]), frozenset({Named("a")}), {(Named("a"), 1): 1},
    {Trade(Named("a")): 1},
], ids=repr)  # fmt: skip
async def test_objects_used_as_keys_are_copied_too(copies: PayloadCopies, value: Any) -> None:
    """A key that compares by value can still be changed; it is found again by its hash."""
    payload, kind = await seal(copies, value)
    result = await unseal(copies, payload, kind)
    assert payload == result == value
    named = [sorted(map(id, names_in(each))) for each in (value, payload, result)]
    assert len({each for ids in named for each in ids}) == 3 * len(named[0]) > 0
    if isinstance(result, dict):
        assert all(result[key] == value[key] for key in value)


def names_in(value: Any) -> list[Named]:
    """Every `Named` in a payload."""
    if isinstance(value, Named):
        return [value]
    if isinstance(value, Trade):
        return names_in(value.price)
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    return [name for part in parts for name in names_in(part)] if _holds(value) else []


def _holds(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple, set, frozenset))


class Team:
    """Hashed by its members, whoever they are."""

    def __init__(self, members: set[Key]) -> None:
        self.members = members

    def __hash__(self) -> int:
        return hash(frozenset(self.members))


async def test_a_key_whose_hash_rests_on_a_set_is_found_by_it(copies: PayloadCopies) -> None:
    """It is whole when it is put in place, wherever else the set is met."""
    members = {Key(), Key()}
    for value in ([members, {Team(members): 1}], [{Team(members): 1}, members]):
        payload, kind = await seal(copies, value)
        for each in (payload, await unseal(copies, payload, kind)):
            (teams,) = [part for part in each if isinstance(part, dict)]
            (team,) = teams
            assert any(part is team.members for part in each)
            assert teams[team] == 1


async def test_an_instance_changed_meanwhile_shares_nothing_of_it(copies: PayloadCopies) -> None:
    """Another thread may have its turn between any two steps; here, as a class is looked at."""
    quote, levels = Quote(1.0, []), list[int]()

    class Interrupting(type):
        def __getattribute__(cls, name: str) -> Any:
            quote.levels = None  # type: ignore[assignment]  # not what is found in a copy now
            return super().__getattribute__(name)

    class Odd(metaclass=Interrupting):
        pass

    vars(quote).update(bid=Odd(), levels=levels)
    payload, kind = await seal(copies, quote)
    first, second = payload, await unseal(copies, payload, kind)
    assert quote.levels is None
    assert first.levels == second.levels == []
    assert len({id(each) for each in (levels, first.levels, second.levels)}) == 3


async def test_an_instance_with_its_own_way_to_be_copied_is_asked(copies: PayloadCopies) -> None:
    """Even if its class does not."""
    quote = Quote(1.0, [])
    vars(quote)["__deepcopy__"] = lambda memo: "a likeness"
    payload, kind = await seal(copies, [quote])
    assert payload == ["a likeness"]
    assert isinstance(kind, DeepSeal)


async def test_a_slotted_class_sees_the_assignments_of_its_copies(copies: PayloadCopies) -> None:
    """``copy.deepcopy`` assigns slots the ordinary way."""
    watched = Watched()
    watched.level = 1
    payload, _ = await seal(copies, watched)
    assert payload.level == 3


@pytest.mark.parametrize("value", [Noting("q3"), SlimNoting("q3"), {"deep": (Noting("q3"),)}])
def test_what_is_filled_into_a_frozen_dataclass_stays(copies: PayloadCopies, value: Any) -> None:
    """Whether it has a place for it from the start or not."""
    first, second = opened(copies, value), opened(copies, value)
    notes = [
        (each["deep"][0] if isinstance(each, dict) else each).notes() for each in (first, second)
    ]
    notes[0].append("private")
    assert notes[1] == []


@dataclasses.dataclass(frozen=True)
class Roomy:
    """Has a slot that is no field: somebody may fill it once it is made."""

    __slots__ = ("price", "spare")

    price: int


async def test_a_slot_that_is_no_field_is_a_place_to_keep_something(copies: PayloadCopies) -> None:
    """So the record is not shared; as ``copy.deepcopy`` cannot copy this one, it is refused."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        copy.deepcopy(Roomy(1))
    with pytest.raises(PayloadIsolationError):
        await copies.seal(Roomy(1), context="payload")


class Changing:
    """A class that is given a say in its copying only later."""

    def __init__(self) -> None:
        self.rows = [1]


@pytest.fixture
def changing() -> Any:
    """Such a class, without any say again afterwards."""
    yield Changing
    copyreg.dispatch_table.pop(Changing, None)
    if "__deepcopy__" in vars(Changing):
        del Changing.__deepcopy__  # type: ignore[attr-defined]


def by_hook(cls: Any) -> None:
    cls.__deepcopy__ = lambda self, memo: "hooked"


def by_registry(cls: Any) -> None:
    copyreg.pickle(cls, lambda _: (str, ("hooked",)))


@pytest.mark.parametrize("give_a_say", [by_hook, by_registry])
async def test_a_class_that_is_given_a_say_in_its_copying_has_it_from_then_on(
    copies: PayloadCopies, changing: Any, give_a_say: Any
) -> None:
    """For what comes in and for what was sealed before."""
    before = copies.seal_now([changing()], context="test")
    assert before is not None
    assert copies.open_now(*before, context="test")[0].rows == [1]
    give_a_say(changing)
    assert copies.open_now(*before, context="test") == ["hooked"]
    assert (await seal(copies, [changing()]))[0] == ["hooked"]


def test_a_class_from_nowhere_is_copied_like_any_other(copies: PayloadCopies) -> None:
    """One that is made by hand need not say which module it is from."""
    homeless = type("Homeless", (), {"__module__": None})
    value: Any = homeless()
    value.rows = [1]
    result = opened(copies, [value])
    assert result[0].rows == [1]
    assert result[0].rows is not value.rows


class Key:
    """Compares by identity, and can change."""


def test_tuples_nested_beyond_reason_are_copied_without_recursion(copies: PayloadCopies) -> None:
    """Whether one is immutable is asked no deeper than fifty levels: the stack has an end."""

    def nested(levels: int) -> Any:
        value: Any = ()
        for _ in range(levels):
            value = (value,)
        return value

    sealed = copies.seal_now(nested(45), context="test")
    assert sealed is not None
    assert sealed[1] is Seal.SHARED
    result, depth = opened(PayloadCopies("builder", run_in_thread=False), nested(5_000)), 0
    while result:
        result, depth = result[0], depth + 1
    assert depth == 5_000


def test_nesting_is_bounded_by_memory_and_not_by_the_stack() -> None:
    """``copy.deepcopy`` itself gives up at a few hundred levels."""
    value: list[Any] = []
    for _ in range(20_000):
        value = [value]
    result, depth = opened(PayloadCopies("builder", run_in_thread=False), value), 0
    while result:
        result, depth = result[0], depth + 1
    assert depth == 20_000


def test_tuples_that_share_parts_many_times_are_judged_once_each(copies: PayloadCopies) -> None:
    """Without a memory for verdicts this would take two to the power of forty steps."""
    value: Any = (1, (2,))
    for _ in range(40):
        value = (value, value)
    sealed = copies.seal_now(value, context="test")
    assert sealed is not None
    assert sealed[0] is value


@pytest.mark.parametrize("value", [
    list(range(120_000)), dict.fromkeys(range(120_000), 0.5),
    {"rows": [[number] for number in range(6_000)]},
    {"all": (list(range(110_000)), dict.fromkeys(range(110_000)), set(range(110_000)))},
], ids=["long list", "large dict", "many rows", "huge parts"])  # fmt: skip
async def test_a_large_payload_is_copied_in_a_thread(copies: PayloadCopies, value: Any) -> None:
    """The event loop is for everybody."""
    assert copies.seal_now(value, context="test") is None
    payload, kind = await copies.seal(value, context="test")
    assert copies.open_now(payload, kind, context="test") is OFFLOADED
    result = await copies.open(payload, kind, context="test")
    assert result == payload == value
    assert len({id(result), id(payload), id(value)}) == 3


@pytest.mark.parametrize("kind", [list, dict, set])
def test_no_call_that_other_threads_wait_for_copies_a_huge_container(
    monkeypatch: pytest.MonkeyPatch, kind: type[Any]
) -> None:
    """One call in C over all of it would keep every other thread, the event loop's too."""
    monkeypatch.setattr(sealing, "HUGE", 10)
    huge = kind(zip(range(20), range(20), strict=True))
    copied_at_once: list[int] = []

    def note(_frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ == "copy":
            copied_at_once.append(len(function.__self__))

    sys.setprofile(note)
    try:
        payload, seal = sealing.seal_anyhow([huge])
        (copied,) = seal.opener(payload)
    finally:
        sys.setprofile(None)
    assert copied == huge
    assert set(copied_at_once) == {1}  # the list around it


async def test_a_copy_of_unknown_length_is_made_in_a_thread_until_one_was_brief(
    copies: PayloadCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what a class does to be copied, but how long the last time took is known."""
    here = threading.current_thread().name
    monkeypatch.setattr(sealing, "_ENOUGH", 0)
    monkeypatch.setattr(sealing, "BRIEF_SECONDS", -1.0)
    assert copies.seal_now([Foreign()], context="test") is None
    payload, kind = await copies.seal([Foreign()], context="test")
    for _ in range(2):
        assert copies.open_now(payload, kind, context="test") is OFFLOADED
        (result,) = await copies.open(payload, kind, context="test")
        assert result.thread.startswith("coalestra")
    monkeypatch.setattr(sealing, "BRIEF_SECONDS", 1000.0)
    assert copies.open_now(payload, kind, context="test") is OFFLOADED
    await copies.open(payload, kind, context="test")
    (result,) = copies.open_now(payload, kind, context="test")
    assert result.thread == here
    monkeypatch.setattr(sealing, "BRIEF_SECONDS", -1.0)
    (result,) = copies.open_now(payload, kind, context="test")
    assert result.thread == here
    assert copies.open_now(payload, kind, context="test") is OFFLOADED


@pytest.mark.parametrize("within", [list, collections.deque, collections.UserList])
async def test_code_of_an_application_is_run_in_threads_until_it_was_brief_often_enough(
    copies: PayloadCopies, monkeypatch: pytest.MonkeyPatch, within: Callable[[Any], Any]
) -> None:
    """What it waits for may be there at first, and not the next time."""

    class Lazy:
        def __deepcopy__(self, memo: object) -> Lazy:
            return self

    monkeypatch.setattr(sealing, "BRIEF_SECONDS", 1000.0)
    payload, kind = await copies.seal(within([Lazy()]), context="test")
    for _ in range(sealing._ENOUGH):
        assert copies.open_now(payload, kind, context="test") is OFFLOADED
        await copies.open(payload, kind, context="test")
    assert copies.open_now(payload, kind, context="test") is not OFFLOADED
    other, its = await copies.seal(within([Lazy()]), context="test")
    assert copies.open_now(other, its, context="test") is not OFFLOADED
    monkeypatch.setattr(sealing, "BRIEF_SECONDS", -1.0)
    copies.open_now(other, its, context="test")
    monkeypatch.setattr(sealing, "BRIEF_SECONDS", 1000.0)
    await copies.open(payload, kind, context="test")
    for one, seal_of_it in ((payload, kind), (other, its)):
        assert copies.open_now(one, seal_of_it, context="test") is OFFLOADED


def test_what_is_looked_at_to_find_code_of_an_application_is_bounded() -> None:
    assert sealing.doubtful_class([[n] for n in range(100)]) is None
    for large in ([None] * 2_000, collections.deque([None] * 2_000), [[n] for n in range(999)]):
        assert sealing.doubtful_class([large]) is not None


@pytest.mark.parametrize("value", [
    collections.deque([1]), collections.OrderedDict(a=1), collections.defaultdict(list, a=[1]),
    ipaddress.ip_network("10.0.0.0/8"), collections.Counter("abc"), array.array("i", [1]),
], ids=lambda value: type(value).__name__)  # fmt: skip
async def test_a_small_object_of_unknown_type_takes_no_thread_for_its_readers(
    copies: PayloadCopies, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    """Handing it over would cost ten times what the copy costs."""
    monkeypatch.setattr(sealing, "BRIEF_SECONDS", 1000.0)
    payload, kind = await seal(copies, {"a": value})
    result = copies.open_now(payload, kind, context="test")
    assert result == {"a": value}
    assert result["a"] is not payload["a"]


async def test_a_copier_once_sent_to_threads_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """However brief: it may block the next time, and the application knows."""
    monkeypatch.setattr(sealing, "BRIEF_SECONDS", 1000.0)
    own = PayloadCopies("builder", copier=copy.deepcopy, run_in_thread=True)
    default = PayloadCopies("builder", run_in_thread=True)
    for copies in (own, default):
        payload, kind = await seal(copies, [Foreign()])
        await unseal(copies, payload, kind)
        assert copies.open_now(payload, kind, context="test") is OFFLOADED


@pytest.mark.parametrize("copier, wanted, reads_back", [
    (None, None, True), (None, True, True), (None, False, False), (deepcopy_payload, None, True),
    (copy.deepcopy, None, False), (copy.deepcopy, True, True), (copy.deepcopy, False, False),
])  # fmt: skip
async def test_threads_are_used_as_told(copier: Any, wanted: bool | None, reads_back: bool) -> None:
    """None is automatic: for the default copier where it takes long, for another one never."""
    copies = PayloadCopies("cache", copier=copier, run_in_thread=wanted)
    assert copies.run_in_thread is reads_back
    assert copies.health().run_in_thread is reads_back
    assert copies.uses_default_copier is (copier is not copy.deepcopy)
    (payload,), kind = await seal(copies, [Foreign()])
    assert payload.thread.startswith("coalestra") is reads_back
    brief = copies.seal_now({"price": 1}, context="test")
    assert (brief is None) is (wanted is True)
    assert (await unseal(copies, [payload], kind))[0] is not payload


def test_a_custom_copier_copies_every_payload_on_the_way_in_and_out() -> None:
    """Also those that the default copier would share."""
    seen: list[Any] = []

    def copier(value: Any) -> Any:
        seen.append(value)
        return value

    assert opened(PayloadCopies("builder", copier=copier), 5) == 5
    assert seen == [5, 5]


async def test_a_component_with_a_copier_of_its_own_uses_it_for_payloads_others_sealed() -> None:
    """The cache's copier is the cache's, whoever put the payload there."""
    sealed = PayloadCopies("builder").seal_now([1], context="test")
    assert sealed is not None
    cache = PayloadCopies("cache", copier=lambda value: ("mine", value))
    assert cache.open_now(*sealed, context="test") == ("mine", [1])


ODD_ERRORS = [StopIteration, Panic, GeneratorExit, asyncio.CancelledError, StopAsyncIteration]


class Raising:
    """Raises whatever it is told to when it is copied, by one of the ways there are."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class ByDeepcopy(Raising):
    def __deepcopy__(self, memo: object) -> Any:
        raise self.error


class ByReduce(Raising):
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self.error


class ByState(Raising):
    def __getstate__(self) -> Any:
        raise self.error


class ByRegistry(Raising):
    """Its registered function does."""


def raise_that(value: Raising) -> Any:
    raise value.error


copyreg.pickle(ByRegistry, raise_that)


@pytest.mark.parametrize("run_in_thread", [None, True, False])
@pytest.mark.parametrize("way", [ByDeepcopy, ByReduce, ByState, ByRegistry, Raising])
@pytest.mark.parametrize("kind", ODD_ERRORS)
async def test_whatever_a_copy_raises_is_the_failure_of_its_payload(
    run_in_thread: bool | None, way: type[Raising], kind: type[BaseException]
) -> None:
    """Whoever raises it, and wherever: it is counted, names the type, and leaves no slot taken."""
    copier = raise_that if way is Raising else None
    copies = PayloadCopies("builder", copier=copier, run_in_thread=run_in_thread)
    error = kind("odd")
    with pytest.raises(PayloadIsolationError) as caught:
        await seal(copies, way(error), "value of feed")
    assert caught.value.__cause__ is error
    assert (caught.value.context, caught.value.value_type) == ("value of feed", way.__name__)
    assert f" for value of feed: {kind.__name__}(" in str(caught.value)
    health = copies.health()
    assert (health.started_count, health.completed_count, health.failure_count) == (1, 0, 1)
    assert copies.active == 0


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("run_in_thread", [True, False])
@pytest.mark.parametrize("waits", [True, False])
def test_what_ends_the_program_reaches_it_after_the_payload_has_failed(
    run_in_thread: bool, waits: bool, kind: type[BaseException]
) -> None:
    """Nobody is left waiting, and the loop ends as it would have; even if its reader has left."""
    copies = PayloadCopies("builder", run_in_thread=run_in_thread)
    outcomes: list[asyncio.Task[Any]] = []
    error, gate = kind(3), ThreadGate()

    class Ending:
        def __deepcopy__(self, memo: object) -> Any:
            if run_in_thread:
                gate.pass_()
            raise error

    async def main() -> None:
        copying = asyncio.ensure_future(seal(copies, Ending()))
        copying.add_done_callback(outcomes.append)
        await asyncio.sleep(0)
        if not waits:
            copying.cancel()
        gate.open()
        await asyncio.Event().wait()

    with pytest.raises(kind) as ended:
        asyncio.run(main())
    assert ended.value is error
    (outcome,) = outcomes
    if waits or not run_in_thread:
        assert isinstance(outcome.exception(), PayloadIsolationError)
    else:
        assert outcome.cancelled()
    assert copies.health().failure_count == 1
    assert copies.active == 0


def test_what_ends_the_program_ends_it_at_once_where_no_loop_runs() -> None:
    """A copy that is asked for without a loop has nobody else to tell."""
    with pytest.raises(SystemExit):
        PayloadIsolator().copy(ByDeepcopy(SystemExit(3)), context="test")


async def test_every_copy_is_counted_and_sharing_is_not(copies: PayloadCopies) -> None:
    """Health tells what copying was done, in threads or not."""
    opened(copies, 1)
    opened(copies, {"a": 1})
    await seal(copies, [Foreign()])
    health = copies.health()
    assert (health.started_count, health.completed_count, health.failure_count) == (3, 3, 0)


def test_a_closed_component_refuses_every_payload(copies: PayloadCopies) -> None:
    """Immutable ones on the way in, too, so that the answer does not hang on the payload."""
    sealed = copies.seal_now([1], context="test")
    assert sealed is not None
    copies.close()
    assert copies.closed
    for value in ([1], 1):
        with pytest.raises(PayloadCopySubsystemClosedError):
            copies.seal_now(value, context="test")
    with pytest.raises(PayloadCopySubsystemClosedError):
        copies.open_now(*sealed, context="test")


@pytest.mark.parametrize("metadata", [{}, EMPTY, FrozenDict()])
def test_empty_metadata_costs_nothing(copies: PayloadCopies, metadata: Any) -> None:
    """There is one empty mapping for all."""
    sealed = copies.seal_metadata_now(metadata, context="test")
    assert sealed is EMPTY
    assert copies.open_metadata_now(sealed, context="test") is EMPTY


def test_metadata_of_immutable_values_is_shared_once_sealed(copies: PayloadCopies) -> None:
    """A frozen dictionary of such is itself immutable."""
    given = {"published": True, "side": Side.BUY, "pair": (1, 2)}
    sealed = copies.seal_metadata_now(given, context="test")
    assert type(sealed) is FrozenDict
    assert sealed == given
    assert copies.open_metadata_now(sealed, context="test") is sealed


def test_metadata_with_mutable_values_is_copied_for_every_reader(copies: PayloadCopies) -> None:
    """Also when a reader hands it in again."""
    given: dict[str, Any] = {"rows": [1]}
    sealed = copies.seal_metadata_now(given, context="test")
    first = copies.open_metadata_now(sealed, context="test")
    again = copies.seal_metadata_now(first, context="test")
    second = copies.open_metadata_now(again, context="test")
    assert given == sealed == first == again == second
    assert type(first) is type(second) is FrozenDict
    assert len({id(each["rows"]) for each in (given, sealed, first, again, second)}) == 5


def test_metadata_that_cannot_be_copied_is_named(copies: PayloadCopies) -> None:
    """It fails like a payload, but nobody has to guess which mapping is meant."""
    with pytest.raises(PayloadIsolationError, match="while copying for metadata of payload of s"):
        copies.seal_metadata_now({"it": Stubborn()}, context="payload of s")


def test_a_seal_and_its_owner_can_be_looked_at(copies: PayloadCopies) -> None:
    """Their representations say what matters."""
    assert repr(DeepSeal()) == "<Seal deep, takes a thread>"
    assert repr(Seal.SHARED) == "<Seal shared>"
    assert "builder" in repr(copies)
    assert "active=0/4" in repr(copies)


class TestPayloadIsolator:
    """The public face for copying at once."""

    def test_the_default_copier_is_recognised_however_it_is_given(self) -> None:
        """Naming the default explicitly changes nothing."""
        assert PayloadIsolator().uses_default_copier
        assert PayloadIsolator(deepcopy_payload).uses_default_copier
        assert not PayloadIsolator(copy.deepcopy).uses_default_copier

    def test_metadata_comes_back_as_a_dictionary_of_its_own(self) -> None:
        """Even where a copier for payloads would not understand it."""
        given = FrozenDict({"rows": [1]})
        result = PayloadIsolator(lambda value: None).copy_metadata(given, context="test")
        assert result == {"rows": [1]}
        assert type(result) is dict
        assert result["rows"] is not given["rows"]

    def test_a_cloned_value_shares_nothing_and_keeps_its_version(self) -> None:
        """Only the facts that were given change."""
        value: SnapshotValue[list[int]] = SnapshotValue(
            ResourceKey("n", "a"), [1], "feed", 1.0, 2.0, 0.5, False, True, 7.0,
            metadata={"rows": [1]},
        )  # fmt: skip
        clone = PayloadIsolator().clone_snapshot_value(
            value, context="test", age_seconds=3.0, stale=True, metadata={"other": 1}
        )
        assert (clone.age_seconds, clone.stale, clone.fetched_at) == (3.0, True, 2.0)
        assert clone.metadata == {"other": 1}
        assert (clone.key, clone.version) == (value.key, value.version)
        assert clone.value == value.value
        assert clone.value is not value.value
