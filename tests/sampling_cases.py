"""Rows to be sampled, on the host and on the device."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import RequestFailed
from engine.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Fixed:
    """A guide that allows the same ids for ever, or has failed."""

    ids: tuple[int, ...] = ()
    error: str | None = None
    ready = True

    def prepare(self, tokens: object, num_prompt: int) -> None: ...

    def allowed(self) -> bytes:
        if self.error is not None:
            raise RequestFailed(self.error)
        return sum(1 << i for i in self.ids).to_bytes(16, "little")


@dataclass(frozen=True)
class Row:
    """`sampling.SampledRow` with what a test does not care about filled in."""

    params: SamplingParams = GREEDY
    tokens: tuple[int, ...] = (0,)
    num_prompt: int = 1
    uniform: float = 0.5
    suppress: tuple[int, ...] = ()
    guide: Fixed | None = None

    @property
    def end(self) -> int:
        return len(self.tokens)
