"""A live page about one builder: how its sources fare, what is under way, and what builds did.

`app` makes it, as an ASGI application to be mounted in one's own; `serve` serves it from a program
that has no web server, and ``python -m coalestra.inspect module:builder`` from a command line.
Nothing is needed but the standard library, and nothing is fetched from elsewhere.
"""

from __future__ import annotations

from coalestra.inspect.asgi import Inspector
from coalestra.inspect.server import Server

__all__ = ["Inspector", "Server", "app", "serve"]

app = Inspector
serve = Server
