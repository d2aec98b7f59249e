"""The offline worker: `python -m engine.colocate.worker`, a process with one model, the same core, and slabs that may vanish.

Started by the main process with its descriptors on the command line. Three things differ from an engine of its own: at each
layer boundary it shows progress, obeys the layer gate and looks whether its slabs changed; requests that lost pages leave the
step and wait again; and it keeps nothing durable, so it may be killed or frozen at any instruction.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import msgspec

from engine.build import build_core, load_model
from engine.colocate import ipc
from engine.colocate.control import ControlPage, Word
from engine.core import EngineCore
from engine.errors import EngineDead, InvalidCheckpoint, InvalidConfig
from engine.grammar import Grammars, load_tokenizer
from engine.loop import EngineLoop
from engine.memory.host_copies import HostStats
from engine.memory.window import HostWindow, Window
from engine.sched.plan import StepPlan, StepResult
from engine.sched.scheduler import TenantCounters
from engine.timeline import Span, span_of
from engine.types import Abort, Tenant, TokenOut

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 0.02  # least time between two reports
_GATE_POLL_SECONDS = 100e-6
_PR_SET_PDEATHSIG = 1


class Report(msgspec.Struct, frozen=True):
    """What main knows of a worker without asking: for metrics and for the choice of victims."""

    running: int
    waiting: int
    kv_pages: int
    kv_pages_free: int
    prefix_queries: int
    prefix_hits: int
    counters: TenantCounters
    holders: Mapping[int, Mapping[int, int]]  # slab -> number of a request with pages in it -> tokens before the first of them
    computed: Mapping[int, int]  # number of a request -> tokens to compute again if it loses all its pages
    filled: Mapping[int, float] = {}  # slab -> share of its pages in use
    host: HostStats | None = None


class SlabWatch:
    """Follows the owner and epoch of every slab in the control page, and tells the scheduler what came and went."""

    def __init__(self, control: ControlPage, window: Window, core: EngineCore) -> None:
        self._control = control
        self._window = window
        self._core = core
        self._epochs: dict[int, int] = {}  # the slabs the scheduler has, and since which epoch
        self._generation = -1

    @property
    def changed(self) -> bool:
        """Whether some slab changed its owner since `sync`. Cheap enough for every layer."""
        return self._control[Word.GENERATION] != self._generation

    def sync(self) -> None:
        """Take in all changes. A slab that went and came back between two looks has lost its contents all the same."""
        if not self.changed:
            return
        # Read before the slabs: a change that happens meanwhile is seen again next time.
        self._generation = self._control[Word.GENERATION]
        scheduler = self._core.scheduler
        for slab in range(self._control.num_slabs):
            owner, epoch = self._control.slab(slab)
            if slab in self._epochs and (owner is not Tenant.OFFLINE or epoch != self._epochs[slab]):
                del self._epochs[slab]
                scheduler.lose_slab(slab)
                self._window.unmap(slab)  # with what this process wrote there after it was taken
            if owner is Tenant.OFFLINE and slab not in self._epochs:
                self._epochs[slab] = epoch
                self._window.map(slab)
                scheduler.kv.add_slab(slab)


class Reporter:
    """Writes a report after a step, not more often than every few milliseconds, and when there is no work left."""

    def __init__(self, control: ControlPage, core: EngineCore) -> None:
        self._control = control
        self._core = core
        self._next = 0.0
        self._spans: list[Span] = []
        self._busy_until = 0.0

    def after_step(self, plan: StepPlan, result: StepResult) -> None:
        now = time.monotonic()  # noqa: TID251 - main reads the same clock
        self._spans.append(span_of(plan, result, now, self._busy_until))
        self._busy_until = now
        if now >= self._next:
            self._next = now + _REPORT_SECONDS
            self.write()

    def take_spans(self) -> list[Span]:
        """The launches since this was last asked."""
        spans, self._spans = self._spans, []
        return spans

    def after_update(self) -> None:
        if not self._core.has_work:
            self.write()

    def write(self) -> None:
        scheduler, tenant = self._core.scheduler, Tenant.OFFLINE
        kv, pool = scheduler.kv, scheduler.kv.pool
        holders: dict[int, dict[int, int]] = {}
        computed: dict[int, int] = {}
        for number, request in enumerate(kv.holders()):
            computed[number] = request.num_computed
            copied = kv.num_copied(request)
            for index, page in enumerate(request.pages):
                rest = max(index * kv.page_size, copied)
                holders.setdefault(page // pool.pages_per_slab, {}).setdefault(number, rest)
        filled = {slab: sum(pool.slab_use(slab)[:2]) / pool.pages_per_slab for slab in holders}
        report = Report(
            running=scheduler.num_running(tenant),
            waiting=scheduler.num_waiting(tenant),
            kv_pages=pool.num_used(tenant),
            kv_pages_free=pool.num_free,
            prefix_queries=kv.prefix_queries[tenant],
            prefix_hits=kv.prefix_hits[tenant],
            counters=scheduler.counters[tenant],
            holders=holders,
            computed=computed,
            filled=filled,
            host=self._core.host_stats(),
        )
        if not self._control.write_report(report):
            self._control.write_report(msgspec.structs.replace(report, holders={}, computed={}, filled={}))


class WorkerDevice(Protocol):
    """What a worker does differently on each device. `HostSide` is the CPU's, `cuda_worker.CudaSide` the GPU's."""

    loads_in_turn: bool  # whether loading, too, waits until the gate is open

    def make_window(self, num_slabs: int, slab_bytes: int) -> Window:
        """The memory that main made."""
        ...

    def launching(self) -> AbstractContextManager[None]:
        """Entered to launch a layer, in the thread that does."""
        ...

    def open(self, window: Window, call: Callable[[Callable[[], None]], None]) -> Window:
        """The model is loaded: from here on main may take slabs. `call` has the engine's thread do something between two steps.

        Returns the window to map and unmap slabs in.
        """
        ...

    def stand(self) -> None:
        """Again and again, in the engine's thread, while the processor stands still between two layers."""
        ...

    def spin(self) -> bool:
        """For the gate's probe: do something on the device. True if the processor is to look at the gate as well."""
        ...


