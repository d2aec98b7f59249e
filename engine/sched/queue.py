"""TenantQueue: the waiting requests of one tenant, lowest priority number first, then in order of arrival.

A request keeps its place: one that was preempted goes back to where its arrival puts it, ahead of everything younger.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Protocol

from engine.types import Request


class Queue(Protocol):
    """What the scheduler and its policies need of the waiting requests of one tenant. See TenantQueue for what each does."""

    def __len__(self) -> int: ...

    def push(self, request: Request) -> None: ...

    def peek(self) -> Request | None: ...

    def remove(self, request: Request) -> None: ...

    def forget(self, request: Request) -> None: ...

    def heads(self) -> Iterator[Request]: ...


class TenantQueue:
    """A heap with lazy removal: push, peek and remove cost O(log n) however long the queue is.

    `behind`: another queue, whose places those requests keep here that it knows.
    """

    def __init__(self, behind: TenantQueue | None = None) -> None:
        self._heap: list[tuple[int, int, Request]] = []
        # Sequence number of every request pushed and not forgotten.
        self._place: dict[Request, int] = {} if behind is None else behind._place
        self._waiting: set[Request] = set()
        self._next = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, request: Request) -> None:
        if request not in self._place:
            self._place[request] = self._next
            self._next += 1
        self._waiting.add(request)
        heapq.heappush(self._heap, (request.priority, self._place[request], request))

    def peek(self) -> Request | None:
        while self._heap:
            request = self._heap[0][2]
            if request in self._waiting:
                return request
            heapq.heappop(self._heap)
        return None

    def remove(self, request: Request) -> None:
        """The request stops waiting (it runs now) but keeps its place should it come back."""
        self._waiting.discard(request)
        self.peek()  # drops it from the heap at once if it was the head

    def forget(self, request: Request) -> None:
        """The request is finished."""
        self.remove(request)
        self._place.pop(request, None)

    def heads(self) -> Iterator[Request]:
        """The head, then the next one if the head was admitted meanwhile, and so on: nobody overtakes a refused request."""
        while (head := self.peek()) is not None:
            yield head
            if head in self._waiting:
                return
