"""Sluice against other engines, side by side: `python -m bench.engine [--peers ...] [--rounds N] [--out FILE.json]`.

The same greedy prompts for everyone: one of 512 tokens alone (time to the first token, time per further token) and 32 of 128
to 512 tokens at once (wall time), 64 new tokens each, float32, the same number of threads. Engines stay loaded and take
turns, round after round; medians are printed with their spread, the machine's own limits beside them, and how far the output
tokens are those of transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import pydoc_data.topics
import random
import signal
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.contender import Contender, ContenderError, Turn, await_quiet
from bench.peers.pipe import Setup
from engine.demo import resolve_model
from engine.spec import ModelSpec, load_spec
from engine.tokenizer import Tokenizer

BASELINE = "transformers"
PEERS = {
    "transformers": "bench.peers.transformers_generate",
    "vllm": "bench.peers.vllm_cpu",
    "openvino": "bench.peers.openvino_genai_cb",
    "ct2": "bench.peers.ctranslate2_generator",
}
OWN_FORMAT = ("openvino", "ct2")  # read a converted model, named by --model-for
SINGLE_TOKENS = 512
SHORTEST, LONGEST = 128, 512
NEAR_TIE = 1e-4  # logits this close may fall either way by rounding alone
FLOAT_BYTES = 4

Tokens = list[int]


# -- the work


@dataclass(frozen=True, slots=True)
class Work:
    """The prompts. `singles` are run one by one, `batch` all at once."""

    singles: list[Tokens]
    batch: list[Tokens]
    count: int  # new tokens each


def make_work(tokenizer: Tokenizer, prompts: int, singles: int, count: int, seed: int = 0) -> Work:
    """English text in Python's own help topics, cut into prompts of seeded lengths that tokenize to themselves again."""
    topics = pydoc_data.topics.topics
    ids = tokenizer.encode("\n".join(topics[name] for name in sorted(topics)), add_special=False)
    rng = random.Random(seed)
    lengths = [SINGLE_TOKENS] * singles + [rng.randint(SHORTEST, LONGEST) for _ in range(prompts)]
    cut: list[Tokens] = []
    begin = 0
    for length in lengths:
        while (piece := ids[begin : begin + length]) != tokenizer.encode(tokenizer.decode(piece), add_special=False):
            begin += 1
        if len(piece) < length:
            raise SystemExit("the help topics are too short for so many prompts; ask for fewer")
        cut.append(piece)
        begin += length
    return Work(cut[:singles], cut[singles:], count)


@dataclass(frozen=True, slots=True)
class Floors:
    """What the work costs at least: bytes of weights read per decode step, and fp32 operations."""

    step_bytes: int
    prefill_flop: float  # of one prompt of SINGLE_TOKENS, with the logits of its last token
    batch_flop: float

    @classmethod
    def of(cls, spec: ModelSpec, work: Work) -> Floors:
        heads, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        layer = spec.hidden_size * (2 * heads + 2 * kv + 3 * spec.intermediate_size)
        head = spec.hidden_size * spec.vocab_size

        def flop(first: int, last: int, sampled: int) -> float:
            """Tokens at positions first .. last - 1 through the layers, `sampled` of them through the vocabulary."""
            attended = (last * (last + 1) - first * (first + 1)) / 2
            layers = spec.num_layers * (2 * layer * (last - first) + 4 * heads * attended)
            return layers + 2.0 * head * sampled

        return cls(
            step_bytes=FLOAT_BYTES * (spec.num_layers * layer + head),
            prefill_flop=flop(0, SINGLE_TOKENS, 1),
            batch_flop=sum(flop(0, len(prompt) + work.count - 1, work.count) for prompt in work.batch),
        )


# -- the measurements


