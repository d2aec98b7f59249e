"""FakeRunner: a runner with no torch, for tests of everything above the runner and for simulation of policies.

It does have a KV memory. Each page slot holds a digest of all tokens up to its own, made from the digest in the slot before
it, and the next token is made from the last digest. So a request whose pages were lost, mixed up or not yet computed produces
other tokens than `expected_tokens`, and tests see it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.clock import ManualClock
from engine.memory.host import Transfer
from engine.sched.plan import Checkpoint, PlanRow, RowResult, StepPlan, StepResult, StopCondition
from engine.types import TokenLogprob

_MASK = (1 << 61) - 1
_POISON = -1


def _extend(digest: int, token: int) -> int:
    return (digest * 1_000_003 + token + 1) & _MASK


def _choose(digest: int, vocab_size: int, suppress: Sequence[int], allowed: bytes | None = None) -> int:
    first = (digest ^ (digest >> 17)) % vocab_size
    tokens = [*range(first, vocab_size), *range(first)] if suppress or allowed else [first]
    if allowed is not None:
        tokens = [token for token in tokens if allowed[token >> 3] >> (token & 7) & 1]
    return next((token for token in tokens if token not in suppress), tokens[0])


def expected_tokens(prompt: Sequence[int], count: int, vocab_size: int) -> list[int]:
    """What a FakeRunner must generate after `prompt`, whatever else it runs (no token suppressed)."""
    digest = 0
    for token in prompt:
        digest = _extend(digest, token)
    output: list[int] = []
    for _ in range(count):
        output.append(_choose(digest, vocab_size, ()))
        digest = _extend(digest, output[-1])
    return output


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step: fixed + per computed token + per token of context read."""

    fixed: float = 5e-3
    per_token: float = 1e-4
    per_context: float = 1e-7

    def of(self, rows: Sequence[PlanRow]) -> float:
        computed = sum(row.count for row in rows)
        return self.fixed + self.per_token * computed + self.per_context * sum(row.end for row in rows)


class FakeCopier:
    """`memory.host.PageCopier` for a FakeRunner's memory. With a ManualClock, each page takes its time.

    Copies are made when they are first asked about after `hold` is cleared, as by a device with a copy engine of its own.
    """

    page_bytes = 1

    def __init__(self, memory: dict[int, list[int]], num_slots: int, clock: ManualClock | None, page_seconds: float) -> None:
        self.num_slots = num_slots
        self.batch = 4
        self.hold = False
        self._memory = memory
        self._store: dict[int, list[int]] = {}
        self._clock = clock
        self._page_seconds = page_seconds
        self._pending: set[Transfer] = set()

    def start(self, transfer: Transfer) -> Transfer:
        self._pending.add(transfer)
        if not self.hold:
            self.wait(transfer)
        return transfer

    def poll(self, handle: Transfer) -> float | None:
        if self.hold and handle in self._pending:
            return None
        self.wait(handle)
        return self._page_seconds * len(handle.moves)

    def wait(self, handle: Transfer) -> None:
        if handle not in self._pending:
            return
        self._pending.remove(handle)
        for page, slot in handle.moves:
            if handle.load:
                self._memory[page] = list(self._store[slot])
            else:
                self._store[slot] = list(self._memory[page])
        if self._clock is not None:
            self._clock.advance(self._page_seconds * len(handle.moves))

    def close(self) -> None:
        self._store.clear()


@dataclass(slots=True)
class _InFlight:
    """A launched step; `result` once it has run."""

    plan: StepPlan
    rows: tuple[PlanRow, ...]
    first: int
    stop: StopCondition | None
    after: _InFlight | None = None
    result: StepResult | None = None


