"""What colocation costs online requests and gives offline work: `python -m bench.colocation [--trace FILE] [--out FOLDER]`.

Replays a trace against real servers over HTTP, with and without an offline backlog of another model. The servers of all arms
are loaded at the same time and take turns, round after round (A B C, A B C, ...; the order rotates); who has no turn is idle.
Prints one table per question and writes everything measured as JSON, the tables, and a picture. With `--sharing`: one model for
both tenants instead, see bench.colocate.sharing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import platform
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.colocate import report, sharing
from bench.colocate.arms import ALONE, NO_GATE, OFFLINE_ALONE, OVERLOAD, SHARING, SLUICE, TIGHT, Arm, Load, Run, measure
from bench.colocate.client import replay, session
from bench.colocate.models import find_model
from bench.colocate.plot import draw
from bench.colocate.servers import Probe, Server, ServerError
from bench.colocate.stats import quantile
from bench.colocate.workload import (
    Backlog,
    Cost,
    Planned,
    Scaling,
    at_rate,
    choose_windows,
    fit_rate,
    length_factors,
    overload,
    plan,
    renewed,
    scale_lengths,
)
from bench.contender import await_quiet
from bench.engine import machine
from bench.traces import PromptMaker, TraceError, TraceRequest, facts, generate_trace, read_trace
from engine.errors import SluiceError
from engine.spec import load_spec

TABLES = ("interference", "harvest", "bounds", "memory", "victims", "overload")
QUICK = (ALONE, NO_GATE, SLUICE, OFFLINE_ALONE)
OVERLOAD_FACTOR = 10.0


@dataclass(slots=True)
class Session:
    """One invocation: its options, its traffic, and what it has measured."""

    args: argparse.Namespace
    online: Path
    offline: Path
    trace: list[TraceRequest]  # lengths scaled, rate not
    prompts: PromptMaker
    backlog: Backlog
    factors: tuple[float, float]
    log_folder: Path
    cost: Cost | None = None
    scaling: Scaling | None = None
    runs: list[Run] = field(default_factory=list)
    probes: dict[str, Probe | None] = field(default_factory=dict)
    flags: dict[str, list[str]] = field(default_factory=dict)
    disturbed: int = 0  # windows in which others used the machine

    # -- servers

    def flags_of(self, arm: Arm, kv_memory: str, *more: str) -> list[str]:
        flags = ["--model", str(self.online), "--kv-cache-memory", kv_memory, *more, *shlex.split(self.args.server_flags)]
        return [*flags, "--offline-model", str(self.offline), *arm.flags] if arm.offline else flags

    async def start(self, arm: Arm, flags: list[str], stack: contextlib.AsyncExitStack) -> Server:
        log = self.log_folder / f"{arm.name.replace(' ', '-')}.log"
        server = await stack.enter_async_context(Server(arm.name, flags, log))
        self.flags[arm.name], self.probes[arm.name] = flags, server.probe()
        say(f"{arm.name}: ready, {server.resident_mb():,.0f} MB; {server.probe() or 'no gate probed'}")
        return server

    # -- traffic

    async def calibrate(self, server: Server) -> None:
        """Measure what an online request costs here, and fit the trace's rate to it."""
        if self.cost is not None:
            return
        short, long = (TraceRequest(0.0, prompt, 24) for prompt in (32, 288))
        async with session() as client:
            times: dict[int, list[float]] = {}
            tokens: list[float] = []
            for number in range(5):
                for request in (short, long):
                    made = plan([request], self.prompts)
                    (answer,) = await replay(client, server.url, server.models[0], made, time.perf_counter())
                    if answer.error is not None:
                        raise ServerError(f"server {server.name!r}: {answer.error}")
                    if number:
                        times.setdefault(request.prompt_tokens, []).append(answer.ttft)
                        tokens.append(answer.tpot)
        one, many = (statistics.median(times[request.prompt_tokens]) for request in (short, long))
        slope = max(0.0, (many - one) / (long.prompt_tokens - short.prompt_tokens))
        self.cost = Cost(max(0.0, one - slope * short.prompt_tokens), slope, statistics.median(tokens))
        self._fit(self.cost)

    def _fit(self, cost: Cost) -> None:
        seconds = self.seconds(self.args.minutes)
        windows = 8 * self.args.rounds
        rate = self.args.scale_rate or fit_rate(self.trace, cost, self.args.busy, seconds, windows)
        self.trace = at_rate(self.trace, rate)
        chosen = choose_windows(self.trace, cost, self.args.busy, seconds, self.args.rounds)
        estimated = statistics.fmean(cost.busy(window, seconds) for window in chosen)
        self.scaling = Scaling(*self.factors, rate, estimated)
        say(
            f"a request takes {1e3 * cost.first:.0f} ms and {1e3 * cost.prompt_token:.2f} ms per prompt token, then "
            f"{1e3 * cost.output_token:.1f} ms per token; rate x{rate:.3g} makes online busy for about {estimated:.0%}"
        )

    def seconds(self, minutes: float) -> float:
        return 60.0 * minutes / float(self.args.rounds)

    def windows(self, seconds: float, rounds: int) -> list[list[Planned]]:
        assert self.cost is not None
        chosen = choose_windows(self.trace, self.cost, self.args.busy, seconds, rounds)
        return [plan(window, self.prompts) for window in chosen]

    def load(self, concurrency: int, **more: Any) -> Load:
        requests = [TraceRequest(0.0, length, 4) for length in (64, 200)]
        return Load(self.backlog, concurrency, self.args.warm, plan(requests, self.prompts), **more)

    # -- groups of arms

    async def sharing(self, arms: Sequence[Arm]) -> None:
        """Interference, harvest, bounds: plenty of memory."""
        async with contextlib.AsyncExitStack() as stack:
            servers = {}
            for arm in arms:
                if arm.server == arm.name:
                    servers[arm.name] = await self.start(arm, self.flags_of(arm, self.args.kv_memory), stack)
                    await self.calibrate(servers[arm.name])
            await self._rounds(arms, servers, self.args.minutes, self.args.rounds, self.args.backlog)

    async def tight(self, arms: Sequence[Arm]) -> None:
        """Memory and victims: so little memory that bursts of online requests need what offline work holds."""
        async with contextlib.AsyncExitStack() as stack:
            servers = {}
            for arm in arms:
                flags = self.flags_of(arm, self.args.tight_kv_memory, "--online-cache-share", "0")
                servers[arm.name] = await self.start(arm, flags, stack)
                await self.calibrate(servers[arm.name])
            rounds = min(2, self.args.rounds)
            await self._rounds(arms, servers, self.args.tight_minutes, rounds, self.args.tight_backlog, sample_seconds=0.5)

    async def overload(self) -> None:
        """One window with a burst of online requests far beyond capacity."""
        arm = Arm(OVERLOAD)
        seconds = 3 * max(4.0, self.seconds(self.args.minutes) / 3)
        async with contextlib.AsyncExitStack() as stack:
            server = await self.start(arm, self.flags_of(arm, self.args.kv_memory), stack)
            await self.calibrate(server)
            requests = plan(overload(self.trace, seconds, OVERLOAD_FACTOR), self.prompts)
            load = self.load(self.args.backlog, sample_seconds=0.25, after_seconds=seconds / 3)
            self.runs.append(await measure(server, arm, 0, requests, seconds, load))

    async def _rounds(
        self, arms: Sequence[Arm], servers: dict[str, Server], minutes: float, rounds: int, concurrency: int, **more: Any
    ) -> None:
        seconds = 60 * minutes / rounds
        load = self.load(concurrency, **more)
        for number, window in enumerate(self.windows(seconds, rounds)):
            first = number * 2 % len(arms)
            for arm in (*arms[first:], *arms[:first]):
                run = await self._undisturbed(servers[arm.server], arm, number, window, seconds, load)
                self.runs.append(run)
                say(_line(run))

    async def _undisturbed(
        self, server: Server, arm: Arm, number: int, window: Sequence[Planned], seconds: float, load: Load
    ) -> Run:
        """A window in which others left the machine alone, or the last one tried. What it measured plays no part in that."""
        for _ in range(1 + self.args.retries):
            await asyncio.to_thread(await_quiet, self.args.quiet, self.args.patience)
            run = await measure(server, arm, number, window, seconds, load)
            if run.cores["others"] < self.args.quiet:
                break
            self.disturbed += 1
            window = [renewed(planned) for planned in window]
        return run

    # -- what it came to

    def results(self) -> report.Results:
        return report.Results(self.runs, self.probes)

    def tables(self) -> list[str]:
        results = self.results()
        lines: list[str] = []
        for name in self.args.tables:
            made = {
                "interference": report.interference,
                "harvest": report.harvest,
                "bounds": report.bounds,
                "memory": report.memory,
                "victims": report.victims,
                "overload": report.overloaded,
            }[name](results)
            lines += [*made, ""]
        disturbed = f"Windows disturbed by others: {self.disturbed}, each measured again at most {self.args.retries} times."
        return [*lines, "## Whether to believe it", "", *report.quality(results), disturbed]

    def about(self) -> dict[str, Any]:
        """What was measured, where, with which versions."""
        assert self.cost is not None and self.scaling is not None
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine() | {"kernel": platform.release()},
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "numba", "aiohttp")},
            "args": {key: value.name if isinstance(value, Path) else value for key, value in vars(self.args).items()},
            "models": {"online": self.online.name, "offline": self.offline.name},
            "trace": asdict(facts(self.trace)),
            "cost": asdict(self.cost),
            "scaling": asdict(self.scaling),
            "flags": {name: _without_paths(flags) for name, flags in self.flags.items()},
            "probes": {name: probe and asdict(probe) for name, probe in self.probes.items()},
        }

    def head(self) -> list[str]:
        about = self.about()
        busy = [run.busy_share for run in self.results().of(ALONE)]
        machine_, versions = about["machine"], about["versions"]
        return [
            "# Colocation",
            "",
            f"{about['date']}; {machine_['cpu']}, {machine_['cores']} cores, {machine_['memory_gb']} GB, "
            f"Python {machine_['python']}, " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
            f"Online: {self.online.name}; offline: {self.offline.name}"
            + (" (random weights: only its shape matters)." if self.args.offline_model == "other" else "."),
            f"Trace: {self.args.trace.name if self.args.trace else 'generated'}, scaled: {facts(self.trace)}.",
            f"Windows of {self.seconds(self.args.minutes):.0f} s, {self.args.rounds} rounds; online alone is busy for "
            f"{', '.join(f'{share:.0%}' for share in busy) or '-'} of them.",
            "",
        ]

    def save(self, folder: Path) -> str:
        """Write tables, raw numbers and picture. Returns the tables."""
        folder.mkdir(parents=True, exist_ok=True)
        text = "\n".join([*self.head(), *self.tables()]) + "\n"
        (folder / "colocation.md").write_text(text, encoding="utf-8")
        record = {"about": self.about(), "runs": [run.record() for run in self.runs]}
        (folder / "colocation.json").write_text(json.dumps(rounded(record), separators=(",", ":")) + "\n", encoding="utf-8")
        draw(self.results(), folder / "colocation.png")
        return text