@dataclass(slots=True)
class Score:
    """All that was measured of one contender. Seconds; one entry a round, or a prompt and round for the single ones."""

    name: str
    size: int | None = None  # static batch size, the best of those tried
    tried: dict[int, float] = field(default_factory=dict)  # batch seconds by static batch size
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    batch: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    stolen: list[float] = field(default_factory=list)
    memory_mb: float = 0.0
    tokens: list[Tokens] = field(default_factory=list)  # of the batch, latest round
    single_tokens: list[Tokens] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Equality:
    """Greedy outputs against the baseline's."""

    identical: int
    prompts: int
    mean_prefix: float
    differences: int
    near_ties: int  # differences at which the baseline's two likeliest tokens are within NEAR_TIE


class Match:
    """The contenders, their scores, and the order of play."""

    def __init__(self, contenders: Sequence[Contender], limits: Contender, work: Work, args: argparse.Namespace) -> None:
        self.contenders = contenders
        self.scores = {contender.label: Score(contender.name) for contender in contenders}
        self.limits: list[dict[str, float]] = []
        self._limits = limits
        self._work = work
        self._args = args

    def prepare(self) -> None:
        """Warm up, and find the best static batch size of those engines that have one."""
        for contender in self.contenders:
            score = self.scores[contender.label]
            contender.turn("single", prompt=self._work.singles[0][:64], count=8)
            if wanted := self._args.batch_size.get(contender.label):
                score.size = int(wanted)
                continue
            for size in contender.batch_sizes:
                turn = self._turn(contender, "batch", prompts=self._work.batch, count=self._work.count, size=size)
                score.tried[size] = turn.seconds
                _say(f"{contender.label}: batch size {size} takes {turn.seconds:.1f} s")
            score.size = min(score.tried, key=score.tried.__getitem__, default=None)

    def play(self) -> None:
        """All rounds."""
        for number in range(1, self._args.rounds + 1):
            self.limits.append(self._turn(self._limits, "measure").result)
            for contender in self.contenders:
                self._round(contender)
                score = self.scores[contender.label]
                _say(
                    f"round {number}: {contender.label}: TTFT {1e3 * score.ttft[-1]:.0f} ms, TPOT {1e3 * score.tpot[-1]:.1f} "
                    f"ms, batch {score.batch[-1]:.2f} s, others {max(score.outside):.2f} cores"
                )

    def _round(self, contender: Contender) -> None:
        work, score = self._work, self.scores[contender.label]
        contender.turn("single", prompt=work.singles[0][:64], count=8)  # caches and clocks back after standing still
        score.single_tokens = []
        for prompt in work.singles:
            single = self._turn(contender, "single", prompt=prompt, count=work.count).result
            score.single_tokens.append(single["tokens"])
            score.ttft.append(single["first"])
            score.tpot.append((single["last"] - single["first"]) / max(1, work.count - 1))
        turn = self._turn(contender, "batch", prompts=work.batch, count=work.count, size=score.size)
        score.batch.append(turn.seconds)
        score.tokens = turn.result
        score.memory_mb = max(score.memory_mb, contender.memory_mb())
        for tokens in (*score.tokens, *score.single_tokens):
            if len(tokens) != work.count:
                raise ContenderError(f"{contender.label} gave {len(tokens)} tokens instead of {work.count}")

    def _turn(self, contender: Contender, op: str, **args: Any) -> Turn:
        await_quiet(self._args.quiet, self._args.patience)
        turn = contender.turn(op, **args)
        if contender.label in self.scores:
            self.scores[contender.label].outside.append(turn.outside)
            self.scores[contender.label].stolen.append(turn.stolen)
        return turn

    def equality(self, label: str) -> Equality | None:
        """The contender's outputs against the baseline's; None if the baseline does not play."""
        oracle = next((contender for contender in self.contenders if contender.label == BASELINE), None)
        if oracle is None:
            return None
        wanted, found = ([*self.scores[name].tokens, *self.scores[name].single_tokens] for name in (BASELINE, label))
        same = [common_prefix(left, right) for left, right in zip(wanted, found, strict=True)]
        prompts = [*self._work.batch, *self._work.singles]
        gaps = [
            oracle.turn("gap", prompt=prompt + tokens[:length]).result
            for prompt, tokens, length in zip(prompts, wanted, same, strict=True)
            if length < len(tokens)
        ]
        return Equality(
            identical=len(same) - len(gaps),
            prompts=len(same),
            mean_prefix=statistics.fmean(same),
            differences=len(gaps),
            near_ties=sum(gap <= NEAR_TIE for gap in gaps),
        )


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens are the same from the start on."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


