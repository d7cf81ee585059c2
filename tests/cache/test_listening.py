"""Listeners are heard in order, held weakly, and told everything."""

from __future__ import annotations

from coalestra.cache.store import Listeners
from tests.contracts.samples import A, B, Witness, revision_of


def test_every_kind_of_news_reaches_every_listener() -> None:
    listeners = Listeners()
    one, two = Witness(), Witness()
    listeners.subscribe(one)
    listeners.subscribe(two)
    revision = revision_of(A)
    listeners.tell(lambda each: each.announced([A]))
    listeners.tell(lambda each: each.revised({A: revision}))
    listeners.tell(lambda each: each.concluded([A]))
    listeners.tell(lambda each: each.invalidating({A: None, B: None}))
    listeners.tell(lambda each: each.invalidating_where(lambda key: key == B))
    assert one.heard == two.heard
    assert [what for what, *_ in one.heard] == [
        "announced",
        "revised",
        "concluded",
        "invalidating",
        "invalidating_where",
    ]


def test_the_one_who_tells_of_a_revision_is_not_told() -> None:
    listeners = Listeners()
    teller, other = Witness(), Witness()
    listeners.subscribe(teller)
    listeners.subscribe(other)
    listeners.tell(lambda each: each.revised({A: None}), teller)
    assert (teller.heard, other.heard) == ([], [("revised", A, None)])


def test_a_listener_is_not_kept_alive() -> None:
    listeners = Listeners()
    listeners.subscribe(Witness())
    assert listeners.references == ()
    assert repr(listeners) == "Listeners(0)"


def test_unsubscribing_a_stranger_does_nothing() -> None:
    listeners = Listeners()
    known = Witness()
    listeners.subscribe(known)
    listeners.unsubscribe(Witness())
    listeners.tell(lambda each: each.revised({A: None}))
    assert known.heard == [("revised", A, None)]


def test_listeners_can_listen_to_listeners() -> None:
    outer, inner = Listeners(), Listeners()
    witness = Witness()
    inner.subscribe(witness)
    outer.subscribe(inner)
    outer.tell(lambda each: each.revised({A: None}))
    assert witness.heard == [("revised", A, None)]
