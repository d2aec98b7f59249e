"""One model for both tenants, loaded once: each window of traffic gets a core and a loop of its own and is timed.

Requests go in by `EngineLoop.put` when the trace says so, and tokens are timed where they leave the loop; by a steady clock.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.colocate.equal import Unequal, gap
from bench.colocate.steady import SteadyClock
from bench.colocate.workload import Backlog, Cost, Planned, at_rate, choose_windows, fit_rate, plan, scale_lengths
from bench.latency_model import look
from bench.traces import PromptMaker, generate_trace
from engine.build import build_core, load_model, make_control
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import EngineDead
from engine.loop import EngineLoop
from engine.sched.latency import Load, StepTime
from engine.sched.policies import Budget, Priority, make_policy
from engine.sched.slo import SloControl
from engine.sched.view import View
from engine.types import SamplingParams, Submit, Tenant, TokenOut

TRACES = {"chat": (1.0, 48, 32), "code": (3.0, 128, 6)}  # burstiness of the gaps; median prompt and output tokens


@dataclass(frozen=True)
class Capped(Priority):
    """Priority with a fixed number of offline tokens a step: what one sets by hand for want of a latency target."""

    beside: int  # online rows
    alone: int

    @classmethod
    def of(cls, text: str) -> Capped:
        """From "8", or "8/64" where steps without online rows may hold more."""
        beside, _, alone = text.partition("/")
        return cls(int(beside), int(alone or beside))

    def budget(self, view: View) -> Budget:
        return replace(super().budget(view), offline=self.beside if view.unfinished(Tenant.ONLINE) else self.alone)


@dataclass(slots=True)
class Window:
    """One arm's share of one round, raw. Times in seconds of a SteadyClock, by request; `wall_`: of the usual one."""

    arm: str
    key: str = ""  # of the requests: trace, load, round
    seconds: float = 0.0
    wall_seconds: float = 0.0
    ttft: dict[str, float] = field(default_factory=dict)
    tpot: dict[str, float] = field(default_factory=dict)
    wall_ttft: dict[str, float] = field(default_factory=dict)
    wall_tpot: dict[str, float] = field(default_factory=dict)
    offline_tokens: int = 0  # processed, prompts and outputs, those computed again not counted twice
    recomputed: int = 0
    copied: int = 0  # tokens of offline KV to the host
    restored: int = 0  # and back
    responses: list[int] = field(default_factory=list)
    scale: float = 1.0
    believed: float = math.nan  # the control's own estimate of what its metric has increased by
    mode: str = ""
    asked: dict[str, Submit] = field(default_factory=dict)
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Traffic:
    """One window on its way through a loop: online by the clock, offline kept at `depth` in flight."""

    def __init__(
        self, core: EngineCore, model: StepTime, requests: Sequence[Planned], backlog: Callable[[], Submit] | None, depth: int
    ) -> None:
        """`model`: of step times, for the clock."""
        self._core, self._requests, self._next, self._depth = core, requests, backlog, depth
        core.close = lambda: None  # type: ignore[method-assign]  # the model is needed again
        self._clock = SteadyClock(model, core.runner.num_layers, lambda: core.busy_since is not None)
        core.on_step = self._clock.ran
        self._sent: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._tokens: dict[str, list[int]] = {}
        self._left = len(requests)
        self._open = True
        self._done = threading.Event()
        self.window = Window("")
        self.loop = EngineLoop(core, self._saw, self._died)

    def _died(self, error: EngineDead) -> None:
        self._done.set()
        raise error

    def run(self, warm: float, lead: float, seconds: float) -> Window:
        """Offline alone for `warm` seconds, then the traffic, of which the first `lead` seconds are not counted; returns when
        all online requests are over."""
        for _ in range(self._depth if self._next is not None else 0):
            self._put(self._next())  # type: ignore[misc]
        time.sleep(warm)
        counters = self._core.scheduler.counters[Tenant.OFFLINE]
        began = self._clock.now()
        self._send(began, 0.0, lead)
        start = time.perf_counter()
        before, recomputed, copied = counters.computed_tokens, counters.recomputed_tokens, self._copied()
        self._send(began, lead, lead + seconds)
        window, end = self.window, time.perf_counter()
        window.recomputed = counters.recomputed_tokens - recomputed
        window.copied, window.restored = (after - then for after, then in zip(self._copied(), copied, strict=True))
        window.offline_tokens = counters.computed_tokens - before - window.recomputed
        self._open = False
        if self._left:
            self._done.wait(60)
        self.loop.close()  # the counters below move no more
        window.responses = list(self._core.stop_rule.responses.counts)
        if self._core.meter is not None:
            window.scale = self._core.meter.control.scale
            window.believed = self._core.meter.control.increase or math.nan
        window.mode = self._core.mode.value
        window.outputs |= {name: tuple(tokens) for name, tokens in self._tokens.items() if name in window.outputs}
        window.wall_seconds, window.seconds = end - start, self._clock.at(end) - self._clock.at(start)
        counted = {f"on-{number}" for number, request in enumerate(self._requests) if request.arrival_s >= lead}
        window.ttft, window.tpot = self._times(counted, self._clock.at)
        window.wall_ttft, window.wall_tpot = self._times(counted, lambda moment: moment)
        return window

    def _times(self, counted: set[str], at: Callable[[float], float]) -> tuple[dict[str, float], dict[str, float]]:
        """To the first token, and for each after it, by request and by this clock."""
        first = {name: at(moment) for name, moment in self._first.items() if name in counted}
        last = {name: at(self._last[name]) for name in first if name in self._last and len(self._tokens[name]) > 1}
        ttft = {name: moment - at(self._sent[name]) for name, moment in first.items()}
        return ttft, {name: (moment - first[name]) / (len(self._tokens[name]) - 1) for name, moment in last.items()}

    def _send(self, began: float, start: float, end: float) -> None:
        """The requests of this part of the traffic, in its time."""
        for number, request in enumerate(self._requests):
            if start <= request.arrival_s < end:
                self._wait(began + request.arrival_s)
                name = f"on-{number}"
                self._sent[name] = time.perf_counter()
                self._put(submit(name, Tenant.ONLINE, request.prompt, request.output_tokens))
        self._wait(began + end)

    def _wait(self, reading: float) -> None:
        while (left := reading - self._clock.now()) > 0:
            time.sleep(min(left, 0.01))

    def _copied(self) -> tuple[int, int]:
        """Tokens copied to the host until now, and those copied back."""
        host = self._core.host_stats()
        return (0, 0) if host is None else (host.copied * self._core.scheduler.kv.page_size, host.restored_tokens)

    def _saw(self, outs: list[TokenOut]) -> None:
        now = time.perf_counter()
        for out in outs:
            tokens = self._tokens.setdefault(out.id, [])
            if out.token is not None:
                tokens.append(out.token)
            online = out.id in self._sent
            if online:
                self._first.setdefault(out.id, now)
            if out.finish_reason is None:
                continue
            self.window.outputs[out.id] = ()
            if online:
                self._last[out.id] = now
                self._left -= 1
                if not self._left:
                    self._done.set()
            elif self._open and self._next is not None:
                self._put(self._next())

    def _put(self, asked: Submit) -> None:
        self.window.asked[asked.id] = asked
        self.loop.put(asked)


