"""Two tiny models on one machine: what they are asked, what they must answer, and everything that may happen to them meanwhile.

The answers are those of each model alone, in an engine without colocation. Whatever is done to the offline worker, its memory
or the main process, both models must give exactly these.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from helpers import tiny_checkpoint
from processes import PATIENCE, eventually

from engine import Engine, SamplingParams, Tenant
from engine.colocate import lending
from engine.colocate.arbiter import State
from engine.colocate.exclusive import SharingStats
from engine.colocate.process import OfflineProcess
from engine.generation import Generation
from engine.memory.window import HostWindow
from engine.types import Completion, FinishReason

SLAB = 96 * 1024  # 128 tokens of the online model, 96 of the offline one
NUM_SLABS = 16


# -- models and what they are asked


@dataclass(frozen=True)
class Case:
    """A request."""

    prompt: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Answer:
    """All that a request's outcome may not depend on: its tokens, texts and ends, by choice."""

    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    reasons: tuple[FinishReason | None, ...]
    prompt_logprobs: tuple[int | None, ...] | None


def answer_of(done: Completion) -> Answer:
    asked = done.prompt_logprobs
    return Answer(
        tuple(choice.tokens for choice in done.choices),
        tuple(choice.text for choice in done.choices),
        tuple(choice.finish_reason for choice in done.choices),
        None if asked is None else tuple(entry and entry.token for entry in asked),
    )


def _prompt(draw: random.Random, length: int) -> tuple[int, ...]:
    return tuple(draw.randrange(256) for _ in range(length))


def online_cases() -> list[Case]:
    """Some small and some that need more memory than online has at first."""
    draw = random.Random(1)
    params = [
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=11, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=8),
    ]
    return [Case(_prompt(draw, length), params[i % 3]) for i, length in enumerate((5, 40, 300, 17, 200, 90, 400, 3))]


def offline_cases() -> list[Case]:
    """Whatever has a state that must survive a worker: penalties, seeds, several choices, log-probabilities, stops."""
    draw = random.Random(2)
    params = [
        SamplingParams(temperature=0, max_tokens=60, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=5, max_tokens=60, ignore_eos=True),
        SamplingParams(temperature=0.7, seed=6, n=2, top_p=0.9, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3, max_tokens=60),
        SamplingParams(temperature=0, max_tokens=40, min_tokens=20, stop_token_ids=tuple(range(0, 264, 5))),
        SamplingParams(temperature=0, max_tokens=12, logprobs=2, prompt_logprobs=0),
        SamplingParams(temperature=1.0, seed=8, max_tokens=80, top_k=20, stop=("e",)),
    ]
    lengths = (9, 60, 30, 120, 15, 200, 33, 250, 4, 80, 48, 100, 21, 7)
    return [Case(_prompt(draw, length), params[i % len(params)]) for i, length in enumerate(lengths)]


@dataclass(frozen=True)
class Models:
    """Two checkpoints, the requests to each, and their answers when alone."""

    online: Path
    offline: Path
    cases: dict[Tenant, list[Case]]
    answers: dict[Tenant, list[Answer]]


def two_models(folder: Path) -> Models:
    online = tiny_checkpoint(folder)
    offline = tiny_checkpoint(folder, "qwen3", seed=7, num_hidden_layers=4, head_dim=16)
    cases = {Tenant.ONLINE: online_cases(), Tenant.OFFLINE: offline_cases()}
    answers = {}
    for tenant, path in ((Tenant.ONLINE, online), (Tenant.OFFLINE, offline)):
        with Engine(str(path), kv_cache_memory=4 << 20, threads=1, progress=False) as engine:
            running = [engine.submit(case.prompt, case.params) for case in cases[tenant]]
            answers[tenant] = [answer_of(generation.result(PATIENCE)) for generation in running]
    return Models(online, offline, cases, answers)


def colocated(models: Models, **options: object) -> Engine:
    """Both models in `NUM_SLABS` slabs, of which online keeps as few as it may."""
    settings: dict[str, object] = {
        "offline_model": str(models.offline), "kv_cache_memory": NUM_SLABS * SLAB, "slab_size": SLAB, "threads": 1,
        "online_cache_share": 0.0, "cooldown_ms": 2.0, "progress": False,
    }  # fmt: skip
    return Engine(str(models.online), **(settings | options))


def ask_all(engine: Engine, models: Models, tenant: Tenant, indices: Sequence[int] | None = None) -> None:
    """Ask these cases at once (default: all) and compare."""
    chosen = range(len(models.cases[tenant])) if indices is None else indices
    cases = [models.cases[tenant][index] for index in chosen]
    running = [engine.submit(case.prompt, case.params, tenant=tenant) for case in cases]
    for index, case, generation in zip(chosen, cases, running, strict=True):
        assert read(generation, case) == models.answers[tenant][index], (tenant, index)


def read(generation: Generation, case: Case) -> Answer:
    """The answer put together from single deltas: one too many or too few makes it a wrong one."""
    tokens: list[list[int]] = [[] for _ in range(case.params.n)]
    texts = [""] * case.params.n
    reasons: list[FinishReason | None] = [None] * case.params.n
    asked = None
    for delta in generation:
        assert delta.error is None, delta.error
        assert reasons[delta.index] is None, "a delta after the last one"
        assert case.params.logprobs is None or len(delta.logprobs) == len(delta.tokens)
        tokens[delta.index] += delta.tokens
        texts[delta.index] += delta.text
        reasons[delta.index] = delta.finish_reason
        asked = asked or delta.prompt_logprobs
    return Answer(
        tuple(map(tuple, tokens)),
        tuple(texts),
        tuple(reasons),
        None if asked is None else tuple(entry and entry.token for entry in asked),
    )


