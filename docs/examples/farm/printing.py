"""What the reader sees: tables of snapshots, the state of health, and sentences that are true."""

from __future__ import annotations

from coalestra import BuilderHealthAssessment, Snapshot, SnapshotValue


def chapter(title: str) -> None:
    print(f"\n=== {title}")


def show(snapshot: Snapshot) -> None:
    """Print a snapshot as a table: value, source, age, and how it was obtained."""
    print(f"    {'resource':22} {'mm':>5}  {'source':8}  {'age':>6}  how it was obtained")
    for key, value in snapshot.items():
        age = f"{value.age_seconds / 60:.0f} min"
        print(f"    {key!s:22} {value.value:5.1f}  {value.source:8}  {age:>6}  {how(value)}")
    print()


def how(value: SnapshotValue[float]) -> str:
    """Tell from its provenance how a value came to be in a snapshot."""
    facts = value.metadata
    if "fallback_error" in facts:
        return f"STALE, because {why(facts['fallback_error'])}"
    if value.dependency_versions:
        inputs = f"STALE {facts['stale_inputs']}" if facts["stale_inputs"] else "all fresh"
        return f"derived from {len(value.dependency_versions)} values, {inputs}"
    if facts.get("published"):
        return "published as an event"
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