class FakeRunner:
    """Fills the Runner protocol. With a ManualClock, a step takes the time its cost says.

    `asynchronous`: a step does nothing before it is collected, as if the device were that late; what happens to its pages in
    between, it sees.
    """

    def __init__(
        self,
        *,
        num_layers: int = 4,
        vocab_size: int = 1000,
        page_size: int = 16,
        cost: StepCost | None = None,
        clock: ManualClock | None = None,
        asynchronous: bool = False,
    ) -> None:
        self.asynchronous = asynchronous
        self.vocab_size = vocab_size
        self.page_size = page_size
        self.cost = cost or StepCost()
        self._layers = num_layers
        self._clock = clock
        self._memory: dict[int, list[int]] = {}
        self._pending: deque[_InFlight] = deque()

    @property
    def num_layers(self) -> int:
        return self._layers

    def launch(self, plan: StepPlan, stop: StopCondition | None = None, after: _InFlight | None = None) -> _InFlight:
        assert not plan.follows or after is not None
        return self._start(_InFlight(plan, plan.rows, 0, stop, after))

    def resume(
        self, checkpoint: Checkpoint, dropped: frozenset[str] = frozenset(), stop: StopCondition | None = None
    ) -> _InFlight:
        rows = tuple(row for row in checkpoint.plan.rows if row.request_id not in dropped)
        return self._start(_InFlight(checkpoint.plan, rows, checkpoint.layer, stop))

    def collect(self, in_flight: _InFlight) -> StepResult:
        if in_flight.result is None:
            assert self._pending[0] is in_flight, "steps are collected in the order in which they were launched"
            self._run(self._pending.popleft())
        assert in_flight.result is not None
        return in_flight.result

    def poison(self, pages: Sequence[int]) -> None:
        """The pages now belong to somebody else: whoever reads them gets garbage."""
        for page in pages:
            self._memory[page] = [_POISON] * self.page_size

    def copier(self, num_slots: int, page_seconds: float = 0.0) -> FakeCopier:
        """A host store for its pages."""
        return FakeCopier(self._memory, num_slots, self._clock, page_seconds)

    def close(self) -> None:
        self._memory.clear()

    def _start(self, step: _InFlight) -> _InFlight:
        if self.asynchronous:
            self._pending.append(step)
        else:
            self._run(step)
        return step

    def _run(self, step: _InFlight) -> None:
        per_layer = self.cost.of(step.rows) / self._layers
        for layer in range(step.first, self._layers):
            if layer > step.first and step.plan.preemptible and step.stop is not None and step.stop(layer):
                checkpoint = Checkpoint(replace(step.plan, rows=step.rows), layer, None)
                step.result = StepResult((), per_layer * (layer - step.first), checkpoint)
                return
            if self._clock is not None:
                self._clock.advance(per_layer)
        rows = zip(step.rows, self._sampled_before(step), strict=True)
        step.result = StepResult(tuple(self._row(*pair) for pair in rows), per_layer * (self._layers - step.first))

    @staticmethod
    def _sampled_before(step: _InFlight) -> Sequence[int | None]:
        """For each row the token that the step before sampled for it, if it follows one."""
        if not step.plan.follows:
            return [None] * len(step.rows)
        assert step.after is not None and step.after.result is not None
        return [step.after.result.rows[place].token for place in step.plan.follows]

    def _row(self, row: PlanRow, sampled_before: int | None) -> RowResult:
        digest = self._read(row, row.start - 1) if row.start else 0
        prompt_logprobs: list[TokenLogprob] = []
        for position in range(row.start, row.end):
            token = row.tokens[position] if sampled_before is None else sampled_before
            digest = _extend(digest, token)
            page, slot = divmod(position, self.page_size)
            self._memory.setdefault(row.pages[page], [_POISON] * self.page_size)[slot] = digest
            if row.params.prompt_logprobs is not None and position + 1 < row.num_prompt:
                prompt_logprobs.append(TokenLogprob(row.tokens[position + 1], -1.0, 1))
        if not row.sample:
            return RowResult(row.request_id, prompt_logprobs=tuple(prompt_logprobs))
        token = _choose(digest, self.vocab_size, row.suppress, None if row.guide is None else row.guide.allowed())
        logprob = TokenLogprob(token, -1.0, 1) if row.params.logprobs is not None else None
        return RowResult(row.request_id, token, logprob, tuple(prompt_logprobs))

    def _read(self, row: PlanRow, position: int) -> int:
        page, slot = divmod(position, self.page_size)
        return self._memory.get(row.pages[page], [_POISON] * self.page_size)[slot]
