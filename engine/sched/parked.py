"""ParkedPasses: offline passes stopped between two layers, until they go on; and which of their requests still take part.

Several may be parked: while one waits, a step of requests that go before all of its own may start and be stopped as well. What
they hold is bounded in tokens, since each keeps its hidden states. The only writer of `Request.parked`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.sched.plan import Checkpoint
from engine.types import Request


@dataclass(slots=True)
class _Parked:
    """A pass, and the requests that are still in it."""

    checkpoint: Checkpoint
    members: dict[str, Request]
    priority: int  # of its first request
    order: int


class ParkedPasses:
    """`limit`: most tokens whose hidden states are kept, over all parked passes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._passes: list[_Parked] = []  # first to go on last
        self._count = 0

    def __len__(self) -> int:
        return len(self._passes)

    @property
    def next(self) -> Checkpoint | None:
        """The pass that goes on first."""
        return self._passes[-1].checkpoint if self._passes else None

    @property
    def room(self) -> int:
        """Tokens of one more pass that could be parked beside these."""
        return max(0, self._limit - sum(parked.checkpoint.plan.num_tokens for parked in self._passes))

    def outranked_by(self, request: Request | None) -> bool:
        """Whether a step may start before these passes go on, for the sake of this waiting request."""
        return request is not None and all(request.priority < parked.priority for parked in self._passes)

    def park(self, checkpoint: Checkpoint, members: Iterable[Request]) -> None:
        """Keep a pass; its members are not planned until it goes on."""
        found = {request.id: request for request in members}
        for request in found.values():
            assert not request.parked, request.id
            request.parked = True
        self._count += 1
        if found:
            first = min(request.priority for request in found.values())
            self._passes.append(_Parked(checkpoint, found, first, self._count))
            self._passes.sort(key=lambda parked: (parked.priority, parked.order), reverse=True)

    def take(self) -> tuple[Checkpoint, frozenset[str]] | None:
        """The pass that goes on first, and the requests in it that must not take part any more. None if nothing is parked."""
        if not self._passes:
            return None
        parked = self._passes.pop()
        for request in parked.members.values():
            request.parked = False
        gone = {row.request_id for row in parked.checkpoint.plan.rows} - parked.members.keys()
        return parked.checkpoint, frozenset(gone)

    def leave(self, request: Request) -> None:
        """The request lost its pages, or is over: its rows take no part when the pass goes on. An empty pass is dropped."""
        if not request.parked:
            return
        request.parked = False
        for parked in self._passes:
            if parked.members.pop(request.id, None) is not None:
                if not parked.members:
                    self._passes.remove(parked)
                return

    def check(self) -> None:
        """Raise AssertionError unless passes and flags agree. For tests."""
        members = [request for parked in self._passes for request in parked.members.values()]
        assert all(request.parked for request in members)
        assert len({request.id for request in members}) == len(members)
        assert all(parked.members for parked in self._passes)
