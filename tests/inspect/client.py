"""What speaks ASGI to the page, as a server would: whole answers, and streams read slowly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

HERE = ("127.0.0.1", 50_000)


def scope_of(path: str, method: str = "GET", **more: Any) -> dict[str, Any]:
    """The scope of a request that comes from this machine."""
    headers = {"host": "127.0.0.1:8089", **more.pop("headers", {})}
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": path, "query_string": b"", "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": HERE, "server": ("127.0.0.1", 8089), **more,
    }  # fmt: skip


@dataclass
class Answer:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def get(page: Any, path: str, method: str = "GET", **more: Any) -> Answer:
    """Ask for a path and return the answer."""
    async with Stream(page, scope_of(path, method, **more)) as stream:
        await stream.task
        return Answer(stream.status, stream.headers, b"".join(stream.parts))


@dataclass
class Stream:
    """One request, from both of its ends. While `gate` is closed the client takes nothing."""

    page: Any
    scope: dict[str, Any]
    parts: list[bytes] = field(default_factory=list)
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    ended: bool = False

    async def __aenter__(self) -> Stream:
        self._requested = False
        self._changed = asyncio.Event()
        self._left = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.task = asyncio.create_task(self.page(self.scope, self._receive, self._send))
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self.leave()
        self.gate.set()
        await asyncio.wait((self.task,))

    def leave(self) -> None:
        """Go, as a client does that closes its connection."""
        self._left.set()

    async def states(self, count: int) -> list[Any]:
        """Wait for that many states, and return all that came."""
        while len(self._told()) < count:
            self._changed.clear()
            await self._changed.wait()
        return self._told()

    def _told(self) -> list[Any]:
        events = b"".join(self.parts).decode().split("\n\n")
        return [json.loads(each[6:]) for each in events if each.startswith("data: ")]

    async def _receive(self) -> dict[str, Any]:
        if not self._requested:
            self._requested = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.gate.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.parts.append(message["body"])
            self.ended = not message.get("more_body", False)
        self._changed.set()
