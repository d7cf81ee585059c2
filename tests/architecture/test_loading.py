"""What importing the library loads, and that this makes no difference to whoever uses it."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints, is_typeddict

import pytest

import coalestra
from tests.architecture.source_tree import PACKAGE, Function, Module, modules
from tests.architecture.test_layers import RANK
from tests.support import PUBLIC

PACKAGES = [Module(path).name for path in sorted(PACKAGE.rglob("__init__.py"))]
ASYNC_BUILD = """
import asyncio
from coalestra import CallableSource, ResourceKey, SnapshotBuilder

async def fetch(key, context):
    return 1

async def main():
    source = CallableSource(name="s", priority=1, supports=lambda key: True, fetcher=fetch)
    key = ResourceKey("a", "b")
    async with SnapshotBuilder([source]) as builder:
        for _ in range(2):
            assert (await builder.build([key]))[key].value == 1

asyncio.run(main())
"""

AFRESH = """
for each in [name for name in sys.modules if name.partition(".")[0] == "coalestra"]:
    del sys.modules[each]
"""

# Where a module may be loaded later than with its user, since not every program gets there. Never
# for each key, and never where an error is on its way.
LOADED_LATE = {"resilience.py delay_for_attempt": {"random"}}


def loaded_by(program: str) -> set[str]:
    """The modules of the library, and `random`, that a new interpreter has after a program."""
    shown = "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", preamble() + program + shown],
        check=True,
        capture_output=True,
        text=True,
    )
    names = json.loads(done.stdout.splitlines()[-1])
    return {name for name in names if name.split(".")[0] in {"coalestra", "random"}}


def preamble() -> str:
    return f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"


# What is loaded ------------------------------------------------------------------------------


def test_importing_the_package_alone_loads_nothing_of_what_it_exports() -> None:
    """``import coalestra`` costs about as much as a module that is empty."""
    assert loaded_by("import coalestra") == {"coalestra"}


def test_building_and_closing_load_nothing_that_making_a_builder_did_not() -> None:
    """No build waits for a module; all of them are there once the names are imported."""
    names = ASYNC_BUILD.split("async def fetch")[0]
    assert loaded_by(ASYNC_BUILD) == loaded_by(names)


def test_modules_are_loaded_late_in_known_places_only() -> None:
    """An import within a function is a decision, written down in the list above."""
    found: dict[str, set[str]] = {}
    for module in modules():
        lines = [line for line, _, _ in module.imports]
        for function in module.definitions():
            within = range(function.lineno, (function.end_lineno or 0) + 1)
            if isinstance(function, Function) and any(line in within for line in lines):
                late = {
                    name
                    for node in ast.walk(function)
                    if isinstance(node, ast.Import | ast.ImportFrom)
                    for name in imported(node)
                }
                if late:
                    found[f"{module.where} {function.name}"] = late
    assert found == LOADED_LATE


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The modules that an import statement names."""
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]


def test_without_its_packages_an_extra_says_what_to_install() -> None:
    program = ""
    for extra, missing, needs in (
        ("opentelemetry", "opentelemetry", "the package opentelemetry-api"),
        ("prometheus", "prometheus_client", "the package prometheus_client"),
        ("redis", "redis", "the packages redis and msgspec"),
        ("redis", "msgspec", "the packages redis and msgspec"),
    ):
        program += (
            f"sys.modules[{missing!r}] = text = None\n"
            "import coalestra; coalestra.SnapshotBuilder\n"
            f"try: import coalestra.{extra}\nexcept ImportError as error: text = str(error)\n"
            f"assert text.startswith('coalestra.{extra} must have {needs}, which cannot '), text\n"
            f"assert \"'.[{extra}]'\" in text, text\n"
            f"{AFRESH}del sys.modules[{missing!r}]\n"
        )
    loaded_by(program)


# Names ---------------------------------------------------------------------------------------


def test_every_name_that_a_package_exports_is_there_though_nothing_is_loaded() -> None:
    """Whichever name is asked for first, it resolves, and `dir` has listed it before."""
    program = ""
    for name in PACKAGES:
        program += (
            f"import {name} as package\n"
            f"assert set(package.__all__) <= set(dir(package)), '{name}: dir'\n"
            "missing = [name for name in reversed(package.__all__) if not hasattr(package, name)]\n"
            f"assert not missing, ('{name}', missing)\n"
            "namespace = {}\n"
            f"exec('from {name} import *', namespace)\n"
            f"assert set(package.__all__) <= set(namespace), '{name}: star'\n{AFRESH}"
        )
    loaded_by(program)


