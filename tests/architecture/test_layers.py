"""Imports point downwards, never round in a circle, and what is pure stays pure."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

import pytest

from tests.architecture.source_tree import Module, modules

RANK = {
    "core": 0, "_endings": 0.25, "_lockfree": 0.5, "concurrency": 1, "observability": 1,
    "resilience": 2, "cache": 2, "orchestration": 3, "adapters": 4, "testing": 4, "sync": 4,
    "_telemetry": 4.5, "inspect": 5, "opentelemetry": 5, "redis": 5, "prometheus": 5,
}  # fmt: skip
FOREIGN_IN = {
    "opentelemetry": {"opentelemetry"},
    "prometheus": {"prometheus_client"},
    "redis": {"redis", "msgspec"},
}
FOR_TYPE_CHECKERS = {"typing_extensions"}  # which each of them brings along
FORBIDDEN_NAMES = {
    "utils", "util", "helpers", "helper", "common", "base", "misc", "manager", "handler", "wrapper",
}  # fmt: skip
FORBIDDEN_IN_CORE = {"asyncio", "threading", "concurrent", "_thread", "queue", "multiprocessing"}


def test_the_library_is_where_it_is_looked_for() -> None:
    assert {module.layer for module in modules()} >= set(RANK) - {"testing"}


def test_every_part_of_the_library_has_a_place_in_the_layer_order() -> None:
    unknown = {module.where for module in modules() if module.layer not in {"", *RANK}}
    assert not unknown


def test_a_module_imports_only_lower_layers_or_its_own() -> None:
    upward = [
        f"{module.where}:{line} imports {name}"
        for module in modules()
        if module.layer
        for line, name, taken in module.imports
        for layer in imported_layers(name, taken)
        if layer != module.layer and RANK.get(layer, 99) >= RANK[module.layer]
    ]
    assert not upward


def imported_layers(name: str, taken: str) -> list[str]:
    """The layers that an import reaches; the version of the package is in none."""
    package, _, layer = f"{name}.{taken}".rstrip(".").partition(".")
    layer = layer.partition(".")[0]
    return [layer] if package == "coalestra" and layer != "__version__" else []


def test_every_import_is_absolute() -> None:
    relative = [
        f"{module.where}:{line} imports {name}"
        for module in modules()
        for line, name, _ in module.imports
        if name.startswith(".")
    ]
    assert not relative


def test_the_library_needs_nothing_but_the_standard_library() -> None:
    """An extra may need its own, in its own layer, on which nothing else stands."""
    foreign = [
        f"{module.where}:{line} imports {name}"
        for module in modules()
        for line, name, _ in module.imports
        if name.split(".")[0] not in {"coalestra", *sys.stdlib_module_names}
        if name.split(".")[0] not in FOREIGN_IN.get(module.layer, set())
        if name not in FOR_TYPE_CHECKERS or line not in module.for_types_only
    ]
    assert not foreign


def test_the_core_knows_neither_event_loops_nor_threads() -> None:
    impure = [
        f"{module.where}:{line} imports {name}"
        for module in modules()
        if module.layer == "core"
        for line, name, _ in module.imports
        if name.split(".")[0] in FORBIDDEN_IN_CORE
    ]
    assert not impure


def test_no_modules_import_each_other_in_a_circle() -> None:
    """What is imported to name a type does not count: it is not done when the program runs."""
    known = {module.name for module in modules()}
    graph = {
        module.name: {
            target
            for line, name, taken in module.imports
            if line not in module.for_types_only
            for target in ({f"{name}.{taken}"} & known or {name} & known)
            if target != module.name
        }
        for module in modules()
    }
    assert circle_in(graph) == []


def test_a_file_is_named_after_what_is_in_it() -> None:
    vague = [module.where for module in modules() if FORBIDDEN_NAMES & words_of(module)]
    assert not vague


def words_of(module: Module) -> set[str]:
    """The words of the file's name and of its folder's."""
    stems = module.where.removesuffix(".py").split("/")
    return {word for stem in stems for word in [stem, *stem.split("_")]}


def circle_in(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """One circle of the graph as a path that ends where it begins; empty if there is none."""
    done: set[str] = set()
    for start in sorted(graph):
        path: list[str] = []
        rest = [iter([start])]
        while rest:
            step = next(rest[-1], None)
            if step is None:
                rest.pop()
                if path:
                    done.add(path.pop())
            elif step in path:
                return [*path[path.index(step) :], step]
            elif step not in done:
                path.append(step)
                rest.append(iter(sorted(graph.get(step, ()))))
    return []


@pytest.mark.parametrize("graph,circle", [
    ({}, []), ({"a": ["b", "c"], "b": ["c"], "c": []}, []),
    ({"a": ["b"], "b": ["c"], "c": ["b"]}, ["b", "c", "b"]), ({"a": [], "b": ["b"]}, ["b", "b"]),
])  # fmt: skip
def test_a_circle_is_found_where_one_is(graph: dict[str, list[str]], circle: list[str]) -> None:
    assert circle_in(graph) == circle
