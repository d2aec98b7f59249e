"""ChannelGate: freeze and thaw the compute of one process's CUDA context.

Owns the state of the gate and its lock. The hardware does not count: a channel is enabled or not, so exactly one gate
at a time may freeze a set of channels. Every freeze runs on a lease; when it lapses, the watchdog thaws.

    THAWED ──freeze──▶ FROZEN ──thaw, lapsed lease, owner's death──▶ THAWED
       └── any failure ──▶ UNSURE ──watchdog, thaw──▶ THAWED           LOST and CLOSED are final

Order for taking memory away: `freeze()`, then `with gate.remapping():` unmap and map the sink, then `thaw()`. A channel
that runs while an address is unmapped faults its whole context, so a thaw waits for the remap to end.
"""

import atexit
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from nvdriver.device import Clock, Host, Peer
from nvdriver.errors import DeviceLost, NvDriverError, Refused
from nvdriver.scan import ScanLimits
from nvdriver.switch import ChannelSwitch
from nvdriver.watchdog import Lease, Watchdog

logger = logging.getLogger(__name__)


class Route(Enum):
    """By which open file the calls go."""

    IN_PROCESS = "in_process"  # the context's own, from a thread of the same process
    PASSED_FD = "passed_fd"  # a duplicate that the owner handed over
    CROSS_CLIENT = "cross_client"  # our own, where the driver was configured or patched to allow it


class State(Enum):
    THAWED = "thawed"
    FROZEN = "frozen"
    UNSURE = "unsure"  # a call failed half-way: some channels may be off
    LOST = "lost"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class GateOptions:
    lease_s: float = 1.0  # the longest a freeze outlives the last sign of life of whoever asked for it
    watch_s: float = 0.25  # how often the watchdog looks; keep it well below the lease
    remap_limit_s: float = 2.0  # a remap that takes longer is taken for stuck behind the frozen channels
    copy_engines: bool = False  # freeze copies too
    scan: ScanLimits = field(default_factory=ScanLimits)


