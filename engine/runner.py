"""Steps of one model on one device: plan in, tokens out, perhaps with a pass parked between two layers.

The runner keeps nothing between steps. All that a request needs comes in its `PlanRow`, its KV lies in the pages named
there, and a parked pass is in its `Checkpoint`; so any step can be dropped, repeated or resumed elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import engine.forward as forward
from engine.clock import Clock, MonotonicClock
from engine.kernels.api import Graphs, KVLayout, Pace
from engine.kernels.sampling import Outcomes, Sample, Sampler, sample, token_logprobs
from engine.memory.window import Window
from engine.model import Model
from engine.sched.plan import Checkpoint, RowResult, StepPlan, StepResult, StopCondition
from engine.types import TokenLogprob

_LOGPROB_ROWS = 256  # prompt positions whose logits over the vocabulary exist at once


@dataclass(frozen=True, slots=True)
class _Parked:
    """Activations between two layers, [T, hidden] each."""

    hidden: torch.Tensor
    residual: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A launched step: either parked, or with samples to wait for."""

    plan: StepPlan
    started: float
    seconds: float  # that the host took to launch it
    checkpoint: Checkpoint | None = None
    sampled: Outcomes | None = None
    prompt_logprobs: dict[str, tuple[TokenLogprob, ...]] | None = None


