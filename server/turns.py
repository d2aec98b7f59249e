"""Turns of the event loop: of many requests that come at once a few are begun in each, so streams under way go on between."""

from __future__ import annotations

import asyncio
from collections import deque

_AT_ONCE = 8  # beginning one takes some tenths of a millisecond


class Turns:
    """Lets `at_once` through in each turn of the event loop, in the order in which they came."""

    def __init__(self, at_once: int = _AT_ONCE) -> None:
        self._at_once = at_once
        self._left = at_once
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._counting = False  # the next turn is arranged

    async def take(self) -> None:
        """Go on in this turn, or in the next one that has room."""
        loop = asyncio.get_running_loop()
        if not self._counting:
            self._counting = True
            loop.call_soon(self._next, loop)
        if self._left:
            self._left -= 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left = self._at_once
        while self._waiting and self._left:
            turn = self._waiting.popleft()
            if not turn.done():  # who left meanwhile needs none
                turn.set_result(None)
                self._left -= 1
        self._counting = self._left < self._at_once
        if self._counting:
            loop.call_soon(self._next, loop)
