"""What the reader sees: tables of snapshots, the state of health, and sentences that are true."""

from __future__ import annotations

from collections.abc import Sequence

from coalestra import BuilderHealthAssessment, ResourceKey, Snapshot, SnapshotValue


def chapter(title: str) -> None:
    print(f"\n=== {title}")


def show(snapshot: Snapshot, keys: Sequence[ResourceKey], *, look_at: str) -> None:
    """Print some values of a snapshot as a table, under a word on what to see in it."""
    print(f"  look: {look_at}")
    print(f"    {'value':21} {'mm':>5}  {'source':8}  {'age':>6}  how it came here")
    for key in keys:
        value = snapshot[key]
        mark = "!" if value.stale else " "
        age = f"{value.age_seconds / 60:.0f} min"
        name = f"{key.name} of the {key.subject}"
        print(f"  {mark} {name:21} {value.value:5.1f}  {value.source:8}  {age:>6}  {how(value)}")


def how(value: SnapshotValue[float]) -> str:
    """Tell from its provenance how a value came to be in a snapshot."""
    facts = value.metadata
    if "fallback_error" in facts:
        return f"STALE: the last one known, because {why(facts['fallback_error'])}"
    if value.stale_key:
        return f"STALE: computed just now, but from {value.stale_key.name} that is"
    if value.dependency_versions:
        return f"computed from {len(value.dependency_versions)} others, all fresh"
    if facts.get("published"):
        return "told by an event; nobody asked"
    if value.from_cache:
        return "from the cache"
    return f"fetched, attempt {value.attempts}"


def why(error: str) -> str:
    """Shorten the sentence of an error to the name of its cause."""
    names = [word.partition("(")[0] for word in error.split() if "Error(" in word]
    return " ".join(names)


def show_health(verdict: BuilderHealthAssessment) -> None:
    found = [f"{finding.reason.value} of {finding.component}" for finding in verdict.findings]
    print("    health:", ", ".join([verdict.severity.value, *found]))


def tell(sentence: str, is_so: bool) -> None:
    """Print what the reader is told, or end the program if it is not so."""
    if not is_so:
        raise SystemExit(f"NOT AS TOLD: {sentence}")
    print(f"ok  {sentence}")
