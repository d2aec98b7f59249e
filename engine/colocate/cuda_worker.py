"""CudaSide: what an offline worker does on a GPU beside what every worker does. Puts the barrier between its layers, takes over
the slabs that main made, and starts the agent that switches its channels and lets go of lost slabs.

The order of a start is what makes it safe: main waits for this process only from the moment its agent can answer (`open`), and
an agent may look before there is a slab to let go of. Not yet run on a GPU.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import AbstractContextManager

from engine.colocate.control import ControlPage
from engine.colocate.cuda_gate import (
    Agent,
    CudaDevice,
    DeviceSide,
    grant,
    open_barrier,
    open_channels,
    refuse_grant,
)
from engine.colocate.cuda_slabs import OfflineWindow
from engine.memory.cuda_vmm import CudaVmm, CudaWindow, receive
from engine.memory.window import Window


class CudaSide:
    """`colocate.worker.WorkerDevice` on the current CUDA device. `sock` is the other end of `CudaSharing`'s."""

    loads_in_turn = True  # no rung stops a process that has no agent yet

    def __init__(self, control: ControlPage, sock: socket.socket) -> None:
        self._control = control
        self._sock = sock
        self._device = CudaDevice()
        self._barrier = open_barrier(self._device.stream())
        self._side = DeviceSide(control, self._barrier, self._device)
        self._agent: Agent | None = None

    def make_window(self, num_slabs: int, slab_bytes: int) -> Window:
        driver = CudaVmm(self._device.index)
        return CudaWindow(num_slabs, slab_bytes, driver, receive(self._sock, num_slabs, driver))

    def launching(self) -> AbstractContextManager[None]:
        return self._side.launching()

    def open(self, window: Window, call: Callable[[Callable[[], None]], None]) -> Window:
        channels = open_channels(self._control)
        slabs = OfflineWindow(window, self._control, self._side.drain)
        self._side.slabs = slabs
        self._agent = Agent(
            self._control, self._barrier, channels, slabs, lambda: call(slabs.drain_and_let_go), self._side.launch_lock
        )
        self._agent.start()
        if channels is None:
            refuse_grant(self._sock)
        else:
            grant(self._sock, channels)
        return slabs

    def stand(self) -> None:
        self._side.stand()

    def spin(self) -> bool:
        return self._side.spin()
