"""The page as an ASGI application: who may read, what is answered, how it keeps up to date."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import logging
import math
import re
import sys
import threading
import weakref
from base64 import b64encode
from hashlib import sha256
from typing import Any

import pytest

from coalestra import (
    AsyncMemoryCache,
    BuilderHealthReason,
    FreshnessPolicy,
    SnapshotBuilder,
    SyncSnapshotBuilder,
)
from coalestra.core.trace import Trace
from coalestra.inspect import app
from coalestra.inspect.asgi import MOST_VIEWERS, SEND_SECONDS, STREAM_SECONDS
from coalestra.inspect.looks import Story
from tests.inspect.client import Stream, get, scope_of
from tests.orchestration.scripted import Derived, Single, builder, key
from tests.support import LoopClock, ThreadGate, settle

K = key("k", "secret-subject")
PATHS = ("/", "/state.json", "/cache.json", "/events", "/traces/0123456789ab.html", "/nothing")


def page_of(**settings: Any) -> Any:
    return app(builder(Single("k"), trace=True), **settings)


# What is answered ---------------------------------------------------------------------------------


async def test_the_page_comes_whole_with_its_title_and_asks_nobody_else() -> None:
    answer = await get(page_of(title="Farm <west>"), "/")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-length"] == str(len(answer.body))
    assert "<title>Farm &lt;west&gt;</title>" in answer.text
    assert "{{" not in answer.text
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", answer.text)
    assert "@import" not in answer.text
    assert "url(" not in answer.text


async def test_a_title_that_no_encoding_has_is_shown_as_far_as_it_can_be() -> None:
    answer = await get(page_of(title="Farm \udcff west"), "/")
    assert answer.status == 200
    assert "<title>Farm ? west</title>" in answer.text


async def test_the_page_knows_what_every_finding_of_health_means() -> None:
    text = (await get(page_of(), "/")).text
    told = text.partition("const FINDINGS = {")[2].partition("};")[0]
    known = re.findall(r"^  (\w+): \[", told, re.MULTILINE)
    assert sorted(known) == sorted(reason.value for reason in BuilderHealthReason)


async def test_the_policy_of_the_page_lets_its_own_script_and_style_run_and_nothing_else() -> None:
    answer = await get(page_of(), "/")
    policy = answer.headers["content-security-policy"]
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = b64encode(sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<[^>]+ (?:style|on\w+)=", answer.text), "inline code would not run"


@pytest.mark.parametrize("path", PATHS)
async def test_every_answer_is_kept_from_caches_frames_and_guesses(path: str) -> None:
    async with Stream(page_of(), scope_of(path)) as stream:
        await settle()
        headers = stream.headers
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "frame-ancestors" in headers["content-security-policy"]


async def test_the_state_is_told_as_json_once_as_well() -> None:
    answer = await get(page_of(), "/state.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json["verdict"]["severity"] == "healthy"
    assert [source["name"] for source in answer.json["sources"]] == ["k"]


async def test_a_state_that_is_young_enough_is_told_again() -> None:
    page = page_of(interval_seconds=5.0)
    first = (await get(page, "/state.json")).json
    await asyncio.sleep(4)
    assert (await get(page, "/state.json")).json == first
    await asyncio.sleep(2)
    assert (await get(page, "/state.json")).json != first


@pytest.mark.parametrize("path", ["/nothing", "/traces/x.html", "/traces/0123456789ab.exe", "//"])
async def test_what_is_not_there_is_not_found(path: str) -> None:
    assert (await get(page_of(), path)).status == 404


@pytest.mark.parametrize("path", PATHS)
async def test_it_can_only_be_read(path: str) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FOO"):
        answer = await get(page_of(), path, method)
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD"), method


@pytest.mark.parametrize("path", PATHS)
async def test_head_answers_with_the_headers_alone(path: str) -> None:
    page = page_of()
    async with Stream(page, scope_of(path)) as whole:
        await settle()
    answer = await get(page, path, "HEAD")
    assert (answer.status, answer.body) == (whole.status, b"")
    assert answer.headers["content-type"] == whole.headers["content-type"]
    if path == "/":
        assert answer.headers["content-length"] == str(len(b"".join(whole.parts)))


# Where it is mounted ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "root,path",
    [
        ("", "/state.json"),
        ("/ops/inspect", "/ops/inspect/state.json"),  # the path holds the root, as ASGI has it
        ("/ops/inspect/", "/ops/inspect/state.json"),
        ("/ops/inspect", "/state.json"),  # or not, as older servers and frameworks do
        ("/state", "/state/state.json"),
    ],
)
async def test_it_finds_its_paths_wherever_it_is_mounted(root: str, path: str) -> None:
    assert (await get(page_of(), path, root_path=root)).status == 200


@pytest.mark.parametrize("root,path,location", [
    ("/ops/inspect", "/ops/inspect", "inspect/"), ("/inspect", "/inspect", "inspect/"),
    ("/a b", "/a b", "a%20b/"), ("", "", "/"),
])  # fmt: skip
async def test_without_its_last_slash_it_leads_there(root: str, path: str, location: str) -> None:
    answer = await get(page_of(), path, root_path=root)
    assert (answer.status, answer.headers["location"]) == (307, location)


async def test_every_address_of_the_page_is_relative() -> None:
    text = (await get(page_of(), "/")).text
    addresses = re.findall(r"""(?:fetch|EventSource)\(["']([^"']+)|href="([^"]+)""", text)
    assert {one or other for one, other in addresses} >= {"events", "cache.json", "state.json"}
    assert not [one or other for one, other in addresses if (one or other).startswith("/")]


async def test_a_server_may_begin_and_end_its_life_with_it() -> None:
    came = asyncio.Queue[dict[str, str]]()
    sent: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await came.put({"type": "lifespan.startup"})
    await came.put({"type": "lifespan.shutdown"})
    await page_of()({"type": "lifespan"}, came.get, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_a_websocket_is_refused() -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await page_of()({**scope_of("/events"), "type": "websocket"}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


# Who may read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "client,host",
    [
        ("127.0.0.1", "127.0.0.1:8089"),
        ("127.8.9.1", "localhost"),
        ("::1", "[::1]:8089"),
        ("::ffff:127.0.0.1", "localhost:8089"),
        ("127.0.0.1", "farm.localhost:8089"),
        ("127.0.0.1", "0.0.0.0:8089"),  # as a server on all addresses says where it is
        ("::1", "[::]:8089"),
        ("127.0.0.1", "devbox"),  # nobody can have a name without a dot on the internet
        ("testclient", "testserver"),  # no address: it has not come over a network
    ],
)
async def test_unless_told_otherwise_this_machine_may_read(client: str, host: str) -> None:
    answer = await get(page_of(), "/", client=(client, 1), headers={"host": host})
    assert answer.status == 200


@pytest.mark.parametrize(
    "scope",
    [
        {"client": ("192.168.0.7", 1)},
        {"client": ("2001:db8::1", 1)},
        {"client": ("testclient", 1), "headers": {"x-forwarded-for": "192.168.0.7"}},
        {"client": None},
        {"client": ("", 0)},
        {"headers": {"host": "rebound.example:8089"}},
        {"headers": {"host": "127.0.0.1.example"}},
        {"headers": {"host": "8.8.8.8"}},
        {"headers": {"host": "localhost.example"}},
        {"headers": {"host": "[::1].example"}},
        {"headers": {"host": "[::1"}},
        {"headers": {"host": ""}},
        {"headers": {"x-forwarded-for": "127.0.0.1"}},
        {"headers": {"forwarded": "for=127.0.0.1"}},
        {"headers": {"x-real-ip": "127.0.0.1"}},
        {"headers": {"x-forwarded-proto": "https"}},
        {"headers": {"via": "1.1 edge"}},
        {"headers": {"cf-connecting-ip": "127.0.0.1"}},
        {"http_version": "1.0"},  # as nginx asks, which adds no header unless told to
    ],
)
async def test_unless_told_otherwise_nobody_else_may_read_anything(scope: dict[str, Any]) -> None:
    for path in PATHS:
        answer = await get(page_of(), path, **scope)
        assert answer.status == 403
        assert "authorize=" in answer.text, "it says what to do"


async def test_whom_the_application_lets_in_may_read_from_anywhere() -> None:
    asked: list[str] = []

    def may_read(scope: Any) -> bool:
        asked.append(scope["path"])
        return (b"x-user", b"ops") in scope["headers"]

    page = page_of(authorize=may_read)
    far = ("192.168.0.7", 1)
    assert (await get(page, "/", headers={"x-user": "ops"}, client=far)).status == 200
    answer = await get(page, "/state.json", headers={"x-user": "eve"}, client=far)
    assert (answer.status, "authorize" in answer.text) == (403, False)
    assert asked == ["/", "/state.json"]


@pytest.mark.parametrize("given,status", [(True, 200), (False, 403), (None, 403), ("yes", 403)])
async def test_the_answer_may_be_awaited_and_only_true_lets_in(given: Any, status: int) -> None:
    async def may_read(scope: Any) -> Any:
        await asyncio.sleep(1)
        return given

    assert (await get(page_of(authorize=may_read), "/")).status == status
    assert (await get(page_of(authorize=lambda scope: given), "/")).status == status


async def test_an_error_in_deciding_lets_nobody_in() -> None:
    def may_read(scope: Any) -> bool:
        raise LookupError("no such session")

    async with Stream(page_of(authorize=may_read), scope_of("/")) as stream:
        await settle()
        assert isinstance(stream.task.exception(), LookupError), "the application's to report"
    assert stream.status == 0


@pytest.mark.parametrize(
    "site,mode,status",
    [
        ("same-origin", "cors", 200),
        ("none", "navigate", 200),
        ("cross-site", "navigate", 200),  # a link from a ticket leads here
        ("cross-site", "no-cors", 403),
        ("cross-site", "cors", 403),
        ("same-site", "cors", 403),
    ],
)
async def test_no_other_site_can_read_through_a_browser(site: str, mode: str, status: int) -> None:
    headers = {"sec-fetch-site": site, "sec-fetch-mode": mode}
    page = page_of(authorize=lambda scope: True)
    assert (await get(page, "/state.json", headers=headers)).status == status


# Keeping up to date -------------------------------------------------------------------------------


async def test_a_viewer_is_told_the_state_at_once_and_then_again_and_again() -> None:
    async with Stream(page_of(interval_seconds=2.0), scope_of("/events")) as viewer:
        states = await viewer.states(4)
    assert viewer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert viewer.headers["x-accel-buffering"] == "no"
    assert viewer.parts[0] == b"retry: 500\n\n"
    times = [state["at"] for state in states]
    assert times == pytest.approx([times[0] + 2.0 * number for number in range(4)])


async def test_all_viewers_share_one_sampler() -> None:
    made = builder(Single("k"))
    looks = counted_looks(made)
    page = app(made)
    async with Stream(page, scope_of("/events")) as one, Stream(page, scope_of("/events")) as two:
        first, second = await one.states(3), await two.states(3)
        assert first == second
        assert len(looks) == 3


def counted_looks(made: SnapshotBuilder) -> list[float]:
    """When a builder's health was asked for, from now on."""
    looks: list[float] = []
    ask = made.health_snapshot

    async def health_snapshot() -> Any:
        looks.append(asyncio.get_running_loop().time())
        return await ask()

    made.health_snapshot = health_snapshot  # type: ignore[method-assign]  # to count its calls
    return looks


async def test_a_viewer_who_comes_later_is_told_what_the_others_see_at_once() -> None:
    page = page_of(interval_seconds=8.0)
    async with Stream(page, scope_of("/events")) as first:
        (seen,) = await first.states(1)
        await asyncio.sleep(3)
        async with Stream(page, scope_of("/events")) as late:
            await settle()
            assert await late.states(1) == [seen]


async def test_nobody_looks_while_nobody_watches_and_an_old_state_is_not_told() -> None:
    made = builder(Single("k"))
    looks = counted_looks(made)
    page = app(made)
    async with Stream(page, scope_of("/events")) as viewer:
        await viewer.states(2)
    before = len(looks)
    await asyncio.sleep(60)
    assert len(looks) == before
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not others, "no task is left"
    async with Stream(page, scope_of("/events")) as again:
        (state,) = await again.states(1)
    assert state["at"] == pytest.approx(made.clock.now())


async def test_a_stream_ends_after_a_while_so_that_a_server_can_end_too() -> None:
    async with Stream(page_of(), scope_of("/events")) as viewer:
        began = asyncio.get_running_loop().time()
        await viewer.task
        assert viewer.ended
    assert asyncio.get_running_loop().time() - began <= STREAM_SECONDS + 1


async def test_a_slow_viewer_holds_nobody_back_and_gets_the_newest_state_next() -> None:
    page = page_of()
    async with Stream(page, scope_of("/events")) as slow, Stream(page, scope_of("/events")) as fast:
        await slow.states(1)
        slow.gate.clear()
        await fast.states(5)
        assert len(slow.parts) == 2
        slow.gate.set()
        told = await slow.states(3)
        at = [state["at"] for state in told]
    assert at[1] - at[0] == pytest.approx(1.0), "the one that was on its way"
    assert at[2] - at[1] >= 3.0, "then the newest, and none between"


async def test_a_viewer_who_takes_nothing_is_given_up() -> None:
    async with Stream(page_of(), scope_of("/events")) as stuck:
        await stuck.states(1)
        stuck.gate.clear()
        await asyncio.sleep(SEND_SECONDS + 2)
        assert stuck.task.done()
        assert stuck.task.exception() is None
    await settle()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("error", [OSError("gone"), ConnectionResetError(), BrokenPipeError()])
async def test_a_viewer_whose_connection_breaks_is_let_go(error: OSError) -> None:
    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise error

    async def receive() -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError

    await page_of()(scope_of("/events"), receive, send)
    await settle()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_cancelling_a_stream_leaves_nothing_behind() -> None:
    async with Stream(page_of(), scope_of("/events")) as viewer:
        await viewer.states(1)
        viewer.task.cancel()
        await settle()
        assert viewer.task.cancelled()
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_so_many_may_watch_and_others_are_asked_to_come_later() -> None:
    page = page_of()
    streams = [Stream(page, scope_of("/events")) for _ in range(MOST_VIEWERS + 1)]
    for stream in streams:
        await stream.__aenter__()
    await settle()
    assert sorted(stream.status for stream in streams) == [200] * MOST_VIEWERS + [503]
    for stream in streams:
        await stream.__aexit__(None, None, None)
    async with Stream(page, scope_of("/events")) as viewer:
        await viewer.states(1)
        assert viewer.status == 200


async def test_the_closing_of_the_builder_is_told_and_ends_no_stream() -> None:
    made = builder(Single("k"))
    async with Stream(app(made), scope_of("/events")) as viewer:
        await viewer.states(1)
        await made.aclose()
        state = (await viewer.states(3))[-1]
    assert state["verdict"]["closed"] is True
    assert state["verdict"]["severity"] == "critical"


async def test_an_error_in_looking_is_told_by_its_type_and_the_next_look_may_succeed() -> None:
    made = builder(Single("k"))
    ask, fails = made.health_snapshot, [True]

    async def health_snapshot() -> Any:
        if fails:
            raise RuntimeError("of secret-subject")
        return await ask()

    made.health_snapshot = health_snapshot  # type: ignore[method-assign]  # to let it fail
    async with Stream(app(made), scope_of("/events")) as viewer:
        (state,) = await viewer.states(1)
        assert state == {"error": "RuntimeError"}
        fails.clear()
        assert (await viewer.states(2))[1]["verdict"]["severity"] == "healthy"


async def test_a_clock_that_tells_no_time_is_told_as_an_error_not_as_a_state() -> None:
    class Odd(LoopClock):
        def now(self) -> float:
            return math.nan

    state = (await get(app(builder(Single("k"), clock=Odd())), "/state.json")).json
    assert state == {"error": "ValueError"}


def test_the_states_of_a_loop_that_has_ended_are_let_go() -> None:
    page = app(SnapshotBuilder([Single("k")]))

    async def watch() -> weakref.ref[asyncio.AbstractEventLoop]:
        await get(page, "/state.json")
        return weakref.ref(asyncio.get_running_loop())

    loops = [asyncio.run(watch()) for _ in range(4)]
    gc.collect()
    assert sum(loop() is not None for loop in loops) <= 1


# A builder on a loop of its own -------------------------------------------------------------------


@pytest.mark.real_loop
async def test_the_builder_of_a_thread_is_looked_at_on_its_own_loop() -> None:
    with SyncSnapshotBuilder(SnapshotBuilder([Single("k")]), max_pending_submissions=7) as sync:
        threads = []
        ask = sync.builder.health_snapshot

        async def health_snapshot() -> Any:
            threads.append(threading.current_thread().name)
            return await ask()

        sync.builder.health_snapshot = health_snapshot  # type: ignore[method-assign]  # to see it
        sync.build([K])
        page = app(sync)
        state = (await get(page, "/state.json")).json
        assert threads == ["coalestra-sync-loop"]
        assert state["submissions"] == [0, 7]
        assert state["sources"][0]["attempt_count"] == 1
        assert state["waited_ms"] >= 0
        assert (await get(page, "/cache.json")).json["values"][0]["source"] == "k"


@pytest.mark.real_loop
async def test_the_builder_of_a_thread_that_is_closed_says_so() -> None:
    sync = SyncSnapshotBuilder(SnapshotBuilder([Single("k")]))
    page = app(sync)
    sync.close()
    assert (await get(page, "/state.json")).json["verdict"]["closed"] is True
    assert (await get(page, "/cache.json")).json == {"error": "BuilderClosedError"}


@pytest.mark.real_loop
async def test_a_builder_whose_thread_is_held_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalestra.inspect.looks.PATIENCE_SECONDS", 0.05)
    released = threading.Event()

    async def hold(_: SnapshotBuilder) -> None:
        released.wait(10)

    with SyncSnapshotBuilder(SnapshotBuilder([Single("k")])) as sync:
        held = sync.submit(hold)
        state = (await get(app(sync), "/state.json")).json
        assert state["loop"]["answers"] is False
        assert state["waited_ms"] is None
        assert [source["name"] for source in state["sources"]] == ["k"]
        assert (await get(app(sync), "/cache.json")).json == {"error": "TimeoutError"}
        released.set()
        held.result(10)


@pytest.mark.real_loop
def test_what_is_seen_from_outside_may_change_meanwhile() -> None:
    stop: list[bool] = []

    async def fetch(key: Any, context: Any) -> Any:
        await asyncio.sleep(0)

    async def work(own: SnapshotBuilder) -> None:
        for count in itertools.takewhile(lambda _: not stop, itertools.count()):
            await own.build([key("k", f"{count}-{index}") for index in range(20)])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with SyncSnapshotBuilder(SnapshotBuilder([Single("k", fetch=fetch)])) as sync:
            working = sync.submit(work)
            for _ in range(3_000):
                assert len(sync.builder.flights_under_way(limit=10)) <= 10
                assert set(sync.builder.capacity.holders()) <= {"k"}
            stop.append(True)
            working.result(10)
    finally:
        sys.setswitchinterval(interval)


# Traces -------------------------------------------------------------------------------------------


async def traced() -> SnapshotBuilder:
    made = builder(Single("k"), Derived("d", needs=lambda each: [K]), trace=True)
    await made.build([key("d", "other-secret")])
    return made


FORMS = {
    "html": ("text/html; charset=utf-8", "<"),
    "svg": ("image/svg+xml", "<svg"),
    "txt": ("text/plain; charset=utf-8", ""),
    "json": ("application/json", "{"),
    "chrome.json": ("application/json", "{"),
}


@pytest.mark.parametrize("form", FORMS)
async def test_a_recent_trace_can_be_had_in_every_form(form: str) -> None:
    page = app(await traced())
    (trace,) = (await get(page, "/state.json")).json["traces"]
    assert (trace["kind"], trace["keys"], trace["calls"], trace["failed"]) == ("build", 2, 2, 0)
    assert trace["obtained"] == {"derived": 1, "fetched": 1}
    answer = await get(page, f"/traces/{trace['id']}.{form}")
    assert (answer.status, answer.headers["content-type"]) == (200, FORMS[form][0])
    assert answer.text.lstrip().startswith(FORMS[form][1])
    policy = answer.headers["content-security-policy"]
    assert "script" not in policy.replace("sandbox", "")
    assert "sandbox" in policy
    assert ("content-disposition" in answer.headers) == (form == "chrome.json")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shown", [False, True])
async def test_subjects_are_in_a_trace_only_if_asked_for(form: str, shown: bool) -> None:
    page = app(await traced(), show_subjects=shown)
    (trace,) = (await get(page, "/state.json")).json["traces"]
    text = (await get(page, f"/traces/{trace['id']}.{form}")).text
    assert ("secret" in text) == shown


async def test_the_text_of_an_error_is_in_a_trace_only_if_asked_for() -> None:
    async def fetch(key: Any, context: Any) -> Any:
        raise ConnectionError("no row for secret-subject")

    made = builder(Single("k", fetch=fetch), trace=True)
    await made.build([K], strict=False)
    for shown in (False, True):
        page = app(made, show_subjects=shown)
        (trace,) = (await get(page, "/state.json")).json["traces"]
        assert trace["failed"] == 1
        for form in FORMS:
            text = (await get(page, f"/traces/{trace['id']}.{form}")).text
            assert ("no row" in text) <= shown, form
            assert ("secret" in text) <= shown, form
        html = (await get(page, f"/traces/{trace['id']}.html")).text
        assert "ConnectionError" in html
        assert ("no row" in html) == shown


async def test_a_trace_that_was_let_go_is_not_found() -> None:
    made = await traced()
    (trace,) = (await get(app(made), "/state.json")).json["traces"]
    for _ in range(40):
        await made.build([K])
    page = app(made)
    await get(page, "/state.json")
    answer = await get(page, f"/traces/{trace['id']}.html")
    assert (answer.status, "gone" in answer.text) == (404, True)


async def test_a_trace_that_was_shown_can_still_be_had_when_the_builder_has_let_it_go() -> None:
    made = await traced()
    page = app(made)
    (trace,) = (await get(page, "/state.json")).json["traces"]
    for _ in range(40):
        await made.build([K])
    await asyncio.sleep(2)
    state = (await get(page, "/state.json")).json
    assert trace in state["traces"], "it is the slowest"
    assert (await get(page, f"/traces/{trace['id']}.html")).status == 200


async def test_an_id_that_is_no_fit_for_an_address_is_no_trouble() -> None:
    made = builder(Single("k"), trace=True)
    await made.build([K], snapshot_id="../<script>\n?#\ud800")
    page = app(made)
    (trace,) = (await get(page, "/state.json")).json["traces"]
    assert re.fullmatch("[0-9a-f]{12}", trace["id"])
    assert trace["snapshot_id"] == "../<script>\\n?#\\ud800", "as events and logs have it"


async def test_a_trace_is_drawn_on_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []

    def to_text(_: Trace) -> str:
        names.append(threading.current_thread())
        return ""

    page = app(await traced())
    (trace,) = (await get(page, "/state.json")).json["traces"]
    monkeypatch.setattr(Trace, "to_text", to_text)
    await get(page, f"/traces/{trace['id']}.txt")
    assert names != [threading.main_thread()]


async def test_a_look_is_told_on_another_thread_too(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Story.told
    names = []

    def seen(*arguments: Any) -> Any:
        names.append(threading.current_thread())
        return told(*arguments)

    monkeypatch.setattr(Story, "told", seen)
    assert (await get(page_of(), "/state.json")).json["verdict"]
    assert len(names) == 1
    assert names != [threading.main_thread()]


# What it is made with -----------------------------------------------------------------------------


@pytest.mark.parametrize("setting,value,error", [
    ("authorize", "everyone", TypeError), ("title", "", ValueError), ("title", 7, TypeError),
    ("show_values", 1, TypeError), ("show_subjects", "yes", TypeError),
    ("interval_seconds", 0, ValueError), ("interval_seconds", True, TypeError),
])  # fmt: skip
def test_a_wrong_setting_is_refused_by_name(setting: str, value: Any, error: type) -> None:
    with pytest.raises(error, match=setting):
        app(SnapshotBuilder([Single("k")]), **{setting: value})


def test_only_a_builder_can_be_watched() -> None:
    with pytest.raises(TypeError, match="builder must be a SnapshotBuilder"):
        app(object())  # type: ignore[arg-type]  # the very mistake


async def holding(payload: Any, **settings: Any) -> SnapshotBuilder:
    """A builder whose cache holds a value of K."""
    made = builder(Single("k"), **settings)
    await made.publisher.publish(K, payload, source="k")
    return made


async def test_the_repr_of_a_value_holds_up_no_loop() -> None:
    asked = []

    class Slow:
        def __repr__(self) -> str:
            asked.append(threading.current_thread())
            return "slow"

    page = app(await holding(Slow()), show_values=True)
    (shown,) = (await get(page, "/cache.json")).json["values"]
    assert shown["value"] == "slow"
    assert len(asked) == 1
    assert asked != [threading.main_thread()]


async def test_a_repr_that_does_not_end_holds_up_neither_its_viewer_nor_the_end() -> None:
    gate = ThreadGate()

    class Stuck:
        def __repr__(self) -> str:
            gate.pass_()
            return "late"

    page = app(await holding(Stuck()), show_values=True)
    assert (await get(page, "/cache.json")).json == {"error": "TimeoutError"}
    async with Stream(page, scope_of("/cache.json")) as stream:
        await settle()
        stream.task.cancel()
        await settle()
        assert stream.task.cancelled(), "as a server does with it at its end"
    gate.open()


async def test_values_in_memory_are_shown_only_if_asked_for() -> None:
    made = await holding("secret-value")
    hidden = (await get(app(made), "/cache.json")).json
    assert hidden["shows_values"] is False
    assert "value" not in hidden["values"][0]
    assert "secret" not in json.dumps(hidden)
    shown = (await get(app(made, show_values=True), "/cache.json")).json
    assert shown["values"][0]["value"] == "'secret-value'"
    assert shown["values"][0]["key"].startswith("test:k:#")


async def test_a_value_that_has_left_the_cache_is_not_kept_alive_for_having_been_seen() -> None:
    class Payload(dict[str, int]):
        pass

    cache = AsyncMemoryCache()
    page = app(await holding(Payload(), trace=True, cache=cache), show_values=True)
    reference = weakref.ref(cache.store.newest(1)[0].payload)
    async with Stream(page, scope_of("/events")) as viewer:
        await viewer.states(2)
        await get(page, "/cache.json")
        await cache.clear()
        await viewer.states(4)
        gc.collect()
        assert reference() is None


async def test_watching_leaves_no_trace_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "coalestra"):
        async with Stream(page_of(), scope_of("/events")) as viewer:
            await viewer.states(3)
    assert not caplog.records


async def test_watching_counts_as_no_use_and_asks_no_source() -> None:
    source = Single("k")
    made = builder(source, default_policy=FreshnessPolicy(1.0, 5.0))
    await made.build([K])
    before = (await made.health_snapshot()).cache
    await asyncio.sleep(30)
    page = app(made, show_values=True)
    async with Stream(page, scope_of("/events")) as viewer:
        await viewer.states(3)
    await get(page, "/cache.json")
    assert (await made.health_snapshot()).cache == before
    assert len(source.calls) == 1
