"""CudaSharing: the main process's side of a GPU that two models share. Passes the slabs to each worker, takes its grant, and
knows which gate it allows.

Between the two runs one SOCK_SEQPACKET socket a worker: descriptors of all slabs go over, and when its model is loaded
either a grant of its channels comes back or the reason why there is none. Not yet run on a GPU.
"""

from __future__ import annotations

import logging
import math
import socket
import threading
from collections.abc import Callable

from engine.colocate.control import ControlPage
from engine.colocate.cuda_gate import REMAP_LIMIT_SECONDS, AgentGate, GrantedGate, StreamGate, open_granted
from engine.colocate.cuda_slabs import OnlineWindow
from engine.colocate.gate import Gate, LayerGate, NoGate, rungs
from engine.errors import InvalidConfig
from engine.memory.cuda_vmm import CudaWindow, VmmError
from engine.memory.window import Window

logger = logging.getLogger(__name__)

_GRANT_SECONDS = 5.0  # the worker sends it before it says that it is ready


class CudaSharing:
    """`colocate.device.SharedDevice` on the current CUDA device, around the window that the online model runs in."""

    punch: Callable[[int], None] | None = None  # a worker lets go by itself, before online maps the slab

    def __init__(self, window: Window, control: ControlPage, end_worker: Callable[[], None]) -> None:
        assert isinstance(window, CudaWindow)
        self._slabs = window
        self._control = control
        self._online = OnlineWindow(window, control, window.synchronize, end_worker)
        self.window: Window = self._online
        self._ours: socket.socket | None = None
        self._theirs: socket.socket | None = None
        self._sender: threading.Thread | None = None
        self._is_ready = False
        self._granted: GrantedGate | None = None

    # -- gates

    def rungs(self, wanted: str) -> tuple[str, ...]:
        return rungs(wanted, "cuda")

    def ways(self, rung: str) -> tuple[str, ...]:
        """Main switches the channels itself if it may: that needs nothing of the worker's interpreter."""
        if rung != "channel":
            return (rung,)
        return ("granted", "channel") if self._granted is not None else ("channel",)

    def gate(self, way: str, pid: int | None) -> Gate:
        """A worker that still loads has no agent and no layers: it stands before it begins, as on the rung `layer`."""
        if way == "none":
            return NoGate()
        if not self._is_ready or way == "layer":
            return LayerGate(self._control)
        if way == "stream":
            return StreamGate(self._control)
        if way == "granted" and self._granted is not None:
            return self._granted
        return AgentGate(self._control)

    def patience(self, way: str) -> float:
        """Mapping may turn out to need the channels that are off; then the worker's watchdog ends the freeze after so long."""
        return REMAP_LIMIT_SECONDS if way in ("granted", "channel") else math.inf

    # -- a worker's life, in the supervisor's thread

    def worker_fd(self) -> int:
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return self._theirs.fileno()

    def started(self) -> None:
        assert self._ours is not None and self._theirs is not None
        self._theirs.close()
        self._sender = threading.Thread(target=self._send, args=(self._ours,), name="slab-sender", daemon=True)
        self._sender.start()

    def _send(self, sock: socket.socket) -> None:
        try:
            self._slabs.send(sock)
        except (OSError, VmmError) as error:  # most often: the worker is dead, which its supervisor sees too
            logger.warning("the offline worker did not get its memory: %s", error)

    def ready(self) -> None:
        assert self._ours is not None and self._sender is not None
        self._sender.join()
        self._ours.settimeout(_GRANT_SECONDS)
        try:
            self._granted = open_granted(self._control, self._ours)
        except (OSError, InvalidConfig) as error:
            logger.info("the channels are the worker's own to switch: %s", error)
        self._is_ready = True

    def gone(self) -> None:
        """Its descriptors here would keep its GPU memory, and its channels, alive."""
        self._is_ready = False
        if self._granted is not None:
            self._granted.close()
            self._granted = None
        self._online.worker_ended()
        for sock in (self._ours, self._theirs):
            if sock is not None:
                sock.close()
        if self._sender is not None:
            self._sender.join()
        self._ours = self._theirs = self._sender = None

    def close(self) -> None:
        """The worker is gone and so is the engine that used the window."""
        self._online.close()
