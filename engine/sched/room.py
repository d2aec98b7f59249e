"""StepRoom: what the step being built may still hold, in tokens and in time. Lives for one `Scheduler.schedule` call."""

from __future__ import annotations

from collections.abc import Callable

from engine.sched.latency import Load, StepTime
from engine.sched.plan import PlanRow
from engine.sched.policies import Budget
from engine.types import Request, Tenant

_COPIES = 0.05  # of what a shared step may take, and at most half of what online rows leave of it


class StepRoom:
    """The budgets and rows of the step being built."""

    def __init__(self, budget: Budget, step_time: StepTime, to_copy: Callable[[], float] = lambda: 0.0) -> None:
        """`to_copy`: seconds of copies to and from the host that could be made beside it. Asked for shared steps only."""
        self.left = budget.tokens
        self.left_offline = min(budget.offline, budget.tokens)
        self.rows: dict[str, PlanRow] = {}  # by request, in order
        self.has_online = False
        self._budget = budget
        self._step_time = step_time
        self._load = Load()
        self._seconds: float | None = None  # what offline rows may make of the step, known once its online rows are
        self._to_copy = to_copy
        self._copying = 0.0
        self._timed = budget.seconds is not None or budget.increase is not None

    def room(self, request: Request) -> int:
        """Tokens of this request that may be computed, at most those whose KV it lacks."""
        missing = len(request.tokens) - request.num_computed
        if request.tenant is Tenant.ONLINE:
            return min(self.left, missing)
        wanted = min(self.left_offline, missing)
        if not self._timed or not self._load.tokens or wanted <= 0:
            return wanted
        if self._budget.decode_only and missing > 1:
            return 0
        return self._that_fit(request.num_computed, wanted)

    def slack(self) -> float:
        """Seconds that the step leaves of what it may take; none unless it is a shared one."""
        if not self.is_shared:
            return 0.0
        return max(0.0, self._allowed() - self._step_time.predict(self._load))

    @property
    def is_shared(self) -> bool:
        """Whether it has online rows, and offline work may take what they leave of its time."""
        return self._timed and self._load.tokens > 0 and self._step_time.ready

    @property
    def copying(self) -> float | None:
        """Seconds kept for copies that are made after it; None unless it is a shared one."""
        if not self.is_shared:
            return None
        self._allowed()
        return self._copying

    def _that_fit(self, start: int, wanted: int) -> int:
        """The most tokens from `start` on that keep the step within its time; none while the model knows too little."""
        if not self._step_time.ready:
            return 0
        low, high, allowed = 0, wanted, self._allowed()
        while low < high:
            middle = (low + high + 1) // 2
            if self._step_time.predict(self._load.plus(start, middle)) <= allowed:
                low = middle
            else:
                high = middle - 1
        return low

    def _allowed(self) -> float:
        """What the step may take beside the copies. First asked when its online rows are in it and nothing else is."""
        if self._seconds is None:
            seconds, increase = self._budget.seconds, self._budget.increase
            alone = self._step_time.predict(self._load)
            allowed = seconds if seconds is not None else alone * (1 + (increase or 0))
            self._copying = max(0.0, min(self._to_copy(), _COPIES * allowed, (allowed - alone) / 2))
            self._seconds = allowed - self._copying
        return self._seconds

    def add(self, row: PlanRow) -> None:
        self.left -= row.count
        if row.tenant is Tenant.OFFLINE:
            self.left_offline -= row.count
        else:
            self.has_online = True
        if self.left_offline > self.left:
            self.left_offline = self.left
        if self._timed:
            self._load = self._load.plus(row.start, row.count)
        self.rows[row.request_id] = row