# -- the report


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Median [lowest-highest]."""
    middle, low, high = (scale * number for number in (statistics.median(values), min(values), max(values)))
    return f"{middle:.{digits}f} [{low:.{digits}f}-{high:.{digits}f}]"


def report(match: Match, work: Work, floors: Floors, equalities: dict[str, Equality | None]) -> Iterable[str]:
    """The lines of the report."""
    read = max(limit["read_gb_s"] for limit in match.limits)
    gemm = max(limit["sgemm_gflop_s"] for limit in match.limits)
    floor_tpot, floor_ttft = floors.step_bytes / read / 1e9, floors.prefill_flop / gemm / 1e9
    floor_batch = floors.batch_flop / gemm / 1e9
    new = len(work.batch) * work.count
    total = new + sum(map(len, work.batch))
    baseline = match.scores.get(BASELINE)

    yield f"{'':14} {'TTFT 512, ms':>24} {'TPOT, ms':>20} {'batch, s':>20} {'out tok/s':>10} {'all tok/s':>10} {'speed-up':>9}"
    for label, score in match.scores.items():
        seconds = statistics.median(score.batch)
        factor = f"{statistics.median(baseline.batch) / seconds:.2f}x" if baseline else "-"
        yield (
            f"{label:14} {spread(score.ttft, 1e3, 0):>24} {spread(score.tpot, 1e3):>20} {spread(score.batch, 1.0, 2):>20} "
            f"{new / seconds:>10.1f} {total / seconds:>10.0f} {factor:>9}"
        )
    yield f"{'machine floor':14} {1e3 * floor_ttft:>24.0f} {1e3 * floor_tpot:>20.1f} {floor_batch:>20.2f}"
    yield ""
    yield "Share of the machine's limit that is reached (1.00 is the floor; TTFT and batch: arithmetic, TPOT: memory):"
    for label, score in match.scores.items():
        shares = (
            floor / statistics.median(values)
            for floor, values in ((floor_ttft, score.ttft), (floor_tpot, score.tpot), (floor_batch, score.batch))
        )
        ttft, tpot, batch = shares
        yield f"{label:14} TTFT {ttft:.2f}   TPOT {tpot:.2f}   batch {batch:.2f}   memory {score.memory_mb:,.0f} MB"
    yield (
        f"Limits measured between the rounds, best: read {read:.1f} GB/s, sgemm {gemm:.0f} GFLOP/s; medians "
        f"{statistics.median(limit['read_gb_s'] for limit in match.limits):.1f} and "
        f"{statistics.median(limit['sgemm_gflop_s'] for limit in match.limits):.0f}."
    )
    yield ""
    yield f"Greedy tokens against {BASELINE}:"
    for label, equal in equalities.items():
        if equal is None:
            yield f"{label:14} not compared: {BASELINE} does not take part"
        elif label != BASELINE:
            yield (
                f"{label:14} {equal.identical}/{equal.prompts} outputs identical, mean identical prefix "
                f"{equal.mean_prefix:.1f} of {work.count}; {equal.near_ties} of {equal.differences} differences are near-ties"
            )
    yield ""
    for label, score in match.scores.items():
        static = f", static batches of {score.size}" if score.size else ""
        tried = " (tried " + ", ".join(f"{size}: {s:.1f} s" for size, s in score.tried.items()) + ")" if score.tried else ""
        yield (
            f"{label}: {score.name}{static}{tried}; others used {statistics.median(score.outside):.2f} cores "
            f"(at most {max(score.outside):.2f}), stolen {statistics.median(score.stolen):.2f}"
        )


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    memory = psutil.virtual_memory().total
    return {"cpu": model, "cores": psutil.cpu_count(), "memory_gb": round(memory / 1e9, 1), "python": platform.python_version()}


# -- command


def _pairs(texts: Iterable[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise SystemExit(f"{text!r}: write NAME=VALUE")
        pairs[name] = value
    return pairs


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--peers", nargs="*", choices=tuple(PEERS), default=[BASELINE], help="who plays against Sluice")
    parser.add_argument("--python-for", action="append", default=[], metavar="PEER=PYTHON", help="a peer's own interpreter")
    parser.add_argument("--model-for", action="append", default=[], metavar="PEER=FOLDER", help="a peer's converted model")
    parser.add_argument("--option", action="append", default=[], metavar="NAME.KEY=VALUE", help="an option of one engine")
    parser.add_argument("--batch-size", action="append", default=[], metavar="PEER=N", help="do not search, use this one")
    parser.add_argument("--model", default="demo", help="folder of the checkpoint, or demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--prompts", type=int, default=32, help="prompts in the batch")
    parser.add_argument("--singles", type=int, default=3, help="prompts run alone, in each round")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens for each prompt")
    parser.add_argument("--quiet", type=float, default=0.2, help="wait while others use this many cores or more ...")
    parser.add_argument("--patience", type=float, default=60.0, help="... but not longer than this, in seconds, each time")
    parser.add_argument("--out", type=Path, help="write everything measured as JSON")
    return parser


def line_up(args: argparse.Namespace, model: Path) -> list[Contender]:
    """Sluice and the peers asked for, not started yet."""
    options: dict[str, dict[str, Any]] = {}
    for name, value in _pairs(args.option).items():
        engine, _, key = name.partition(".")
        options.setdefault(engine, {})[key] = _value(value)
    pythons, models = _pairs(args.python_for), _pairs(args.model_for)
    contenders = []
    for label, module in {"sluice": "bench.peers.sluice", **{peer: PEERS[peer] for peer in args.peers}}.items():
        if label in OWN_FORMAT and label not in models:
            raise SystemExit(f"{label} needs a converted model: --model-for {label}=FOLDER, see bench/README.md")
        setup = Setup(models.get(label, str(model)), args.threads, options.get(label, {}))
        contenders.append(Contender(label, module, setup, pythons.get(label, sys.executable)))
    return contenders


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.batch_size = _pairs(args.batch_size)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contenders are ended too
    model = resolve_model(args.model)
    work = make_work(Tokenizer.load(model), args.prompts, args.singles, args.tokens)
    with contextlib.ExitStack() as stack:
        limits = stack.enter_context(Contender("limits", "bench.peers.limits", Setup("", args.threads)))
        contenders = []
        for contender in line_up(args, model):
            try:
                contenders.append(stack.enter_context(contender))
                _say(f"{contender.label} is loaded: {contender.name}")
            except (ContenderError, OSError) as error:
                raise SystemExit(f"cannot start {contender.label}: {error}") from error
        match = Match(contenders, limits, work, args)
        match.prepare()
        match.play()
        equalities = {contender.label: match.equality(contender.label) for contender in contenders}
    floors = Floors.of(load_spec(model), work)
    print(
        f"{model.name}, float32, {args.threads} threads, greedy, {args.tokens} new tokens; batch of {len(work.batch)} prompts, "
        f"{sum(map(len, work.batch)):,} tokens; {args.rounds} rounds, {args.singles} prompts alone in each; "
        "medians [lowest-highest]"
    )
    for line in report(match, work, floors, equalities):
        print(line)
    if args.out:
        record = {
            "machine": machine(),
            "args": {key: value for key, value in vars(args).items() if key in ("rounds", "threads", "tokens", "option")},
            "prompts": {"batch": [len(prompt) for prompt in work.batch], "singles": [len(prompt) for prompt in work.singles]},
            "limits": match.limits,
            "floors": asdict(floors),
            "scores": {label: asdict(score) for label, score in match.scores.items()},
            "equality": {label: asdict(equal) if equal else None for label, equal in equalities.items()},
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
