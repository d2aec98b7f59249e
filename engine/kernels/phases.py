"""One attention for steps with prompts, another for steps of single tokens: whichever was faster when both were tried.

Knows nothing of devices: what is tried, and how time is taken, is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.kernels.api import BatchMeta, QKNorm

_MARGIN = 0.03  # share of time that an alternative must save: less may be chance, and the first is known better


@dataclass(frozen=True, slots=True)
class Choice:
    """Names of the attentions that serve, and the seconds that were measured, by name."""

    prompts: str
    singles: str
    seconds: Mapping[str, Mapping[str, float]]  # phase -> name -> seconds

    def __str__(self) -> str:
        def told(phase: str) -> str:
            return ", ".join(f"{name} {1e6 * seconds:.0f} us" for name, seconds in self.seconds[phase].items())

        return f"prompts by {self.prompts} ({told('prompts')}), single tokens by {self.singles} ({told('singles')})"


def choose(names: Sequence[str], seconds: Callable[[str, BatchMeta], float], prompts: BatchMeta, singles: BatchMeta) -> Choice:
    """Try each on a step of either phase. The first name serves unless another takes at least 3 % less time."""
    measured: dict[str, dict[str, float]] = {"prompts": {}, "singles": {}}
    for phase, meta in (("prompts", prompts), ("singles", singles)):
        for name in names:
            measured[phase][name] = seconds(name, meta)
    return Choice(_fastest(names, measured["prompts"]), _fastest(names, measured["singles"]), measured)


def _fastest(names: Sequence[str], seconds: Mapping[str, float]) -> str:
    best = min(names, key=lambda name: seconds[name])
    return best if seconds[best] < (1 - _MARGIN) * seconds[names[0]] else names[0]


def trial(*, rows: int, start: int, count: int, page_size: int, num_pages: int) -> BatchMeta:
    """A step of equal rows; their pages are spread over all there are, and used twice where there are too few."""
    needed = -(-(start + count) // page_size)
    stride = max(1, num_pages // (rows * needed))
    tables = tuple(tuple((row * needed + i) * stride % num_pages for i in range(needed)) for row in range(rows))
    return BatchMeta((start,) * rows, (count,) * rows, tuple(row * count for row in range(rows)), tables)


class PhasedAttention:
    """`api.RotaryAttention` by two others, each of which takes `fixed_rows` in its plan (`cuda_graphs.FixedAttention`)."""

    def __init__(self, prompts: Any, singles: Any) -> None:
        self._prompts = prompts
        self._singles = singles

    @property
    def generation(self) -> int:
        """Of the one that is captured in graphs."""
        return int(self._singles.generation)

    def plan(self, meta: BatchMeta, fixed_rows: int | None = None) -> tuple[Any, Any]:
        if fixed_rows is not None or all(count == 1 for count in meta.counts):
            return self._singles, self._singles.plan(meta, fixed_rows)
        return self._prompts, self._prompts.plan(meta)

    def run(
        self, handle: tuple[Any, Any], layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        attention, plan = handle
        out: torch.Tensor = attention.run(plan, layer, q, k, v, window)
        return out

    def run_rotary(
        self,
        handle: tuple[Any, Any],
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        window: int | None,
        norm: QKNorm | None = None,
    ) -> torch.Tensor:
        attention, plan = handle
        out: torch.Tensor = attention.run_rotary(plan, layer, q, k, v, rotation, window, norm)
        return out
