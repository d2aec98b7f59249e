"""ExclusiveSharing: two models on one device, online first. Ties arbiter, gate, worker, guardian and slabs together.

While any online request is unfinished the offline worker stands still (Valve's rule). `arrive` freezes in the caller's thread,
since waking another thread costs more than the freeze itself; a thread of its own thaws, keeps the heartbeat and settles
memory.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.build import Memory
from engine.clock import Clock, MonotonicClock
from engine.colocate.arbiter import Arbiter, CoolDown, State
from engine.colocate.control import ControlPage, Word
from engine.colocate.device import shared_device
from engine.colocate.gate import Freeze, Gate, NoGate, ProbeResult, cost_of, probe
from engine.colocate.guardian import Guardian
from engine.colocate.lending import SlabLender
from engine.colocate.process import OfflineProcess
from engine.colocate.worker import Report
from engine.config import EngineConfig
from engine.errors import InvalidConfig
from engine.loop import Deliver
from engine.memory.pages import PagePool, SlabUse, slab_use
from engine.memory.reserve import make_reserve, most_cached
from engine.memory.slabs import SlabPool
from engine.memory.victims import VICTIMS, Holdings
from engine.memory.window import Window
from engine.timeline import StepHistogram, Timeline
from engine.types import Abort, Cost, Submit, Tenant

if TYPE_CHECKING:
    from engine.core import EngineCore

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 0.1
_STOP_PATIENCE = 0.002  # longest an arrival waits for the worker's threads to stop; typically it is tens of microseconds
_LATENCY_BUCKETS = (50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3)


@dataclass(frozen=True, slots=True)
class SharingStats:
    """A snapshot for metrics. Seconds by owner sum to the time since the start."""

    device_seconds: dict[str, float]  # online, offline, switch, idle
    state: State
    gate: str
    probe: ProbeResult | None
    cooldown_seconds: float
    preemptions: int
    false_alarms: int
    latency_buckets: tuple[float, ...]  # seconds
    preemption_latency: tuple[int, ...]  # counts per bucket, then those beyond
    preemption_seconds: float
    request_preemptions: dict[int, int]  # preemptions caused -> finished online requests
    reclaims: int
    reclaimed_slabs: int
    reclaim_seconds: StepHistogram
    slabs: dict[Tenant, int]
    headroom_slabs: int
    worker: Report | None
    worker_restarts: int
    worker_failure: str | None


class ExclusiveSharing:
    """The offline model's side of an Engine.

    `device` is a resolved name, `window` the memory that the online model runs in; `deliver` gets the offline requests' tokens.
    Raises InvalidConfig if the wanted gate does not stop the worker.
    """

    def __init__(
        self,
        config: EngineConfig,
        offline: EngineConfig,
        memory: Memory,
        core: EngineCore,
        device: str,
        window: Window,
        run_in_engine: Callable[[Callable[[], None]], None],
        deliver: Deliver,
        clock: Clock | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self._clock = clock or MonotonicClock()
        self._timeline = timeline or Timeline(self._clock)
        self._run_in_engine = run_in_engine
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._closing = False
        self._control = ControlPage(memory.num_slabs)
        self._device = shared_device(device, memory, window, self._control, lambda: self._process.end_child())
        self._rungs = self._device.rungs(config.gate)
        self._slabs = SlabPool(memory.num_slabs, self._control.publish_slab)
        self._lender = SlabLender(
            self._slabs, core.scheduler.kv, self._device.window, self._device.punch, self._clock,
            reserve=make_reserve(config.reserve, memory.num_slabs),
            victims=VICTIMS[config.victims],
            holdings=self._holdings,
            cache_slabs=most_cached(config.reserve, memory.num_slabs, config.online_cache_share),
        )  # fmt: skip
        core.scheduler.kv.lender = self._lender
        self._lender.on_reclaim = lambda pages, slabs: self._timeline.event(
            "reclaim", f"online needed {pages} pages", slabs=slabs
        )
        self._gate: Gate = NoGate()
        self._gate_name = config.gate
        self._way = "none"  # of `SharedDevice.gate`, as soon as it is known
        self._unfit: set[str] = set()  # ways that stop the worker but keep its memory
        self._pid: int | None = None
        self._probe: ProbeResult | None = None
        fixed = None if config.cooldown_ms is None else config.cooldown_ms / 1e3
        self._arbiter = Arbiter(CoolDown(0.0, fixed=fixed), self._clock.now())
        self._offline_since: float | None = None  # the worker may run and has work, since then
        self._offline_seconds = 0.0
        self._latencies = [0] * (len(_LATENCY_BUCKETS) + 1)
        self._latency_sum = 0.0
        self._request_preemptions: Counter[int] = Counter()
        self._guardian = Guardian(self._control)
        self._guardian.start()
        self._process = OfflineProcess(
            offline, memory, self._control, self._device.worker_fd, deliver=deliver, started=self._worker_started,
            ready=self._worker_ready, ended=self._worker_ended, gone=self._device.gone, timeline=self._timeline,
        )  # fmt: skip
        self._ticker = threading.Thread(target=self._tick, name="arbiter", daemon=True)
        self._ticker.start()

    # -- start

    def wait_ready(self) -> bool:
        """Wait for the worker's model and choose the gate by a probe. False if there will be no worker."""
        while self._process.wait_ready():
            if self._choose_gate():
                return True
        return False

    def _choose_gate(self) -> bool:
        """False if the worker died meanwhile: of a reclaim that its gate does not allow, or of something else."""
        pid = self._pid
        for way in (way for rung in self._rungs for way in self._device.ways(rung)):
            if way in self._unfit:
                continue
            with self._lock:
                self._way = way
                self._set_gate()
            if way == "none":
                break
            self._process.spin(True)
            self._probe = probe(self._gate, self._control)
            self._process.spin(False)
            if self._pid != pid:
                return False
            logger.info("%s", self._probe)
            if self._probe.works and self._memory_moves(way):
                break
            if self._pid != pid:
                return False
        else:
            raise InvalidConfig(f"the gate {self._gate_name!r} does not stop the offline worker here; try --gate auto")
        self._gate_name = self._gate.name
        if self._probe is not None:
            self._arbiter.cool_down.set_cost(cost_of(self._probe))
        return True

    def _memory_moves(self, way: str) -> bool:
        """Whether a reclaim under this gate works, before anybody has work. A worker that keeps its memory is ended by it."""
        done, pid, seconds = threading.Event(), self._pid, 0.0

        def reclaim() -> None:
            nonlocal seconds
            try:
                seconds = -self._clock.now()
                self._lender.rehearse()
                seconds += self._clock.now()
            finally:
                done.set()

        with self._lock:
            self._gate.freeze()
        self._gate.wait_stopped(_STOP_PATIENCE)
        self._run_in_engine(reclaim)
        done.wait()
        with self._lock:
            self._gate.thaw()
        moves = self._pid == pid and seconds < self._device.patience(way)
        if not moves:
            logger.warning("gate %s (%s): the worker does not let go of memory while frozen by it", self._gate.name, way)
            self._unfit.add(way)
        return moves

    def _set_gate(self) -> None:
        """The chosen gate, for the worker there is now. Under the lock."""
        self._gate = self._device.gate(self._way, self._pid)
        if self._arbiter.frozen:
            self._gate.freeze()

    def _worker_started(self, pid: int) -> None:
        with self._lock:
            self._pid = pid
            self._guardian.watch(pid)
            self._set_gate()
        self._device.started()

    def _worker_ready(self) -> None:
        self._device.ready()
        with self._lock:
            self._set_gate()

    def _worker_ended(self, pid: int) -> None:
        with self._lock:
            self._pid = None
            self._gate = NoGate()
            self._control[Word.FROZEN] = Freeze.NO  # the next one may be born into an idle moment

    # -- online requests

    def arrive(self, request: object, cost: Cost) -> None:
        """An online request is at the door: when this returns the worker stands still. Any thread; the cost is booked."""
        with self._lock:
            now = self._clock.now()
            busy = self._process.busy
            if not self._arbiter.arrive(request, now, offline_busy=busy):
                return
            self._account(now)
            self._gate.freeze()
            self._gate.wait_stopped(_STOP_PATIENCE)
            after = self._clock.now()
            self._arbiter.froze(after)
            self._timeline.switched(now, after)
            cost.waited_us += round((after - now) * 1e6)
            if busy:
                cost.preemptions += 1
                self._book_latency(after - now)
                self._timeline.event("preemption", "an online request arrived", latency_us=round((after - now) * 1e6))

    def finish(self, request: object, cost: Cost, request_ids: tuple[str, ...] = ()) -> None:
        """An online request is over, however it ended."""
        with self._lock:
            self._arbiter.finish(request, self._clock.now())
            cost.slabs_reclaimed += sum(self._lender.reclaimed_for.pop(name, 0) for name in request_ids)
            cost.waited_us += round(1e6 * sum(self._lender.waited_for.pop(name, 0.0) for name in request_ids))
            self._wake.notify()

    def withdraw(self, request: object) -> None:
        """What had arrived is no online request after all."""
        with self._lock:
            now = self._clock.now()
            if self._arbiter.withdraw(request, now):
                self._account(now)
                self._thaw("withdrawn", "it was offline work after all", now)
            self._wake.notify()

    def count(self, cost: Cost) -> None:
        """Enter a finished online request in the ledger."""
        with self._lock:
            self._request_preemptions[cost.preemptions] += 1

    def _book_latency(self, seconds: float) -> None:
        self._latencies[bisect_left(_LATENCY_BUCKETS, seconds)] += 1
        self._latency_sum += seconds

    # -- offline requests

    def put(self, command: Submit | Abort) -> None:
        self._process.put(command)
        with self._lock:
            self._account(self._clock.now())

    def pause(self, on: bool) -> None:
        """Have the worker run no steps although it could; or run them again."""
        self._process.pause(on)
        with self._lock:
            self._account(self._clock.now())

    @property
    def frozen(self) -> bool:
        """Whether the worker stands still for online's sake."""
        return self._arbiter.frozen

    @property
    def num_unfinished(self) -> int:
        return self._process.num_unfinished

    @property
    def failure(self) -> str | None:
        return self._process.failure

    # -- time

    def _tick(self) -> None:
        while not self._closing:
            try:
                self._look()
            except Exception:  # without this thread offline work would stand still for ever
                logger.exception("the arbiter failed and goes on")
            with self._wake:
                deadline = self._arbiter.deadline()
                pause = _BEAT_SECONDS if deadline is None else min(_BEAT_SECONDS, deadline - self._clock.now())
                if not self._closing and pause > 0:
                    self._wake.wait(pause)

    def _look(self) -> None:
        """What is due now: the heartbeat, the gate, memory."""
        rescued = self._guardian.check()
        with self._lock:
            now = self._clock.now()
            self._account(now)
            if self._arbiter.frozen:
                if rescued:
                    self._gate.freeze()  # this process stood still so long that the guardian let the worker go
                self._gate.keep()
            if self._arbiter.poll(now):
                self._account(now)
                self._thaw("thaw", "online work is done", now)
            settled = self._arbiter.state is State.OFFLINE
        if settled:
            self._run_in_engine(self._lender.settle)

    def _thaw(self, kind: str, cause: str, now: float) -> None:
        self._gate.thaw()
        stood = self._timeline.released(now)
        if self._process.busy:
            self._timeline.event(kind, cause, stood_still_ms=round(stood * 1e3, 3))

    def _account(self, now: float) -> None:
        """Book the time in which the worker could run and had work."""
        if self._offline_since is not None:
            self._offline_seconds += now - self._offline_since
        self._offline_since = now if not self._arbiter.frozen and self._process.busy else None

    def _report(self) -> Report | None:
        report: Report | None = None if self._closing else self._control.read_report(Report)
        return report

    def _holdings(self) -> Holdings:
        report = self._report()
        return Holdings() if report is None else Holdings(report.holders, report.computed)

    # -- what it came to

    def slab_use(self, online: PagePool) -> list[SlabUse]:
        """Who owns each slab, and how much of it is in use."""
        report = self._report()
        filled = {} if report is None else report.filled
        uses = []
        for slab in range(self._slabs.num_slabs):
            if self._slabs.owner(slab) is Tenant.OFFLINE:
                uses.append(SlabUse(Tenant.OFFLINE, 0.0, filled.get(slab, 0.0), 0.0))
            else:
                uses.append(slab_use(online, slab, Tenant.ONLINE))
        return uses

    def offline_share(self) -> float:
        """Share of the whole KV memory that the worker's requests use, as it last reported."""
        report = self._report()
        return 0.0 if report is None else sum(report.filled.values()) / self._slabs.num_slabs

    def stats(self) -> SharingStats:
        report = self._report()
        with self._lock:
            now = self._clock.now()
            self._account(now)
            spent = self._arbiter.seconds(now)
            online, switch = spent[State.ONLINE], spent[State.PREEMPTING]
            idle = spent[State.OFFLINE] - self._offline_seconds + spent[State.COOLING]
            seconds = {"online": online, "offline": self._offline_seconds, "switch": switch, "idle": idle}
            return SharingStats(
                device_seconds=seconds,
                state=self._arbiter.state,
                gate=self._gate_name,
                probe=self._probe,
                cooldown_seconds=self._arbiter.cool_down.seconds,
                preemptions=self._arbiter.preemptions,
                false_alarms=self._arbiter.false_alarms,
                latency_buckets=_LATENCY_BUCKETS,
                preemption_latency=tuple(self._latencies),
                preemption_seconds=self._latency_sum,
                request_preemptions=dict(self._request_preemptions),
                reclaims=self._lender.reclaims,
                reclaimed_slabs=self._lender.reclaimed_slabs,
                reclaim_seconds=self._lender.seconds,
                slabs={tenant: self._slabs.count(tenant) for tenant in Tenant},
                headroom_slabs=self._lender.reserve.headroom,
                worker=report,
                worker_restarts=self._process.restarts,
                worker_failure=self._process.failure,
            )

    def close(self) -> None:
        """End the worker, whatever state it is in. The online engine has ended: nothing here is asked for slabs any more."""
        with self._wake:
            if self._closing:
                return  # descriptors closed a second time may be somebody else's by now
            self._closing = True
            self._wake.notify()
        self._ticker.join()
        self._process.close()
        self._guardian.close()
        self._lender.close()
        self._device.close()
        self._control.close()
