"""The watchdog: a step that does not end is told, with the place where it stands, and the server's health with it."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from server.service import Service

if TYPE_CHECKING:
    from engine import Engine

log = logging.getLogger(__name__)

_LOOKS = 0.25  # seconds between two looks, at most


async def watch_steps(service: Service, engine: Engine, timeout: float) -> None:
    """While a step has been running for longer than `timeout` seconds, `service.stuck` says for how long. 0: never."""
    while timeout:
        await asyncio.sleep(min(_LOOKS, timeout / 4))
        age = engine.step_age()
        if age > timeout and not service.stuck:
            service.metrics.stuck_steps.inc()
            engine.timeline.event("stuck", "a step does not end", seconds=round(age, 3))
            log.critical("a step has been running for %.1f s; the engine's thread stands at:\n%s", age, engine.stack())
        elif service.stuck and age < service.stuck:
            log.warning("the step that was stuck has ended; it took at least %.1f s", service.stuck)
            engine.timeline.event("stuck", "the step ended after all", seconds=round(service.stuck, 3))
        service.stuck = age if age > timeout else 0.0
