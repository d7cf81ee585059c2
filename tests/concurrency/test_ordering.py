"""The order under the graph: it says what a plain list would, also when labels run out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coalestra.concurrency.waits_for import Order, Spot


def labels_agree(order: Order, expected: list[Spot]) -> bool:
    labels = [spot.label for spot in expected]
    return list(order) == expected and labels == sorted(set(labels))


def move(order: Order, spots: list[Spot], place: Spot, *, after: bool) -> None:
    order.remove(*spots)
    order.put(spots, place if after else place.before)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["append", "prepend", "remove", "move_before", "move_after"]),
        st.integers(0, 99),
        st.integers(0, 99),
    ),
    max_size=60,
)


@given(STEPS)
def test_it_agrees_with_a_plain_list(steps: list[tuple[str, int, int]]) -> None:
    """After any steps, and the labels always rise."""
    order, row = Order(), list[Spot]()
    for step, first, second in steps:
        if step in ("append", "prepend") or len(row) < 2:
            spot = Spot()
            order.put([spot], order if step == "prepend" else order.before)
            row.insert(0 if step == "prepend" else len(row), spot)
        elif step == "remove":
            order.remove(row.pop(first % len(row)))
        else:
            place = row[second % len(row)]
            moved = [spot for spot in row[first % len(row) :] if spot is not place]
            row = [spot for spot in row if spot not in moved]
            at = row.index(place) + (step == "move_after")
            row[at:at] = moved
            move(order, moved, place, after=step == "move_after")
        assert labels_agree(order, row)


def test_any_number_of_spots_may_be_put_in_at_one_place() -> None:
    """The labels between two neighbours run out after some five hundred, and are renewed."""
    order, first, last = Order(), Spot(), Spot()
    order.put([first, last], order)
    row = [first, last]
    for _ in range(2_000):
        spot = Spot()
        order.put([spot], last.before)
        row.insert(-1, spot)
    assert labels_agree(order, row)


def test_a_long_run_is_moved_in_one_go() -> None:
    """Its spots share the room between two neighbours evenly."""
    order, row = Order(), [Spot() for _ in range(1_000)]
    order.put(row, order)
    move(order, row[1:-1], row[-1], after=True)
    assert labels_agree(order, [row[0], row[-1], *row[1:-1]])
    move(order, row[1:-1], row[-1], after=False)
    assert labels_agree(order, row)
