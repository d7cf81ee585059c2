"""Who waits for whom: a graph that never lets a cycle in.

All nodes stand in one total order in which each waiter comes before what it waits for. An edge that
agrees with the order cannot close a cycle and costs nothing to check. One that does not is
searched for a cycle from both ends at once, only between the two places, and only until the
searches meet in the order; what they have visited moves there (the two-way compatible search of
Haeupler, Kavitha, Mathew, Sen and Tarjan, "Incremental cycle detection, topological ordering, and
strong component maintenance", 2012). Over many edges that comes to about the square root of
their number for each, and for the usual edge, of a new node, to nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

# A total order that can be inserted into anywhere; to compare two places is to compare numbers ----


_GAP = 1 << 512
"""Between neighbours. It takes 512 insertions at one spot to use it up and renumber everything."""


class Spot:
    """A place in an `Order`: the greater the label, the further back."""

    __slots__ = ("_after", "_before", "label")

    def __init__(self) -> None:
        self.label: int = 0
        self._before: Spot = self
        self._after: Spot = self

    @property
    def before(self) -> Spot:
        """The next spot to the front; the `Order` itself at its front."""
        return self._before

    @property
    def after(self) -> Spot:
        """The next spot to the back; the `Order` itself at its back."""
        return self._after

    def link(self, after: Spot) -> None:
        """Make `after` the neighbour that follows."""
        self._after = after
        after._before = self


class Order(Spot):
    """A line of spots, closed to a ring by itself: the end of the line is also before its start."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Spot]:
        spot = self.after
        while spot is not self:
            yield spot
            spot = spot.after

    def append(self, spot: Spot) -> None:
        """Put a spot that stands nowhere at the back."""
        self._insert((spot,), self.before)

    def prepend(self, spot: Spot) -> None:
        """Put a spot that stands nowhere at the front."""
        self._insert((spot,), self)

    def remove(self, spot: Spot) -> None:
        """Take a spot out."""
        spot.before.link(spot.after)

    def move_before(self, spots: Sequence[Spot], place: Spot) -> None:
        """Put spots, in the given order, right before another that is not among them."""
        for spot in spots:
            self.remove(spot)
        self._insert(spots, place.before)

    def move_after(self, spots: Sequence[Spot], place: Spot) -> None:
        """Put spots, in the given order, right after another that is not among them."""
        for spot in spots:
            self.remove(spot)
        self._insert(spots, place)

    def _insert(self, spots: Sequence[Spot], left: Spot) -> None:
        if not spots:
            return
        right = left.after
        first, step = self._labels_between(left, right, len(spots))
        for spot in spots:
            left.link(spot)
            spot.label = first
            first += step
            left = spot
        left.link(right)
        if not step:
            self._renumber()

    def _labels_between(self, left: Spot, right: Spot, count: int) -> tuple[int, int]:
        """Return the first label and the step for new spots; step 0 means there is no room."""
        if right is self:
            return (0 if left is self else left.label + _GAP), _GAP
        if left is self:
            return right.label - _GAP * count, _GAP
        step = (right.label - left.label) // (count + 1)
        return left.label + step, step

    def _renumber(self) -> None:
        for number, spot in enumerate(self):
            spot.label = number * _GAP


# Who waits for whom: a graph that never lets a cycle in ------------------------------------------


N = TypeVar("N", bound=Hashable)


