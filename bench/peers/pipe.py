"""The driver's end of the pipe: one JSON object a line in, one out. Standard library only, for any virtual environment.

A driver is started with one argument, its Setup as JSON. It answers `{"ready": {...}}` once loaded, then one answer to each
`{"op": name, "args": {...}}`: `{"result": ..., "seconds": wall}` or `{"error": traceback}`. It ends when its input does.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Tokens = list[int]

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Setup:
    """What the harness tells a driver."""

    model: str  # folder, in the format that the engine wants
    threads: int
    options: dict[str, Any] = field(default_factory=dict)  # the engine's own, from --option


@dataclass
class Single:
    """One prompt alone: output ids, and seconds from the call to the first and to the last of them."""

    tokens: Tokens = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0
    _start: float = field(default_factory=time.perf_counter, repr=False)

    def add(self, *tokens: int) -> None:
        """These ids are here now."""
        if not tokens:
            return
        self.last = time.perf_counter() - self._start
        if not self.tokens:
            self.first = self.last
        self.tokens += tokens


class Driver:
    """What each driver fills in: greedy decoding, `count` new ids a prompt, end of sequence ignored, no prefix cache."""

    name: str  # product and version, for the report
    batch_sizes: tuple[int, ...] = ()  # static batch sizes to choose from; none for engines that batch continuously

    def single(self, prompt: Tokens, count: int) -> Single:
        raise NotImplementedError

    def batch(self, prompts: list[Tokens], count: int, size: int | None) -> list[Tokens]:
        """All prompts, submitted at once; their outputs in order. `size` is one of batch_sizes, or None."""
        raise NotImplementedError

    def gap(self, prompt: Tokens) -> float:
        """How far the two likeliest next ids are apart, in logits."""
        raise NotImplementedError


def serve(make: Callable[[Setup], Driver]) -> None:
    """Load the engine and obey until the pipe closes. What the engine prints goes to stderr."""
    _die_with_parent()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        driver = make(Setup(**json.loads(sys.argv[1])))
    except Exception:
        reply({"error": traceback.format_exc()})
        return
    reply({"ready": {"name": driver.name, "batch_sizes": driver.batch_sizes}})
    for line in sys.stdin:
        request = json.loads(line)
        begin = time.perf_counter()
        try:
            result = getattr(driver, request["op"])(**request["args"])
            seconds = time.perf_counter() - begin
            if isinstance(result, Single):
                result = {"tokens": result.tokens, "first": result.first, "last": result.last}
            reply({"result": result, "seconds": seconds})
        except Exception:
            reply({"error": traceback.format_exc()})


def _die_with_parent() -> None:
    """A stopped process never sees its input close, so the kernel is asked to kill it (Linux; elsewhere it stays)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def chunks(prompts: list[Tokens], size: int) -> list[list[int]]:
    """Indices of the prompts in groups of `size`, prompts of like length together: least padding for a static batch."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    return [order[begin : begin + size] for begin in range(0, len(order), size)]
