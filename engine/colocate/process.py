"""OfflineProcess: the main process's side of the offline worker. Starts it, feeds it, replays what a dead one left undone.

Owns every offline request that is not finished, with the tokens delivered so far; a new worker goes on after them, so nothing
is lost and nothing is delivered twice. Nothing here ever waits for the worker, which may be frozen at any moment.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from engine.build import Memory
from engine.colocate import ipc
from engine.colocate.control import ControlPage
from engine.config import EngineConfig, child_environment
from engine.errors import EngineDead
from engine.loop import Deliver
from engine.types import Abort, FinishReason, Submit, TokenOut

logger = logging.getLogger(__name__)

_MAX_DEATHS = 3  # a request that was in the worker at this many deaths is the likely cause of them
_MAX_EARLY_DEATHS = 5  # in a row before the model was loaded
_BACKOFF_SECONDS = (0.1, 0.5, 2.0, 5.0)


@dataclass(slots=True)
class _Unfinished:
    submit: Submit
    delivered: list[int] = field(default_factory=list)
    deaths: int = 0


class OfflineProcess:
    """Runs `engine.colocate.worker` as a child, again and again if need be.

    `deliver` gets what steps produced, in the reader's thread. `started(pid)` is called for each new child before it does
    anything, so that the child of a busy moment is born frozen; `ended(pid)` after its death.
    """

    def __init__(
        self,
        config: EngineConfig,
        memory: Memory,
        control: ControlPage,
        window_fd: int,
        *,
        deliver: Deliver,
        started: Callable[[int], None],
        ended: Callable[[int], None],
    ) -> None:
        self._start = ipc.Start(config, memory, config.offline_nice)
        self._num_slabs = memory.num_slabs
        self._control = control
        self._window_fd = window_fd
        self._deliver = deliver
        self._started, self._ended = started, ended
        self._lock = threading.Lock()
        self._unfinished: dict[str, _Unfinished] = {}
        self._sender: ipc.Sender | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._closing = threading.Event()
        self._settled = threading.Event()  # the first child is ready, or there will be none
        self.failure: str | None = None  # why there is no worker and will be none
        self.ready = False
        self.restarts = 0
        # The thread that starts children lives as long as they do.
        self._thread = threading.Thread(target=self._supervise, name="offline-supervisor", daemon=True)
        self._thread.start()

    # -- the engine's side

    @property
    def busy(self) -> bool:
        return bool(self._unfinished)

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    def wait_ready(self) -> bool:
        """Wait for the first child to have loaded its model. False if it cannot."""
        self._settled.wait()
        return self.failure is None

    def put(self, command: Submit | Abort) -> None:
        """Hand over a command. Never waits. Raises EngineDead if there will be no worker."""
        with self._lock:
            if self.failure is not None:
                raise EngineDead(f"the offline model is not available: {self.failure}")
            if isinstance(command, Submit):
                self._unfinished[command.id] = _Unfinished(command)
                self._send(ipc.Put(command))
                return
            gone = self._unfinished.pop(command.id, None)
            self._send(ipc.Drop(command.id))
        if gone is not None:
            # The worker may be frozen for long; its answer to the abort would come as late.
            self._deliver([TokenOut(id=command.id, finish_reason=FinishReason.ABORT)])

    def spin(self, on: bool) -> None:
        """Have the worker make visible progress without work, for the gate's probe."""
        with self._lock:
            self._send(ipc.Spin() if on else ipc.Rest())

    def close(self) -> None:
        """Kill the worker; requests that are not finished end nowhere."""
        self._closing.set()
        with self._lock:
            if self._child is not None:
                self._child.kill()
        self._thread.join()

    def _send(self, frame: ipc.Frame) -> None:
        if self._sender is not None:
            self._sender.put(frame)

    # -- the supervisor's thread

    def _supervise(self) -> None:
        early_deaths = 0
        while not self._closing.is_set():
            self.ready = False
            self._run_child()
            early_deaths = 0 if self.ready else early_deaths + 1
            self.ready = False
            if self._closing.is_set():
                break
            if early_deaths >= _MAX_EARLY_DEATHS and self.failure is None:
                self.failure = f"its process died {early_deaths} times before the model was loaded"
            if self.failure is not None:
                logger.error("no offline model: %s", self.failure)
                self._give_up()
                break
            self.restarts += 1
            logger.warning("the offline worker died; starting it again with %d unfinished requests", len(self._unfinished))
            self._fail_suspects()
            self._closing.wait(_BACKOFF_SECONDS[min(early_deaths, len(_BACKOFF_SECONDS) - 1)])
        self._settled.set()

    def _run_child(self) -> None:
        """Start a child, give it all unfinished requests, and deliver what it says until it dies."""
        ours, theirs = socket.socketpair()
        fds = (theirs.fileno(), self._control.fd, self._window_fd)
        command = [sys.executable, "-m", "engine.colocate.worker"]
        command += [str(fds[0]), str(fds[1]), str(self._num_slabs), str(fds[2])]
        with ours:
            with theirs:
                child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=fds, env=child_environment())
            self._started(child.pid)
            sender = ipc.Sender(ours)
            sender.put(self._start)
            with self._lock:
                self._child, self._sender = child, sender
                for entry in self._unfinished.values():
                    sender.put(ipc.Put(replace(entry.submit, resume=tuple(entry.delivered))))
            if self._closing.is_set():
                child.kill()
            self._read(ours)
            with self._lock:
                self._child, self._sender = None, None
            sender.close()
            child.kill()
            child.wait()
            self._ended(child.pid)

    def _read(self, sock: socket.socket) -> None:
        while (frame := ipc.receive(sock)) is not None:
            if isinstance(frame, ipc.Ready):
                self.ready = True
                self._settled.set()
            elif isinstance(frame, ipc.Outs):
                self._take(frame.outs)
            elif isinstance(frame, ipc.Failed):
                if frame.fatal:
                    self.failure = frame.message
                return

    def _take(self, outs: list[TokenOut]) -> None:
        kept = []
        with self._lock:
            for out in outs:
                entry = self._unfinished.get(out.id)
                if entry is None:
                    continue  # aborted meanwhile
                if out.token is not None:
                    entry.delivered.append(out.token)
                if out.finish_reason is not None:
                    del self._unfinished[out.id]
                kept.append(out)
        if kept:
            self._deliver(kept)

    def _fail_suspects(self) -> None:
        with self._lock:
            for entry in self._unfinished.values():
                entry.deaths += 1
            suspects = [key for key, entry in self._unfinished.items() if entry.deaths >= _MAX_DEATHS]
            for key in suspects:
                del self._unfinished[key]
        self._fail(suspects, f"the offline worker died {_MAX_DEATHS} times with this request in it")

    def _give_up(self) -> None:
        with self._lock:
            keys, self._unfinished = list(self._unfinished), {}
        self._fail(keys, f"the offline model is not available: {self.failure}")

    def _fail(self, keys: list[str], error: str) -> None:
        if keys:
            self._deliver([TokenOut(id=key, finish_reason=FinishReason.ERROR, error=error) for key in keys])
