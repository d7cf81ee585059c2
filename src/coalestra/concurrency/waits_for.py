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
from operator import attrgetter
from typing import Generic, TypeVar

_GAP = 1 << 512
"""Between the labels of neighbours: 512 insertions at one spot use it up, and all are renewed."""

N = TypeVar("N", bound=Hashable)


class Spot:
    """A place in an `Order`: the greater the label, the further back."""

    __slots__ = ("after", "before", "label")

    def __init__(self) -> None:
        self.label: int = 0
        self.before: Spot = self
        self.after: Spot = self


class Order(Spot):
    """A line of spots, closed to a ring by itself: the end of the line is also before its start."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Spot]:
        spot = self.after
        while spot is not self:
            yield spot
            spot = spot.after

    def remove(self, *spots: Spot) -> None:
        """Take spots out."""
        for spot in spots:
            spot.before.after, spot.after.before = spot.after, spot.before

    def put(self, spots: Sequence[Spot], left: Spot) -> None:
        """Put spots that stand nowhere right after another one, or the order: that is in front."""
        right = left.after
        if right is self:
            label, step = (0 if left is self else left.label + _GAP), _GAP
        elif left is self:
            label, step = right.label - _GAP * len(spots), _GAP
        else:
            step = (right.label - left.label) // (len(spots) + 1)
            label = left.label + step
        for spot in spots:
            left.after, spot.before, spot.label = spot, left, label
            label += step
            left = spot
        left.after, right.before = right, left
        if not step:
            for number, spot in enumerate(self):
                spot.label = number * _GAP


class _Node(Spot, Generic[N]):
    """A node, its edges and its place in the order."""

    __slots__ = ("name", "targets", "waiters")

    def __init__(self, name: N) -> None:
        super().__init__()
        self.name = name
        self.targets: dict[_Node[N], None] = {}
        self.waiters: dict[_Node[N], None] = {}


class WaitsFor(Generic[N]):
    """A graph of ``waiter waits for target``, free of cycles at any time.

    It holds a node for as long as the node has an edge. An edge is there or not, however often it
    was added.
    """

    __slots__ = ("_nodes", "_order")

    def __init__(self) -> None:
        self._nodes: dict[N, _Node[N]] = {}
        self._order = Order()

    def __len__(self) -> int:
        """Count the nodes that wait or are waited for."""
        return len(self._nodes)

    def __contains__(self, node: object) -> bool:
        return node in self._nodes

    def __repr__(self) -> str:
        edges = sum(len(node.targets) for node in self._nodes.values())
        return f"<WaitsFor nodes={len(self._nodes)} edges={edges}>"

    def add(self, waiter: N, target: N) -> tuple[N, ...] | None:
        """Let `waiter` wait for `target`, unless that would close a cycle.

        Returns:
            None if the edge is in the graph now; else the cycle it would have closed, from
            `waiter` through `target` back to `waiter`, and the graph is as before.
        """
        if waiter is target or waiter == target:
            return (waiter, target)
        ahead, behind = self._nodes.get(waiter), self._nodes.get(target)
        if ahead is not None and behind is not None:
            if ahead.label > behind.label:
                cycle = self._reorder(ahead, behind)
                if cycle is not None:
                    return cycle
        else:
            # A new target goes to the very back, a new waiter to the very front: nothing to check.
            if behind is None:
                behind = self._nodes[target] = _Node(target)
                self._order.put((behind,), self._order.before)
            if ahead is None:
                ahead = self._nodes[waiter] = _Node(waiter)
                self._order.put((ahead,), self._order)
        ahead.targets[behind] = None
        behind.waiters[ahead] = None
        return None

    def remove(self, waiter: N, target: N) -> None:
        """Let `waiter` no longer wait for `target`; nothing happens if it did not."""
        ahead, behind = self._nodes.get(waiter), self._nodes.get(target)
        if ahead is not None and behind is not None and behind in ahead.targets:
            self._cut(ahead, behind)

    def discard(self, node: N) -> None:
        """Forget a node and all its edges; nothing happens if it is not there."""
        known = self._nodes.get(node)
        if known is not None:
            for target in tuple(known.targets):
                self._cut(known, target)
            for waiter in tuple(known.waiters):
                self._cut(waiter, known)

    def _cut(self, ahead: _Node[N], behind: _Node[N]) -> None:
        """Remove an edge, and of its nodes those that have no other."""
        del ahead.targets[behind], behind.waiters[ahead]
        for node in (ahead, behind):
            if not node.targets and not node.waiters:
                self._order.remove(node)
                del self._nodes[node.name]

    def _reorder(self, waiter: _Node[N], target: _Node[N]) -> tuple[N, ...] | None:
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
            moved = forward.visited()
        else:
            leading = [node for node in backward.visited() if node.label > low.label]
            moved = leading + [node for node in forward.visited() if node.label < low.label]
        self._order.remove(*moved)
        self._order.put(moved, waiter if low is None else low.before)
        return None


class _Search(Generic[N]):
    """One direction of the search, nearest first and an edge at a time.

    `direction` is 1 along the edges, -1 against them; `limit` is the label beyond which nothing
    can lie on a cycle.
    """

    __slots__ = ("_direction", "_limit", "_live", "came_from")

    def __init__(self, start: _Node[N], direction: int, limit: int) -> None:
        self._direction = direction
        self._limit = limit * direction
        self.came_from: dict[_Node[N], _Node[N]] = {}
        self._live: list[tuple[int, _Node[N], Iterator[_Node[N]], int]] = []
        self._visit(start, start)

    def _visit(self, node: _Node[N], came_from: _Node[N]) -> None:
        self.came_from[node] = came_from
        edges = node.targets if self._direction > 0 else node.waiters
        if edges:
            entry = (node.label * self._direction, node, iter(edges), len(edges))
            heapq.heappush(self._live, entry)

    def nearest(self) -> _Node[N] | None:
        """Return the visited node nearest to the start that has edges left to look at."""
        return self._live[0][1] if self._live else None

    def step(self, node: _Node[N], other: _Search[N]) -> _Node[N] | None:
        """Look at one more edge of the nearest node; return where that met the other search."""
        place, _, edges, left = self._live[0]
        neighbour = next(edges)
        if left == 1:
            heapq.heappop(self._live)
        else:
            self._live[0] = (place, node, edges, left - 1)
        if neighbour not in self.came_from and neighbour.label * self._direction <= self._limit:
            self._visit(neighbour, node)
            if neighbour in other.came_from:
                return neighbour
        return None

    def visited(self) -> list[_Node[N]]:
        """Return every visited node, from the front of the order to the back."""
        return sorted(self.came_from, key=attrgetter("label"))

    def way(self, node: _Node[N]) -> list[N]:
        """Return the nodes from `node` back to where the search began."""
        nodes = [node.name]
        while self.came_from[node] is not node:
            node = self.came_from[node]
            nodes.append(node.name)
        return nodes


def _cycle(met: _Node[N], backward: _Search[N], forward: _Search[N]) -> tuple[N, ...]:
    """Join both ways where they met: waiter, target ... met ... waiter."""
    from_target, to_waiter = forward.way(met)[::-1], backward.way(met)
    return (to_waiter[-1], *from_target, *to_waiter[1:])
