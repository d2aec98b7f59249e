"""OfflineProcess: the main process's side of the offline worker. Starts it, feeds it, replays what a dead one left undone.

Owns every offline request that is not finished, with the tokens delivered so far; a new worker goes on after them, so nothing
is lost and nothing is delivered twice. Nothing here ever waits for the worker, which may be frozen at any moment.
"""

from __future__ import annotations

import logging
import signal
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
from engine.timeline import Timeline
from engine.types import Abort, FinishReason, Submit, TokenOut

logger = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "engine.colocate.worker")
_SUSPICIOUS = 2  # a request that saw so many deaths since its last token is tried alone
_MAX_DEATHS = 4  # and is their cause after so many, the last ones alone
_MAX_EARLY_DEATHS = 3  # in a row, if the model was never loaded
_BACKOFF_SECONDS = (0.1, 0.5, 2.0, 5.0, 30.0)


@dataclass(slots=True)
class _Unfinished:
    submit: Submit
    delivered: list[int] = field(default_factory=list)
    deaths: int = 0  # of loaded workers that had it, since its last token


class OfflineProcess:
    """Runs `engine.colocate.worker` as a child, again and again if need be.

    `deliver` gets what steps produced, in the reader's thread. `memory_fd()` is a descriptor for the next child. `started(pid)`
    is called for each new child before it does anything, so that the child of a busy moment is born frozen; `ready()` when it
    has loaded its model; `ended(pid)` when it is as good as dead, `gone()` when its process is no more.
    """

    def __init__(
        self,
        config: EngineConfig,
        memory: Memory,
        control: ControlPage,
        memory_fd: Callable[[], int],
        *,
        deliver: Deliver,
        started: Callable[[int], None],
        ready: Callable[[], None],
        ended: Callable[[int], None],
        gone: Callable[[], None],
        timeline: Timeline,
    ) -> None:
        self._start = ipc.Start(config, memory)
        self._num_slabs = memory.num_slabs
        self._control = control
        self._memory_fd = memory_fd
        self._deliver = deliver
        self._started, self._made_ready, self._ended, self._gone = started, ready, ended, gone
        self._timeline = timeline
        self._lock = threading.Lock()
        self._unfinished: dict[str, _Unfinished] = {}
        self._paused = False
        self._suspect: str | None = None  # the request that the worker has alone, the others being held back
        self._sender: ipc.Sender | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._closing = threading.Event()
        self._childless = threading.Event()
        self._childless.set()
        self._settled = threading.Event()  # the child is ready, or there will be none
        self.failure: str | None = None  # why there is no worker and will be none
        self.ready = False
        self.restarts = 0
        # The thread that starts children lives as long as they do: the system ends them when it is gone.
        self._thread = threading.Thread(target=self._supervise, name="offline-supervisor", daemon=True)
        self._thread.start()

    # -- the engine's side

    @property
    def busy(self) -> bool:
        """Whether the worker has something to run."""
        return bool(self._unfinished) and not self._paused

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    def wait_ready(self) -> bool:
        """Wait for the child to have loaded its model. False if it cannot."""
        self._settled.wait()
        return self.failure is None

    def put(self, command: Submit | Abort) -> None:
        """Hand over a command; never waits. Raises EngineDead without a worker to come, InvalidRequest if it cannot be sent."""
        if isinstance(command, Submit):
            ipc.check(command)
        with self._lock:
            if self.failure is not None:
                raise EngineDead(f"the offline model is not available: {self.failure}")
            if self._closing.is_set():
                raise EngineDead("the engine was closed")
            if isinstance(command, Submit):
                self._unfinished[command.id] = entry = _Unfinished(command)
                if self._suspect is None:
                    self._hand_over(entry)
                return
            gone = self._unfinished.pop(command.id, None)
            self._send(ipc.Drop(command.id))
            if command.id == self._suspect:
                self._acquit()
        if gone is not None:
            # The worker may be frozen for long; its answer to the abort would come as late.
            self._deliver([TokenOut(id=command.id, finish_reason=FinishReason.ABORT)])

    def pause(self, on: bool) -> None:
        """Have the worker, and those after it, run no steps; or run them again."""
        with self._lock:
            self._paused = on
            self._send(ipc.Pause(on))

    def spin(self, on: bool) -> None:
        """Have the worker make visible progress without work, for the gate's probe."""
        with self._lock:
            self._send(ipc.Spin() if on else ipc.Rest())

    def end_child(self) -> None:
        """Kill the worker and wait until its process is gone. Another one is started, as after any death."""
        with self._lock:
            if self._child is not None:
                self._child.kill()
        self._childless.wait()

    def close(self) -> None:
        """Kill the worker; requests that are not finished end nowhere."""
        self._closing.set()
        with self._lock:
            if self._child is not None:
                self._child.kill()
        self._thread.join()

    # -- inside, under the lock

    def _send(self, frame: ipc.Frame) -> None:
        if self._sender is not None:
            self._sender.put(frame)

    def _hand_over(self, entry: _Unfinished) -> None:
        self._send(ipc.Put(replace(entry.submit, resume=tuple(entry.delivered))))

    def _hand_over_all(self) -> None:
        """All unfinished requests for a new child; or only the oldest of those that saw most deaths, if that is many."""
        entries = list(self._unfinished.values())
        worst = max(entries, key=lambda entry: entry.deaths, default=None)
        self._suspect = None
        if worst is not None and worst.deaths >= _SUSPICIOUS:
            self._suspect = worst.submit.id
            entries = [worst]
        for entry in entries:
            self._hand_over(entry)

    def _acquit(self) -> None:
        """The suspect made progress or has ended: the others may join it."""
        suspect, self._suspect = self._suspect, None
        for key, entry in self._unfinished.items():
            if key != suspect:
                self._hand_over(entry)

    # -- the supervisor's thread

    def _supervise(self) -> None:
        early_deaths = 0
        was_ready = False
        while not self._closing.is_set():
            self.ready = False
            try:
                cause = self._run_child()
            except Exception as error:  # the system refuses a process, or the worker talked nonsense
                logger.exception("the offline worker could not be run")
                cause = str(error)
            was_ready = was_ready or self.ready
            early_deaths = 0 if self.ready else early_deaths + 1
            if self._closing.is_set():
                break
            if early_deaths >= _MAX_EARLY_DEATHS and not was_ready and self.failure is None:
                self.failure = f"its process ended {early_deaths} times before the model was loaded, the last time: {cause}"
            if self.failure is not None:
                logger.error("no offline model: %s", self.failure)
                self._give_up()
                break
            self.restarts += 1
            self._timeline.event("worker", f"the offline worker ended: {cause}", requests_replayed=len(self._unfinished))
            logger.warning("the offline worker ended (%s); %d requests go on in the next", cause, len(self._unfinished))
            if self.ready:
                self._judge()
            self._closing.wait(_BACKOFF_SECONDS[min(early_deaths, len(_BACKOFF_SECONDS) - 1)])
        self.ready = False
        self._settled.set()

    def _run_child(self) -> str:
        """Start a child, give it all unfinished requests, and deliver what it says until it ends. Returns how it ended."""
        ours, theirs = socket.socketpair()
        with ours:
            self._childless.clear()
            try:
                with theirs:
                    child = self._spawn(theirs.fileno())
            except BaseException:
                self._gone()
                self._childless.set()
                raise
            sender = ipc.Sender(ours)
            try:
                self._started(child.pid)
                sender.put(self._start)
                with self._lock:
                    self._child, self._sender = child, sender
                    if self._paused:
                        self._send(ipc.Pause(True))
                    self._hand_over_all()
                if self._closing.is_set():
                    child.kill()
                error = self._read(ours)
            finally:
                self._settled.clear()
                with self._lock:
                    self._child, self._sender = None, None
                child.kill()
                self._ended(child.pid)  # before its number can become another process's
                child.wait()
                sender.close()
                self._gone()
                self._childless.set()
        return error or _cause(child.returncode)

    def _spawn(self, socket_fd: int) -> subprocess.Popen[bytes]:
        fds = (socket_fd, self._control.fd, self._memory_fd())
        arguments = (fds[0], fds[1], self._num_slabs, fds[2])
        command = [*WORKER, *map(str, arguments)]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=fds, env=child_environment())

    def _read(self, sock: socket.socket) -> str | None:
        """Until the child ends. Returns what it said of the reason, if anything."""
        while (frame := ipc.receive(sock)) is not None:
            if isinstance(frame, ipc.Ready):
                self._made_ready()
                self.ready = True
                self._settled.set()
            elif isinstance(frame, ipc.Outs):
                self._timeline.worker_steps(frame.spans)
                self._take(frame.outs)
            elif isinstance(frame, ipc.Failed):
                if frame.fatal:
                    self.failure = frame.message
                return frame.message
        return None

    def _take(self, outs: list[TokenOut]) -> None:
        kept = []
        with self._lock:
            for out in outs:
                entry = self._unfinished.get(out.id)
                if entry is None:
                    continue  # aborted meanwhile
                if out.token is not None:
                    entry.delivered.append(out.token)
                    entry.deaths = 0
                if out.finish_reason is not None:
                    del self._unfinished[out.id]
                if out.id == self._suspect:
                    self._acquit()
                kept.append(out)
        if kept:
            self._deliver(kept)

    def _judge(self) -> None:
        """A loaded worker died: suspect the requests it had, and fail the one that it died of again and again."""
        with self._lock:
            suspect, self._suspect = self._suspect, None
            for entry in self._unfinished.values() if suspect is None else [self._unfinished[suspect]]:
                entry.deaths += 1
            guilty = suspect is not None and self._unfinished[suspect].deaths >= _MAX_DEATHS
            if guilty and suspect is not None:
                del self._unfinished[suspect]
        if guilty and suspect is not None:
            self._fail([suspect], f"the offline worker died {_MAX_DEATHS} times with this request in it")

    def _give_up(self) -> None:
        with self._lock:
            keys, self._unfinished = list(self._unfinished), {}
        self._fail(keys, f"the offline model is not available: {self.failure}")

    def _fail(self, keys: list[str], error: str) -> None:
        if keys:
            self._deliver([TokenOut(id=key, finish_reason=FinishReason.ERROR, error=error) for key in keys])


def _cause(status: int) -> str:
    """How a process ended, for people."""
    if status >= 0:
        return f"exit status {status}"
    hint = ", perhaps for lack of memory" if status == -signal.SIGKILL else ""
    return f"signal {signal.Signals(-status).name}{hint}"
