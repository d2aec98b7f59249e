"""Sampling on the CPU: top_p beside sorting the vocabulary, the cost of a grammar's mask, and guided beside unguided steps.

Called by `python -m bench.kernels_cpu --only sampling`. The vocabulary is the demo model's; weights of whole steps are random,
so the tokens that a guided row "chooses" are read from a document instead: the masks are those of a real output.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from msgspec import structs

from engine.demo import resolve_model
from engine.grammar import GrammarGuide, Grammars
from engine.kernels.sampling import nucleus
from engine.runner import ModelRunner
from engine.sched.plan import PlanRow, StepPlan
from engine.tokenizer import Tokenizer
from engine.types import Grammar, SamplingParams, Tenant

DOCUMENT = {
    "name": "Ada Lovelace",
    "born": 1815,
    "fields": ["mathematics", "computing"],
    "address": {"street": "12 St James's Square", "city": "London", "code": "SW1Y 4JH"},
    "notes": "Wrote the first program for a machine that was never built, and saw that it could do more than numbers.",
    "alive": False,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 80},
        "born": {"type": "integer", "minimum": 0, "maximum": 2100},
        "fields": {"type": "array", "items": {"enum": ["mathematics", "computing", "poetry", "music"]}, "maxItems": 9},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}, "code": {"pattern": "^[A-Z0-9 ]{5,9}$"}},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
        "notes": {"type": "string"},
        "alive": {"type": "boolean"},
    },
    "required": ["name", "born", "fields", "address", "notes", "alive"],
    "additionalProperties": False,
}
CONTEXT = 200
PAGE = 16


def sorted_nucleus(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """The same by sorting: the largest few first, the whole vocabulary if they do not do."""
    wanted = top_p * float(weights.sum(dtype=torch.float64))
    size = weights.shape[0]
    for width in (256, 4096, size):
        largest = weights.topk(width).values
        count = 1 + int((largest.cumsum(0, dtype=torch.float64)[:-1] < wanted).sum())
        if count < width:
            break
    least = largest[count - 1]
    above = (weights > least).nonzero().squeeze(-1)
    equal = (weights == least).nonzero().squeeze(-1)
    return torch.cat((above, equal[: count - above.shape[0]])).sort().values


def top_p(show: Callable[..., None], repeats: int, vocab: int) -> None:
    """A row's top_p = 0.9 on distributions from peaked to flat, both ways, which must agree."""
    random = torch.Generator().manual_seed(0)
    for spread in (8.0, 4.0, 2.0, 1.0, 0.3):
        logits = torch.randn(vocab, generator=random) * spread
        weights = (logits - logits.max()).exp()
        kept = nucleus(weights, 0.9)
        assert torch.equal(kept, sorted_nucleus(weights, 0.9))
        calls = {"sorted": lambda w=weights: sorted_nucleus(w, 0.9), "in classes": lambda w=weights: nucleus(w, 0.9)}
        show(f"top_p, keeps {len(kept)} of {vocab} ids", calls, repeats)


@dataclass(frozen=True)
class Guided:
    """A document as the tokens of an output, and the grammar that it is a sentence of."""

    grammars: Grammars
    grammar: Grammar
    tokens: list[int]

    def guide(self) -> GrammarGuide:
        return self.grammars.open(self.grammar)


def open_document(vocab: int) -> Guided:
    folder = resolve_model("demo", progress=False)
    tokenizer = Tokenizer.load(folder)
    started = time.perf_counter()
    grammars = Grammars(lambda: tokenizer, vocab, tokenizer.eos_ids)
    grammars.warm_up()
    warmed = time.perf_counter()
    grammar = Grammar.json_schema(SCHEMA)
    grammars.check(grammar)
    compiled = time.perf_counter()
    print(f"vocabulary of {vocab} read in {1e3 * (warmed - started):.0f} ms (once, while the model loads), ", end="")
    print(f"a schema compiled in {1e3 * (compiled - warmed):.1f} ms")
    tokens = tokenizer.encode(json.dumps(DOCUMENT), add_special=False)
    return Guided(grammars, grammar, tokens)


def masks(guided: Guided, repeats: int) -> None:
    """One row's mask, made and waited for, at each place of the document."""
    seconds: list[float] = []
    for turn in range(repeats + 1):
        guide = guided.guide()
        for length in range(len(guided.tokens)):
            started = time.perf_counter()
            guide.prepare(guided.tokens[:length], 0)
            guide.allowed()
            if turn:
                seconds.append(time.perf_counter() - started)
    _told("mask of a row, with the way to its thread", seconds)


def _told(title: str, seconds: Sequence[float]) -> None:
    values = sorted(1e3 * value for value in seconds)
    p99 = values[min(len(values) - 1, int(0.99 * len(values)))]
    print(f"{title:<59} {statistics.median(values):9.3f} ms  [p99 {p99:.3f}, most {values[-1]:.3f}]")


def steps(runner: ModelRunner, guided: Guided, repeats: int) -> None:
    """Whole decode steps, rows that draw with top_p: all without a grammar, one of them with, all with."""
    params = SamplingParams(temperature=1.0, top_p=0.9)
    for rows in (1, 8, 32):
        shares = sorted({0, 1, rows})
        seconds: dict[int, list[float]] = {share: [] for share in shares}
        for turn in range(repeats + 1):
            guides = {share: [guided.guide() for _ in range(share)] for share in shares}
            for length in range(0, len(guided.tokens), max(1, len(guided.tokens) // 12)):
                for share in shares:
                    started = time.perf_counter()
                    runner.collect(runner.launch(_plan(rows, params, guided.tokens[:length], guides[share])))
                    if turn:
                        seconds[share].append(time.perf_counter() - started)
        for share in shares:
            _told(f"step of {rows} rows, {share} of them guided", seconds[share])


def _plan(rows: int, params: SamplingParams, output: list[int], guides: Sequence[GrammarGuide]) -> StepPlan:
    """Each row computes its last token; its grammar's mask is begun here, as the scheduler does it."""
    tokens = [*range(1, CONTEXT + 1), *output]
    start = len(tokens) - 1
    pages = -(-len(tokens) // PAGE)
    made = []
    for number in range(rows):
        table = range(number * pages, (number + 1) * pages)
        row = PlanRow(str(number), Tenant.ONLINE, tokens, CONTEXT, start, 1, table, True, params, 0.5)
        if number < len(guides):
            guides[number].prepare(tokens, CONTEXT)
            row = structs.replace(row, guide=guides[number])
        made.append(row)
    return StepPlan(0, tuple(made))


def run(show: Callable[..., None], make: Callable[[], ModelRunner], repeats: int, vocab: int) -> None:
    """All of it."""
    top_p(show, repeats, vocab)
    guided = open_document(vocab)
    masks(guided, repeats)
    runner = make()
    steps(runner, guided, max(2, repeats // 3))
    runner.close()
    guided.grammars.close()
