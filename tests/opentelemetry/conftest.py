"""Providers that keep what they get in memory."""

from __future__ import annotations

import pytest

pytest.importorskip("opentelemetry.sdk")

from tests.opentelemetry.memory import Meters, Spans


@pytest.fixture
def spans() -> Spans:
    """A tracer provider, and the spans that have ended on it."""
    return Spans()


@pytest.fixture
def meters() -> Meters:
    """A meter provider, and what its reader reads."""
    return Meters()
