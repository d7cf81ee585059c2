"""The page as an ASGI application: who may read it, what it answers, and how it keeps up to date.

Laws:

1. It only reads: GET and HEAD, nothing else. Who may not read learns nothing, not even what exists.
2. All viewers of an event loop share their looks at the builder: there is one an interval, while
   somebody watches and at no other time.
3. A viewer gets the newest state and never a queue of older ones, however slowly it reads.
4. A stream ends by itself after a while, and the browser comes back: a server that waits for its
   connections to end is not held up by a page left open.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import re
from base64 import b64encode
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from hashlib import sha256
from html import escape
from importlib import resources
from ipaddress import ip_address
from typing import Any
from urllib.parse import quote

from coalestra.concurrency.threads import WorkerThreads
from coalestra.core.trace import Trace
from coalestra.core.validation import callable_, flag, number, text, wrong_type
from coalestra.inspect import looks
from coalestra.orchestration.builder import SnapshotBuilder
from coalestra.sync import SyncSnapshotBuilder

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Authorize = Callable[[Scope], "bool | Awaitable[bool]"]

STREAM_SECONDS = 10.0
"""After so long a stream of events ends, and the browser opens another."""
SEND_SECONDS = 10.0
"""A viewer that takes nothing for so long is given up."""
MOST_VIEWERS = 32
"""So many streams are open at a time; who comes then is asked to come later."""

_HOST = re.compile(r"(?:\[([^]]+)\]|([^][:]+))(?::\d*)?")
_TRACE_PATH = re.compile(r"traces/([0-9a-f]{12})\.(html|svg|txt|json|chrome\.json)")
_PLAIN = "text/plain; charset=utf-8"
_EVENTS = "text/event-stream; charset=utf-8"
_JSON = "application/json"
_OF_PROXIES = re.compile(rb"via|forwarded|x-forwarded-.*|x-real-ip|.*-(client|connecting)-ip")

_NOT_HERE = """\
This page may be read from this machine only, as the application that serves it has not said
who else may. Say so where it is made:

    coalestra.inspect.app(builder, authorize=may_read)

