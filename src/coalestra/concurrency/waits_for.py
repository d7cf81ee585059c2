"""Who waits for whom: a graph that never lets a cycle in.

Every node has a level, and nobody waits for a lower one. An edge to a higher level therefore cannot
close a cycle and costs nothing to check; nor does one from a node that nobody waits for, or to one
that waits for nobody. For any other the nodes of the waiter's level are searched against the edges,
a few steps far. If that does not settle it, the target and what it waits for are raised: to the
level of the waiter, or above it if the search was broken off. As many edges as that take part in
each new level, so a node is seldom raised (Bender, Fineman, Gilbert and Tarjan, "A New Approach to
Incremental Cycle Detection and Related Problems", 2015).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

_STEPS = 100
"""How far a search goes against the edges: about the square root of how many there may be."""

N = TypeVar("N", bound=Hashable)


@dataclass(slots=True, eq=False)
class _Node(Generic[N]):
    """A node with its edges in both directions."""

    name: N
    level: int = 0
    targets: dict[_Node[N], None] = field(default_factory=dict)
    waiters: dict[_Node[N], None] = field(default_factory=dict)


class WaitsFor(Generic[N]):
    """A graph of ``waiter waits for target``, free of cycles at any time.

    It holds a node for as long as the node has an edge. An edge is there or not, however often it
    was added.
    """

    __slots__ = ("_nodes",)

    def __init__(self) -> None:
        self._nodes: dict[N, _Node[N]] = {}

    def __repr__(self) -> str:
        edges = sum(len(node.targets) for node in self._nodes.values())
        return f"<WaitsFor nodes={len(self._nodes)} edges={edges}>"

    def add(self, waiter: N, target: N) -> tuple[N, ...] | None:
        """Let `waiter` wait for `target`, unless that would close a cycle.

        Return None if the edge is in the graph now; else it is as before, and the cycle is returned
        that the edge would have closed, from `waiter` through `target` back to `waiter`.
        """
        if waiter is target or waiter == target:
            return (waiter, target)
        ahead = self._nodes.get(waiter) or self._nodes.setdefault(waiter, _Node(waiter))
        behind = self._nodes.get(target) or self._nodes.setdefault(target, _Node(target))
        if ahead.level >= behind.level:
            if not behind.targets:
                behind.level = ahead.level
            elif not ahead.waiters:
                ahead.level = behind.level
            elif (cycle := _cycle(ahead, behind)) is not None:
                return cycle
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
                del self._nodes[node.name]


def _cycle(ahead: _Node[N], behind: _Node[N]) -> tuple[N, ...] | None:
    """Raise `behind` so far that `ahead` may wait for it, or return the cycle that forbids it."""
    before, steps = {ahead: ahead}, 0  # by node who leads on to `ahead`
    line = [ahead]
    for node in line:
        steps += len(node.waiters)
        if steps > _STEPS:
            break
        for waiter in node.waiters:
            if waiter.level == ahead.level and waiter not in before:
                before[waiter] = node
                line.append(waiter)
    if behind in before:
        return (ahead.name, *_way(behind, before))
    level = ahead.level + (steps > _STEPS)
    if behind.level == level:
        return None
    after, raised = {behind: behind}, [behind]  # by node who leads back to `behind`
    for node in raised:
        for target in node.targets:
            if target in before:
                return (ahead.name, *_way(node, after)[::-1], *_way(target, before))
            if target.level < level and target not in after:
                after[target] = node
                raised.append(target)
    for node in raised:
        node.level = level
    return None


def _way(node: _Node[N], onward: dict[_Node[N], _Node[N]]) -> list[N]:
    """Return the nodes from `node` on to where the search began."""
    names = [node.name]
    while onward[node] is not node:
        node = onward[node]
        names.append(node.name)
    return names