class HostSide:
    """`WorkerDevice` for a CPU: the processor is the device."""

    loads_in_turn = False  # its niceness and the system's gates do for that

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def make_window(self, num_slabs: int, slab_bytes: int) -> Window:
        return HostWindow(num_slabs, slab_bytes, self._fd)

    def launching(self) -> AbstractContextManager[None]:
        return nullcontext()

    def open(self, window: Window, call: Callable[[Callable[[], None]], None]) -> Window:
        return window

    def stand(self) -> None:
        pass

    def spin(self) -> bool:
        return True


def worker_device(device: str, control: ControlPage, memory_fd: int) -> WorkerDevice:
    from engine.kernels.select import resolve_device

    if resolve_device(device) == "cpu":
        return HostSide(memory_fd)
    from engine.colocate.cuda_worker import CudaSide

    return CudaSide(control, socket.socket(fileno=memory_fd))


class Worker:
    """The worker's main thread: reads frames; the engine's thread runs the steps."""

    def __init__(self, sock: socket.socket, control: ControlPage, memory_fd: int) -> None:
        self._sock = sock
        self._control = control
        self._memory_fd = memory_fd
        self._device: WorkerDevice = HostSide(memory_fd)
        self._report: Callable[[], None] = lambda: None

    def run(self) -> int:
        """Until the main process goes away. Returns an exit status."""
        start = ipc.receive(self._sock)
        if not isinstance(start, ipc.Start):
            return 1
        os.nice(start.config.offline_nice)
        try:
            loop = self._start(start)
        except (InvalidConfig, InvalidCheckpoint) as error:
            ipc.send(self._sock, ipc.Failed(str(error), fatal=True))
            return 2
        except Exception as error:  # memory, most likely, of which there may be more another time
            logger.exception("the model could not be loaded")
            advice = "; lower --kv-cache-memory or --max-num-batched-tokens" if _is_lack_of_memory(error) else ""
            ipc.send(self._sock, ipc.Failed(f"{type(error).__name__}: {error}{advice}", fatal=False))
            return 1
        gc.collect()
        gc.freeze()
        ipc.send(self._sock, ipc.Ready())
        self._serve(loop)
        return 0

    def _start(self, start: ipc.Start) -> EngineLoop:
        self._device = device = worker_device(start.config.device, self._control, self._memory_fd)
        if device.loads_in_turn:
            self._stand()
        built = load_model(
            start.config, memory=start.memory, make_window=device.make_window, launching=device.launching, progress=False
        )
        grammars = Grammars(lambda: load_tokenizer(built.path), built.spec.vocab_size, built.spec.eos_ids)
        core = build_core(start.config, built, slabs=(), open_guide=grammars.open)
        reporter = Reporter(self._control, core)

        def deliver(outs: list[TokenOut]) -> None:
            reporter.after_update()
            self._deliver(outs, reporter.take_spans())

        core.on_step = reporter.after_step
        self._report = reporter.write
        loop = EngineLoop(core, deliver, self._died, name="offline-engine")
        assert built.window is not None
        watch = SlabWatch(self._control, device.open(built.window, loop.call), core)

        def sync() -> None:
            self._boundary()
            watch.sync()

        def interrupted() -> bool:
            self._boundary()
            return watch.changed

        core.sync = sync
        core.interrupted = interrupted
        mapped = threading.Event()
        for first in (watch.sync, reporter.write, mapped.set):
            loop.call(first)
        mapped.wait()
        return loop

    def _boundary(self) -> None:
        """Between two layers: show progress, and stand still while the gate is closed."""
        self._show_progress()
        if self._control[Word.FROZEN]:
            self._stand()
            self._show_progress()

    def _stand(self) -> None:
        """While the gate is closed. Fails open: if main gives no sign of life, nobody would ever open the gate again."""
        while self._control[Word.FROZEN] and self._control.main_is_alive():
            self._device.stand()
            time.sleep(_GATE_POLL_SECONDS)

    def _show_progress(self) -> None:
        self._control[Word.PROGRESS_NS] = time.monotonic_ns()
        self._control[Word.PROGRESS] += 1

    def _serve(self, loop: EngineLoop) -> None:
        paused = False  # then no step ends, after which a report would be written
        while (frame := ipc.receive(self._sock)) is not None:
            if isinstance(frame, ipc.Put):
                loop.put(frame.submit)
                if paused:
                    loop.call(self._report)
            elif isinstance(frame, ipc.Drop):
                loop.put(Abort(frame.id))
            elif isinstance(frame, ipc.Pause):
                paused = frame.on
                loop.pause(frozenset(Tenant) if paused else frozenset())
                loop.call(self._report)
            elif isinstance(frame, ipc.Spin):
                while not select.select([self._sock], [], [], 0)[0]:
                    self._boundary() if self._device.spin() else self._show_progress()

    def _deliver(self, outs: list[TokenOut], spans: list[Span]) -> None:
        try:
            ipc.send(self._sock, ipc.Outs(outs, spans))
        except OSError:
            os._exit(0)

    def _died(self, error: EngineDead) -> None:
        logger.error("the offline engine stopped: %s", error)
        ipc.send(self._sock, ipc.Failed(str(error), fatal=False))
        os._exit(3)


def _is_lack_of_memory(error: Exception) -> bool:
    from torch import OutOfMemoryError

    return isinstance(error, MemoryError | OutOfMemoryError)


def main() -> int:
    """`worker SOCKET_FD CONTROL_FD NUM_SLABS MEMORY_FD`. Returns an exit status."""
    # A worker that stands still when the main process dies is the guardian's to end; but that may have died just before.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    socket_fd, control_fd, num_slabs, memory_fd = map(int, sys.argv[1:])
    # The terminal's Ctrl-C and a service manager's SIGTERM go to the main process, which knows what to do with this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="offline worker: %(message)s")
    return Worker(socket.socket(fileno=socket_fd), ControlPage(num_slabs, control_fd), memory_fd).run()


if __name__ == "__main__":
    try:
        status = main()
    except BaseException:
        logger.exception("the offline worker failed")
        status = 1
    # Main is gone or wants us gone. Nothing here is worth a clean shutdown, and a step may take long.
    os._exit(status)
