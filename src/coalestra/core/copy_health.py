"""What one component's copying of payloads looks like from outside."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PayloadCopyHealth:
    """The state of one component's payload copies at one moment.

    Counters run since the component was made. A copy whose waiter gave up counts as timed out,
    and later as completed or failed too, because its thread cannot be stopped.

    Attributes:
        run_in_thread: whether copies may be made in threads.
        max_concurrency: how many threads may copy at once.
        active_copies, peak_active_copies: copies under way now, and at most so far.
        waiting_for_capacity, peak_waiting_for_capacity: copies waiting for a thread.
        started_count, completed_count, failure_count: copies begun, done, and failed.
        timeout_count: waiters whose time ran out during a copy.
        capacity_timeout_count: waiters whose time ran out before one began.
        capacity_wait_count: copies that had to wait for a thread.
        average_wait_ms, max_wait_ms: how long they waited, in milliseconds.
        average_duration_ms, max_duration_ms: how long copies took, in milliseconds.
        accepting_copies: False once closing has begun.
        shutdown_started, shutdown_complete: whether closing has begun, and whether it is over.
        shutdown_incomplete: closing gave up waiting, and copies are still active.
        shutdown_timeout_count: how often closing gave up waiting.
        active_at_last_shutdown_timeout: how many copies it left behind the last time.
    """

    run_in_thread: bool
    max_concurrency: int
    active_copies: int = 0
    waiting_for_capacity: int = 0
    peak_active_copies: int = 0
    peak_waiting_for_capacity: int = 0
    started_count: int = 0
    completed_count: int = 0
    failure_count: int = 0
    timeout_count: int = 0
    capacity_timeout_count: int = 0
    capacity_wait_count: int = 0
    average_wait_ms: float = 0.0
    max_wait_ms: float = 0.0
    average_duration_ms: float = 0.0
    max_duration_ms: float = 0.0
    accepting_copies: bool = True
    shutdown_started: bool = False
    shutdown_complete: bool = False
    shutdown_incomplete: bool = False
    shutdown_timeout_count: int = 0
    active_at_last_shutdown_timeout: int = 0
