"""The gate's rungs on a GPU: `channel` and `stream`. The one file of the engine that knows nvdriver.

* `channel`: the worker's GPU channels are switched off in the middle of whatever they compute. An `Agent`, a thread of the
  worker, does so when it sees `Word.FROZEN`; or the main process itself, on descriptors that the worker granted, which then
  needs nothing of the worker's interpreter (`grant`, `GrantedGate`). The worker keeps watch over either: the channels come back
  on when main falls silent for `LEASE_SECONDS` (fail open).
* `stream`: a wait for a word in pinned memory, queued between layers, in CUDA graphs too. Stops the device at the next of them,
  however far the processor has launched ahead. The same agent sets the word, and opens it when main falls silent.

On every rung the worker's processor stops as well, at its next layer, as for `layer`. So a call that the driver refuses leaves
the worker frozen within a layer, and never reaches an online request; a probe, for which the processor looks at nothing but
`Freeze.LAYER`, shows what the rung does by itself. Under MPS all clients share one context: nvdriver refuses to open there and
says why, and the next rung is tried.

Not yet run on a GPU: checked against nvdriver's fake resource manager and a fake stream.
"""

from __future__ import annotations

import ctypes
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from engine.colocate.control import LEASE_SECONDS, ControlPage, Word
from engine.colocate.cuda_slabs import OfflineWindow
from engine.colocate.gate import Freeze
from engine.errors import InvalidConfig
from nvdriver.api import (
    ChannelGate,
    DriverUnavailable,
    GateOptions,
    State,
    make_grant,
    open_gate,
    receive_grant,
    send_grant,
)
from nvdriver.errors import NvDriverError

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 100e-6
_AGAIN_SECONDS = 0.25
_SWITCH_SECONDS = 200e-6  # longest another Python thread keeps the agent waiting; the default is 5 ms
_GUARD_LEASE_SECONDS = 2 * LEASE_SECONDS  # a main process that only stalled hears of it from its own gate first
REMAP_LIMIT_SECONDS = 0.5  # one that takes longer waits for the channels, which the watchdog then switches on
_NO_GRANT = b"no channels"
_TRY_SECONDS = 0.02
_LAUNCH_SECONDS = 0.1  # a layer takes well under a millisecond to launch


# -- the main process


class StreamGate:
    """Asks the worker's agent to close the stream barrier: stops the device within one layer."""

    name = "stream"

    def __init__(self, control: ControlPage) -> None:
        self._control = control

    def freeze(self) -> None:
        self._control[Word.FROZEN] = Freeze.STREAM

    def wait_stopped(self, seconds: float) -> None:
        pass  # it ends its layer first; whoever waited for that would wait longer than its own first layer takes

    def keep(self) -> None:
        pass

    def thaw(self) -> None:
        self._control[Word.FROZEN] = Freeze.NO


class AgentGate:
    """Asks the worker's agent to switch its channels off: stops the device in the middle of a kernel."""

    name = "channel"

    def __init__(self, control: ControlPage) -> None:
        self._control = control

    def freeze(self) -> None:
        self._control[Word.FROZEN] = Freeze.CHANNEL

    def wait_stopped(self, seconds: float) -> None:
        _wait(lambda: bool(self._control[Word.HELD]), seconds)

    def keep(self) -> None:
        pass  # the agent follows main's heartbeat

    def thaw(self) -> None:
        self._control[Word.FROZEN] = Freeze.NO


