"""What the clients send: a trace scaled to the machine and cut into windows, and an endless offline backlog.

The arms of a round replay the same window, token for token. A trace is scaled in three ways: prompt lengths, output lengths,
and rate; the rate is found from what a request costs on this machine, so that online is busy for a wanted share of the time.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from bench.colocate.stats import covered
from bench.traces import PromptMaker, TraceRequest

LONGEST_PROMPT, LONGEST_OUTPUT = 384, 48


@dataclass(frozen=True, slots=True)
class Cost:
    """What an online request costs on this machine with nothing else running, in seconds."""

    first: float  # of any request
    prompt_token: float
    output_token: float

    def busy(self, requests: Iterable[TraceRequest], seconds: float) -> float:
        """Estimated share of `seconds` with a request unfinished: prefills one after the other, decodes side by side."""
        intervals: list[tuple[float, float]] = []
        free = 0.0
        for request in requests:
            free = max(free, request.arrival_s) + self.first + self.prompt_token * request.prompt_tokens
            intervals.append((request.arrival_s, free + self.output_token * request.output_tokens))
        return covered(intervals, seconds) / seconds


@dataclass(frozen=True, slots=True)
class Planned:
    """One online request of a window: when to send what."""

    arrival_s: float
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Scaling:
    """How a trace was made to fit the machine."""

    prompt: float
    output: float
    rate: float  # arrivals come this many times as fast
    estimated_busy: float


def scale_lengths(trace: Sequence[TraceRequest], prompt: float, output: float) -> list[TraceRequest]:
    """Lengths multiplied, within 1 and what the benchmark's KV memory is made for. Prefix ids no longer fit and go."""
    return [
        TraceRequest(
            request.arrival_s,
            min(LONGEST_PROMPT, max(1, round(request.prompt_tokens * prompt))),
            min(LONGEST_OUTPUT, max(2, round(request.output_tokens * output))),
        )
        for request in trace
    ]


def length_factors(trace: Sequence[TraceRequest], prompt_tokens: int, output_tokens: int) -> tuple[float, float]:
    """Factors that give the trace these medians."""
    return (
        prompt_tokens / statistics.median(request.prompt_tokens for request in trace),
        output_tokens / statistics.median(request.output_tokens for request in trace),
    )


def at_rate(trace: Sequence[TraceRequest], rate: float) -> list[TraceRequest]:
    """The same requests, arriving `rate` times as fast."""
    return [replace(request, arrival_s=request.arrival_s / rate) for request in trace]


def cut(trace: Sequence[TraceRequest], begin: float, end: float) -> list[TraceRequest]:
    """What arrives in [begin, end), with times from `begin` on."""
    return [replace(r, arrival_s=r.arrival_s - begin) for r in trace if begin <= r.arrival_s < end]


def fit_rate(trace: Sequence[TraceRequest], cost: Cost, busy: float, seconds: float, windows: int) -> float:
    """The factor at which the mean estimated busy share of the first `windows` windows is `busy`."""
    low, high = 1e-4, 1e4
    for _ in range(60):
        middle = math.sqrt(low * high)
        scaled = at_rate(trace, middle)
        mean = statistics.fmean(cost.busy(window, seconds) for window in cut_windows(scaled, seconds, windows))
        low, high = (middle, high) if mean < busy else (low, middle)
    return math.sqrt(low * high)


def cut_windows(trace: Sequence[TraceRequest], seconds: float, count: int) -> list[list[TraceRequest]]:
    """The first `count` windows of the trace, which starts again when it is over."""
    span = max(trace[-1].arrival_s, 1e-9) * (1 + 1 / len(trace))
    windows: list[list[TraceRequest]] = [[] for _ in range(count)]
    for request in _repeated(trace, span, count * seconds):
        number = int(request.arrival_s / seconds)
        if number < count:
            windows[number].append(replace(request, arrival_s=request.arrival_s - number * seconds))
    return windows


def _repeated(trace: Sequence[TraceRequest], span: float, until: float) -> Iterator[TraceRequest]:
    start = 0.0
    while True:
        for request in trace:
            if start + request.arrival_s >= until:
                return
            yield replace(request, arrival_s=start + request.arrival_s)
        start += span


def choose_windows(
    trace: Sequence[TraceRequest], cost: Cost, busy: float, seconds: float, count: int
) -> list[list[TraceRequest]]:
    """Of eight times as many windows those whose estimated busy share is nearest to `busy`, in order of time.

    Bursts make neighbouring windows very unlike each other; these say something about the share asked for.
    """
    windows = cut_windows(trace, seconds, 8 * count)
    near = sorted(range(len(windows)), key=lambda i: abs(cost.busy(windows[i], seconds) - busy))
    return [windows[i] for i in sorted(near[:count])]


def overload(trace: Sequence[TraceRequest], seconds: float, factor: float) -> list[TraceRequest]:
    """A window of three parts: the trace, as much more of it `factor` times as fast, the trace again."""
    third = seconds / 3
    calm, busy, after = (
        cut(trace, 0.0, third),
        at_rate(cut(trace, third, third + factor * third), factor),
        cut(trace, third + factor * third, (2 + factor) * third),
    )
    parts = ((0.0, calm), (third, busy), (2 * third, after))
    return [replace(r, arrival_s=r.arrival_s + start) for start, part in parts for r in part]


def plan(requests: Sequence[TraceRequest], prompts: PromptMaker) -> list[Planned]:
    """Requests with their tokens."""
    return [Planned(r.arrival_s, prompts.prompt(r), r.output_tokens) for r in requests]


def renewed(planned: Planned) -> Planned:
    """The same request with another first token, so that no server has a prefix of it in its cache."""
    first, *rest = planned.prompt
    return replace(planned, prompt=(first - 1 if first else 1, *rest))


class Backlog:
    """Endless offline work: every request another prompt, lengths around their means so that requests do not march in step."""

    def __init__(self, vocab_size: int, prompt_tokens: int, output_tokens: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._prompts = PromptMaker(vocab_size, seed)
        self._prompt_tokens, self._output_tokens = prompt_tokens, output_tokens

    def next(self) -> tuple[tuple[int, ...], int]:
        """A prompt and the number of tokens wanted."""
        count = round(self._prompt_tokens * self._random.uniform(0.5, 1.5))
        wanted = round(self._output_tokens * self._random.uniform(0.5, 1.5))
        return self._prompts.prompt(TraceRequest(0.0, max(1, count), 1)), max(1, wanted)


def body_of(model: str, prompt: Sequence[int], max_tokens: int, **more: object) -> bytes:
    """The JSON of a POST to /v1/completions that makes exactly so many tokens, greedily."""
    body = {"model": model, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return json.dumps(body | more, separators=(",", ":")).encode()