def rounded(value: Any) -> Any:
    """Numbers to a tenth of a microsecond: what was measured, without the digits that were not."""
    if isinstance(value, float):
        return round(value, 7)
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value


def _without_paths(flags: list[str]) -> list[str]:
    return [Path(flag).name if flag.startswith("/") else flag for flag in flags]


def _line(run: Run) -> str:
    ttft = 1e3 * quantile(report.ttfts(run), 0.5)
    failed = sum(answer.error is not None for answer in run.answers)
    return (
        f"round {run.round} {run.arm}: {len(run.answers)} online ({failed} failed), TTFT p50 {ttft:.0f} ms, "
        f"busy {run.busy_share:.0%}; offline {run.offline_tokens()[1] / run.seconds:,.0f} tok/s; "
        f"others used {run.cores['others']:.2f} cores"
    )


# -- command


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.colocation", description=(__doc__ or "").split("\n\n", maxsplit=1)[0]
    )
    parser.add_argument("--trace", type=Path, help="Azure, BurstGPT, Mooncake ...: told by its columns (default: generated)")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES[:5]))
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--quick", action="store_true", help="see that it works: few arms, one short round, no conclusions")
    parser.add_argument("--minutes", type=float, default=1.25, help="measured per arm, over all rounds")
    parser.add_argument("--tight-minutes", type=float, default=0.6, help="the same for the arms with little memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=float, default=4.0, help="seconds of the same work before each window")
    parser.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("models and servers")
    group.add_argument("--online-model", default="demo", help="a folder, demo, or other: random weights of another shape")
    group.add_argument("--offline-model", default="other")
    group.add_argument("--exchange", action="store_true", help="exchange the two models")
    group.add_argument("--kv-memory", default="1GiB")
    group.add_argument("--tight-kv-memory", default="144MiB", help="for the tables memory and victims")
    group.add_argument("--server-flags", default="", help="more flags for all servers, in one string")
    group = parser.add_argument_group("online traffic")
    group.add_argument("--busy", type=float, default=0.4, help="share of the time that online shall be busy")
    group.add_argument("--scale-rate", type=float, help="arrivals come so many times as fast (default: fitted to --busy)")
    group.add_argument("--scale-prompt", type=float, help="factor on prompt lengths (default: median as --prompt-tokens)")
    group.add_argument("--scale-output", type=float, help="factor on output lengths (default: median as --output-tokens)")
    group.add_argument("--prompt-tokens", type=int, default=96)
    group.add_argument("--output-tokens", type=int, default=16)
    group.add_argument("--burstiness", type=float, default=2.5, help="generated arrivals: coefficient of variation of the gaps")
    group = parser.add_argument_group("offline backlog")
    group.add_argument("--backlog", type=int, default=32, help="requests in flight at once")
    group.add_argument("--tight-backlog", type=int, default=16)
    group.add_argument("--offline-prompt-tokens", type=int, default=128)
    group.add_argument("--offline-output-tokens", type=int, default=64)
    group = parser.add_argument_group("measuring")
    group.add_argument("--quiet", type=float, default=0.2, help="wait while others use this many cores or more ...")
    group.add_argument("--patience", type=float, default=10.0, help="... but not longer than this, in seconds, each time")
    group.add_argument("--retries", type=int, default=1, help="measure a window again if others used the machine meanwhile")
    sharing.add_arguments(parser)
    group.add_argument("--out", type=Path, default=Path("bench/results/colocation"), help="folder for JSON, tables and picture")
    return parser


def make_session(args: argparse.Namespace, logs: Path) -> Session:
    online, offline = find_model(args.online_model), find_model(args.offline_model)
    if args.exchange:
        online, offline = offline, online
    if args.trace is None:
        lengths = {"prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens}
        trace = generate_trace(rate=1.0, seconds=2000.0, burstiness=args.burstiness, seed=args.seed, **lengths)
    else:
        trace = read_trace(args.trace)
    fitted = length_factors(trace, args.prompt_tokens, args.output_tokens)
    factors = args.scale_prompt or fitted[0], args.scale_output or fitted[1]
    offline_vocabulary = load_spec(offline).vocab_size
    return Session(
        args=args,
        online=online,
        offline=offline,
        trace=scale_lengths(trace, *factors),
        prompts=PromptMaker(load_spec(online).vocab_size, args.seed),
        backlog=Backlog(offline_vocabulary, args.offline_prompt_tokens, args.offline_output_tokens, args.seed + 1),
        factors=factors,
        log_folder=logs,
    )


async def run(session: Session) -> None:
    args = session.args
    wanted = set(args.arms or [arm.name for arm in (*SHARING, *TIGHT)])
    if {"interference", "harvest", "bounds"} & set(args.tables) and (arms := chosen(SHARING, wanted)):
        await session.sharing(arms)
    if {"memory", "victims"} & set(args.tables) and (arms := chosen(TIGHT, wanted)):
        await session.tight(arms)
    if "overload" in args.tables:
        await session.overload()


def chosen(arms: Sequence[Arm], wanted: set[str]) -> list[Arm]:
    """The wanted arms; one whose server is not among them gets its own."""
    kept = [arm for arm in arms if arm.name in wanted]
    names = {arm.name for arm in kept}
    return [arm if arm.server in names else replace(arm, on="") for arm in kept]


def quick(args: argparse.Namespace) -> None:
    """Settings of a run that takes about a minute and measures nothing well."""
    args.tables = [table for table in args.tables if table in TABLES[:3]] or args.tables
    args.arms = args.arms or list(QUICK)
    args.minutes, args.tight_minutes, args.rounds, args.warm, args.patience, args.retries = 0.15, 0.15, 1, 1.5, 0.0, 0


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.sharing is not None:
        args.out = args.out.parent / "sharing" if args.out == Path("bench/results/colocation") else args.out
        return sharing.main(args)
    if args.quick:
        quick(args)
    with tempfile.TemporaryDirectory(prefix="colocation-") as logs:
        try:
            session = make_session(args, Path(logs))
            asyncio.run(run(session))
        except KeyboardInterrupt:
            say("interrupted: what follows is what was measured until then")
        except (ServerError, SluiceError, TraceError) as error:
            say(f"error: {error}")
            return 1
    print(session.save(args.out), end="")
    say(f"raw numbers and picture: {args.out}")
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no server is left behind
    sys.exit(main())
