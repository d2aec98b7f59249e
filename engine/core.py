"""EngineCore: the whole engine in one `step()`: copy, schedule, launch, collect, update. No threads, no text, no torch.

Where the runner is asynchronous and the next step is certain, it is launched before the results of this one are waited for, so
that the device never waits for the host. One caller at a time. Requests come in with `submit` and leave as TokenOut; errors of
the runner end the requests of that step and nothing else, until too many steps in a row fail.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine.errors import EngineDead
from engine.memory.host import PageCopier, Transfer
from engine.memory.host_copies import HostStats
from engine.sched.latency import Load
from engine.sched.modes import Mode, ModeChooser
from engine.sched.plan import Checkpoint, Runner, StepPlan, StepResult, StopCondition
from engine.sched.scheduler import Scheduler
from engine.sched.slo import OnlineMeter, offline_share
from engine.sched.stopping import LAYER_BUCKETS, StopRule, Waiting
from engine.types import Submit, Tenant, TokenOut

logger = logging.getLogger(__name__)

_MAX_FAILED_STEPS = 3  # in a row; a device that fails this often will not recover by itself
_SHARE = 0.05  # of the time of steps, for copies that no request waits for
_MOST_CREDIT = 0.05  # seconds of them at once


class _Copying:
    """Carries out the scheduler's transfers between steps, within a share of the time that the steps take."""

    def __init__(self, scheduler: Scheduler, copier: PageCopier) -> None:
        self._scheduler = scheduler
        self._copier = copier
        self._clock = scheduler.clock
        self._credit = _MOST_CREDIT  # seconds that saves may take
        self._saved = 0.0  # seconds beside online rows that were too few for a page
        self._under_way: deque[tuple[Transfer, object, float]] = deque()  # with the seconds that starting it took
        assert scheduler.kv.copies is not None
        scheduler.kv.copies.settle = self._settle

    @property
    def page_bytes(self) -> int:
        return self._copier.page_bytes

    def earn(self, seconds: float) -> None:
        """Steps took so long."""
        self._credit = min(_MOST_CREDIT, self._credit + _SHARE * seconds)

    def start(self, interrupted: Callable[[], bool]) -> None:
        """Start what there is to copy, until somebody is at the door: loads all, saves while there is credit."""
        while not interrupted():
            transfer = self._scheduler.next_transfer(self._copier.batch, save=self._credit > 0)
            if transfer is None:
                return
            blocked = self._begin(transfer)
            if not transfer.load:
                self._credit -= blocked

    def start_beside(self, interrupted: Callable[[], bool], seconds: float) -> float:
        """The same while online rows wait for it, within these seconds. Returns those it took.

        Until it is known what a page takes, one is copied at a time.
        """
        cost, left, taken = self._scheduler.rotation.copy_time, seconds + self._saved, 0.0
        while not interrupted():
            known = cost.elapsed is not None
            limit = 1 if not known else self._copier.batch if not cost.blocked else int((left - taken) / cost.blocked)
            transfer = self._scheduler.next_transfer(min(limit, self._copier.batch), save=True) if limit else None
            if transfer is None:
                break
            taken += self._begin(transfer)
            if not known:
                break
        self._saved = min(max(0.0, left - taken), cost.blocked)
        return taken

    def _begin(self, transfer: Transfer) -> float:
        """Returns the seconds in which it blocked."""
        began = self._clock.now()
        handle = self._copier.start(transfer)
        blocked = self._clock.now() - began
        self._under_way.append((transfer, handle, blocked))
        return blocked

    def take_complete(self) -> list[tuple[Transfer, float, float]]:
        """Transfers that are complete, with the seconds each took and those in which it blocked."""
        complete: list[tuple[Transfer, float, float]] = []
        for _ in range(len(self._under_way)):
            transfer, handle, blocked = self._under_way.popleft()
            elapsed = self._copier.poll(handle)
            if elapsed is None:
                self._under_way.append((transfer, handle, blocked))
            else:
                complete.append((transfer, elapsed, blocked))
        return complete

    def _settle(self) -> None:
        for _, handle, _ in self._under_way:
            self._copier.wait(handle)

    def close(self) -> None:
        self._settle()
        self._copier.close()


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step that runs. `handle` is the runner's; `whole`: from the first layer on."""

    plan: StepPlan
    handle: Any
    began: float
    whole: bool = True