def submit(name: str, tenant: Tenant, prompt: Sequence[int], output: int) -> Submit:
    """Every third request is sampled with a seed, the others are greedy."""
    seed = hash(tuple(prompt)) % 1000
    params = SamplingParams(max_tokens=output, ignore_eos=True, temperature=0.8 if seed % 3 == 0 else 0.0, seed=seed)
    return Submit(id=name, tenant=tenant, prompt=tuple(prompt), params=params, seed=seed)


class Rig:
    """The loaded model, its costs, and traffic fitted to it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.config = EngineConfig(model=args.online_model, kv_cache_memory=args.sharing_kv_memory, host_kv_memory=1 << 30)
        self.built = load_model(self.config)
        self._used = False  # its window is mapped
        self.error = 0.0  # of predicted step times, at the end of the latest window
        self.prompts = PromptMaker(self.built.spec.vocab_size, args.seed)
        self._controls: dict[str, SloControl] = {}  # by arm: each goes on in the arm's next window
        self._pairs: dict[str, dict[str, tuple[int, ...]]] = {}
        self.unequal: list[Unequal] = []
        self.step_time = StepTime()  # not the user's: what it knows must not depend on what ran here before
        self.core({})  # maps the window
        say("learning step times")
        options = (self.step_time, self.built, self.config.page_size, 60.0, 200, args.seed)
        learner = threading.Thread(target=look, args=options)  # which ends: a second pool of compute threads slows the first
        learner.start()
        learner.join()
        if not self.step_time.ready:
            raise SystemExit("error: steps take too long here to learn anything of them; is the machine busy?")
        self._steady = copy.deepcopy(self.step_time)
        self.cost = self._calibrate()

    def core(self, options: dict[str, Any], arm: str = "") -> EngineCore:
        """A core with these options of the engine; `policy`: a baseline by name, `cap`: priority with so many offline tokens a
        step, `layers`: False stops no pass, `copies`. Its control goes on where the one of the arm's latest core was."""
        options = dict(options)
        policy, layers, copies = options.pop("policy", None), options.pop("layers", True), options.pop("copies", False)
        cap = options.pop("cap", None)
        built = self.built if copies else replace(self.built, copier=None)
        if self._used and built.window is not None:
            for slab in range(built.num_slabs):
                built.window.unmap(slab)
        self._used = True
        config = self.config.with_options(**options)
        control = self._controls.get(arm) or make_control(config)
        if control is not None and arm:
            self._controls[arm] = control
        core = build_core(config, built, step_time=self.step_time, control=control)
        if policy is not None:
            core.scheduler.policy = make_policy(policy)
        if cap is not None:
            core.scheduler.policy = Capped.of(cap)
        core.interrupted = (lambda: False) if not layers else core.interrupted
        return core

    def run(
        self, arm: str, options: dict[str, Any], requests: Sequence[Planned], *, warm: float = 1.5, lead: float = 0.0,
        seconds: float = 0.0, offline: bool = True, key: str = "",
    ) -> Window:  # fmt: skip
        core = self.core(options, arm)
        made = Backlog(self.built.spec.vocab_size, *self.args.sharing_lengths, self.args.seed + 1)
        numbers = iter(range(1 << 30))

        def more() -> Submit:
            prompt, output = made.next()
            return submit(f"off-{next(numbers)}", Tenant.OFFLINE, prompt, output)

        traffic = Traffic(core, self._steady, requests, more if offline else None, self.args.sharing_depth)
        if options.get("layers", True):
            core.interrupted, core.waiting = traffic.loop.online_at_the_door, traffic.loop.waiting
        try:
            window = traffic.run(warm, lead, seconds)
        finally:
            traffic.loop.close()
        window.arm, window.key = arm, key
        self.error = self.step_time.error
        self._compare(arm, key, window)
        return window

    def _compare(self, arm: str, key: str, window: Window) -> None:
        """Whoever answered a request before must have answered the same."""
        known = self._pairs.setdefault(key, {})
        for name, tokens in window.outputs.items():
            if (before := known.setdefault(name, tokens)) != tokens:
                parted = gap(self.built, self.config.page_size, window.asked[name], (before, tokens))
                self.unequal.append(Unequal(f"{arm} {key} {name}", parted))

    def _calibrate(self) -> Cost:
        """What an online request costs alone, from the model of step times."""
        model = self.step_time
        first, long = model.predict(Load().plus(0, 16)), model.predict(Load().plus(0, 272))
        return Cost(first, max(0.0, (long - first) / 256), model.predict(Load().plus(64, 1)))

    def windows(self, trace: str, load: float, seconds: float, count: int) -> list[list[Planned]]:
        """Windows of a trace that keep online busy for this share of the time."""
        burstiness, prompt, output = TRACES[trace]
        made = generate_trace(
            rate=1.0, seconds=1000.0, burstiness=burstiness, prompt_tokens=prompt, output_tokens=output, seed=self.args.seed
        )
        made = scale_lengths(made, 1.0, 1.0)
        fitted = at_rate(made, fit_rate(made, self.cost, load, seconds, 8 * count))
        return [plan(window, self.prompts) for window in choose_windows(fitted, self.cost, load, seconds, count)]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