# -- what may happen


def sharing(engine: Engine) -> SharingStats:
    stats = engine.stats().sharing
    assert stats is not None
    return stats


def worker_of(engine: Engine) -> OfflineProcess:
    assert engine._sharing is not None
    return engine._sharing._process


def at_rest(engine: Engine) -> None:
    """Wait until nothing is to be done and offline may run."""
    eventually(lambda: not any(t.running or t.waiting for t in engine.stats().tenants.values()), "no request")
    eventually(lambda: sharing(engine).state is State.OFFLINE, "thaw")


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def workers(parent: int | None = None) -> list[psutil.Process]:
    """The offline workers that this process, or another one, has now."""
    found = []
    for child in psutil.Process(parent).children():
        try:
            if "engine.colocate.worker" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue  # it has just ended
    return found


@contextmanager
def poisoned(quiet_seconds: float = 0.02) -> Iterator[None]:
    """What is taken from a worker is not empty afterwards but full of NaN; and what online does not need goes back soon."""

    def poison(window: HostWindow, slab: int) -> None:
        window.tensor[slab * window.slab_bytes : (slab + 1) * window.slab_bytes] = 0xFF

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostWindow, "punch", poison)
        patch.setattr(lending, "_QUIET_SECONDS", quiet_seconds)
        yield


class Fire:
    """Threads that use an engine and harm it at random, until the time is up. Every answer is compared."""

    def __init__(self, engine: Engine, models: Models, seed: int, seconds: float) -> None:
        self.events: Counter[str] = Counter()
        self._engine = engine
        self._models = models
        self._seed = seed
        self._until = time.monotonic() + seconds
        self._stop = threading.Event()
        self._errors: list[BaseException] = []

    def run(self, *, kills: bool = False, pauses: bool = False) -> None:
        """All of it at once. Raises what the first of the threads raised."""
        acts: list[Callable[[random.Random], None]] = [*[self._offline] * 4, *[self._online] * 2, self._freeze, self._abort]
        acts += [self._kill] * kills + [self._pause] * pauses
        draws = [random.Random(f"{self._seed} {number}") for number in range(len(acts))]
        # Daemons: should an answer never come, the test fails instead of waiting for the one who waits for it.
        threads = [threading.Thread(target=self._loop, args=pair, daemon=True) for pair in zip(acts, draws, strict=True)]
        for thread in threads:
            thread.start()
        deadline = self._until + PATIENCE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._stop.set()
        if self._errors:
            raise self._errors[0]
        hanging = [act.__name__ for act, thread in zip(acts, threads, strict=True) if thread.is_alive()]
        assert not hanging, (hanging, self.events, sharing(self._engine))

    def _loop(self, act: Callable[[random.Random], None], draw: random.Random) -> None:
        try:
            while time.monotonic() < self._until and not self._stop.is_set():
                act(draw)
        except BaseException as error:
            self._errors.append(error)
            self._until = 0.0
            self._stop.set()

    def _wait(self, seconds: float) -> None:
        self._stop.wait(min(seconds, max(0.0, self._until - time.monotonic())))

    def _offline(self, draw: random.Random) -> None:
        cases = self._models.cases[Tenant.OFFLINE]
        ask_all(self._engine, self._models, Tenant.OFFLINE, draw.choices(range(len(cases)), k=draw.randint(1, 4)))
        self.events["offline"] += 1

    def _online(self, draw: random.Random) -> None:
        self._wait(draw.expovariate(1 / 0.1))
        ask_all(self._engine, self._models, Tenant.ONLINE, [draw.randrange(len(self._models.cases[Tenant.ONLINE]))])
        self.events["online"] += 1

    def _freeze(self, draw: random.Random) -> None:
        """The head of a request whose body is bad, or that turns out to be offline."""
        with self._engine.arriving() as arrival:
            time.sleep(draw.choice((0.0, 0.0, 0.001, 0.01)))
            if draw.random() < 0.3:
                arrival.withdraw()
        assert arrival.cost.preemptions <= 1
        self.events["freeze"] += 1
        self._wait(draw.expovariate(1 / 0.02))

    def _abort(self, draw: random.Random) -> None:
        """A client that leaves."""
        tenant = draw.choice(list(Tenant))
        case = draw.choice(self._models.cases[tenant])
        generation = self._engine.submit(case.prompt, case.params, tenant=tenant)
        self._wait(draw.choice((0.0, 0.0, 0.01, 0.1)))
        generation.abort()
        reasons = {choice.finish_reason for choice in generation.result(PATIENCE).choices}
        assert reasons <= {FinishReason.ABORT, FinishReason.LENGTH, FinishReason.STOP}
        self.events["abort"] += 1
        self._wait(draw.expovariate(1 / 0.1))

    def _kill(self, draw: random.Random) -> None:
        """Mostly at work, sometimes while it loads."""
        process = worker_of(self._engine)
        patient = draw.random() < 0.8
        while patient and not process.ready and time.monotonic() < self._until:
            self._wait(0.01)
        self._wait(draw.uniform(0.0, 2.0))
        if process._child is not None and time.monotonic() < self._until:
            process._child.kill()
            self.events["kill"] += 1

    def _pause(self, draw: random.Random) -> None:
        """Stop the arbiter for longer than its lease: the guardian lets the worker go, and the arbiter takes it back."""
        self._wait(draw.uniform(3.0, 8.0))
        assert self._engine._sharing is not None
        with self._engine.arriving(), self._engine._sharing._lock:
            time.sleep(1.4)
        self.events["pause"] += 1


def stress_seconds(default: float) -> float:
    """How long to keep an engine under fire; SLUICE_STRESS_SECONDS for longer."""
    return float(os.environ.get("SLUICE_STRESS_SECONDS", default))
