"""View: what a policy may look at. Read-only by agreement; the scheduler makes one a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from engine.sched.queue import Queue
from engine.types import Request, RequestState, Tenant


@dataclass(frozen=True, slots=True)
class View:
    """What there is at this moment.

    `running` has the requests as keys, in the order in which they were started, oldest first. `parked`: passes wait to go on.
    `alone_tokens`: most tokens of a step of offline rows only; none while parked passes go first.
    """

    now: float
    running: Mapping[Tenant, dict[Request, None]]
    waiting: Mapping[Tenant, Queue]
    max_tokens: int
    alone_tokens: int
    parked: bool

    def unfinished(self, tenant: Tenant) -> int:
        return len(self.running[tenant]) + len(self.waiting[tenant])

    def catching_up(self, tenant: Tenant) -> Iterator[Request]:
        """The tenant's running requests: those one token behind (decoding) first, then those with more to compute."""
        decoding: list[Request] = []
        others: list[Request] = []
        for request in self.running[tenant]:
            (decoding if len(request.tokens) - request.num_computed == 1 else others).append(request)
        return self._still_running([*decoding, *others])

    def started(self) -> Iterator[Request]:
        """Running requests of both tenants, oldest first."""
        return self._still_running(sorted(chain(*self.running.values()), key=lambda request: request.started or 0.0))

    @staticmethod
    def _still_running(requests: Sequence[Request]) -> Iterator[Request]:
        """Without those that sit in a parked pass, wait for their pages, or lost their place to an earlier candidate."""
        return (r for r in requests if r.state is RequestState.RUNNING and not r.parked and not r.restoring)
