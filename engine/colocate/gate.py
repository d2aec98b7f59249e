"""Gates: stop and restart the offline worker's compute from outside. The rungs of a CPU; `cuda_gate` has those of a GPU.

A gate says what it asks of the worker; whether the worker really stands still is shown by `probe`, never taken from a success
code: a word that the worker advances must stop advancing. Freezing is idempotent and never waits for the worker.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from engine.colocate.control import ControlPage, Word
from engine.errors import InvalidConfig


class Freeze(IntEnum):
    """What `Word.FROZEN` says. The worker's processor stands still for each of them; on a GPU the device does so by ..."""

    NO = 0
    LAYER = 1  # nothing more (and what ProcessGate says)
    STREAM = 2  # its stream barrier
    CHANNEL = 3  # channels that the worker's agent switches off
    BY_MAIN = 4  # channels that main switches, and that may be on or off
    HELD_BY_MAIN = 5  # channels that main has switched off; this plus n for the n-th time


class Gate(Protocol):
    """Freeze and thaw return at once, may be repeated and may come from any thread, one at a time."""

    name: str

    def freeze(self) -> None: ...

    def wait_stopped(self, seconds: float) -> None:
        """After `freeze`: wait until the worker stands still, as far as that can be known at once; `seconds` at most."""
        ...

    def keep(self) -> None:
        """Ten times a second while frozen: for gates whose hold is a lease."""
        ...

    def thaw(self) -> None: ...


class ProcessGate:
    """SIGSTOP and SIGCONT: stops the worker in the middle of whatever it computes.

    Made while the worker is an unreaped child; from then on it signals that process or none, whoever gets its number later.
    """

    name = "process"

    def __init__(self, control: ControlPage, pid: int) -> None:
        self._control = control
        self._pidfd = os.pidfd_open(pid)
        weakref.finalize(self, os.close, self._pidfd)

    def freeze(self) -> None:
        # The word goes first: a guardian that looks in between sees a frozen worker with a living owner.
        self._control[Word.FROZEN] = Freeze.LAYER
        self._signal(signal.SIGSTOP)

    def wait_stopped(self, seconds: float) -> None:
        """Until the kernel has stopped all of the worker's threads. Only works for a child of this process."""
        deadline = time.monotonic() + seconds  # noqa: TID251
        stopped = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
        with suppress(ChildProcessError):
            while os.waitid(os.P_PIDFD, self._pidfd, stopped) is None and time.monotonic() < deadline:  # noqa: TID251
                time.sleep(0)

    def keep(self) -> None:
        pass

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)
        self._control[Word.FROZEN] = Freeze.NO

    def _signal(self, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return  # it died; whoever waits for it will notice


class LayerGate:
    """A word of the control page that the worker polls at each layer boundary: stops it within one layer."""

    name = "layer"

    def __init__(self, control: ControlPage) -> None:
        self._control = control

    def freeze(self) -> None:
        self._control[Word.FROZEN] = Freeze.LAYER

    def wait_stopped(self, seconds: float) -> None:
        pass  # it ends its layer first; whoever waited for that would wait longer than its own first layer takes

    def keep(self) -> None:
        pass

    def thaw(self) -> None:
        self._control[Word.FROZEN] = Freeze.NO


class NoGate:
    """Lets the worker run always: the baseline, and what is left when no rung works."""

    name = "none"

    def freeze(self) -> None:
        pass

    def wait_stopped(self, seconds: float) -> None:
        pass  # it never stops

    def keep(self) -> None:
        pass

    def thaw(self) -> None:
        pass


_RUNGS = {"cpu": ("process", "layer", "none"), "cuda": ("channel", "stream", "layer", "none")}


def rungs(wanted: str, device: str) -> tuple[str, ...]:
    """The gates to try, best first, for what --gate says. Raises InvalidConfig for one that cannot stop work on the device."""
    known = _RUNGS["cuda" if device == "cuda" else "cpu"]
    if wanted != "auto" and wanted not in known:
        why = ": a GPU goes on when its process is stopped" if wanted == "process" else ""
        raise InvalidConfig(f"--gate {wanted} is not for the device {device}{why}; choose one of auto, {', '.join(known)}")
    return known if wanted == "auto" else (wanted,)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Whether the gate stopped the worker every time, and how fast (seconds, one entry per trial)."""

    gate: str
    works: bool
    freeze: tuple[float, ...]
    thaw: tuple[float, ...]

    def __str__(self) -> str:
        if not self.works:
            return f"gate {self.gate}: does not stop the worker"
        return (
            f"gate {self.gate}: freeze p50 {_ms(self.freeze, 0.5)}, p99 {_ms(self.freeze, 0.99)}; "
            f"thaw p50 {_ms(self.thaw, 0.5)}, p99 {_ms(self.thaw, 0.99)} ({len(self.freeze)} trials)"
        )


def _ms(samples: tuple[float, ...], quantile: float) -> str:
    ordered = sorted(samples)
    return f"{ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] * 1e3:.3f} ms" if ordered else "-"


def probe(gate: Gate, control: ControlPage, *, trials: int = 20, hold: float = 0.005) -> ProbeResult:
    """Freeze and thaw a worker that is making progress (it spins while probed) and watch its progress word.

    A trial counts as stopped if the word does not move for `hold` seconds after the freeze has settled, or else for a longer
    time after that. Freeze latency is from the call to the last progress the worker made, thaw latency from the call to its
    first progress after.
    """
    freezes: list[float] = []
    thaws: list[float] = []
    works = _wait(lambda: _moving(control), 1.0)
    while works and len(freezes) < trials:
        called = time.monotonic_ns()
        gate.freeze()
        time.sleep(hold)
        # On a busy machine a worker, or its agent, may get a processor only now, and ends the layer it is in before it looks.
        stopped = any(_still(control, factor * hold) for factor in (1, 4, 16))
        before, stopped_at = control[Word.PROGRESS], control[Word.PROGRESS_NS]
        thawed = time.monotonic_ns()
        gate.thaw()
        resumed_at = _next_progress(control, before)
        # A worker that never moves again was not stopped by the gate: it is dead, or stuck.
        works = stopped and _wait(lambda: _moving(control), 1.0)
        freezes.append(max(0, stopped_at - called) / 1e9)
        thaws.append(max(0, resumed_at - thawed) / 1e9)
    return ProbeResult(gate.name, works, tuple(freezes), tuple(thaws))


def cost_of(result: ProbeResult) -> float:
    """Seconds one preemption costs: a typical freeze plus a typical thaw."""
    return statistics.median(result.freeze) + statistics.median(result.thaw) if result.freeze else 0.0


def _next_progress(control: ControlPage, before: int) -> int:
    """Monotonic ns of the progress seen first after `before` changes (or of the last one, if it does not within a second)."""
    _wait(lambda: control[Word.PROGRESS] != before, 1.0)
    return control[Word.PROGRESS_NS]


def _moving(control: ControlPage) -> bool:
    return not _still(control, 0.001)


def _still(control: ControlPage, seconds: float) -> bool:
    before = control[Word.PROGRESS]
    time.sleep(seconds)
    return control[Word.PROGRESS] == before


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds  # noqa: TID251
    while not condition():
        if time.monotonic() >= deadline:  # noqa: TID251
            return False
    return True