class ModelRunner:
    """`sched.plan.Runner` for a model whose attention reads and writes the pages of `window`.

    `sampler`, `pace` and `graphs` are the backend's. Exceptions of the device or its kernels come out of `launch`, `resume` and
    `collect` as they are.
    """

    def __init__(
        self,
        model: Model,
        layout: KVLayout,
        window: Window,
        device: torch.device,
        clock: Clock | None = None,
        *,
        sampler: Sampler = sample,
        pace: Callable[[], Pace] | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        self.layout = layout
        self.window = window
        self.device = device
        self.asynchronous = device.type != "cpu"
        self._collected = 0.0  # when the last step was
        self._model = model
        self._clock = clock or MonotonicClock()
        self._sampler = sampler
        self._pace = pace
        self._graphs = graphs
        if graphs is not None:
            with torch.inference_mode():
                graphs.prepare()

    @property
    def num_layers(self) -> int:
        return self._model.num_layers

    @torch.inference_mode()
    def launch(self, plan: StepPlan, stop: StopCondition | None = None, after: _InFlight | None = None) -> _InFlight:
        started = self._clock.now()
        before = None if after is None or after.sampled is None else after.sampled.token_ids
        batch = forward.build(plan, self.device, before if plan.follows else None)
        stop = self._paced(stop) if plan.preemptible else None
        done = self._graphs.run(batch.token_ids, batch.positions, batch.meta, stop) if self._graphs is not None else None
        if done is None:
            parked = _Parked(self._model.embed(batch.token_ids), None)
            return self._run(plan, batch, 0, parked, stop, started)
        layer, hidden, residual = done
        if layer == self.num_layers:
            return self._finish(plan, batch, hidden, residual, started)
        return self._park(plan, layer, _Parked(hidden.clone(), residual.clone()), started)

    @torch.inference_mode()
    def resume(
        self, checkpoint: Checkpoint, dropped: frozenset[str] = frozenset(), stop: StopCondition | None = None
    ) -> _InFlight:
        started = self._clock.now()
        plan, parked = checkpoint.plan, checkpoint.state
        if dropped:
            plan, places = forward.without(plan, dropped)
            keep = torch.tensor(places, dtype=torch.int64, device=self.device)
            residual = None if parked.residual is None else parked.residual[keep]
            parked = _Parked(parked.hidden[keep], residual)
        if not plan.rows:
            return _InFlight(plan, started, 0.0)
        stop = self._paced(stop) if plan.preemptible else None
        return self._run(plan, forward.build(plan, self.device), checkpoint.layer, parked, stop, started)

    def _paced(self, stop: StopCondition | None) -> StopCondition | None:
        """`stop`, asked about layers that the device is about to reach."""
        if stop is None or self._pace is None:
            return stop
        pace = self._pace()

        def stop_when_close(layer: int) -> bool:
            pace.layer_launched()
            return stop(layer)

        return stop_when_close

    def _run(
        self, plan: StepPlan, batch: forward.Batch, layer: int, parked: _Parked, stop: StopCondition | None, started: float
    ) -> _InFlight:
        """Layers from `layer` to the end or to a stop. A resumed pass makes one layer of progress before it asks again."""
        model = self._model
        handle = model.plan(batch.meta)
        rotation = model.rotation(batch.positions)
        hidden, residual = parked.hidden, parked.residual
        for index in range(layer, model.num_layers):
            if index > layer and stop is not None and stop(index):
                return self._park(plan, index, _Parked(hidden, residual), started)
            hidden, residual = model.layer(index, hidden, residual, rotation, handle)
        assert residual is not None, "a checkpoint lies before the end"
        return self._finish(plan, batch, hidden, residual, started)

    def _park(self, plan: StepPlan, layer: int, parked: _Parked, started: float) -> _InFlight:
        return _InFlight(plan, started, self._clock.now() - started, Checkpoint(plan, layer, parked))

    def _finish(
        self, plan: StepPlan, batch: forward.Batch, hidden: torch.Tensor, residual: torch.Tensor, started: float
    ) -> _InFlight:
        sampled = self._sample(plan, batch, hidden, residual)
        prompt_logprobs = self._prompt_logprobs(plan, batch, hidden, residual)
        return _InFlight(plan, started, self._clock.now() - started, None, sampled, prompt_logprobs)

    def _sample(self, plan: StepPlan, batch: forward.Batch, hidden: torch.Tensor, residual: torch.Tensor) -> Outcomes | None:
        if not batch.sampled:
            return None
        logits = self._model.logits(hidden, residual, batch.sample_rows)
        return self._sampler(logits, [plan.rows[index] for index in batch.sampled])

    def _prompt_logprobs(
        self, plan: StepPlan, batch: forward.Batch, hidden: torch.Tensor, residual: torch.Tensor
    ) -> dict[str, tuple[TokenLogprob, ...]]:
        found = {}
        for row, offset in zip(plan.rows, batch.meta.offsets, strict=True):
            if row.params.prompt_logprobs is None:
                continue
            targets = forward.prompt_targets(row)
            entries: list[TokenLogprob] = []
            for first in range(0, len(targets), _LOGPROB_ROWS):
                chunk = targets[first : first + _LOGPROB_ROWS]
                places = torch.arange(offset + first, offset + first + len(chunk), device=self.device)
                logits = self._model.logits(hidden, residual, places)
                entries += token_logprobs(logits, chunk, row.params.prompt_logprobs)
            found[row.request_id] = tuple(entries)
        return found

    @torch.inference_mode()
    def collect(self, in_flight: _InFlight) -> StepResult:
        if in_flight.checkpoint is not None:
            return StepResult((), in_flight.seconds, in_flight.checkpoint)
        # A step launched ahead began when the one before it was done. Else the time between launch and collect is the caller's.
        is_ahead = in_flight.started < self._collected
        started = self._collected if is_ahead else self._clock.now() - in_flight.seconds
        samples = iter(in_flight.sampled.collect() if in_flight.sampled is not None else ())
        prompt_logprobs = in_flight.prompt_logprobs or {}
        rows = []
        for row in in_flight.plan.rows:
            outcome = next(samples) if row.sample else Sample()
            entries = prompt_logprobs.get(row.request_id, ())
            rows.append(RowResult(row.request_id, outcome.token, outcome.logprob, entries, outcome.error))
        self._collected = self._clock.now()
        return StepResult(tuple(rows), self._collected - started)

    def close(self) -> None:
        self.window.close()
