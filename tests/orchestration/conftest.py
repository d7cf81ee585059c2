"""Time on a busy machine decides nothing here."""

from __future__ import annotations

import pytest

from coalestra.concurrency import pace


@pytest.fixture(autouse=True)
def _no_slice_of_real_time_ends_early(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What belongs together stays in one step, however slow the machine.

    The tests of slices themselves, which move the clock by hand, keep the real length.
    """
    if not request.path.name.startswith(("test_bounds", "test_warm_reads")):
        monkeypatch.setattr(pace, "SLICE_SECONDS", 60.0)
