"""``python -m coalestra.inspect module:builder`` serves the page of a builder that a module has."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import inspect
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from coalestra.inspect import app, serve
from coalestra.inspect.looks import AnyBuilder
from coalestra.orchestration.builder import SnapshotBuilder
from coalestra.sync import SyncSnapshotBuilder


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m coalestra.inspect",
        description="Serve the live page of a builder. It is the builder of this new process: to "
        "watch a service at work, mount coalestra.inspect.app(builder) in it instead.",
    )
    parser.add_argument(
        "builder",
        metavar="MODULE:NAME",
        help="a builder, or a function (async or not) that makes one",
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8089, help="0 for any that is free (8089)")
    parser.add_argument("--title", default="Coalestra", help="what the page is called")
    parser.add_argument("--show-values", action="store_true", help="show values in memory")
    parser.add_argument(
        "--show-subjects", action="store_true", help="show subjects of keys and texts of errors"
    )
    parser.add_argument(
        "--open", action="store_true", help="answer anybody who reaches the address, also others"
    )
    return parser.parse_args(arguments)


async def _builder_of(path: str) -> AnyBuilder:
    """Import the module and return what it names, or what that makes."""
    module, _, name = path.partition(":")
    if not all(part.isidentifier() for each in (module, name) for part in each.split(".")):
        raise SystemExit(f"the builder must be given as MODULE:NAME, got {path!r}")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # it is here, and one that it needs is not
        missing = f"there is no module {error.name!r} here; start this in its folder"
        raise SystemExit(missing) from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise SystemExit(f"module {module!r} has no {name!r}")
        found = getattr(found, part)
    if callable(found):
        found = found()
    if inspect.isawaitable(found):
        found = await found
    if not isinstance(found, (SnapshotBuilder, SyncSnapshotBuilder)):
        kinds = "a SnapshotBuilder or SyncSnapshotBuilder"
        raise SystemExit(f"{path} must be {kinds}, or make one, got {type(found).__name__}")
    return found


async def _serve(options: argparse.Namespace) -> None:
    builder = await _builder_of(options.builder)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    with contextlib.suppress(NotImplementedError):  # on Windows Ctrl-C cancels this instead
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ended.set)
    try:
        page = app(
            builder,
            authorize=(lambda _scope: True) if options.open else None,
            title=options.title,
            show_values=options.show_values,
            show_subjects=options.show_subjects,
        )
        async with serve(page, host=options.host, port=options.port) as server:
            where = f"Watching {options.builder} at {server.url} (Ctrl-C ends it)"
            print(where, flush=True)  # noqa: T201 - it is a command
            await ended.wait()
    except (OSError, ValueError) as error:
        where = f"{options.host}, port {options.port}"
        raise SystemExit(f"cannot serve at {where}: {error}") from None
    finally:
        if isinstance(builder, SyncSnapshotBuilder):
            await asyncio.to_thread(builder.close)
        else:
            await builder.aclose()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until a signal to end comes; return the exit status."""
    options = _parsed(arguments)
    sys.path.insert(0, os.getcwd())
    try:
        asyncio.run(_serve(options))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
