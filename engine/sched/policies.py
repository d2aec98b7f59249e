"""Scheduling policies: who goes first (`order`), how much may run (`budget`), who gives way (`victims`); functions of a View.

Shared code in the scheduler spends the budgets and moves the requests; a policy never does.
"""

from __future__ import annotations

from collections.abc import Iterator, Reversible
from dataclasses import dataclass
from typing import Protocol

from engine.sched.modes import Mode, ModeChooser
from engine.sched.slo import SloControl
from engine.sched.view import View
from engine.types import Request, RequestState, Tenant

_LEAST_ALONE = 16  # tokens of a step of offline rows: fewer would hardly make it shorter


@dataclass(frozen=True, slots=True)
class Budget:
    """Most tokens one step may compute: in all, and for the offline tenant.

    Where online and offline share a step, offline rows are added only while the predicted time of the step stays within
    `seconds`, or within `increase` (a share) of what it is without them. `decode_only`: of offline requests those one token
    behind may take part, since what else fits is for parked passes.
    """

    tokens: int
    offline: int
    seconds: float | None = None
    increase: float | None = None
    decode_only: bool = False


class Policy(Protocol):
    def order(self, view: View) -> Iterator[Request]:
        """Candidates, first to go first. Lazy: each is placed or refused before the next is asked for."""
        ...

    def budget(self, view: View) -> Budget: ...

    def victims(self, view: View, request: Request) -> Iterator[Request]:
        """Running requests that give way to `request`, first to go first. May end with the request itself."""
        ...


class OnlineFirst:
    """Online work first and alone: offline runs when no online request is unfinished, and gives way at once.

    A step with online rows holds no offline ones, so online latency is what it would be without offline work.
    """

    def order(self, view: View) -> Iterator[Request]:
        for tenant in (Tenant.ONLINE, Tenant.OFFLINE):
            yield from view.catching_up(tenant)
            yield from view.waiting[tenant].heads()

    def budget(self, view: View) -> Budget:
        if view.unfinished(Tenant.ONLINE):
            return Budget(tokens=view.max_tokens, offline=0)
        return Budget(tokens=view.alone_tokens, offline=view.alone_tokens)

    def victims(self, view: View, request: Request) -> Iterator[Request]:
        """Offline gives way to online; within a tenant, who started later gives way to who started earlier."""
        if request.tenant is Tenant.ONLINE:
            yield from reversed(view.running[Tenant.OFFLINE])
        if request.state is RequestState.RUNNING:
            yield from _younger(view.running[request.tenant], request)


class SharedStep(OnlineFirst):
    """Offline rows ride in online steps as far as the latency target allows (ConServe section 2.1, HyGen's two phases).

    Without online work it does what OnlineFirst does. `tpot` is the target for a step in seconds; without one, steps may take
    `increase` (a share) longer than they would with their online rows alone.
    """

    def __init__(
        self,
        tpot: float | None = None,
        increase: float = 0.05,
        control: SloControl | None = None,
        modes: ModeChooser | None = None,
    ) -> None:
        """`control` scales these budgets by what online requests feel; `modes` says when nobody rides."""
        self._tpot = tpot
        self._increase = increase
        self._control = control
        self._modes = modes

    def budget(self, view: View) -> Budget:
        busy = view.unfinished(Tenant.ONLINE) > 0
        exclusive = self._modes is not None and self._modes.look(view.now, busy) is Mode.EXCLUSIVE
        scale = 1.0 if self._control is None else self._control.scale
        if not busy and self._control is not None and self._control.what == "ttft":
            # Whoever arrives waits for a layer of what runs then.
            tokens = min(view.alone_tokens, max(_LEAST_ALONE, int(view.alone_tokens * scale)))
            return Budget(tokens=tokens, offline=tokens)
        if exclusive or not busy:
            return super().budget(view)
        if self._tpot is not None:
            return Budget(view.max_tokens, view.max_tokens, seconds=self._tpot * scale, decode_only=view.parked)
        return Budget(view.max_tokens, view.max_tokens, increase=self._increase * scale, decode_only=view.parked)


class Priority(OnlineFirst):
    """Online rows first, then offline rows up to the token budget, however long that takes: the baseline of priorities."""

    def budget(self, view: View) -> Budget:
        tokens = 0 if view.parked else view.max_tokens
        return Budget(tokens=tokens, offline=tokens)


class Fcfs:
    """First come, first served, blind to the tenant: the baseline every other policy is measured against."""

    def order(self, view: View) -> Iterator[Request]:
        yield from view.started()
        queues = view.waiting
        while True:
            heads = [head for queue in queues.values() if (head := queue.peek()) is not None]
            if not heads:
                return
            first = min(heads, key=lambda request: request.arrival)
            yield first
            if first.state is RequestState.WAITING:
                return

    def budget(self, view: View) -> Budget:
        tokens = 0 if view.parked else view.max_tokens
        return Budget(tokens=tokens, offline=tokens)

    def victims(self, view: View, request: Request) -> Iterator[Request]:
        if request.state is RequestState.RUNNING:
            yield from _younger(list(view.started()), request)


def _younger(running: Reversible[Request], request: Request) -> Iterator[Request]:
    """Those after `request`, youngest first, then the request itself."""
    for other in reversed(running):
        yield other
        if other is request:
            return


def make_policy(
    name: str,
    *,
    tpot: float | None = None,
    increase: float = 0.05,
    control: SloControl | None = None,
    modes: ModeChooser | None = None,
) -> Policy:
    """The policy of that name; all else matters to "shared-step" alone."""
    if name == "shared-step":
        return SharedStep(tpot, increase, control, modes)
    plain: dict[str, type[Policy]] = {"fcfs": Fcfs, "priority": Priority, "online-first": OnlineFirst}
    return plain[name]()


POLICIES = ("online-first", "shared-step", "priority", "fcfs")