where may_read(scope) looks at the ASGI scope of a request, and returns True for those who may
(or is an async function that does). Give authorize=lambda scope: True if what stands in front
of the page, such as a route with a login, decides that already.
"""
_NOT_FOR_YOU = "You may not read this page.\n"


def from_this_machine(scope: Scope) -> bool:
    """Whether a request comes straight from this machine, to a name that only this one can have.

    Not if a proxy has passed it on: it says so, or speaks HTTP/1.0, as nginx does and no browser.
    Nor if it was asked for by a name on the internet: anybody can make one that leads here, and so
    read in the browser of a person what only that person may.
    """
    headers = dict(scope["headers"])
    client = (scope.get("client") or ("",))[0]
    asked = _HOST.fullmatch(headers.get(b"host", b"").decode("latin-1"))
    passed_on = scope.get("http_version") == "1.0" or any(map(_OF_PROXIES.fullmatch, headers))
    if passed_on or not (client and asked):
        return False
    name = asked[1] or asked[2]
    local = _is_loopback(name)
    if local is None:
        local = "." not in name or name.endswith(".localhost")
    # What is no address, as the clients of tests give, cannot have come over a network.
    return local and _is_loopback(client) is not False


def _is_loopback(host: str) -> bool | None:
    """Whether an address is one of this machine alone; None if it is no address."""
    try:
        address = ip_address(host)
    except ValueError:
        return None
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified  # a server on all addresses, from here


@lru_cache(maxsize=1)
def _template() -> tuple[str, str]:
    """Return the page without its title, and the policy that lets its own script and style run."""
    page = resources.files("coalestra.inspect").joinpath("page.html").read_text(encoding="utf-8")
    allowed = {
        tag: " ".join(
            f"'sha256-{b64encode(sha256(inside.encode()).digest()).decode()}'"
            for inside in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("style", "script")
    }
    policy = (
        f"default-src 'none'; style-src {allowed['style']}; script-src {allowed['script']}; "
        "connect-src 'self'; img-src 'self' data:; frame-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


_TRACE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'; sandbox allow-same-origin"
)
_DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"


class Exchange:
    """One request, and the answer to it."""

    __slots__ = ("_send", "headers", "method", "path", "receive", "scope")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self._send = send
        self.method: str = scope["method"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        path, root = scope["path"], scope.get("root_path", "").rstrip("/")
        # Servers and frameworks differ in whether the path holds the one that this is mounted at.
        if root and (path == root or path.startswith(f"{root}/")):
            path = path[len(root) :]
        self.path: str = path

    async def begin(self, status: int, content_type: str, **more: str) -> None:
        """Send the status and the headers; those of ``more`` take the place of the usual ones."""
        headers = {
            "content-type": content_type,
            "cache-control": "no-store",
            "content-security-policy": _DATA_POLICY,
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            **{name.replace("_", "-"): value for name, value in more.items()},
        }
        encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def body(self, content: bytes, *, more: bool = False) -> None:
        """Send a part of the body; the last one unless there is ``more``."""
        await self._send({"type": "http.response.body", "body": content, "more_body": more})

    async def answer(
        self, status: int, content: str | bytes, content_type: str = _PLAIN, **headers: str
    ) -> None:
        """Send the whole answer; without its body, if that was not asked for."""
        # A name may hold half a surrogate pair, as one of a file that is not UTF-8.
        encoded = content.encode("utf-8", "replace") if isinstance(content, str) else content
        await self.begin(status, content_type, content_length=str(len(encoded)), **headers)
        await self.body(b"" if self.method == "HEAD" else encoded)


@dataclass(eq=False, repr=False)
class Sampler:
    """Looks at the builder when a viewer wants a state, unless there is one that is young enough.

    Attributes:
        story: what is told of the looks.
        viewers: how many watch now.
        due: when the state is too old, on the clock of the event loop.
    """

    story: looks.Story
    _builder: looks.AnyBuilder
    _threads: WorkerThreads
    _interval: float
    viewers: int = 0
    due: float = -math.inf
    _looking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _state: bytes = b""

    async def state(self, late: float = 0.0) -> bytes:
        """Return a state that is no older than the interval.

        It is asked for so many seconds `late`, as the event loop was held.
        """
        now = asyncio.get_running_loop().time
        async with self._looking:
            began = now()
            if began >= self.due - self._interval / 10:  # a timer may be early by a little
                try:
                    look = await looks.look_at(self._builder)
                    written = self._written, look, began, late
                    state = await self._threads.run(*written, or_here=True)
                except Exception as error:
                    # What went wrong may name a resource, so its type is all that is shown.
                    state = json.dumps({"error": type(error).__name__}).encode()
                self.due, self._state = began + self._interval, state
            return self._state

    def _written(self, look: looks.Look, now: float, late: float) -> bytes:
        told = {**self.story.told(look, now, late), "interval": self._interval}
        return json.dumps(told, separators=(",", ":"), allow_nan=False).encode()


class Inspector:
    """The page of one builder, as an ASGI application without dependencies.

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

    def __init__(
        self,
        builder: looks.AnyBuilder,
        *,
        authorize: Authorize | None = None,
        title: str = "Coalestra",
        show_values: bool = False,
        show_subjects: bool = False,
        interval_seconds: float = 1.0,
    ) -> None:
        if not isinstance(builder, (SnapshotBuilder, SyncSnapshotBuilder)):
            raise wrong_type("builder", "a SnapshotBuilder or a SyncSnapshotBuilder", builder)
        self.builder = builder
        self._authorize = callable_("authorize", authorize, optional=True)
        self._title = text("title", title)
        self._shows_values = flag("show_values", show_values)
        self._names = looks.Names(show=flag("show_subjects", show_subjects))
        self._interval = number("interval_seconds", interval_seconds, above=0)
        self._threads = WorkerThreads(idle_seconds=5.0)
        self._samplers: dict[asyncio.AbstractEventLoop, Sampler] = {}

    def __repr__(self) -> str:
        return f"<Inspector of {self.builder!r}>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            await self._answer(Exchange(scope, receive, send))
        else:  # a websocket, closed before it is open: a server answers 403
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, exchange: Exchange) -> None:
        if not await self._may_read(exchange):
            told = _NOT_HERE if self._authorize is None else _NOT_FOR_YOU
            await exchange.answer(403, told)
        elif exchange.method not in ("GET", "HEAD"):
            await exchange.answer(405, "This page can only be read.\n", allow="GET, HEAD")
        elif exchange.path == "":
            # Relative to what was asked for, which a proxy may know by another path.
            last = quote(exchange.scope["path"].rpartition("/")[2])
            await exchange.answer(307, "", location=f"{last}/" if last else "/")
        else:
            await self._route(exchange, exchange.path[1:])

    async def _may_read(self, exchange: Exchange) -> bool:
        allowed = (self._authorize or from_this_machine)(exchange.scope)
        if inspect.isawaitable(allowed):
            allowed = await allowed
        # Another site may lead a person to the page, but not use a person's browser to read it.
        site = exchange.headers.get(b"sec-fetch-site", b"none")
        mode = exchange.headers.get(b"sec-fetch-mode", b"navigate")
        return allowed is True and (site in (b"none", b"same-origin") or mode == b"navigate")

    async def _route(self, exchange: Exchange, path: str) -> None:
        trace = _TRACE_PATH.fullmatch(path)
        if path == "":
            page, policy = _template()
            page = page.replace("{{title}}", escape(self._title))
            await exchange.answer(
                200, page, "text/html; charset=utf-8", content_security_policy=policy
            )
        elif path == "state.json":
            await exchange.answer(200, await self._sampler().state(), _JSON)
        elif path == "cache.json":
            await self._tell_cache(exchange)
        elif path == "events":
            await self._stream(exchange)
        elif trace is not None:
            await self._tell_trace(exchange, trace[1], trace[2])
        else:
            await exchange.answer(404, "There is no such page.\n")

    def _sampler(self) -> Sampler:
        loop = asyncio.get_running_loop()
        sampler = self._samplers.get(loop)
        if sampler is None:
            for other in tuple(self._samplers):
                if other.is_closed():
                    self._samplers.pop(other, None)
            story = looks.Story(self.builder, self._names)
            sampler = Sampler(story, self.builder, self._threads, self._interval)
            self._samplers[loop] = sampler
        return sampler

    async def _tell_cache(self, exchange: Exchange) -> None:
        shown = self._shows_values
        try:
            found = await looks.look_into_cache(self.builder)
            now = looks.own_of(self.builder).clock.now()
            told: dict[str, Any] = {"at": now, "values": None, "shows_values": shown}
            if found is not None:
                telling = partial(looks.told_values, found, self._names, now, shown)
                job = self._threads.start(telling, "told_values", or_here=True)
                if not await looks.done_in_time(job.ended):  # a `repr` may never end
                    raise TimeoutError
                told["values"] = job.outcome()
        except Exception as error:
            told = {"error": type(error).__name__}
        await exchange.answer(200, json.dumps(told), _JSON)

    async def _tell_trace(self, exchange: Exchange, name: str, form: str) -> None:
        content_type, draw = _FORMS[form]
        known = self._sampler().story.traces
        content = await self._threads.run(self._drawn, known, name, draw, or_here=True)
        if content is None:
            await exchange.answer(404, "This trace is gone: a builder keeps the last few only.\n")
            return
        headers = {"content_security_policy": _TRACE_POLICY}
        if form == "chrome.json":
            headers["content_disposition"] = f'attachment; filename="coalestra-{name}.json"'
        await exchange.answer(200, content, content_type, **headers)

    def _drawn(self, known: looks.Traces, name: str, draw: Callable[[Trace], str]) -> str | None:
        trace = known.find(name)
        if trace is None:
            recent = self.builder.recent_traces()
            trace = next((each for each in recent if looks.trace_id(each) == name), None)
        return None if trace is None else draw(self._names.trace(trace))

    async def _stream(self, exchange: Exchange) -> None:
        """Send the state whenever there is a new one, until the viewer goes or the time is up."""
        sampler = self._sampler()
        if sampler.viewers >= MOST_VIEWERS:
            await exchange.answer(503, "Too many are watching.\n", retry_after="10")
            return
        begin = partial(exchange.begin, 200, _EVENTS, x_accel_buffering="no")
        if exchange.method == "HEAD":
            await begin()
            await exchange.body(b"")
            return
        sampler.viewers += 1
        gone = asyncio.create_task(_until_gone(exchange.receive), name="coalestra inspect viewer")
        try:
            await begin()
            if await _told_all(exchange, sampler, gone):
                await exchange.body(b"")
        finally:
            gone.cancel()
            sampler.viewers -= 1


