"""Virtual time, clocks, gates and leak checks for the tests."""

import importlib

from tests.support.cancellation import cancel_at_every_await
from tests.support.clocks import EPOCH, LoopClock, ManualClock
from tests.support.gates import Gate, ThreadGate
from tests.support.leaks import begun, no_leaks, settle
from tests.support.running import Leak, Panic, drop, lines_run, run_real, run_virtual
from tests.support.virtual_loop import Deadlock, ShuffledLoop, VirtualLoop, loop_turn, taking

PUBLIC: list[str] = importlib.import_module("coalestra").__all__
"""Every name that the package exports; type checkers see the names themselves instead."""

__all__ = [
    "EPOCH", "PUBLIC", "Deadlock", "Gate", "Leak", "LoopClock", "ManualClock", "Panic",
    "ShuffledLoop", "ThreadGate", "VirtualLoop", "begun", "cancel_at_every_await", "drop",
    "lines_run", "loop_turn", "no_leaks", "run_real", "run_virtual", "settle", "taking",
]  # fmt: skip
