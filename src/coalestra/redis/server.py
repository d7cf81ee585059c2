"""Every call to the server: limited in time, cut short while the server is down, and counted.

Laws:

1. A call takes no longer than the time limit, whatever the server, the network or the client does.
2. After a few failures in a row calls are refused at once; one probe at a time finds out whether
   the server is back.
3. What fails raises `SharedCacheUnavailableError`, or what the server answered.
4. A connection that turns out to be closed, as all are after a restart of the server, gives
   way to another one: every script may run twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from itertools import compress, count
from typing import Any, Final, NamedTuple, cast

from redis import exceptions
from redis.asyncio import Redis, RedisCluster
from redis.client import NEVER_DECODE

from coalestra._endings import look_after
from coalestra.core.errors import CacheCircuitOpenError, CacheUnavailableError, message_of
from coalestra.redis.scripts import whole
from coalestra.resilience import Circuit, CircuitBreakerPolicy, CircuitState, Outcome

Client = Redis | RedisCluster

_UNREACHABLE: Final = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ClusterDownError,
    exceptions.RedisClusterException,
    OSError,
)
_CIRCUIT: Final = CircuitBreakerPolicy(failure_threshold=3, recovery_timeout_seconds=1.0)
_BYTES: Final[dict[str, Any]] = {NEVER_DECODE: True}
_MEASUREMENT_HOLDS_SECONDS: Final = 60.0
_CLOSED_CONNECTIONS: Final = 3
_SCAN_SECONDS: Final = 30.0
_LAST_LOOK: Final = 0.2
"""The part of the time limit that is there to look at the answer only."""


class SharedCacheUnavailableError(CacheUnavailableError, ConnectionError):
    """The server of the shared cache did not answer, or not in time.

    The fault is the server's, the network's or the limit's. Reads go on with the sources; a
    publication or an invalidation has to be made again, as it may not have happened.
    """


class SharedCacheLeftAloneError(SharedCacheUnavailableError, CacheCircuitOpenError):
    """The server of the shared cache has failed repeatedly, and was not asked at all."""


class Call(NamedTuple):
    """One run of a script: the names it works on, and its other arguments."""

    names: Sequence[str]
    arguments: Sequence[Any]


class Server:
    """One server, or cluster of servers, as one client of redis-py reaches it."""

    def __init__(self, client: Client, time_limit_seconds: float) -> None:
        self.client: Client = client
        self.is_cluster: bool = isinstance(client, RedisCluster)
        self.time_limit_seconds: float = time_limit_seconds
        self.counts: dict[str, int] = dict.fromkeys(("calls", "failures", "timeouts", "refused"), 0)
        self.last_error: str | None = None
        self._circuit = Circuit()
        self._turns = count(1).__next__
        self._tasks: set[asyncio.Task[Any]] = set()
        self._offset: tuple[float, float, float] | None = None

    def __repr__(self) -> str:
        failures, calls = self.counts["failures"], self.counts["calls"]
        return f"<Server {self.state.value}, {failures} of {calls} calls failed>"

    @property
    def state(self) -> CircuitState:
        """Whether calls are made (closed), refused (open), or one is to find out (half open)."""
        return self._circuit.state(time.monotonic())

    @property
    def clock_offset_seconds(self) -> float | None:
        """How far the server's clock is ahead of this machine's; None before the first answer."""
        return None if self._offset is None else self._offset[0]

    async def run(self, script: str, calls: Sequence[Call]) -> list[Any]:
        """Run a script for each call, in one round trip; return the answers, errors among them."""
        return cast(list[Any], await self._limited(self._send(script, calls)))

    async def barrier(self) -> None:
        """Return when the server has sent out all news of what it did before.

        It sends what is to be sent before it looks for the next command. So whoever is connected
        to this server has such news in his own machine when the answer is here.
        """
        if not self.is_cluster:
            await self._limited(self.client.execute_command("PING"))

    async def names_of(self, pattern: str) -> list[str]:
        """Return every name that matches, on every server; has a while for that."""
        client: Any = self.client

        async def scanned() -> list[str]:
            found = client.scan_iter(match=pattern, count=500)
            return [name.decode() if isinstance(name, bytes) else name async for name in found]

        return cast(list[str], await self._limited(scanned(), _SCAN_SECONDS))

    async def command(self, *arguments: Any) -> Any:
        """Run one command."""
        return await self._limited(self.client.execute_command(*arguments, **_BYTES))

    def note_clock(self, server_time: float, sent: float, answered: float) -> None:
        """Learn from an answer how far the clocks are apart; the quickest answer tells best."""
        error = max(0.0, answered - sent) / 2
        now = time.monotonic()
        known = self._offset
        if known is None or error <= known[1] or now - known[2] > _MEASUREMENT_HOLDS_SECONDS:
            self._offset = (server_time - (sent + answered) / 2, error, now)

    async def _send(self, script: str, calls: Sequence[Call]) -> list[Any]:
        text, digest = whole(script)
        for left in reversed(range(_CLOSED_CONNECTIONS)):
            try:
                answers = await self._pipelined("EVALSHA", digest, calls)
                break
            except exceptions.ConnectionError as error:
                if not left or isinstance(error, exceptions.AuthenticationError):
                    raise
        unknown = [isinstance(each, exceptions.NoScriptError) for each in answers]
        if any(unknown):
            # A server that is new, or was started again: nothing has been run yet.
            again = list(compress(calls, unknown))
            more = iter(await self._pipelined("EVAL", text, again))
            answers = [
                next(more) if isinstance(each, exceptions.NoScriptError) else each
                for each in answers
            ]
        return answers

    async def _pipelined(self, command: str, script: str, calls: Sequence[Call]) -> list[Any]:
        commands = [
            (command, script, len(call.names), *call.names, *call.arguments) for call in calls
        ]
        if len(commands) == 1:
            try:
                return [await self.client.execute_command(*commands[0], **_BYTES)]
            except exceptions.ResponseError as error:
                return [error]
        client: Any = self.client
        pipeline = client.pipeline(**({} if self.is_cluster else {"transaction": False}))
        for each in commands:
            pipeline.execute_command(*each, **_BYTES)
        return cast(list[Any], await pipeline.execute(raise_on_error=False))

    async def _limited(self, call: Coroutine[Any, Any, Any], seconds: float | None = None) -> Any:
        """Await a call to the server by the rules at the head of this module."""
        circuit = self._circuit
        if circuit.refuses(time.monotonic()):
            call.close()
            self.counts["refused"] += 1
            raise SharedCacheLeftAloneError(
                f"the server of the shared cache is left alone for a moment: {self.last_error}"
            )
        circuit.admit(time.monotonic(), self._turns())
        turn, outcome = circuit.turn, Outcome.ABANDONED
        self.counts["calls"] += 1
        try:
            answer = await self._answer(call, seconds or self.time_limit_seconds)
            outcome = Outcome.SUCCESS
        except SharedCacheUnavailableError as error:
            outcome = Outcome.FAILURE
            self.counts["failures"] += 1
            self.last_error = str(error)
            raise
        except exceptions.RedisError:
            outcome = Outcome.SUCCESS  # an answer, if not the one that was hoped for
            raise
        finally:
            if circuit.turn == turn:
                circuit.report(outcome, time.monotonic(), self._turns(), _CIRCUIT)
        return answer

    async def _answer(self, call: Coroutine[Any, Any, Any], seconds: float) -> Any:
        # In a task of its own: redis-py may swallow a cancellation, and must not keep anybody.
        task = asyncio.ensure_future(call)
        look_after(task, self._tasks)  # what it raises is raised where it is waited for, if it is
        try:
            # A loop that was busy for so long gets time to look at what has arrived meanwhile.
            for share in (1 - _LAST_LOOK, _LAST_LOOK):
                await asyncio.wait({task}, timeout=seconds * share)
                if task.done():
                    break
        finally:
            task.cancel()
        if not task.done():
            self.counts["timeouts"] += 1
            raise SharedCacheUnavailableError(
                f"the server of the shared cache did not answer within {seconds * 1000:g} ms"
            )
        try:
            answer = task.result()
        except (*_UNREACHABLE, asyncio.CancelledError) as error:
            raise _out_of_reach(error) from error
        for each in answer if isinstance(answer, list) else ():
            if isinstance(each, _UNREACHABLE):
                raise _out_of_reach(each) from each
        return answer

    async def close(self) -> None:
        """End the calls under way."""
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self.time_limit_seconds)


def _out_of_reach(error: BaseException) -> SharedCacheUnavailableError:
    text = f"{type(error).__name__}: {message_of(error)}"
    return SharedCacheUnavailableError(f"the server of the shared cache is out of reach: {text}")