def test_type_checkers_look_into_the_parts_that_programs_look_into() -> None:
    """They import all of each part, of which ``__all__`` says what is exported."""
    seen = set()
    for node in ast.walk(Module(Path(str(coalestra.__file__))).tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for each in node.body:
                assert isinstance(each, ast.ImportFrom)
                assert [alias.name for alias in each.names] == ["*"]
                seen.add(each.module)
    homes = {module.name for module in modules() if module.layer in RANK} & seen
    assert homes == seen
    offered = {
        name: home for home in seen if home for name in importlib.import_module(home).__all__
    }
    assert [name for name in PUBLIC if name not in {"__version__", *offered}] == []


@pytest.mark.parametrize("missing", ["nothing_like_it", "_private", "__wrapped__"])
def test_an_unknown_attribute_gives_the_ordinary_error(missing: str) -> None:
    """The error is the one that any module raises, text and facts."""
    with pytest.raises(AttributeError) as ordinary:
        getattr(ModuleType("coalestra"), missing)
    with pytest.raises(AttributeError) as raised:
        getattr(coalestra, missing)
    assert str(raised.value) == str(ordinary.value)
    assert (raised.value.name, raised.value.obj) == (missing, coalestra)


def test_no_package_exports_a_name_that_one_of_its_modules_has() -> None:
    """Else whoever imports the module first would put it in the place of the object."""
    known = {module.name for module in modules()}
    doubled = [
        f"{name}.{each}"
        for name in PACKAGES
        for each in importlib.import_module(name).__all__
        if f"{name}.{each}" in known
    ]
    assert doubled == []


def test_every_name_of_the_package_is_exported_by_one_of_its_parts() -> None:
    """It is looked for there, from the lowest layer upwards, and the first one counts."""
    parts = [importlib.import_module(f"coalestra.{part}") for part in RANK if part != "testing"]
    homes = {
        name: {id(getattr(part, name)) for part in parts if name in getattr(part, "__all__", ())}
        for name in PUBLIC
        if name != "__version__"
    }
    assert {name: where for name, where in homes.items() if len(where) != 1} == {}


MOVED = {
    "cache": ("CacheStats", "PublishResult", "PublishStatus", "ResourceUpdate"),
    "core": ("PayloadCopier", "PayloadIsolator", "deepcopy_payload"),
    "orchestration": ("PolicyResolver",),
}


def test_a_name_is_also_found_where_it_once_was() -> None:
    """Applications of 0.6 import it from there; it is the very same object."""
    program = ""
    for home, names in MOVED.items():
        program += f"import coalestra.{home}\n"
        program += "".join(f"assert coalestra.{home}.{n} is coalestra.{n}\n" for n in names)
        program += f"from coalestra.{home} import {', '.join(names)}\n"
    loaded_by(program)


def test_submodules_are_attributes_without_an_import_of_their_own() -> None:
    """``import coalestra`` alone still leads to ``coalestra.core.errors``."""
    loaded = loaded_by("import coalestra; coalestra.core.errors.CoalestraError")
    assert "coalestra.core.errors" in loaded


# Annotations ---------------------------------------------------------------------------------


def public_classes() -> dict[str, type[Any]]:
    found = {name: getattr(coalestra, name) for name in PUBLIC}
    return {name: each for name, each in found.items() if inspect.isclass(each)}


def is_protocol(each: type[Any]) -> bool:
    return bool(getattr(each, "_is_protocol", False))


def test_the_attributes_of_every_public_class_have_types_at_runtime() -> None:
    """Libraries that read annotations find every name in them."""
    for name, each in public_classes().items():
        hints = get_type_hints(each)
        if dataclasses.is_dataclass(each):
            assert {field.name for field in dataclasses.fields(each)} <= hints.keys(), name
        assert hints or not is_typeddict(each), name


def test_the_methods_of_every_protocol_have_types_at_runtime() -> None:
    """Whoever implements one may ask it what is expected."""
    protocols = [each for each in public_classes().values() if is_protocol(each)]
    for method in (method for each in protocols for method in vars(each).values()):
        if inspect.isfunction(method):
            get_type_hints(method)


@pytest.mark.parametrize("name", [
    "AsyncMemoryCache", "CallableBatchSource", "CallableDerivedSource", "CallableSource",
    "CircuitBreaker", "ResourcePublisher", "SnapshotBuilder", "SnapshotSession",
    "SyncResourcePublisher", "SyncSnapshotBuilder",
])  # fmt: skip
def test_what_is_made_by_hand_or_by_a_container_says_what_it_takes(name: str) -> None:
    """Dependency injection reads the types of constructors."""
    get_type_hints(public_classes()[name].__init__)