async def _told_all(exchange: Exchange, sampler: Sampler, gone: asyncio.Task[None]) -> bool:
    """Tell one viewer until its time is up; return whether it is still there then."""
    now = asyncio.get_running_loop().time
    until, content, late = now() + STREAM_SECONDS, b"retry: 500\n\n", 0.0
    while True:
        sending = asyncio.ensure_future(exchange.body(content, more=True))
        try:
            await asyncio.wait((sending, gone), timeout=SEND_SECONDS, return_when="FIRST_COMPLETED")
            if not sending.done():
                return False
            sending.result()
        except OSError:
            return False
        finally:
            sending.cancel()
        if content.startswith(b"data") and (pause := min(sampler.due, until) - now()) > 0:
            due = now() + pause
            await asyncio.wait((gone,), timeout=pause)
            late = max(0.0, now() - due)
        if gone.done():
            return False
        if now() >= until:
            return True
        content = b"data: " + await sampler.state(late) + b"\n\n"


async def _until_gone(receive: Receive) -> None:
    """Return when the other side has gone, in whatever way a server tells of it."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except OSError:
        return


async def _live(receive: Receive, send: Send) -> None:
    """Agree to whatever a server's lifespan does: there is nothing to start or to end."""
    while True:
        stage = (await receive())["type"]
        await send({"type": f"{stage}.complete"})
        if stage == "lifespan.shutdown":
            return


_FORMS: dict[str, tuple[str, Callable[[Trace], str]]] = {
    "html": ("text/html; charset=utf-8", lambda trace: trace.to_html()),
    "svg": ("image/svg+xml", lambda trace: trace.to_svg()),
    "txt": (_PLAIN, lambda trace: trace.to_text()),
    "json": (_JSON, lambda trace: json.dumps(trace.to_dict())),
    "chrome.json": (_JSON, lambda trace: json.dumps(trace.to_chrome())),
}
