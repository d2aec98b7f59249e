"""EngineLoop: the thread that owns an EngineCore. Commands go in by a queue; a step's results leave in one call.

The one exception to "everything through the queue": a step in flight cannot be asked anything, so `put` of an online request
shows at the door, which the core looks at between the layers of an offline step.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable

from engine.core import EngineCore
from engine.errors import EngineDead
from engine.sched.stopping import Waiting
from engine.types import Abort, Submit, Tenant, TokenOut

logger = logging.getLogger(__name__)

_STALL_SECONDS = 0.005

Deliver = Callable[[list[TokenOut]], None]


class EngineLoop:
    """Runs the core while it has work and sleeps otherwise.

    `deliver` is called in the loop's thread after each step that produced something; whatever it puts (an abort because a stop
    string was found) is obeyed before the next step. `died` is called once if the core gives up.
    """

    def __init__(self, core: EngineCore, deliver: Deliver, died: Callable[[EngineDead], None], name: str = "engine") -> None:
        self._core = core
        self._deliver = deliver
        self._died = died
        self._commands: deque[Submit | Abort | Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._door: deque[Waiting] = deque()  # online requests not yet taken in, as in `_commands`
        self.knocked = 0.0  # when the first of the online requests at the door, or of those last there, came to it
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def put(self, command: Submit | Abort) -> None:
        """Hand over a command. Thread-safe, never waits for a step."""
        with self._wake:
            if self._closing or not self._thread.is_alive():
                raise EngineDead("the engine has stopped")
            self._commands.append(command)
            if isinstance(command, Submit) and command.tenant is Tenant.ONLINE:
                now = self._core.scheduler.clock.now()
                if not self._door:
                    self.knocked = now
                self._door.append(Waiting(len(command.prompt), now, self._core.stop_rule.layer))
            self._wake.notify()

    def stack(self) -> str:
        """Where the loop's thread is now, as a traceback."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "" if frame is None else "".join(traceback.format_stack(frame))

    def close(self) -> None:
        """Stop after the current step. Requests still in the core end nowhere; the caller has drained or aborted them."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def call(self, function: Callable[[], None]) -> None:
        """Have the loop's thread call `function` between two steps. Dropped if the loop has ended."""
        with self._wake:
            if self.alive:
                self._commands.append(function)
                self._wake.notify()

    def pause(self, tenants: frozenset[Tenant]) -> None:
        """From the next step on, run nothing of these tenants; of all others again. What is under way is finished."""

        def pause() -> None:
            self._core.scheduler.paused = tenants

        self.call(pause)

    def online_at_the_door(self) -> bool:
        """Whether a step without online rows should make way: an online request waits to be taken in, or the loop closes."""
        return bool(self._door) or self._closing

    def waiting(self) -> tuple[Waiting, ...]:
        """The online requests at the door; none of them matters to a loop that closes."""
        with self._wake:
            return () if self._closing else tuple(self._door)

    def _run(self) -> None:
        try:
            while self._wait():
                outs = self._drain()
                if not self._closing:
                    outs += self._core.step()
                if outs:
                    self._deliver(outs)
        except EngineDead as error:
            self._died(error)
        except Exception as error:
            logger.exception("the engine loop failed")
            dead = EngineDead(f"the engine loop failed: {error}")
            dead.__cause__ = error
            self._died(dead)
        finally:
            self._core.close()

    def _wait(self) -> bool:
        with self._wake:
            if self._core.stalled and not self._commands and not self._closing:
                self._wake.wait(_STALL_SECONDS)  # only memory that comes back by itself can help
            while not (self._commands or self._closing or self._core.has_work):
                self._wake.wait()
            return not self._closing

    def _drain(self) -> list[TokenOut]:
        outs: list[TokenOut] = []
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, Abort):
                outs += self._core.abort(command.id)
                continue
            if not isinstance(command, Submit):
                command()
                continue
            arrival = None
            if command.tenant is Tenant.ONLINE:
                with self._wake:
                    arrival = self._door.popleft().since
            self._core.submit(command, arrival)
        return outs
