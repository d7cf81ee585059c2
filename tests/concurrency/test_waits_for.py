"""The graph of who waits for whom: it agrees with a naive search, and stays fast."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable
from itertools import pairwise
from typing import TypeVar
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coalestra.concurrency import waits_for
from coalestra.concurrency.waits_for import WaitsFor
from tests.support.examples import times
from tests.support.running import profiled

N = TypeVar("N", bound=Hashable)


class NaiveGraph:
    """The same by searching the whole graph each time."""

    def __init__(self) -> None:
        self.edges: set[tuple[int, int]] = set()

    def reaches(self, start: int, goal: int) -> bool:
        seen, stack = {start}, [start]
        while stack:
            node = stack.pop()
            if node == goal:
                return True
            following = {target for waiter, target in self.edges if waiter == node} - seen
            seen |= following
            stack.extend(following)
        return False

    def add(self, waiter: int, target: int) -> bool:
        if self.reaches(target, waiter):
            return False
        self.edges.add((waiter, target))
        return True


def edges_of(graph: WaitsFor[N]) -> tuple[tuple[N, N], ...]:
    nodes = graph._nodes.values()
    return tuple((node.name, target.name) for node in nodes for target in node.targets)


NODES = st.integers(0, 9)
STEPS = st.lists(st.one_of(
    st.tuples(st.just("add"), NODES, NODES), st.tuples(st.just("add"), NODES, NODES),
    st.tuples(st.just("remove"), NODES, NODES), st.tuples(st.just("discard"), NODES, NODES),
), max_size=80)  # fmt: skip


@pytest.mark.parametrize("searched", [0, 2, 100])
@times(5)
@given(STEPS)
def test_it_agrees_with_a_naive_search(searched: int, steps: list[tuple[str, int, int]]) -> None:
    """Same edges, same refusals, and every reported cycle is one, wherever a search breaks off."""
    with mock.patch.object(waits_for, "_STEPS", searched):
        compare_with_a_naive_graph(steps)


def compare_with_a_naive_graph(steps: list[tuple[str, int, int]]) -> None:
    graph: WaitsFor[int] = WaitsFor()
    naive = NaiveGraph()
    for step, waiter, target in steps:
        if step == "add":
            cycle = graph.add(waiter, target)
            assert (cycle is None) == naive.add(waiter, target)
            if cycle is not None:
                assert cycle[0] == cycle[-1] == waiter
                assert cycle[1] == target
                assert len(set(cycle)) == len(cycle) - 1
                assert set(pairwise(cycle)) <= naive.edges | {(waiter, target)}
        elif step == "remove":
            graph.remove(waiter, target)
            naive.edges.discard((waiter, target))
        else:
            graph.discard(waiter)
            naive.edges = {edge for edge in naive.edges if waiter not in edge}
        assert set(edges_of(graph)) == naive.edges
        assert len(graph._nodes) == len({node for edge in naive.edges for node in edge})


def test_nodes_without_edges_are_forgotten() -> None:
    """State is held for present waits only."""
    graph: WaitsFor[str] = WaitsFor()
    for waiter, target in [("a", "b"), ("a", "c"), ("b", "c")]:
        graph.add(waiter, target)
    graph.discard("a")
    assert "a" not in graph._nodes
    assert edges_of(graph) == (("b", "c"),)
    graph.remove("b", "c")
    graph.remove("b", "c")
    graph.discard("unknown")
    assert len(graph._nodes) == 0
    assert repr(graph) == "<WaitsFor nodes=0 edges=0>"


# Work, counted in calls of Python functions rather than in seconds ------------------------------


def calls_in(work: Callable[[], object]) -> int:
    """Count the Python functions that are entered while `work` runs."""
    return profiled(work)["call"]


def add_all(graph: WaitsFor[Hashable], edges: Iterable[tuple[Hashable, Hashable]]) -> None:
    for waiter, target in edges:
        assert graph.add(waiter, target) is None


def chain_of(nodes: Iterable[Hashable]) -> list[tuple[Hashable, Hashable]]:
    return list(pairwise(nodes))


@pytest.mark.parametrize("order", [1, -1], ids=["from the top", "from the bottom"])
def test_a_chain_of_ten_thousand_is_built_checked_and_dropped_in_linear_work(order: int) -> None:
    """Deeper than any stack, in whichever direction it grows."""
    graph: WaitsFor[Hashable] = WaitsFor()
    length = 10_000
    edges = chain_of(range(length))[::order]
    assert calls_in(lambda: add_all(graph, edges)) < 20 * length
    cycle = graph.add(length - 1, 0)
    assert cycle is not None
    assert len(cycle) == length + 1

    def discard_all() -> None:
        for node in range(length):
            graph.discard(node)

    assert calls_in(discard_all) < 20 * length
    assert len(graph._nodes) == 0


def test_many_who_join_one_in_the_middle_of_a_chain_cost_little_each() -> None:
    """New waiters, each with somebody who waits for it, join a node that itself waits."""
    graph: WaitsFor[Hashable] = WaitsFor()
    add_all(graph, chain_of(range(5_000)))
    joins: list[tuple[Hashable, Hashable]] = []
    for number in range(5_000):
        joins += [(("reader", number), ("derived", number)), (("derived", number), 2_500)]
    assert calls_in(lambda: add_all(graph, joins)) < 60 * len(joins)


def test_a_second_build_may_lean_on_every_node_of_a_deep_first_one() -> None:
    """Node by node each new edge runs against the order; none may cost a walk along the chain."""
    graph: WaitsFor[Hashable] = WaitsFor()
    length = 5_000
    add_all(graph, chain_of(range(length)))
    leaning: list[tuple[Hashable, Hashable]] = []
    for number in range(length - 1):
        leaning.append((("new", number), ("new", number + 1)))
        leaning.append((("new", number), number))
    assert calls_in(lambda: add_all(graph, leaning)) < 60 * len(leaning)


@pytest.mark.slow
def test_a_layered_graph_in_any_order_of_its_edges_stays_far_from_quadratic() -> None:
    """Five thousand nodes, twenty-five thousand edges, shuffled."""
    graph: WaitsFor[Hashable] = WaitsFor()
    rng = random.Random(1)
    edges = [
        ((layer, place), (layer + 1, rng.randrange(100)))
        for layer in range(49)
        for place in range(100)
        for _ in range(5)
    ]
    rng.shuffle(edges)
    assert calls_in(lambda: add_all(graph, edges)) < 150 * len(edges)