@dataclass(frozen=True, slots=True)
class StepStats:
    """How the tenants of one model share its steps."""

    mode: str  # exclusive or step
    scale: float  # what the budget of shared steps is multiplied by; 1 where nothing controls it
    layer_buckets: tuple[int, ...]
    preemption_layers: tuple[int, ...]  # stops of offline passes by the layers they took: per bucket, then those beyond
    preemption_layers_sum: int


class EngineCore:
    """Runs one model's requests.

    `interrupted` is asked between the layers of a step without online rows, and must be cheap. When it says True (an online
    request is at the door) and not all of those in `waiting` can wait for the end of the pass, it is parked at that layer and
    goes on from there when online work is done. `ttft`: seconds to a first token in time; without it nobody can wait.

    `copier` carries out what the scheduler wants copied to host memory and back; with it, the scheduler's KVManager has a host
    tier. `launch_ahead`: whether to launch a step before the one before it is done (default: if the runner is asynchronous);
    never while somebody is at the door. Outputs do not depend on it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        interrupted: Callable[[], bool] = lambda: False,
        copier: PageCopier | None = None,
        launch_ahead: bool | None = None,
        ttft: float | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.interrupted = interrupted
        self.waiting: Callable[[], Sequence[Waiting]] = tuple
        self.stop_rule = StopRule(
            scheduler.step_time, scheduler.clock,
            num_layers=runner.num_layers, max_tokens=scheduler.max_num_batched_tokens, ttft=ttft,
        )  # fmt: skip
        self.on_step: Callable[[StepPlan, StepResult], None] = lambda plan, result: None
        self.sync: Callable[[], None] = lambda: None  # called before a step is decided and before its results are applied
        self.meter: OnlineMeter | None = None  # of what online requests feel, where the step budget follows it
        self.modes: ModeChooser | None = None
        self.stalled = False  # there is work, but nothing of it could run in the last step
        self.busy_since: float | None = None  # when the step that runs now began
        self._idle = False  # nothing could run last time
        self._copying = None if copier is None else _Copying(scheduler, copier)
        self.launch_ahead = runner.asynchronous if launch_ahead is None else launch_ahead
        self._ahead: _Launched | None = None
        self._failed_steps = 0
        self._slack_left = False  # by the latest step, whose tokens go out before it is used
        self._carry = 0.0  # seconds that shared steps left over and no parked pass has used

    def submit(self, submit: Submit, arrival: float | None = None) -> None:
        """Take in a request, which arrived now or, by the scheduler's clock, earlier."""
        request = self.scheduler.add(submit, arrival)
        if submit.tenant is not Tenant.ONLINE:
            return
        self._slack_left = False
        if self.meter is not None:
            self.meter.arrived(submit.id, request.arrival, len(submit.prompt))

    def abort(self, request_id: str) -> list[TokenOut]:
        out = self.scheduler.abort(request_id)
        self._forget_dead_step()
        if self.meter is not None:
            self.meter.gone(request_id)
        return [] if out is None else [out]

    @property
    def has_work(self) -> bool:
        """Whether anything may run: nothing of paused tenants, but what of it is under way."""
        scheduler = self.scheduler
        if self._ahead is not None or scheduler.parked:
            return True
        return any(scheduler.unfinished(t) for t in Tenant if t not in scheduler.paused)

    def step(self) -> list[TokenOut]:
        """Run one step, or do nothing if nothing can run. Raises EngineDead when the runner fails again and again."""
        self.busy_since = self.scheduler.clock.now()
        try:
            return self._step()
        finally:
            self.busy_since = None

    def _step(self) -> list[TokenOut]:
        self.sync()
        if self._slack_left:
            self._slack_left = False
            if (used := self._use_slack()) is not None:
                return used
        self._copy()
        self.stalled = False
        launched, self._ahead = self._ahead, None
        if launched is not None:
            return self._finish(launched)
        plan = self.scheduler.schedule()
        if plan is not None:
            outs = self._run(plan, partial(self.runner.launch, plan, self._stop), 0, whole=True)
            self._slack_left = not plan.preemptible and self._ahead is None and bool(self.scheduler.parked)
            return outs
        parked = self.scheduler.parked.take()
        if parked is None:
            self._idle = True
            self.stalled = self.has_work and not self.scheduler.wants_copies
            return []
        return self._resume(*parked, self._stop)

    def _resume(self, checkpoint: Checkpoint, dropped: frozenset[str], stop: StopCondition) -> list[TokenOut]:
        resume = partial(self.runner.resume, checkpoint, dropped, stop)
        return self._run(checkpoint.plan, resume, checkpoint.layer, whole=False)

    def _use_slack(self) -> list[TokenOut] | None:
        """Some layers of a parked pass in the time that a shared step left over; None if it is too little for one.

        What is too short for a layer is kept for the next step, so that steps are within their time on average and beyond it by
        no more than a layer.
        """
        scheduler, now = self.scheduler, self.scheduler.clock.now
        checkpoint = scheduler.parked.next
        if checkpoint is None or scheduler.slack <= 0 or self.interrupted():
            return None
        layer_seconds = scheduler.step_time.predict(Load.of(checkpoint.plan.rows)) / self.runner.num_layers
        available = self._carry + scheduler.slack
        if available < layer_seconds:
            self._carry = available
            return None
        began = now()

        def stop(layer: int) -> bool:
            return now() - began + layer_seconds > available or self._stop(layer)

        taken = scheduler.parked.take()
        assert taken is not None
        outs = self._resume(*taken, stop)
        self._carry = max(-layer_seconds, min(layer_seconds, available - (now() - began)))
        return outs

    def _copy(self) -> None:
        """Pages to and from the host. While an online request is unfinished, in the time that the latest step had for it."""
        if self._copying is None:
            return
        scheduler, now = self.scheduler, self.scheduler.clock.now
        if scheduler.may_copy or self._idle:
            self._copying.start(self.interrupted)
        elif scheduler.copy_seconds is not None:
            began = now()
            if self._copying.start_beside(self.interrupted, scheduler.copy_seconds):
                scheduler.delays.ran(began, now(), 1.0)
                if self.meter is not None:
                    self.meter.ran((), began, now())
        if complete := self._copying.take_complete():
            self.sync()  # a slab may have been taken before it was copied
            for transfer, elapsed, blocked in complete:
                self.scheduler.landed(transfer, elapsed, blocked)

    def host_stats(self) -> HostStats | None:
        """Of the host tier, if there is one."""
        copies = self.scheduler.kv.copies
        return None if copies is None or self._copying is None else copies.stats(self._copying.page_bytes)

    def _stop(self, layer: int) -> bool:
        self.stop_rule.layer = layer
        return self.interrupted() and self.stop_rule.stops(layer, self.waiting())

    def _run(self, plan: StepPlan, start: Callable[[], Any], layer: int, *, whole: bool) -> list[TokenOut]:
        self.stop_rule.begin(layer)
        began = self.scheduler.clock.now()
        try:
            handle = start()
        except Exception as error:
            return self._failed(plan, error)
        return self._finish(_Launched(plan, handle, began, whole))

    def _finish(self, launched: _Launched) -> list[TokenOut]:
        """Wait for a step and apply what came of it, with the next one launched meanwhile if it is certain."""
        plan = launched.plan
        if self.launch_ahead and launched.whole and not self.interrupted():
            self._launch_after(launched)
        try:
            result = self.runner.collect(launched.handle)
        except Exception as error:
            return self._failed(plan, error)
        self._failed_steps = 0
        self._idle = False
        if self._copying is not None:
            self._copying.earn(result.seconds)
        self.on_step(plan, result)
        now = self.scheduler.clock.now()
        self.scheduler.delays.ran(launched.began, now, offline_share(plan.rows, self.scheduler.step_time))
        if self.meter is not None:
            self.meter.ran(plan.rows, launched.began, now)
        if result.checkpoint is not None:
            self.scheduler.park(result.checkpoint)
            return []
        if launched.whole:
            self.scheduler.learn(plan, result.seconds)
            if self.modes is not None:
                self._tell_modes(self.modes, plan)
        self.sync()
        outs = self.scheduler.update(plan, result)
        if self.meter is not None:
            self.meter.saw(outs, launched.began, now)
            if self.modes is not None and (work := self.meter.work) is not None:
                self.modes.settle(work)
        self._forget_dead_step()
        return outs

    def _launch_after(self, launched: _Launched) -> None:
        plan = self.scheduler.schedule_after(launched.plan)
        if plan is None:
            return
        try:
            self._ahead = _Launched(plan, self.runner.launch(plan, self._stop, launched.handle), self.scheduler.clock.now())
        except Exception as error:  # launched again in its turn, it works or fails its requests
            logger.warning("step %d could not be launched ahead: %s", plan.step, error)

    def _forget_dead_step(self) -> None:
        """If all requests of the step launched ahead have ended: wait for it, so that nothing touches their pages later."""
        if self._ahead is not None and not self.scheduler.wants(self._ahead.plan):
            self._drop_ahead()

    def _drop_ahead(self) -> None:
        """Wait for the step launched ahead, if any, whose results nobody wants."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            try:
                self.runner.collect(ahead.handle)
            except Exception as error:
                logger.warning("a step launched ahead failed, its requests had ended: %s", error)

    @property
    def mode(self) -> Mode:
        """How the tenants of this model share it at the moment."""
        if self.modes is not None:
            return self.modes.mode
        return Mode.EXCLUSIVE if self.meter is None else Mode.STEP

    def stats(self) -> StepStats:
        responses = self.stop_rule.responses
        scale = 1.0 if self.meter is None else self.meter.control.scale
        return StepStats(self.mode.value, scale, LAYER_BUCKETS, tuple(responses.counts), responses.total)

    def _tell_modes(self, modes: ModeChooser, plan: StepPlan) -> None:
        """What a whole step did for offline work. By predicted times, so that a disturbance is no reason for anything."""
        step_time = self.scheduler.step_time
        if not step_time.ready:
            return
        seconds = step_time.predict(Load.of(plan.rows))
        done = step_time.added(Load.of(row for row in plan.rows if row.tenant is Tenant.OFFLINE))
        if plan.preemptible:
            modes.ran_alone(seconds, done)
        else:
            modes.ran_online(seconds, done, could_ride=self.scheduler.unfinished(Tenant.OFFLINE) > 0)

    def _failed(self, plan: StepPlan, error: Exception) -> list[TokenOut]:
        logger.exception("step %d with %d rows failed", plan.step, len(plan.rows))
        self._drop_ahead()
        self._failed_steps += 1
        if self._failed_steps >= _MAX_FAILED_STEPS:
            raise EngineDead(f"{self._failed_steps} steps in a row failed; the last one with: {error}") from error
        outs = self.scheduler.fail(plan, f"the step failed: {type(error).__name__}")
        if self.meter is not None:
            for out in outs:
                self.meter.gone(out.id)
        return outs

    def close(self) -> None:
        self._drop_ahead()
        if self._copying is not None:
            self._copying.close()
        self.runner.close()