class GrantedGate:
    """Switches the worker's channels off from here, on a lease of `LEASE_SECONDS`, which `keep` renews.

    The worker's agent may remap slabs as long as FROZEN says HELD_BY_MAIN, so that is the last thing to be said when freezing
    and the first to be taken back when thawing.
    """

    name = "channel"

    def __init__(self, control: ControlPage, channels: ChannelGate) -> None:
        self._control = control
        self._channels = channels
        self._holds = 0

    def freeze(self) -> None:
        if self._control[Word.FROZEN] >= Freeze.HELD_BY_MAIN and self._renew():
            return
        self._control[Word.FROZEN] = Freeze.BY_MAIN  # whatever comes of the channels, the processor stops
        with _survived("switch the worker's channels off; it stops at its next layer"):
            self._channels.freeze()
            self._control[Word.FROZEN] = Freeze.HELD_BY_MAIN + self._holds
            self._holds += 1

    def wait_stopped(self, seconds: float) -> None:
        pass  # `freeze` returned when none of the channels was running

    def keep(self) -> None:
        self.freeze()

    def thaw(self) -> None:
        if self._control[Word.FROZEN] >= Freeze.HELD_BY_MAIN:
            self._control[Word.FROZEN] = Freeze.BY_MAIN
            self._wait_for_remap()
        with _survived("switch the worker's channels on; the watchdogs go on trying"):
            self._channels.thaw()
        self._control[Word.FROZEN] = Freeze.NO

    def close(self) -> None:
        """Let go of the worker's descriptors, which would keep a dead worker's memory alive; a living worker thaws."""
        with _survived("close the worker's channels"):
            self._channels.close()

    def _renew(self) -> bool:
        renewed = False
        with _survived("renew the lease"):
            renewed = self._channels.renew()
        return renewed

    def _wait_for_remap(self) -> None:
        """The worker may be remapping; one that has mapped nothing never does."""
        control = self._control
        _wait(lambda: control[Word.LET_GO] in (0, control[Word.GENERATION]), REMAP_LIMIT_SECONDS)


def open_granted(control: ControlPage, sock: socket.socket) -> GrantedGate:
    """The gate on what the worker's `grant` sent over a SOCK_SEQPACKET socket. Raises InvalidConfig with the reason."""
    try:
        if sock.recv(len(_NO_GRANT), socket.MSG_PEEK) == _NO_GRANT:
            raise InvalidConfig("no channel gate: the worker has no channels to grant")
        grant, files = receive_grant(sock)
        return GrantedGate(control, open_gate(grant, files, options=_options(LEASE_SECONDS)))
    except NvDriverError as error:
        raise InvalidConfig(f"no channel gate: {error}") from error


# -- the worker


class StreamOps(Protocol):
    """What the barrier needs of a device."""

    def make_word(self) -> tuple[Any, int]:
        """A 32-bit word, 0, that host and device share: an object whose `value` the host sets, and the device's address."""
        ...

    def wait_zero(self, stream: int, address: int) -> None:
        """Queue a wait until the word is 0. May be captured into a graph."""
        ...


class StreamBarrier:
    """A gate in the device's own queue. `put` one between layers; while closed, nothing behind the next one runs."""

    def __init__(self, ops: StreamOps) -> None:
        self._ops = ops
        self._word, self._address = ops.make_word()
        self._lock = threading.Lock()
        self._closed = False
        self._draining = False

    def put(self, stream: int) -> None:
        """Queue a wait in the stream (a CUstream as an integer)."""
        self._ops.wait_zero(stream, self._address)

    def set(self, closed: bool) -> None:
        with self._lock:
            self._closed = closed
            if not self._draining:
                self._word.value = int(closed)

    def run_out(self) -> None:
        """Let the device run out what was launched, also while closed, until `drain` was called."""
        with self._lock:
            self._draining = True
            self._word.value = 0

    def drain(self, synchronize: Callable[[], None]) -> None:
        """Run out, and wait for it. By the thread that launches, so it ends."""
        self.run_out()
        try:
            synchronize()
        finally:
            with self._lock:
                self._draining = False
                self._word.value = int(self._closed)


