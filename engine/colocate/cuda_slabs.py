"""Slabs of GPU memory that change hands: the windows of both processes, and the order in which they may map.

A slab's handle exists in two processes, and no driver keeps them apart. So at any time at most one of them maps it:

    freeze → owner and epoch flip in the control page → the worker's address points at the sink → `Word.LET_GO` says so
           → online maps the slab → ... → thaw

`OfflineWindow` lets go, in the worker; `OnlineWindow` waits for that, in the main process. Where the channels are off this is
a matter of 0.1 ms a slab, whatever the worker was computing; on the other rungs the worker first reaches its next layer.
What a slab held is for the scheduler to forget, by its epoch; here only memory moves. Of an offline worker only kernels may
touch the window, never a copy engine: a freeze leaves copies on, and one that met a hole would cost the worker its context
(its host tier packs pages by a kernel first and copies the pack, `kernels.cuda_host_store`). Not yet run on a GPU.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import torch

from engine.clock import Clock, MonotonicClock
from engine.colocate.control import ControlPage, Word
from engine.memory.window import Window
from engine.types import Tenant

logger = logging.getLogger(__name__)

_PATIENCE = 2.0  # seconds; letting go of 10 GiB in slabs of 64 MiB should take 14 ms
_POLL_SECONDS = 20e-6


class OfflineWindow:
    """The worker's window. `map` and `unmap` come from its engine's thread, `let_go` from whoever made it stand still.

    `drain` waits until the device has done all that was launched, whatever the gate says. It comes before every change in
    the engine's thread, since a kernel of a step that lost its pages may still touch the slab's address.
    """

    def __init__(self, window: Window, control: ControlPage, drain: Callable[[], None]) -> None:
        self._window = window
        self._control = control
        self._drain = drain
        self._lock = threading.Lock()
        self._mapped: set[int] = set()
        # From here on main waits for this process; all that it sees as offline's it may map, and nothing else.
        self.let_go()

    @property
    def num_slabs(self) -> int:
        return self._window.num_slabs

    @property
    def slab_bytes(self) -> int:
        return self._window.slab_bytes

    @property
    def tensor(self) -> torch.Tensor:
        return self._window.tensor

    @property
    def is_behind(self) -> bool:
        """Whether slabs may be gone that are still mapped here."""
        return self._control[Word.LET_GO] != self._control[Word.GENERATION]

    def map(self, slab: int) -> None:
        """Map the slab, unless it is online's again by now: then a later look at the control page takes it for lost."""
        self._drain()
        with self._lock:
            if slab not in self._mapped and self._is_ours(slab):
                self._window.map(slab)
                self._mapped.add(slab)

    def unmap(self, slab: int) -> None:
        """Point the slab's address at the sink, if that has not happened yet."""
        if slab in self._mapped:
            self._drain()
        with self._lock:
            self._point_at_sink(slab)

    def let_go(self) -> None:
        """Point the address of every lost slab at the sink, and say so. No kernel of this process may be running."""
        with self._lock:
            generation = self._control[Word.GENERATION]  # read first: what changes from here on makes us behind again
            for slab in sorted(self._mapped):
                if not self._is_ours(slab):
                    self._point_at_sink(slab)
            self._control[Word.LET_GO] = generation

    def drain_and_let_go(self) -> None:
        """The same for the engine's thread, between two layers: run out what was launched, and launch nothing meanwhile."""
        self._drain()
        self.let_go()

    def close(self) -> None:
        with self._lock:
            self._mapped.clear()
            self._window.close()

    def _is_ours(self, slab: int) -> bool:
        return self._control.slab(slab)[0] is Tenant.OFFLINE

    def _point_at_sink(self, slab: int) -> None:
        if slab in self._mapped:
            self._window.unmap(slab)
            self._mapped.remove(slab)


class OnlineWindow:
    """The main process's window: a slab is mapped here only when the worker has let go of it.

    A worker that does not within `patience` seconds is stuck: `end_worker` kills it and returns when its process is gone, and
    the driver has taken back its mappings. `drain` waits until the device has done what this process launched.
    """

    def __init__(
        self,
        window: Window,
        control: ControlPage,
        drain: Callable[[], None],
        end_worker: Callable[[], None],
        clock: Clock | None = None,
        patience: float = _PATIENCE,
    ) -> None:
        self._window = window
        self._control = control
        self._drain = drain
        self._end_worker = end_worker
        self._clock = clock or MonotonicClock()
        self._patience = patience

    @property
    def num_slabs(self) -> int:
        return self._window.num_slabs

    @property
    def slab_bytes(self) -> int:
        return self._window.slab_bytes

    @property
    def tensor(self) -> torch.Tensor:
        return self._window.tensor

    def map(self, slab: int) -> None:
        """After the slab became online's in the control page. No kernel of ours knows its address, so nothing is drained."""
        if not self._wait_let_go():
            logger.error("the offline worker keeps GPU memory that it has lost; ending it")
            self._end_worker()
            self.worker_ended()
        self._window.map(slab)

    def unmap(self, slab: int) -> None:
        """Before the slab becomes offline's. A step launched ahead may still write to its pages, so this waits for it."""
        self._drain()
        self._window.unmap(slab)

    def worker_ended(self) -> None:
        """The worker's process is gone, and the next has not been started: nobody else maps anything."""
        self._control[Word.LET_GO] = 0

    def close(self) -> None:
        self._window.close()

    def _wait_let_go(self) -> bool:
        generation = self._control[Word.GENERATION]
        deadline = self._clock.now() + self._patience
        while 0 != self._control[Word.LET_GO] < generation:
            if self._clock.now() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True