class WaitsFor(Generic[N]):
    """A graph of ``waiter waits for target``, free of cycles at any time.

    It holds a node for as long as the node has an edge. An edge is there or not, however often it
    was added.
    """

    __slots__ = ("_order", "_seats")

    def __init__(self) -> None:
        self._seats: dict[N, _Seat[N]] = {}
        self._order = Order()

    def __len__(self) -> int:
        """Count the nodes that wait or are waited for."""
        return len(self._seats)

    def __contains__(self, node: object) -> bool:
        return node in self._seats

    def __repr__(self) -> str:
        edges = sum(len(seat.targets) for seat in self._seats.values())
        return f"<WaitsFor nodes={len(self._seats)} edges={edges}>"

    def edges(self) -> tuple[tuple[N, N], ...]:
        """Return every (waiter, target) there is."""
        seats = self._seats.values()
        return tuple((seat.node, target.node) for seat in seats for target in seat.targets)

    def add(self, waiter: N, target: N) -> tuple[N, ...] | None:
        """Let `waiter` wait for `target`, unless that would close a cycle.

        Returns:
            None if the edge is in the graph now; else the cycle it would have closed, from
            `waiter` through `target` back to `waiter`, and the graph is as before.
        """
        if waiter is target or waiter == target:
            return (waiter, target)
        ahead, behind = self._seats.get(waiter), self._seats.get(target)
        if ahead is not None and behind is not None:
            if ahead.label > behind.label:
                cycle = self._reorder(ahead, behind)
                if cycle is not None:
                    return cycle
        else:
            # A new target goes to the very back, a new waiter to the very front: nothing to check.
            if behind is None:
                behind = self._seats[target] = _Seat(target)
                self._order.append(behind)
            if ahead is None:
                ahead = self._seats[waiter] = _Seat(waiter)
                self._order.prepend(ahead)
        ahead.targets[behind] = None
        behind.waiters[ahead] = None
        return None

    def remove(self, waiter: N, target: N) -> None:
        """Let `waiter` no longer wait for `target`; nothing happens if it did not."""
        ahead, behind = self._seats.get(waiter), self._seats.get(target)
        if ahead is not None and behind is not None and behind in ahead.targets:
            del ahead.targets[behind]
            del behind.waiters[ahead]
            self._drop_if_bare(ahead)
            self._drop_if_bare(behind)

    def discard(self, node: N) -> None:
        """Forget a node and all its edges; nothing happens if it is not there."""
        seat = self._seats.get(node)
        if seat is None:
            return
        for target in seat.targets:
            del target.waiters[seat]
            self._drop_if_bare(target)
        for waiter in seat.waiters:
            del waiter.targets[seat]
            self._drop_if_bare(waiter)
        seat.targets.clear()
        seat.waiters.clear()
        self._drop_if_bare(seat)

    def _drop_if_bare(self, seat: _Seat[N]) -> None:
        if not seat.targets and not seat.waiters:
            self._order.remove(seat)
            del self._seats[seat.node]

    def _reorder(self, waiter: _Seat[N], target: _Seat[N]) -> tuple[N, ...] | None:
        """Make waiter stand before target, or return the cycle that forbids it."""
        forward, backward = _Search(target, 1, waiter.label), _Search(waiter, -1, target.label)
        while True:
            low, high = forward.nearest(), backward.nearest()
            if low is None or high is None or low.label > high.label:
                break
            met = forward.step(low, backward) or backward.step(high, forward)
            if met is not None:
                return _cycle(met, backward, forward)
        if low is None:
            self._order.move_after(forward.visited(), waiter)
        else:
            leading = [seat for seat in backward.visited() if seat.label > low.label]
            trailing = [seat for seat in forward.visited() if seat.label < low.label]
            self._order.move_before(leading + trailing, low)
        return None


class _Seat(Spot, Generic[N]):
    """A node, its edges and its place in the order."""

    __slots__ = ("node", "targets", "waiters")

    def __init__(self, node: N) -> None:
        super().__init__()
        self.node = node
        self.targets: dict[_Seat[N], None] = {}
        self.waiters: dict[_Seat[N], None] = {}


class _Search(Generic[N]):
    """One direction of the search, nearest first and an edge at a time.

    `direction` is 1 along the edges, -1 against them; `limit` is the label beyond which nothing
    can lie on a cycle.
    """

    __slots__ = ("_direction", "_limit", "_live", "came_from")

    def __init__(self, start: _Seat[N], direction: int, limit: int) -> None:
        self._direction = direction
        self._limit = limit * direction
        self.came_from: dict[_Seat[N], _Seat[N]] = {}
        self._live: list[tuple[int, _Seat[N], Iterator[_Seat[N]], int]] = []
        self._visit(start, start)

    def _visit(self, seat: _Seat[N], came_from: _Seat[N]) -> None:
        self.came_from[seat] = came_from
        edges = seat.targets if self._direction > 0 else seat.waiters
        if edges:
            entry = (seat.label * self._direction, seat, iter(edges), len(edges))
            heapq.heappush(self._live, entry)

    def nearest(self) -> _Seat[N] | None:
        """Return the visited seat nearest to the start that has edges left to look at."""
        return self._live[0][1] if self._live else None

    def step(self, seat: _Seat[N], other: _Search[N]) -> _Seat[N] | None:
        """Look at one more edge of the nearest seat; return where that met the other search."""
        place, _, edges, left = self._live[0]
        neighbour = next(edges)
        if left == 1:
            heapq.heappop(self._live)
        else:
            self._live[0] = (place, seat, edges, left - 1)
        if neighbour not in self.came_from and neighbour.label * self._direction <= self._limit:
            self._visit(neighbour, seat)
            if neighbour in other.came_from:
                return neighbour
        return None

    def visited(self) -> list[_Seat[N]]:
        """Return every visited seat, from the front of the order to the back."""
        return sorted(self.came_from, key=_label)

    def way(self, seat: _Seat[N]) -> list[N]:
        """Return the nodes from `seat` back to where the search began."""
        nodes = [seat.node]
        while self.came_from[seat] is not seat:
            seat = self.came_from[seat]
            nodes.append(seat.node)
        return nodes


def _label(seat: Spot) -> int:
    return seat.label


def _cycle(met: _Seat[N], backward: _Search[N], forward: _Search[N]) -> tuple[N, ...]:
    """Join both ways where they met: waiter, target ... met ... waiter."""
    from_target, to_waiter = forward.way(met)[::-1], backward.way(met)
    return (to_waiter[-1], *from_target, *to_waiter[1:])
