"""What the main process does differently on each device that two models share: how memory moves, and which gates there are.

`HostSharing` is the CPU's; `cuda_sharing` has the GPU's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from engine.build import Memory
from engine.colocate.control import ControlPage
from engine.colocate.gate import Gate, LayerGate, NoGate, ProcessGate, rungs
from engine.memory.window import HostWindow, Window


class SharedDevice(Protocol):
    """One device of two processes, as the main one sees it. A worker's life: `worker_fd`, `started`, `ready`, `gone`.

    Its gates go by names: those of `rungs`, best first; one rung may have several ways (`ways`).
    """

    window: Window  # online's: the lender maps and unmaps it
    punch: Callable[[int], None] | None  # takes a slab's memory from a worker that stands still, off the online path

    def rungs(self, wanted: str) -> tuple[str, ...]:
        """What to try for what --gate says. Raises InvalidConfig for a gate of another device."""
        ...

    def ways(self, rung: str) -> tuple[str, ...]: ...

    def gate(self, way: str, pid: int | None) -> Gate:
        """The gate by that name, for the worker as it is now: one that cannot do it yet gets what it can do."""
        ...

    def patience(self, way: str) -> float:
        """Seconds a reclaim under that gate may take; one that took longer had to wait until the gate opened."""
        ...

    def worker_fd(self) -> int:
        """A descriptor for the next worker to inherit: its way to the memory."""
        ...

    def started(self) -> None:
        """That worker has its descriptor."""
        ...

    def ready(self) -> None:
        """It has loaded its model."""
        ...

    def gone(self) -> None:
        """Its process is no more."""
        ...

    def close(self) -> None: ...


class HostSharing:
    """`SharedDevice` in host memory: each process has a window of its own, and main punches holes into the worker's."""

    def __init__(self, memory: Memory, window: Window, control: ControlPage) -> None:
        self.window = window
        self._control = control
        self._victim = HostWindow(memory.num_slabs, memory.slab_bytes)
        self.punch: Callable[[int], None] | None = self._victim.punch

    def rungs(self, wanted: str) -> tuple[str, ...]:
        return rungs(wanted, "cpu")

    def ways(self, rung: str) -> tuple[str, ...]:
        return (rung,)

    def gate(self, way: str, pid: int | None) -> Gate:
        if way == "process" and pid is not None:
            return ProcessGate(self._control, pid)
        return LayerGate(self._control) if way == "layer" else NoGate()

    def patience(self, way: str) -> float:
        return math.inf

    def worker_fd(self) -> int:
        return self._victim.fileno()

    def started(self) -> None:
        pass

    def ready(self) -> None:
        pass

    def gone(self) -> None:
        pass

    def close(self) -> None:
        self._victim.close()


def shared_device(
    name: str, memory: Memory, window: Window, control: ControlPage, end_worker: Callable[[], None]
) -> SharedDevice:
    """For a resolved device name. `end_worker` kills the worker and returns when its process is gone."""
    if name == "cpu":
        return HostSharing(memory, window, control)
    from engine.colocate.cuda_sharing import CudaSharing

    return CudaSharing(window, control, end_worker)
