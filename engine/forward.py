"""From a plan to tensors: the flat token dimension of one step and where its rows lie in it.

Owns the order of tokens in a step (rows in plan order, no padding). Knows nothing of models, devices' kernels or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engine.kernels.api import BatchMeta
from engine.sched.plan import PlanRow, StepPlan


@dataclass(frozen=True, slots=True)
class Batch:
    """One step as tensors, T tokens in all."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    meta: BatchMeta
    sampled: tuple[int, ...]  # indices into plan.rows of the rows that sample
    sample_rows: torch.Tensor  # [S] int64: the token of each of them whose logits are wanted


def build(plan: StepPlan, device: torch.device, sampled_before: torch.Tensor | None = None) -> Batch:
    """The tensors of a plan. Raises ValueError for a row without tokens: a plan must not hold one.

    `sampled_before`, for a plan that follows a step not yet collected: the tokens which that step samples, one for each of its
    rows, on the device ([rows] int64; less than 0 for a row that failed, whose successor is not looked at).
    """
    token_ids: list[int] = []
    positions: list[int] = []
    offsets: list[int] = []
    for row in plan.rows:
        offsets.append(len(token_ids))
        token_ids.extend(row.tokens[row.start : row.end] if sampled_before is None else (0,))
        positions.extend(range(row.start, row.end))
        if row.count < 1 or len(token_ids) != len(positions):
            raise ValueError(f"request {row.request_id}: tokens {row.start}..{row.end} of {len(row.tokens)}")
    rows = plan.rows
    sampled = tuple(index for index, row in enumerate(rows) if row.sample)
    last = [offsets[i] + rows[i].count - 1 for i in sampled]
    sizes = (len(token_ids), len(positions), len(last), len(plan.follows))
    ids, places, sample_rows, follows = _on(device, [*token_ids, *positions, *last, *plan.follows]).split(sizes)
    if sampled_before is not None:
        ids = sampled_before[follows].clamp_min(0)
    return Batch(
        token_ids=ids,
        positions=places,
        meta=BatchMeta(
            starts=tuple(row.start for row in rows),
            counts=tuple(row.count for row in rows),
            offsets=tuple(offsets),
            tables=tuple(row.pages for row in rows),
        ),
        sampled=sampled,
        sample_rows=sample_rows,
    )


def _on(device: torch.device, values: list[int]) -> torch.Tensor:
    """int64 on the device: one copy, from pinned memory where that lets the host go on meanwhile."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.int64)
    return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def without(plan: StepPlan, dropped: frozenset[str]) -> tuple[StepPlan, list[int]]:
    """The plan without the rows of some requests, and the places of the tokens that stay in the old token dimension."""
    kept: list[PlanRow] = []
    places: list[int] = []
    offset = 0
    for row in plan.rows:
        if row.request_id not in dropped:
            kept.append(row)
            places.extend(range(offset, offset + row.count))
        offset += row.count
    return replace(plan, rows=tuple(kept)), places


def prompt_targets(row: PlanRow) -> Sequence[int]:
    """The prompt tokens that this row's hidden states predict: positions start + 1 .. end within the prompt."""
    return row.tokens[row.start + 1 : min(row.end + 1, row.num_prompt)]
