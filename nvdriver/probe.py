"""Does the gate really stop anything? Decided by watching progress, never by a status word.

A virtualised or intercepted driver may answer "done" and do nothing, so a gate is believed only after a counter that
the GPU increments (a spinning kernel writing to mapped memory) stood still while frozen and moved again afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass

from nvdriver.device import Clock
from nvdriver.gate import ChannelGate


@dataclass(frozen=True, slots=True)
class ProbeReport:
    ran_before: bool
    stood_still: bool
    ran_after: bool
    freeze_s: float

    @property
    def works(self) -> bool:
        return self.ran_before and self.stood_still and self.ran_after

    def explain(self) -> str:
        if not self.ran_before:
            return "the counter does not move: start the spinning kernel before probing"
        if not self.stood_still:
            return "the driver reported success, but the kernel went on: use a software gate"
        if not self.ran_after:
            return "the kernel did not resume: do not use channel control on this driver"
        return f"the gate stops a running kernel; freezing took {self.freeze_s * 1e6:.0f} us"


def probe(
    gate: ChannelGate, counter: Callable[[], int], clock: Clock, watch_s: float = 0.02, patience: int = 50
) -> ProbeReport:
    """Freeze for `watch_s` under a running counter; wait at most `patience` times that long for it to move."""
    ran_before = _moves(counter, clock, watch_s, patience)
    start = clock.now()
    gate.freeze()
    freeze_s = clock.now() - start
    try:
        stood_still = not _moves(counter, clock, watch_s, 1)
    finally:
        gate.thaw()
    return ProbeReport(ran_before, stood_still, _moves(counter, clock, watch_s, patience), freeze_s)


def _moves(counter: Callable[[], int], clock: Clock, watch_s: float, patience: int) -> bool:
    before = counter()
    for _ in range(patience):
        clock.sleep(watch_s)
        if counter() != before:
            return True
    return False
