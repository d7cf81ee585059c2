"""An agent gathers its context in stages, all of them under one deadline.

=====  =====================================================  =======================
1      who asks, and what the question is about               required
2      notes on that topic, and what a web search has to say  the search may be slow
3      the prompt, derived from what was found before         from exactly those values
=====  =====================================================  =======================

A turn sees one world, whatever happens meanwhile; the next turn sees the news. Every sentence after
"ok" has been checked; the program fails at the first that does not hold.
"""

from __future__ import annotations

import asyncio
import time

from coalestra import (
    CallableDerivedSource,
    CallableSource,
    FetchContext,
    FreshnessPolicy,
    ResourceKey,
    ResourceResolutionError,
    RetryPolicy,
    Snapshot,
    SnapshotBuilder,
    SnapshotDeadlineExceededError,
    SnapshotRequest,
    SourceResiliencePolicy,
)

BUDGET_SECONDS = 2.0
USER = ResourceKey("user", "profile", "ada")
MEMORY = {"ada": "Ada, an engineer", "tides": "the moon pulls", "steam": "hot water pushes"}
NOTES = {about: ResourceKey("notes", "text", about) for about in ("tides", "steam")}
SEARCH = {about: ResourceKey("web", "search", about) for about in NOTES}
ONE_TRY = SourceResiliencePolicy(retry=RetryPolicy(max_attempts=1))  # else timeouts are retried


class Agent:
    """A memory that answers at once, a web search that may not, and a composer of prompts."""

    def __init__(self, *, search_seconds: float | None) -> None:
        self.builder = SnapshotBuilder(
            [
                CallableSource(
                    name="memory",
                    priority=50,
                    supports=lambda key: key.namespace in {"user", "question", "notes"},
                    fetcher=self.remember,
                ),
                CallableSource(
                    name="web",
                    priority=100,
                    supports=lambda key: key.namespace == "web",
                    fetcher=self.search,
                    timeout_seconds=search_seconds,
                    resilience_policy=ONE_TRY,
                ),
                CallableDerivedSource(
                    name="composer",
                    priority=100,
                    supports=lambda key: key.namespace == "prompt",
                    dependencies=self.ingredients,
                    deriver=self.compose,
                    run_sync_in_thread=False,  # joining strings needs no thread
                ),
            ],
            default_policy=FreshnessPolicy(ttl_seconds=60.0, max_stale_seconds=60.0),
        )

    async def remember(self, key: ResourceKey, context: FetchContext) -> str:
        if key.namespace == "question":
            return "tides" if "sea" in key.subject else "steam"
        return MEMORY[key.subject]

    async def search(self, key: ResourceKey, context: FetchContext) -> str:
        if key.subject == "tides":
            await asyncio.sleep(60.0)  # will not be back in time
        return f"a page about {key.subject}"

    def ingredients(self, key: ResourceKey) -> list[ResourceKey]:
        parts = [USER, NOTES[key.subject]]
        return [*parts, SEARCH[key.subject]] if key.qualifier("search") == "yes" else parts

    def compose(self, key: ResourceKey, known: Snapshot, context: FetchContext) -> str:
        return "; ".join(str(value.value) for value in known.values())

    async def turn(self, question: str, *, news: str = "") -> tuple[Snapshot, ResourceKey]:
        """Gather the context of a question; return it, and the key of the prompt in it."""
        topic = ResourceKey("question", "topic", question)
        async with self.builder.session(deadline_seconds=BUDGET_SECONDS) as session:
            about = (await session.resolve([USER, topic])).value(topic, str)
            request = SnapshotRequest(required=[NOTES[about]], optional=[SEARCH[about]])
            found = await session.resolve_request(request)
            if news:
                await self.builder.publisher.publish(NOTES[about], news, source="newsroom")
            # What a value is made of must be read off its key, so these are two prompts.
            searched = {"search": "yes" if SEARCH[about] in found else "no"}
            wanted = ResourceKey("prompt", "text", about, searched)
            return await session.resolve([wanted], strict=False), wanted


def too_late(error: Exception | None) -> bool:
    """Whether the deadline is to blame, for the key as a whole or for one of its sources."""
    if isinstance(error, ResourceResolutionError):
        return error.failures[-1].error_type == "SnapshotDeadlineExceededError"
    return isinstance(error, SnapshotDeadlineExceededError)


def tell(sentence: str, is_so: bool) -> None:
    """Print what the reader is told, or end the program if it is not so."""
    if not is_so:
        raise SystemExit(f"NOT AS TOLD: {sentence}")
    print(f"ok  {sentence}")


async def main() -> None:
    agent = Agent(search_seconds=0.25)
    async with agent.builder:
        seen, wanted = await agent.turn("how does steam work")
        text = seen.value(wanted, str)
        print(f"    {text}")
        tell("a quick search is in the prompt", "a page about steam" in text)
        parts = {key: seen[key].version for key in (USER, NOTES["steam"], SEARCH["steam"])}
        tell("it is made of the very values seen", seen[wanted].dependency_versions == parts)
        seen, wanted = await agent.turn("why does the sea rise", news="the sun pulls too")
        text = seen.value(wanted, str)
        print(f"    {text}\n    {seen.error_for(SEARCH['tides'])}")
        tell("a search that is too slow is left out", text == "Ada, an engineer; the moon pulls")
        tell("what came in meanwhile is news for the next turn only", "sun" not in text)
        seen, wanted = await agent.turn("why does the sea fall")
        tell("there it is", seen.value(wanted, str) == "Ada, an engineer; the sun pulls too")
    patient = Agent(search_seconds=None)
    async with patient.builder:
        began = time.monotonic()
        seen, wanted = await patient.turn("why does the sea rise")
        tell("without a limit of its own, the search uses up the turn", wanted not in seen)
        late = [key for key in seen.errors if too_late(seen.error_for(key))]
        tell("the deadline is named as the reason", late == [SEARCH["tides"], wanted])
        tell("what was found before is there", seen.value(NOTES["tides"], str) == "the moon pulls")
        tell("and the turn ended in time", time.monotonic() - began < 2 * BUDGET_SECONDS)


if __name__ == "__main__":
    asyncio.run(main())
