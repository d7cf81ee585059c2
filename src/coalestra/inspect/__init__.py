"""A live page about one builder: how its sources fare, what is under way, and what builds did.

`app` makes it, as an ASGI application to be mounted in one's own; `serve` serves it from a program
that has no web server, and ``python -m coalestra.inspect module:builder`` from a command line.
Nothing is needed but the standard library, and nothing is fetched from elsewhere.
"""

from __future__ import annotations

from coalestra.inspect.asgi import Authorize, Inspector
from coalestra.inspect.looks import AnyBuilder
from coalestra.inspect.server import Server, serve

__all__ = ["Inspector", "Server", "app", "serve"]


def app(
    builder: AnyBuilder,
    *,
    authorize: Authorize | None = None,
    title: str = "Coalestra",
    show_values: bool = False,
    show_subjects: bool = False,
    interval_seconds: float = 1.0,
) -> Inspector:
    """Return the page of a builder, as an ASGI application without dependencies.

    It only reads, and looks at the builder only while somebody watches. Mount it anywhere: all its
    addresses are relative.

    Args:
        builder: a `SnapshotBuilder`, used on the event loop that serves the page, or a
            `SyncSnapshotBuilder`.
        authorize: says who may read: called with the ASGI scope of every request, it returns True
            for those who may, or is an async function that does. Without it only requests that come
            straight from this machine are answered.
        title: what the page is called.
        show_values: show the values in the memory cache, by their ``repr``.
        show_subjects: show subjects and qualifiers of keys, and texts of errors. Without it there
            is a code in place of a subject.
        interval_seconds: how often the page is renewed.

    Raises:
        TypeError, ValueError: for a bad argument, naming it.
    """
    return Inspector(builder, authorize, title, show_values, show_subjects, interval_seconds)