class Agent:
    """The worker's side of every rung on a GPU: a thread that follows `Word.FROZEN` and lets go of lost slabs.

    `channels` is None where there is no channel control. `settle` has the engine's thread drain and let go, between two steps.
    `launching` is held by whoever launches: to launch a kernel is to ask the driver about its pointers, and Triton refuses one
    whose address is a hole just then.
    """

    def __init__(
        self,
        control: ControlPage,
        barrier: StreamBarrier,
        channels: ChannelGate | None = None,
        slabs: OfflineWindow | None = None,
        settle: Callable[[], None] = lambda: None,
        launching: threading.Lock | None = None,
    ) -> None:
        self._control = control
        self._barrier = barrier
        self._channels = channels
        self._launching = launching or threading.Lock()
        self._slabs = slabs
        self._settle = settle
        self._settled: int | None = None  # the generation for which `settle` was called
        self._doubted = 0  # what FROZEN said when main was silent
        self._refused: bool | None = None  # what the driver would not do with the channels
        self._again = 0.0  # when to ask it again
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        control[Word.HELD] = 0  # whatever the worker before this one left there

    def start(self) -> None:
        """Look from now on, in a thread of its own."""
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_SECONDS))
        self._thread = threading.Thread(target=self._run, name="gate-agent", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let the device run, and give up the channels."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._control[Word.HELD] = 0
        self._barrier.set(False)
        if self._channels is not None:
            with _survived("close the channels"):
                self._channels.close()

    def look(self) -> None:
        """One look at the control page, and what follows from it."""
        frozen = self._control[Word.FROZEN]
        if not self._control.main_is_alive():
            self._doubted, frozen = frozen, Freeze.NO
        self._barrier.set(frozen == Freeze.STREAM)
        self._hold(frozen == Freeze.CHANNEL)
        if self._slabs is not None and self._slabs.is_behind:
            self._let_go(self._slabs)

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            try:
                self.look()
            except Exception:  # without this thread nothing would be thawed
                logger.exception("the gate's agent failed and goes on")
                time.sleep(LEASE_SECONDS / 10)

    def _hold(self, wanted: bool) -> None:
        """Switch the channels as wanted. HELD is said last and taken back first; a refused call is repeated now and then."""
        channels, control = self._channels, self._control
        if channels is None or (wanted is self._refused and time.monotonic() < self._again):  # noqa: TID251 - pacing only
            return
        self._refused, self._again = wanted, time.monotonic() + _AGAIN_SECONDS  # noqa: TID251
        if wanted and not (control[Word.HELD] and channels.is_frozen):
            control[Word.HELD] = 0
            with _survived("switch the channels off; the worker stops at its next layer"):
                channels.freeze()
                control[Word.HELD] = 1
                self._refused = None
        elif not wanted and (control[Word.HELD] or channels.state in (State.FROZEN, State.UNSURE)):
            control[Word.HELD] = 0
            with _survived("switch the channels on; the watchdog goes on trying"):
                channels.thaw()
                self._refused = None
        else:
            self._refused = None

    def _let_go(self, slabs: OfflineWindow) -> None:
        """At once if the channels are off, whoever switched them; else by the engine's thread when it comes by.

        That thread may be waiting for layers behind the closed barrier: those that were launched run out.
        """
        if self._channels is not None:
            # Within this they cannot come on: our watchdog waits for us, and main takes its word back before it thaws.
            with _survived("remap while frozen"), self._channels.remapping():
                if self._are_off(self._channels):
                    with self._no_launch():
                        slabs.let_go()
                    return
        generation = self._control[Word.GENERATION]
        if self._settled != generation:
            self._settled = generation
            self._settle()
            self._barrier.run_out()

    @contextmanager
    def _no_launch(self) -> Iterator[None]:
        """Not for ever: a thread whose launch waits for the channels looks at no pointer."""
        held = self._launching.acquire(timeout=_LAUNCH_SECONDS)
        try:
            yield
        finally:
            if held:
                self._launching.release()

    def _are_off(self, channels: ChannelGate) -> bool:
        """Surely off. Main's word counts unless it was silent since: the guard may have switched them on then."""
        frozen = self._control[Word.FROZEN]
        if frozen >= Freeze.HELD_BY_MAIN:
            return frozen != self._doubted
        return bool(self._control[Word.HELD]) and channels.is_frozen


class Device(Protocol):
    """The worker's device as its launching thread sees it."""

    def stream(self) -> int:
        """The CUstream that layers go to."""
        ...

    def work(self) -> None:
        """Launch a kernel of some tens of microseconds."""
        ...

    def synchronize(self) -> None: ...


class CudaDevice:
    """`Device` by torch, on the current device; makes this process's context."""

    def __init__(self) -> None:
        self.index = torch.cuda.current_device()
        self._scratch = torch.zeros(1 << 22, device="cuda")

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream

    def work(self) -> None:
        self._scratch.add_(1.0)

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class DeviceSide:
    """What a worker on a GPU does beside what every worker does, in the thread that launches."""

    def __init__(self, control: ControlPage, barrier: StreamBarrier, device: Device) -> None:
        self._control = control
        self._barrier = barrier
        self._device = device
        self.slabs: OfflineWindow | None = None
        self.launch_lock = threading.Lock()

    @contextmanager
    def launching(self) -> Iterator[None]:
        """A layer, behind the barrier, and not while the agent moves memory."""
        with self.launch_lock:
            self.boundary()
            yield

    def boundary(self) -> None:
        """Between two layers, or two captured groups of them."""
        self._barrier.put(self._device.stream())

    def stand(self) -> None:
        """Again and again while the processor stands still between two layers."""
        if self.slabs is not None and self.slabs.is_behind:
            self.slabs.drain_and_let_go()

    def drain(self) -> None:
        """For `OfflineWindow`."""
        self._barrier.drain(self._device.synchronize)

    def spin(self) -> bool:
        """For the probe: progress that the device made, or did not. True if the processor is to look at the gate as well."""
        self.boundary()
        self._device.work()
        self._device.synchronize()
        return self._control[Word.FROZEN] == Freeze.LAYER


def open_channels(control: ControlPage) -> ChannelGate | None:
    """This process's own channels, with a watchdog that follows main's heartbeat; None, and the reason in the log, if not here.

    Call it after warm-up: CUDA makes some channels late.
    """
    try:
        return open_gate(beat=lambda: control[Word.HEARTBEAT], options=_options(_GUARD_LEASE_SECONDS))
    except DriverUnavailable as reason:
        logger.warning("no channel gate: %s", reason)
        return None


def grant(sock: socket.socket, channels: ChannelGate) -> None:
    """Let the process at the other end of a SOCK_SEQPACKET socket switch these channels; ours stays as their guard."""
    send_grant(sock, *make_grant(channels))


def refuse_grant(sock: socket.socket) -> None:
    """Say at the other end of that socket that there is nothing to grant."""
    sock.send(_NO_GRANT)


class CudaStreams:
    """`StreamOps` by cuda-python. Raises InvalidConfig where it is missing."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise InvalidConfig("the stream gate needs cuda-python: pip install 'sluice[cuda]'") from error
        self._cuda: Any = driver
        self._equal = int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ)

    def make_word(self) -> tuple[Any, int]:
        """Never freed: a queued wait may outlive whoever made it."""
        flags = self._cuda.CU_MEMHOSTALLOC_PORTABLE | self._cuda.CU_MEMHOSTALLOC_DEVICEMAP
        host = int(self._call("cuMemHostAlloc", ctypes.sizeof(ctypes.c_uint32), flags))
        word = ctypes.c_uint32.from_address(host)
        word.value = 0
        return word, int(self._call("cuMemHostGetDevicePointer", host, 0))

    def wait_zero(self, stream: int, address: int) -> None:
        self._call("cuStreamWaitValue32", stream, address, 0, self._equal)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._cuda, name)(*arguments)
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            raise InvalidConfig(f"no stream gate: {name}: {status.name}; use --gate layer")
        return results[0] if results else None


class NoStreams:
    """`StreamOps` where streams cannot wait for a word: the probe sees that nothing stops."""

    def make_word(self) -> tuple[Any, int]:
        return ctypes.c_uint32(0), 0

    def wait_zero(self, stream: int, address: int) -> None:
        pass


def open_barrier(stream: int) -> StreamBarrier:
    """The barrier of this process's device; one that holds nothing, and the reason in the log, if streams cannot wait here."""
    try:
        barrier = StreamBarrier(CudaStreams())
        barrier.put(stream)  # open, so it holds nothing
        return barrier
    except InvalidConfig as reason:
        logger.warning("%s", reason)
        return StreamBarrier(NoStreams())


def try_barrier() -> bool:
    """Whether a kernel behind a closed barrier waits on this process's device, and runs when it opens. Raises InvalidConfig."""
    device, barrier = CudaDevice(), StreamBarrier(CudaStreams())
    done = torch.cuda.Event()
    barrier.set(True)
    try:
        barrier.put(device.stream())
        device.work()
        done.record()
        time.sleep(_TRY_SECONDS)
        waited = not done.query()
    finally:
        barrier.set(False)
    device.synchronize()
    return waited


# -- both


def _options(lease: float) -> GateOptions:
    return GateOptions(lease_s=lease, watch_s=LEASE_SECONDS / 4, remap_limit_s=REMAP_LIMIT_SECONDS)


@contextmanager
def _survived(doing: str) -> Iterator[None]:
    """Log what the driver refused, and go on: what freezes and thaws has nobody to raise to."""
    try:
        yield
    except NvDriverError as error:
        logger.warning("could not %s: %s", doing, error)


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds  # noqa: TID251
    while not condition() and time.monotonic() < deadline:  # noqa: TID251
        time.sleep(0)
