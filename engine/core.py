"""EngineCore: the whole engine in one `step()`: schedule, launch, collect, update. No threads, no text, no sockets, no torch.

One caller at a time. Requests come in with `submit` and leave as TokenOut; errors of the runner end the requests of that step
and nothing else, until too many steps in a row fail.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from engine.errors import EngineDead
from engine.sched.plan import Runner, StepPlan, StepResult
from engine.sched.scheduler import Scheduler
from engine.types import Submit, Tenant, TokenOut

logger = logging.getLogger(__name__)

_MAX_FAILED_STEPS = 3  # in a row; a device that fails this often will not recover by itself


class EngineCore:
    """Runs one model's requests.

    `interrupted` is asked between the layers of a step without online rows; when it says True (an online request is at the
    door) the pass is parked at that layer, and goes on from there when online work is done.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, *, interrupted: Callable[[], bool] = lambda: False) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.interrupted = interrupted
        self.on_step: Callable[[StepPlan, StepResult], None] = lambda plan, result: None
        self.sync: Callable[[], None] = lambda: None  # called before a step is decided and before its results are applied
        self.stalled = False  # there is work, but nothing of it could run in the last step
        self.busy_since: float | None = None  # when the step that runs now began
        self._failed_steps = 0

    def submit(self, submit: Submit) -> None:
        self.scheduler.add(submit)

    def abort(self, request_id: str) -> list[TokenOut]:
        out = self.scheduler.abort(request_id)
        return [] if out is None else [out]

    @property
    def has_work(self) -> bool:
        return any(self.scheduler.unfinished(tenant) for tenant in Tenant)

    def step(self) -> list[TokenOut]:
        """Run one step, or do nothing if nothing can run. Raises EngineDead when the runner fails again and again."""
        self.busy_since = self.scheduler.clock.now()
        try:
            return self._step()
        finally:
            self.busy_since = None

    def _step(self) -> list[TokenOut]:
        self.sync()
        self.stalled = False
        plan = self.scheduler.schedule()
        if plan is not None:
            return self._run(plan, lambda: self.runner.launch(plan, self._stop), whole=True)
        parked = self.scheduler.parked.take()
        if parked is None:
            self.stalled = self.has_work
            return []
        checkpoint, dropped = parked
        return self._run(checkpoint.plan, lambda: self.runner.resume(checkpoint, dropped, self._stop), whole=False)

    def _stop(self, layer: int) -> bool:
        return self.interrupted()

    def _run(self, plan: StepPlan, start: Callable[[], object], *, whole: bool) -> list[TokenOut]:
        try:
            result = self.runner.collect(start())
        except Exception as error:
            return self._failed(plan, error)
        self._failed_steps = 0
        self.on_step(plan, result)
        if result.checkpoint is not None:
            self.scheduler.park(result.checkpoint)
            return []
        if whole:
            self.scheduler.learn(plan, result.seconds)
        self.sync()
        return self.scheduler.update(plan, result)

    def _failed(self, plan: StepPlan, error: Exception) -> list[TokenOut]:
        logger.exception("step %d with %d rows failed", plan.step, len(plan.rows))
        self._failed_steps += 1
        if self._failed_steps >= _MAX_FAILED_STEPS:
            raise EngineDead(f"{self._failed_steps} steps in a row failed; the last one with: {error}") from error
        return self.scheduler.fail(plan, f"the step failed: {type(error).__name__}")

    def close(self) -> None:
        self.runner.close()
