"""The border between deciding and running: what one step runs, what came of it, and the runner that turns one into the other.

Integers only: no torch behind this module. A plan is frozen, yet its rows point at the request's token list and page table
instead of copying them. That is safe by two rules kept elsewhere: both lists only ever grow while a plan can see them, and a
request that loses pages gets a *new* list (`KVManager`). Rows and results are msgspec structs: a step makes hundreds of them,
which the garbage collector need not follow, since nothing that they hold leads back to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from engine.types import Guide, SamplingParams, Tenant, TokenLogprob

StopCondition = Callable[[int], bool]
"""Asked before each layer but the first, with that layer's index; True parks the pass there."""


class PlanRow(msgspec.Struct, frozen=True, gc=False):
    """One request's share of a step: compute the KV of tokens[start : start + count], then perhaps sample the next one."""

    request_id: str
    tenant: Tenant
    tokens: Sequence[int]  # the whole sequence so far (prompt + output); only grows
    num_prompt: int
    start: int  # position of the first token computed; everything before it is in `pages`
    count: int  # tokens computed in this step, >= 1
    pages: Sequence[int]  # page table, covers start + count tokens; only grows
    sample: bool  # the last computed token is the last known one, so a new token is sampled
    params: SamplingParams
    uniform: float  # the number in [0, 1) that chooses the token, see types.uniform
    suppress: tuple[int, ...] = ()  # ids that must not be sampled now (stop ids before min_tokens)
    guide: Guide | None = None  # a row that samples under a grammar: the guide is prepared for these very tokens

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: rows run together, in this order. `step` is a running number.

    A step with `follows` is launched before the step before it was collected: row i computes the token that row follows[i] of
    that step samples, which only the device knows by then; on the host it is in `tokens` when the results come.
    """

    step: int
    rows: tuple[PlanRow, ...]
    preemptible: bool = False  # no online row: a stop condition may park it between layers
    follows: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)


class RowResult(msgspec.Struct, frozen=True, gc=False):
    """What one row produced. Exactly one of token and error is set when the row sampled; neither when it did not."""

    request_id: str
    token: int | None = None
    logprob: TokenLogprob | None = None
    # For positions start + 1 .. start + count of the prompt part of the row, when the request asked for prompt_logprobs.
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A pass parked before `layer`. `plan` holds the rows still in it, which are fewer once some were dropped.

    `state` belongs to the runner (hidden states, residual); nobody else looks inside.
    """

    plan: StepPlan
    layer: int
    state: Any


@dataclass(frozen=True, slots=True)
class StepResult:
    """Either rows (the pass finished) or a checkpoint (it was parked). `seconds` is device time of this launch."""

    rows: tuple[RowResult, ...]
    seconds: float
    checkpoint: Checkpoint | None = None


class Runner(Protocol):
    """Runs steps of one model. One caller; steps run and are collected in the order in which they were started.

    `launch` and `resume` start a step and may return before the device is done; `collect` waits for it. Where `asynchronous`,
    launching does return before, and a step launched ahead saves time.
    """

    @property
    def asynchronous(self) -> bool: ...

    @property
    def num_layers(self) -> int: ...

    def launch(self, plan: StepPlan, stop: StopCondition | None = None, after: Any = None) -> Any:
        """Start the plan. It runs to its end, or to the layer boundary at which `stop` says so. Returns a handle.

        `after` is the handle of the step, not yet collected, whose tokens a plan with `follows` goes on from.
        """
        ...

    def resume(self, checkpoint: Checkpoint, dropped: frozenset[str] = frozenset(), stop: StopCondition | None = None) -> Any:
        """Go on from a checkpoint without the rows of the requests in `dropped`, whose pages may be somebody else's now."""
        ...

    def collect(self, in_flight: Any) -> StepResult:
        """Wait for a launched step and return what came of it."""
        ...

    def close(self) -> None: ...
