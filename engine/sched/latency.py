"""StepTime: how long a step will take, learned from the engine's own steps.

A linear model in what the step holds (HyGen section on the latency predictor, ConServe section 2.1: tokens computed, their
attention, decode rows, context read), fitted by recursive least squares that forgets slowly and does not believe outliers:
a step that took far longer than predicted was most likely disturbed. One prediction costs about a microsecond.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from engine.sched.plan import PlanRow

_FORGET = 0.998  # weight of a step after one more; about 500 steps are remembered
_BELIEVE = 4.0  # residuals beyond this many typical ones count as this many
_PRIOR = 100.0  # how uncertain the weights are at first, in scaled units
_WARM = 32  # steps before predictions mean anything


@dataclass(frozen=True, slots=True)
class Load:
    """What a step holds, in the terms that its time depends on."""

    tokens: int = 0  # computed
    few: int = 0  # the same, but at most 16: up to there a step mostly waits for the weights
    decode_context: int = 0  # tokens of context read by single-token rows
    chunk_attention: int = 0  # query tokens times context, over rows of several tokens

    def plus(self, start: int, count: int) -> Load:
        """With one more row: tokens start .. start + count - 1."""
        tokens = self.tokens + count
        few = tokens if tokens < 16 else 16
        if count == 1:
            return Load(tokens, few, self.decode_context + start + 1, self.chunk_attention)
        return Load(tokens, few, self.decode_context, self.chunk_attention + count * (2 * start + count) // 2)

    @classmethod
    def of(cls, rows: Iterable[PlanRow]) -> Load:
        load = cls()
        for row in rows:
            load = load.plus(row.start, row.count)
        return load

    def features(self) -> tuple[float, ...]:
        """Scaled so that all are of the order of one in a full step."""
        return 1.0, self.few / 16, self.tokens / 512, self.decode_context / 16384, self.chunk_attention / 131072


class StepTime:
    """Predicts and learns. Not thread-safe: the engine's thread has it to itself."""

    def __init__(self) -> None:
        size = len(Load().features())
        self._weights = [0.0] * size
        self._spread = [[_PRIOR * (row == column) for column in range(size)] for row in range(size)]
        self._typical = 0.0  # residual, seconds
        self.steps = 0
        self.error = 0.0  # mean of |predicted - measured| / measured over recent steps

    @property
    def ready(self) -> bool:
        return self.steps >= _WARM

    def predict(self, load: Load) -> float:
        """Seconds. Meaningless unless `ready`."""
        return max(0.0, sum(weight * value for weight, value in zip(self._weights, load.features(), strict=True)))

    def observe(self, load: Load, seconds: float) -> None:
        """A step with this load took so long."""
        predicted = self.predict(load)
        residual = seconds - sum(w * v for w, v in zip(self._weights, load.features(), strict=True))
        if self.ready:
            self.error += (abs(predicted - seconds) / max(seconds, 1e-6) - self.error) / 50
            limit = _BELIEVE * max(self._typical, 0.02 * seconds)
            residual = max(-limit, min(limit, residual))
        self._typical += (abs(residual) - self._typical) / 50
        self._learn(load.features(), residual)
        self.steps += 1

    def _learn(self, values: tuple[float, ...], residual: float) -> None:
        """One step of recursive least squares."""
        spread = self._spread
        reach = [sum(a * b for a, b in zip(row, values, strict=True)) for row in spread]
        scale = _FORGET + sum(a * b for a, b in zip(reach, values, strict=True))
        gain = [value / scale for value in reach]
        for index, value in enumerate(gain):
            self._weights[index] += value * residual
            row = spread[index]
            for column, other in enumerate(reach):
                row[column] = (row[column] - value * other) / _FORGET
            # What no step excites would be forgotten for ever: its uncertainty is bounded by the prior.
            row[index] = min(row[index], _PRIOR)

    def save(self, path: Path) -> None:
        """Keep what was learned for the next start. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"weights": self._weights, "spread": self._spread, "typical": self._typical, "steps": self.steps}
        scratch = path.with_suffix(".new")
        scratch.write_text(json.dumps(state))
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path) -> StepTime:
        """What an earlier run learned; nothing if there is no such file or it does not fit."""
        model = cls()
        try:
            state = json.loads(path.read_text())
            weights, spread = [float(w) for w in state["weights"]], [[float(v) for v in row] for row in state["spread"]]
            if [len(weights)] * (len(weights) + 1) == [len(model._weights), *map(len, spread)]:
                model._weights, model._spread = weights, spread
                model._typical, model.steps = float(state["typical"]), int(state["steps"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return model
