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
    """Most tokens one step may compute: in all, and for the offline tenant."""

    tokens: int
    offline: int


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
        idle = not view.unfinished(Tenant.ONLINE) and not view.parked
        return Budget(tokens=view.max_tokens, offline=view.max_tokens if idle else 0)

    def victims(self, view: View, request: Request) -> Iterator[Request]:
        """Offline gives way to online; within a tenant, who started later gives way to who started earlier."""
        if request.tenant is Tenant.ONLINE:
            yield from reversed(view.running[Tenant.OFFLINE])
        if request.state is RequestState.RUNNING:
            yield from _younger(view.running[request.tenant], request)


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


POLICIES: dict[str, type[Policy]] = {"online-first": OnlineFirst, "fcfs": Fcfs}
