"""The library stays small in its parts, documented, and out of other objects' private names."""

from __future__ import annotations

import ast
import json
import re

from tests.architecture.public_api import MANIFEST
from tests.architecture.source_tree import Definition, Function, Module, decorators, length, modules

FUNCTION_LINES = 60
PARAMETERS = 6
TYPE_IGNORES = 5

# Public, but of a part that may not be installed, so that the manifest does not tell.
ELSEWHERE = {"RedisCache"}


def test_no_function_needs_scrolling() -> None:
    lengths = {
        f"{module.where}:{node.lineno} {node.name}": length(node)
        for module in modules()
        for node in module.definitions()
        if isinstance(node, Function)
    }
    assert not {where: lines for where, lines in lengths.items() if lines > FUNCTION_LINES}


def test_few_parameters_travel_unless_the_public_contract_says_so() -> None:
    public = set(json.loads(MANIFEST.read_text(encoding="utf-8"))["coalestra"]) | ELSEWHERE
    crowded = {}
    for module in modules():
        for owner, function in functions(module):
            spec = function.args
            count = len(spec.posonlyargs + spec.args + spec.kwonlyargs)
            allowed = PARAMETERS + (owner != "" and "staticmethod" not in decorators(function))
            if count > allowed and (owner or function.name) not in public:
                crowded[f"{module.where}:{function.lineno} {owner}.{function.name}"] = count
    assert not crowded


def functions(module: Module) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with the name of the class it belongs to, or an empty name."""
    methods = {
        id(node): scope.name
        for scope in module.definitions()
        if isinstance(scope, ast.ClassDef)
        for node in scope.body
    }
    return [
        (methods.get(id(node), ""), node)
        for node in module.definitions()
        if isinstance(node, Function)
    ]


def test_every_public_name_says_what_it_is_for() -> None:
    bare = [
        f"{module.where}:{node.lineno} {node.name}"
        for module in modules()
        for node in public_places(module)
        if isinstance(node, Definition) and not node.name.startswith("_")
        if not decorators(node) & {"overload", "setter"} and not ast.get_docstring(node)
    ]
    assert not bare


def public_places(module: Module) -> list[ast.stmt]:
    """The statements of the module and of its classes."""
    classes = [node for node in module.tree.body if isinstance(node, ast.ClassDef)]
    return [*module.tree.body, *(node for scope in classes for node in scope.body)]


def test_every_module_says_what_it_is_for() -> None:
    assert not [module.where for module in modules() if not ast.get_docstring(module.tree)]


def test_nobody_reaches_into_another_objects_private_names() -> None:
    foreign = [
        f"{module.where}:{node.lineno} .{node.attr}"
        for module in modules()
        for own in [own_private_names(module)]
        for node in module.nodes
        if isinstance(node, ast.Attribute) and is_private(node.attr)
        if node.attr not in own
    ]
    assert not foreign


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in {"self", "cls"}


def own_private_names(module: Module) -> set[str]:
    """Every name that the module defines itself, or assigns on ``self`` or ``cls``."""
    names = {node.name for node in module.definitions()}
    for node in module.nodes:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Attribute) and is_self(node.value):
            names.add(node.attr)
    return names


def test_the_type_checker_is_seldom_overruled_and_never_without_a_reason() -> None:
    overruled = [
        f"{module.where}:{number} {line.strip()}"
        for module in modules()
        for number, line in enumerate(module.text.splitlines(), start=1)
        if "type: ignore" in line
    ]
    assert len(overruled) <= TYPE_IGNORES, overruled
    with_reason = re.compile(r"# type: ignore\[[a-z-]+(, ?[a-z-]+)*\]\s+# \S+")
    assert not [line for line in overruled if not with_reason.search(line)]
