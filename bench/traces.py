"""Request traces: public files read by column name, or a seeded generator when there is none; always arrivals and lengths.

Known formats, told apart by their columns and never by position or file name:

* Azure LLM inference (github.com/Azure/AzurePublicDataset): TIMESTAMP, ContextTokens, GeneratedTokens
* BurstGPT (github.com/HPMLL/BurstGPT): Timestamp, Request tokens, Response tokens; failed calls have no response tokens
* Mooncake (github.com/kvcache-ai/Mooncake), JSONL: timestamp (ms), input_length, output_length, hash_ids
* Vidur (github.com/microsoft/vidur): num_prefill_tokens, num_decode_tokens; lengths only, so everything arrives at 0

The files themselves are not part of the project.
"""

from __future__ import annotations

import csv
import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PREFIX_BLOCK = 512  # tokens that one prefix id stands for (Mooncake)

_ARRIVAL = ("timestamp", "arrivaltime", "arrivedat", "arrival")
_PROMPT = ("contexttokens", "requesttokens", "numprefilltokens", "inputlength", "inputtokens", "prompttokens")
_OUTPUT = ("generatedtokens", "responsetokens", "numdecodetokens", "outputlength", "outputtokens", "completiontokens")


class TraceError(ValueError):
    """The file is not a trace that can be read; the message names the line and what was expected."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace. Requests whose `prefix` begins with the same ids share that many blocks of their prompts."""

    arrival_s: float  # since the first request of the trace
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] = ()  # one id for each PREFIX_BLOCK tokens of the prompt, the last block perhaps cut short


@dataclass(frozen=True, slots=True)
class TraceFacts:
    """A trace in numbers. `dispersion` is variance over mean of the arrivals per second: 1 for Poisson, more for bursts."""

    requests: int
    span_s: float
    rate: float
    dispersion: float
    prompt_p50: int
    prompt_p95: int
    output_p50: int
    output_p95: int

    def __str__(self) -> str:
        return (
            f"{self.requests:,} requests in {self.span_s:,.0f} s ({self.rate:.2f}/s, dispersion {self.dispersion:.1f}); "
            f"prompt p50 {self.prompt_p50:,} p95 {self.prompt_p95:,}; output p50 {self.output_p50:,} p95 {self.output_p95:,}"
        )


