"""StepTime: how long a step will take, learned from the engine's own steps.

A linear model in what the step holds (HyGen section on the latency predictor, ConServe section 2.1: tokens computed, their
attention, decode rows, context read), fitted by least squares that forgets slowly and does not believe outliers: a step that
took far longer than predicted was most likely disturbed. One prediction costs about a microsecond, learning a step some tens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from operator import mul
from pathlib import Path
from typing import NamedTuple

from engine.sched.plan import PlanRow

_FORGET = 0.998  # weight of a step after one more; about 500 steps are remembered
_BELIEVE = 4.0  # residuals beyond this many typical ones count as this many
_ROUNDS = 6
_SHORTEST = 1e-5  # seconds; what takes less was not measured
_VERSION = 2  # of what is saved
_WARM = 32  # steps before predictions mean anything
_SATURATED = 0.95  # of the tokens per second of an endless step


class Load(NamedTuple):
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
        tokens = decode_context = chunk_attention = 0
        for row in rows:
            count = row.count
            tokens += count
            if count == 1:
                decode_context += row.start + 1
            else:
                chunk_attention += count * (2 * row.start + count) // 2
        return cls(tokens, min(tokens, 16), decode_context, chunk_attention)

    def features(self) -> tuple[float, ...]:
        """Scaled so that all are of the order of one in a full step."""
        return 1.0, self.few / 16, self.tokens / 512, self.decode_context / 16384, self.chunk_attention / 131072


class StepTime:
    """Predicts and learns. Not thread-safe: the engine's thread has it to itself."""

    def __init__(self) -> None:
        size = len(Load().features())
        self._weights = [0.0] * size
        self._products = [[0.0] * size for _ in range(size)]  # of features with features, sums over what is remembered
        self._targets = [0.0] * size  # of features with what was measured
        self._typical = 0.0  # residual, as a share of the step's time
        self.steps = 0
        self.error = 0.0  # mean of |predicted - measured| / measured over recent steps

    @property
    def ready(self) -> bool:
        return self.steps >= _WARM

    def predict(self, load: Load) -> float:
        """Seconds. Meaningless unless `ready`."""
        return max(0.0, sum(weight * value for weight, value in zip(self._weights, load.features(), strict=True)))

    def added(self, load: Load) -> float:
        """Seconds by which this makes a large step longer."""
        return self.predict(load._replace(few=0)) - self._weights[0]

    def saturating_tokens(self) -> int:
        """Tokens of a step beyond which tokens per second hardly grow. 0 while too little is known."""
        fixed, per_token = self._weights[0] + self._weights[1], self._weights[2] * Load(tokens=1).features()[2]
        if not self.ready or fixed <= 0 or per_token <= 0:
            return 0
        return int(fixed / per_token * _SATURATED / (1 - _SATURATED))

    def observe(self, load: Load, seconds: float) -> None:
        """A step with this load took so long."""
        values = load.features()
        predicted = sum(weight * value for weight, value in zip(self._weights, values, strict=True))
        # Errors count relative to the step's time: a small step is as good a witness as a large one.
        scale = 1 / max(seconds, _SHORTEST)
        residual = 1 - predicted * scale
        if self.ready:
            self.error += (abs(residual) - self.error) / 50
            limit = _BELIEVE * max(self._typical, 0.02)
            residual = max(-limit, min(limit, residual))
        self._typical += (min(abs(residual), 1.0) - self._typical) / 50
        self._learn(tuple(value * scale for value in values), predicted * scale + residual)
        self.steps += 1

    def _learn(self, values: tuple[float, ...], target: float) -> None:
        """Least squares over what is remembered, by a few rounds of coordinate descent from the last weights. No weight is
        below zero, since nothing in a step gives time back; it keeps what is little known from telling nonsense."""
        products, targets, weights = self._products, self._targets, self._weights
        for index, value in enumerate(values):
            row = products[index]
            for column, other in enumerate(values):
                row[column] = row[column] * _FORGET + value * other
            targets[index] = targets[index] * _FORGET + value * target
        for _ in range(_ROUNDS):
            for index, row in enumerate(products):
                if row[index] > 0:
                    missing = targets[index] - sum(map(mul, row, weights))
                    weights[index] = max(0.0, weights[index] + missing / row[index])

    def save(self, path: Path) -> None:
        """Keep what was learned for the next start. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "version": _VERSION,
            "weights": self._weights,
            "products": self._products,
            "targets": self._targets,
            "typical": self._typical,
            "steps": self.steps,
        }
        scratch = path.with_suffix(".new")
        scratch.write_text(json.dumps(state))
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path) -> StepTime:
        """What an earlier run learned; nothing if there is no such file or it does not fit."""
        model = cls()
        try:
            state = json.loads(path.read_text())
            weights, targets = ([float(value) for value in state[name]] for name in ("weights", "targets"))
            products = [[float(value) for value in row] for row in state["products"]]
            size = len(model._weights)
            if state["version"] == _VERSION and [len(weights), len(targets), *map(len, products)] == [size] * (size + 2):
                model._weights, model._targets, model._products = weights, targets, products
                model._typical, model.steps = float(state["typical"]), int(state["steps"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return model
