"""Scheduling policies: who goes first (`order`), how much may run (`budget`), who gives way (`victims`); functions of a View.

Shared code in the scheduler spends the budgets and moves the requests; a policy never does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from engine.sched.view import View
from engine.types import Request, RequestState, Tenant


@dataclass(frozen=True, slots=True)
class Budget:
    """Most tokens one step may compute: in all, and for the offline tenant.

    Where online and offline share a step, offline rows are added only while the predicted time of the step stays within
    `seconds`, or within `increase` (a share) of what it is without them.
    """

    tokens: int
    offline: int
    seconds: float | None = None
    increase: float | None = None


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

    def __init__(self, tpot: float | None = None, increase: float = 0.05) -> None:
        self._tpot = tpot
        self._increase = increase

    def budget(self, view: View) -> Budget:
        if not view.unfinished(Tenant.ONLINE):
            return super().budget(view)
        return Budget(view.max_tokens, view.max_tokens, self._tpot, None if self._tpot is not None else self._increase)


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


def _younger(running: Sequence[Request], request: Request) -> Iterator[Request]:
    """Those after `request`, youngest first, then the request itself."""
    after = running[running.index(request) + 1 :]
    return chain(reversed(after), (request,))


def make_policy(name: str, *, tpot: float | None = None, increase: float = 0.05) -> Policy:
    """The policy by the name its flag uses; the targets matter to "shared-step" alone."""
    if name == "shared-step":
        return SharedStep(tpot, increase)
    return Fcfs() if name == "fcfs" else OnlineFirst()


POLICIES = ("online-first", "shared-step", "fcfs")
