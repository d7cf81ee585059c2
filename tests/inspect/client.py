"""What speaks ASGI to the page, as a server would."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
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
    start, body = list[Any](), list[Any]()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        (start if message["type"] == "http.response.start" else body).append(message)

    await page(scope_of(path, method, **more), receive, send)
    headers = {name.decode(): value.decode() for name, value in start[0]["headers"]}
    return Answer(start[0]["status"], headers, b"".join(each["body"] for each in body))