class ChannelGate:
    """Made by `api.open_gate`. All methods may be called from any thread."""

    def __init__(
        self,
        switch: ChannelSwitch,
        host: Host,
        clock: Clock,
        route: Route,
        options: GateOptions,
        beat: Callable[[], int] | None = None,
        owner: Peer | None = None,
    ) -> None:
        self.route = route
        self.switch = switch
        self._host = host
        self._clock = clock
        self._options = options
        self._pid = host.pid()
        self._owner = owner
        self._changed = threading.Condition()
        self._state = State.THAWED
        self._lease = Lease(options.lease_s, clock, beat)
        # With a heartbeat from elsewhere, its writer may freeze these channels through a descriptor of its own.
        self._is_guard = beat is not None
        self._guarded = False
        self._num_remaps = 0
        self._remap_since = 0.0
        self._watchdog = Watchdog(self.check_lease, options.watch_s)
        atexit.register(self.close)

    @property
    def state(self) -> State:
        return self._state

    @property
    def is_frozen(self) -> bool:
        """Surely frozen: a lapsed lease counts as thawed, even before the watchdog has acted on it."""
        with self._changed:
            return self._holds()

    def freeze(self) -> None:
        """Return when none of the channels is running. Idempotent; on an error everything is enabled again."""
        with self._changed:
            self._check_usable()
            if not self._holds():
                self._disable()
            self._lease.renew()

    def thaw(self) -> None:
        """Let the channels run again, as soon as no remap is under way. Idempotent."""
        self._check_process()
        with self._changed:
            self._changed.wait_for(lambda: not self._num_remaps or self._state not in (State.FROZEN, State.UNSURE))
            if self._state in (State.FROZEN, State.UNSURE):
                self._enable()

    def renew(self) -> bool:
        """Extend the lease. False if the gate is not (or no longer surely) frozen: freeze again if that matters."""
        with self._changed:
            holds = self._holds()
            if holds:
                self._lease.renew()
            return holds

    @contextmanager
    def remapping(self) -> Iterator[None]:
        """Hold off the thaw while addresses are unmapped. Only when frozen; a guard takes its controller's word."""
        with self._changed:
            if not (self._holds() or self._is_guard):
                raise Refused("remapping while the channels may run would fault their context: freeze first")
            if not self._num_remaps:
                self._remap_since = self._clock.now()
            self._num_remaps += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_remaps -= 1
                self._changed.notify_all()

    def set_time_slice(self, microseconds: int) -> None:
        """A soft rung: the share of these channels while others also want the device. Undone by `close`."""
        with self._changed:
            self._check_usable()
            self.switch.set_time_slice(microseconds)

    def preempt(self) -> None:
        """Take the channels off the hardware once. Not a hold: they may be picked again at once."""
        with self._changed:
            self._check_usable()
            self.switch.preempt()

    def check_lease(self) -> None:
        """What the watchdog does each period; also the place where the owner's death is noticed."""
        with self._changed:
            if self._state is State.CLOSED:
                return
            if self._owner is not None and not self._owner.is_alive():
                logger.warning("the process that owns the channels is gone; letting go of its descriptor")
                self._shut()
                return
            lapsed = self._lease.has_lapsed()
            remap_s = self._clock.now() - self._remap_since if self._num_remaps else 0.0
            stuck = remap_s > self._options.remap_limit_s
            if not lapsed:
                self._guarded = False
            if self._is_due(lapsed or stuck) and (stuck or not self._num_remaps):
                logger.warning("enabling the channels: %s", "a remap is stuck" if stuck else "the lease has lapsed")
                self._enable()
                self._guarded = lapsed

    def close(self) -> None:
        """Thaw, then give up the channels. Idempotent. If they cannot be enabled, raise and keep the watchdog at it."""
        # NOTE: within `remapping()` of the same thread, this and thaw() wait until the watchdog calls the remap stuck.
        if self._pid != self._host.pid():
            return  # at exit of a forked child: the gate, and perhaps its lock, belong to the parent
        with self._changed:
            if self._owner is None or self._owner.is_alive():
                self.thaw()
                if self._state is State.THAWED:
                    self._restore_time_slice()
            if self._state is not State.CLOSED:
                self._shut()  # of a dead owner's channels nothing is enabled: what they were doing is nobody's any more
        self._watchdog.stop()
        atexit.unregister(self.close)

    def __enter__(self) -> "ChannelGate":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _holds(self) -> bool:
        return self._state is State.FROZEN and not self._lease.has_lapsed()

    def _is_due(self, overtime: bool) -> bool:
        """Whether the watchdog must enable. A guard enables once a lapse, since it cannot see who else froze."""
        if self._state is State.FROZEN or (self._state is State.THAWED and self._is_guard and not self._guarded):
            return overtime
        return self._state is State.UNSURE

    def _check_usable(self) -> None:
        if self._state is State.CLOSED:
            raise Refused("the gate is closed, by close() or because the owner of the channels is gone: open a new one")
        if self._state is State.LOST:
            raise DeviceLost("the GPU was lost: restart the worker once the device has recovered")
        self._check_process()
        if not self._watchdog.is_alive():
            raise Refused("no watchdog is running, so nobody would thaw after a failure: open a new gate")

    def _check_process(self) -> None:
        """A forked child shares our open files, so the driver would obey it; its copy of the state means nothing."""
        if self._pid != self._host.pid():
            raise Refused("this gate belongs to the process that forked us: open one here, after making a CUDA context")

    def _disable(self) -> None:
        self._state = State.UNSURE
        try:
            self.switch.disable()
        except NvDriverError as error:
            if isinstance(error, DeviceLost):
                self._state = State.LOST
                raise
            try:
                self._enable()
            except NvDriverError:
                logger.exception("the channels are in doubt; the watchdog goes on enabling them")
            raise
        self._state = State.FROZEN

    def _enable(self) -> None:
        self._state = State.UNSURE
        try:
            self.switch.enable()
        except DeviceLost:
            self._state = State.LOST
            raise
        finally:
            self._changed.notify_all()
        self._state = State.THAWED

    def _restore_time_slice(self) -> None:
        try:
            self.switch.restore_time_slice()
        except NvDriverError:  # most often: the context is gone, and its time slice with it
            logger.info("the time slice could not be restored", exc_info=True)

    def _shut(self) -> None:
        """Let go of everything. Channels of a process that is gone need no enabling."""
        self._state = State.CLOSED
        self.switch.close()
        if self._owner is not None:
            self._owner.close()
        self._changed.notify_all()