def read_trace(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """The requests of a file in order of arrival, the first at 0 s; at most `limit` rows of the file are read.

    Rows without prompt or output tokens (failed calls) are left out. Raises TraceError.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            rows = _json_rows(file) if first.lstrip().startswith("{") else _csv_rows(file)
            requests = [request for row in _first(rows, limit) if (request := row.request()) is not None]
    except (OSError, UnicodeDecodeError, TraceError) as error:
        raise TraceError(f"{path}: {error}") from error
    if not requests:
        raise TraceError(f"{path}: no request with prompt and output tokens in it")
    return from_zero(requests)


def from_zero(requests: Iterable[TraceRequest]) -> list[TraceRequest]:
    """In order of arrival, the first at 0 s."""
    ordered = sorted(requests, key=lambda request: request.arrival_s)
    return [replace(request, arrival_s=request.arrival_s - ordered[0].arrival_s) for request in ordered]


def generate_trace(
    *,
    rate: float,
    seconds: float,
    burstiness: float = 1.0,
    prompt_tokens: int = 1000,
    output_tokens: int = 100,
    seed: int = 0,
) -> list[TraceRequest]:
    """A seeded open-loop trace: Gamma gaps with coefficient of variation `burstiness` (1 is Poisson), log-normal lengths.

    `rate` is requests a second, the lengths are medians; their 95th percentiles are about five times that.
    """
    rng = random.Random(seed)
    shape = 1.0 / burstiness**2
    requests: list[TraceRequest] = []
    now = rng.gammavariate(shape, 1.0 / (rate * shape))
    while now < seconds:
        prompt, output = (max(1, round(middle * rng.lognormvariate(0.0, 1.0))) for middle in (prompt_tokens, output_tokens))
        requests.append(TraceRequest(now, prompt, output))
        now += rng.gammavariate(shape, 1.0 / (rate * shape))
    return requests


def facts(requests: Sequence[TraceRequest]) -> TraceFacts:
    """What the trace looks like. Needs at least one request."""
    span = requests[-1].arrival_s - requests[0].arrival_s
    bins = Counter(int(request.arrival_s) for request in requests)
    counts = [bins[second] for second in range(int(requests[-1].arrival_s) + 1)]
    prompts = sorted(request.prompt_tokens for request in requests)
    outputs = sorted(request.output_tokens for request in requests)
    return TraceFacts(
        requests=len(requests),
        span_s=span,
        rate=len(requests) / span if span else 0.0,
        dispersion=statistics.pvariance(counts) / statistics.fmean(counts),
        prompt_p50=prompts[len(prompts) // 2],
        prompt_p95=prompts[int(0.95 * (len(prompts) - 1))],
        output_p50=outputs[len(outputs) // 2],
        output_p95=outputs[int(0.95 * (len(outputs) - 1))],
    )


class PromptMaker:
    """Token ids for the prompts of a trace: equal prefix ids give equal tokens, everything else differs.

    Slices of one pool of random ids, so that a prompt costs a copy and no new integers.
    """

    def __init__(self, vocab_size: int, seed: int = 0, pool: int = 1 << 18) -> None:
        self._pool = random.Random(seed).choices(range(vocab_size), k=pool)
        self._made = 0

    def prompt(self, request: TraceRequest) -> tuple[int, ...]:
        """The prompt of a request of a trace, `request.prompt_tokens` ids long."""
        tokens: list[int] = []
        for block in request.prefix[: -(-request.prompt_tokens // PREFIX_BLOCK)]:
            tokens += self._slice(block * 7919, min(PREFIX_BLOCK, request.prompt_tokens - len(tokens)))
        self._made += 1
        while (missing := request.prompt_tokens - len(tokens)) > 0:
            tokens += self._slice(self._made * 104_729 + len(tokens), min(missing, len(self._pool) // 2))
        return tuple(tokens)

    def _slice(self, start: int, count: int) -> list[int]:
        start %= len(self._pool) // 2
        return self._pool[start : start + count]


# -- inside


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    arrival: Any
    arrival_scale: float
    prompt: Any
    output: Any
    prefix: Any = ()

    def request(self) -> TraceRequest | None:
        try:
            prompt, output = _count(self.prompt), _count(self.output)
            arrival = _seconds(self.arrival) * self.arrival_scale
            prefix = tuple(int(block) for block in self.prefix)
        except (TypeError, ValueError) as error:
            raise TraceError(f"line {self.line}: {error}") from None
        return TraceRequest(arrival, prompt, output, prefix) if prompt > 0 and output > 0 else None


def _first(rows: Iterator[_Row], limit: int | None) -> Iterator[_Row]:
    for index, row in enumerate(rows):
        if limit is not None and index >= limit:
            return
        yield row


def _csv_rows(lines: Iterable[str]) -> Iterator[_Row]:
    reader = csv.DictReader(lines, skipinitialspace=True)
    columns = {_plain(name): name for name in reader.fieldnames or ()}
    prompt, output = _column(columns, _PROMPT, "prompt tokens"), _column(columns, _OUTPUT, "output tokens")
    arrival = next((columns[name] for name in _ARRIVAL if name in columns), None)
    for row in reader:
        yield _Row(reader.line_num, row[arrival] if arrival else 0.0, 1.0, row[prompt], row[output])


def _json_rows(lines: Iterable[str]) -> Iterator[_Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TraceError(f"line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise TraceError(f"line {number}: not a JSON object")
        try:
            keys = {_plain(name): name for name in row}
            prompt, output = _column(keys, _PROMPT, "prompt tokens"), _column(keys, _OUTPUT, "output tokens")
        except TraceError as error:
            raise TraceError(f"line {number}: {error}") from None
        arrival = next((row[keys[name]] for name in _ARRIVAL if name in keys), 0.0)
        yield _Row(number, arrival, 1e-3, row[prompt], row[output], row.get("hash_ids") or ())


def _plain(name: str | None) -> str:
    """A column's name without case, spaces and punctuation."""
    return "".join(char for char in (name or "").lower() if char.isalnum())


def _column(columns: Mapping[str, str], known: Sequence[str], what: str) -> str:
    for name in known:
        if name in columns:
            return columns[name]
    found = ", ".join(columns.values()) or "none"
    raise TraceError(f"no column for {what} (known: {', '.join(known)}); found: {found}")


def _count(value: Any) -> int:
    """Tokens as an integer; an empty field is 0."""
    if isinstance(value, str):
        value = value.strip() or 0
    number = float(value)
    if number < 0 or number != int(number):
        raise ValueError(f"{value!r} is not a number of tokens")
    return int(number)


def _seconds(value: Any) -> float:
    """A number, or a date and time with any number of decimals."""
    try:
        number = float(value)
    except ValueError:
        stamp = datetime.fromisoformat(str(value).strip())
        return (stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a time")
    return number
