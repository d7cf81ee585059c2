"""Describe every public name of the package; the manifest beside this file is that description.

Usage: python tests/architecture/public_api.py [--installed] [--write]

Prints where the package of this checkout (or the one that is installed) and ``public_api.json``
differ, and fails if they do; or writes the manifest anew. A change of the manifest is a change of
the public interface and belongs in CHANGELOG.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import importlib
import importlib.util
import inspect
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any, get_origin, is_typeddict

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = Path(__file__).with_suffix(".json")
PROTOCOL_METHODS = {
    "__aenter__", "__aexit__", "__call__", "__contains__", "__enter__", "__eq__", "__exit__",
    "__getitem__", "__hash__", "__iter__", "__len__", "__lt__", "__str__",
}  # fmt: skip


def describe_package() -> dict[str, Any]:
    """Every name of the package in full, and of its parts the names they export."""
    package = importlib.import_module("coalestra")
    return {
        "coalestra": {name: describe(getattr(package, name)) for name in sorted(package.__all__)},
        "parts": {
            f"coalestra.{info.name}": sorted(
                getattr(importlib.import_module(f"coalestra.{info.name}"), "__all__", ())
            )
            for info in pkgutil.iter_modules(package.__path__)
            if not info.name.startswith("_") and info.name not in extras_missing()
        },
    }


def recorded() -> dict[str, Any]:
    """What the manifest says, but of parts that need something which is not installed here."""
    manifest: dict[str, Any] = json.loads(MANIFEST.read_text(encoding="utf-8"))
    for part in extras_missing():
        del manifest["parts"][f"coalestra.{part}"]
    return manifest


def extras_missing() -> set[str]:
    """The parts that need something which is not installed here."""
    needs = {
        "opentelemetry": ("opentelemetry",),
        "prometheus": ("prometheus_client",),
        "redis": ("redis", "msgspec"),
    }
    return {
        part
        for part, names in needs.items()
        if any(importlib.util.find_spec(name) is None for name in names)
    }


def describe(target: Any) -> dict[str, Any]:
    """One public object: its kind and everything a caller may rely on."""
    if inspect.isclass(target) and not is_alias(target):
        return describe_class(target)
    if inspect.isfunction(target):
        return {"kind": "function", "signature": signature_of(target)}
    if isinstance(target, (str, int, float, bool)):
        return {"kind": "constant", "value": target}
    kind = "type alias" if is_alias(target) else f"instance of {type(target).__name__}"
    return {"kind": kind}


def is_alias(target: Any) -> bool:
    """Whether this names a type that is put together from others."""
    return get_origin(target) is not None


def describe_class(target: type[Any]) -> dict[str, Any]:
    """A class by its nature: enumeration, typed dictionary, or anything with members."""
    bases = [base.__name__ for base in target.__mro__[1:] if base is not object]
    described: dict[str, Any] = {"kind": "class", "bases": bases}
    if issubclass(target, enum.Enum):
        values = {member.name: member.value for member in target}
        return {"kind": "enum", "members": values}
    if is_typeddict(target):
        keys = {name: annotation_text(value) for name, value in target.__annotations__.items()}
        return {"kind": "typed dict", "keys": keys, "required": sorted(target.__required_keys__)}
    if getattr(target, "_is_protocol", False):
        runtime = bool(getattr(target, "_is_runtime_protocol", False))
        described |= {"kind": "protocol", "runtime_checkable": runtime}
        described["bases"] = [name for name in bases if name not in {"Protocol", "Generic"}]
        described["attributes"] = dict(sorted(own_annotations(target).items()))
    else:
        described["bases"] = [name for name in bases if name != "Generic"]
        if constructor := signature_of_constructor(target):
            described["constructor"] = constructor
    if dataclasses.is_dataclass(target):
        described["fields"] = [describe_field(item) for item in dataclasses.fields(target)]
    described["members"] = members_of(target)
    return described


def own_annotations(target: type[Any]) -> dict[str, str]:
    """The annotated attributes of the class and of its bases in this package."""
    found: dict[str, str] = {}
    for base in reversed(ours(target)):
        annotations = inspect.get_annotations(base)
        found |= {
            name: annotation_text(value)
            for name, value in annotations.items()
            if not name.startswith("_")
        }
    return found


def ours(target: type[Any]) -> list[type[Any]]:
    """The class and those of its bases that this package defines."""
    return [base for base in target.__mro__ if base.__module__.partition(".")[0] == "coalestra"]


def describe_field(item: dataclasses.Field[Any]) -> dict[str, Any]:
    """A field of a dataclass."""
    described: dict[str, Any] = {"name": item.name, "type": annotation_text(item.type)}
    if item.default is not dataclasses.MISSING:
        described["default"] = default_text(item.default)
    elif item.default_factory is not dataclasses.MISSING:
        described["default"] = "<factory>"
    described |= {
        name: value
        for name, value in (("compare", item.compare), ("repr", item.repr), ("init", item.init))
        if not value
    }
    return described


def members_of(target: type[Any]) -> dict[str, Any]:
    """The public members that the class has from this package, sorted by name."""
    members: dict[str, Any] = {}
    for base in reversed(ours(target)):
        for name, raw in vars(base).items():
            if not name.startswith("_") or name in PROTOCOL_METHODS:
                members[name] = describe_member(name, raw)
    methods = {name for name in members if inspect.isfunction(getattr(target, name))}
    data = dataclasses.fields(target) if dataclasses.is_dataclass(target) else ()
    fields = {field.name for field in data} - methods
    return {
        name: members[name]
        for name in sorted(members)
        if members[name] is not None and name not in fields
    }


def describe_member(name: str, raw: Any) -> Any:
    """A member of a class; None for what is none (an unset protocol method, a slot)."""
    if raw is None or inspect.ismemberdescriptor(raw):
        return None
    if name.startswith("__"):
        return "async method" if inspect.iscoroutinefunction(raw) else "method"
    if isinstance(raw, property):
        return "property"
    kind = ""
    if isinstance(raw, (staticmethod, classmethod)):
        kind, raw = f"{type(raw).__name__} ", raw.__func__
    if inspect.isfunction(raw):
        prefix = "async " if inspect.iscoroutinefunction(raw) else ""
        return f"{prefix}{kind}{signature_of(raw)}"
    if isinstance(raw, (str, int, float, bool)):
        return f"= {raw!r}"
    return "attribute"


def signature_of_constructor(target: type[Any]) -> str:
    """How to make one; empty where that is the business of a built-in base."""
    for base in target.__mro__:
        if "__init__" in vars(base) or "__new__" in vars(base):
            if base not in ours(target):
                return ""
            return signature_of(target)
    return ""


def signature_of(target: Any) -> str:
    """Parameters, defaults and annotations, alike on every Python."""
    signature = inspect.signature(target)
    parameters = [
        parameter.replace(
            annotation=Text(annotation_text(parameter.annotation))
            if parameter.annotation is not parameter.empty
            else parameter.empty,
            default=Text(default_text(parameter.default))
            if parameter.default is not parameter.empty
            else parameter.empty,
        )
        for parameter in signature.parameters.values()
        if parameter.name not in {"self", "cls"}
    ]
    returned = signature.return_annotation
    if returned is not signature.empty:
        returned = Text(annotation_text(returned))
    return str(signature.replace(parameters=parameters, return_annotation=returned))


class Text(str):
    """A text that shows itself without quotes, as a default or an annotation in a signature."""

    __slots__ = ()
    __repr__ = str.__str__


def annotation_text(annotation: Any) -> str:
    """An annotation as it is written."""
    if isinstance(annotation, str):
        return annotation
    forward = getattr(annotation, "__forward_arg__", None)
    return forward if isinstance(forward, str) else inspect.formatannotation(annotation)


def default_text(default: Any) -> str:
    """A default value as a stable text."""
    if isinstance(default, enum.Enum):
        return f"{type(default).__name__}.{default.name}"
    if default is None or isinstance(default, (str, int, float, tuple, frozenset)):
        return repr(default)
    if inspect.isfunction(default) or inspect.isclass(default):
        return f"<{default.__qualname__}>"
    return f"<{type(default).__name__}>"


def rendered(described: dict[str, Any]) -> str:
    """The manifest as text."""
    return json.dumps(described, indent=1, sort_keys=True) + "\n"


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for each name that came, went or changed."""
    lines = []
    for part in ("coalestra", "parts"):
        old, new = before.get(part, {}), after.get(part, {})
        for name in sorted(old.keys() | new.keys()):
            if name not in new:
                lines.append(f"{name}: is gone")
            elif name not in old:
                lines.append(f"{name}: is new")
            elif old[name] != new[name]:
                lines.append(f"{name}: was {json.dumps(old[name], sort_keys=True)}")
                lines.append(f"{name}: now {json.dumps(new[name], sort_keys=True)}")
    return lines


def main() -> int:
    options = argparse.ArgumentParser(description="Compare the public interface with its manifest.")
    options.add_argument("--write", action="store_true", help="write the manifest anew")
    options.add_argument("--installed", action="store_true", help="of the package installed")
    chosen = options.parse_args()
    if not chosen.installed:
        sys.path.insert(0, str(ROOT / "src"))
    if chosen.write and extras_missing():
        options.error(f"nothing is written without what {extras_missing()} need")
    described = json.loads(rendered(describe_package()))
    lines = differences(recorded(), described)
    if chosen.write:
        MANIFEST.write_text(rendered(described), encoding="utf-8")
    for line in lines:
        print(line)
    print(f"{len(described['coalestra'])} public names, {len(lines)} differences")
    return 1 if lines and not chosen.write else 0


if __name__ == "__main__":
    raise SystemExit(main())
