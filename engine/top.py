"""`python -m engine.top [URL]`: who owns the device of a running server, in a terminal. The same numbers as its dashboard.

It asks the server for `/debug/state` once a second, and of the past only for what is new. No model and no torch here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

Json = dict[str, Any]

_SECOND = 1_000_000  # spans and events come in microseconds
_TIMEOUT = 10.0
_PAPER = 120  # columns, where the output is no terminal
_LEVELS = " ▁▂▃▄▅▆▇█"
_PARTS = ("online_prefill", "online_decode", "offline_prefill", "offline_decode")
_COLORS = {"online": "blue", "offline": "yellow", "switch": "magenta", "idle": "bright_black", "cached": "bright_black"}
_WORDS = {
    "preemption": "offline model stopped",
    "parked": "offline step parked",
    "gave_way": "made room",
    "reclaim": "memory taken",
    "worker": "offline worker died",
    "stuck": "step stuck",
}


class Unreachable(Exception):
    """The server does not answer, or not as asked. The message is for the person at the terminal."""


class Source:
    """A server's state over time: spans and events of the window gathered from its answers."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._last: Json = {}
        self._spans: list[list[int]] = []
        self._switches: list[list[int]] = []
        self._events: list[Json] = []

    def look(self) -> Json:
        """The state now, with all spans and events of the window. Raises Unreachable."""
        state = self._fetch(f"/debug/state?after={self._last.get('cursor', '')}")
        if self._last.get("began") != state["began"]:
            self._spans, self._switches, self._events = [], [], []
        oldest = state["now"] - state["window"] * _SECOND
        self._spans = [span for span in self._spans if sum(span[:2]) > oldest] + state["steps"] + state["offline_steps"]
        self._switches = [span for span in self._switches if span[0] > oldest] + state["switches"]
        self._events = [*self._events, *state["events"]][-50:]
        self._last = state
        return state | {"spans": self._spans, "switches": self._switches, "events": self._events}

    def _fetch(self, path: str) -> Json:
        request = urllib.request.Request(self._url + path, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                body: Json = json.load(response)
                return body
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise Unreachable(f"{self._url} asks for the admin key: --admin-api-key-file FILE") from None
            raise Unreachable(f"{self._url}: {_reason(error)}") from None
        except (OSError, ValueError) as error:
            raise Unreachable(f"{self._url}: {getattr(error, 'reason', None) or error}") from None


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"status {error.code}"


# -- numbers


def seconds_by_owner(state: Json) -> dict[str, float]:
    """Seconds of the window by part, switching and idle."""
    now, window = state["now"], state["window"] * _SECOND
    window = min(window, now - state["began"]) or 1
    sums = dict.fromkeys(_PARTS, 0.0)
    for start, length, *tokens, _rows in state["spans"]:
        inside = max(0, min(start + length, now) - max(start, now - window))
        for part, count in zip(_PARTS, tokens, strict=True):
            sums[part] += inside * count / (sum(tokens) or 1)
    switch = float(sum(span[1] for span in state["switches"] if span[0] > now - window))
    idle = max(0.0, window - sum(sums.values()) - switch)
    return {owner: time / _SECOND for owner, time in (sums | {"switch": switch, "idle": idle}).items()}


def strip(state: Json, tenant: str, width: int) -> list[float]:
    """The window in `width` columns, oldest first: the share of each that the tenant's tokens took."""
    now, window = state["now"], state["window"] * _SECOND
    start, column = now - window, window / width
    at = 2 if tenant == "online" else 4
    shares = [0.0] * width
    for begin, length, *rest in state["spans"]:
        tokens = rest[:4]
        part = sum(tokens[at - 2 : at]) / (sum(tokens) or 1)
        left, right = (begin - start) / column, (begin + length - start) / column
        for x in range(max(0, int(left)), min(width, int(right) + 1)) if part else ():
            shares[x] += part * max(0.0, min(right, x + 1) - max(left, x))
    return [min(1.0, share) for share in shares]


# -- words


def duration(seconds: float | None) -> str:
    """Seconds for people: 12 ms, 3.1 s, 4 min, 2 h 5 min."""
    if seconds is None:
        return "-"
    sign, seconds = ("-" if seconds < 0 else ""), abs(seconds)
    if 0 < seconds < 0.0009995:
        return f"{sign}{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{sign}{seconds * 1e3:.{1 if seconds < 0.0995 else 0}f} ms"
    if seconds < 60:
        return f"{sign}{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{sign}{minutes} min" if minutes < 60 else f"{sign}{minutes // 60} h {minutes % 60} min"


def cost_of(event: Json) -> str:
    """What an event cost."""
    words = []
    for name, value in event["cost"].items():
        unit = {"_us": 1e6, "_ms": 1e3}.get(name[-3:])
        text = f"{value:,.0f}" if unit is None else duration(value / unit)
        words.append(f"{(name if unit is None else name[:-3]).replace('_', ' ')} {text}")
    return ", ".join(words)


def folded(events: list[Json]) -> list[Json]:
    """Each preemption with what came of it: how long the worker stood still, or that it was none."""
    found: list[Json] = []
    for event in events:
        stop = next((e for e in reversed(found) if e["kind"] == "preemption" and "stood_still_ms" not in e["cost"]), None)
        if event["kind"] == "withdrawn":
            if stop is not None:
                found.remove(stop)
        elif event["kind"] != "thaw":
            found.append(event)
        elif stop is not None:
            found[found.index(stop)] = stop | {"cost": stop["cost"] | event["cost"]}
    return found


# -- the picture


def render(state: Json, width: int = 100) -> RenderableType:
    """Everything at once, for a terminal of `width` columns."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_head(state), Text(), *_strips(state, width)]
    parts += [Text(), _tenants(state), Text(), _kv(state, width)]
    if state["jobs"]:
        parts += [Text(), _jobs(state["jobs"])]
    if state["events"]:
        parts += [Text(), _events(state)]
    return Group(*parts)


def _head(state: Json) -> Text:
    from rich.text import Text

    models = ", ".join(f"{model['id']} ({model['tenant']})" for model in state["models"])
    device = state["device"]
    gate = f", gate {device['gate']}, {device['state']}" if "gate" in device else ""
    color = "green" if state["status"] == "ready" else "red"
    paused = state.get("paused")
    still = f", {' and '.join(paused)} paused" if paused else ""
    up = duration(state["uptime"])
    text = Text.assemble(("Sluice ", "bold"), (state["status"], color), (still, "red"), f"  {models}{gate}  up {up}")
    text.truncate(200)
    return text


def _strips(state: Json, width: int) -> list[Text]:
    from rich.text import Text

    shares, known = seconds_by_owner(state), 0.0
    known = sum(shares.values()) or 1.0
    lines = []
    room = max(10, width - 24)
    for tenant in ("online", "offline"):
        levels = "".join(_LEVELS[min(8, -int(-share * 8 // 1))] for share in strip(state, tenant, room))
        share = (shares[f"{tenant}_prefill"] + shares[f"{tenant}_decode"]) / known
        lines.append(Text.assemble(f"{tenant:<8}", (levels, _COLORS[tenant]), f" {share:6.1%}"))
    each = "  ".join(f"{owner.replace('_', ' ')} {seconds / known:.1%}" for owner, seconds in shares.items())
    lines.append(Text(f"last {state['window']:.0f} s: {each}", style="dim"))
    return lines


def _tenants(state: Json) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "run", "wait", "done", "prefill tok/s", "decode tok/s", "TTFT p50, p99", "TPOT p50, p99", "made room"):
        table.add_column(name, justify="left" if not name else "right")
    window = min(state["window"], (state["now"] - state["began"]) / _SECOND) or 1.0
    for index, tenant in enumerate(("online", "offline")):
        part, recent = state["tenants"][tenant], state["latency"][tenant]
        rates = [sum(span[2 + 2 * index + phase] for span in state["spans"]) / window for phase in (0, 1)]
        times = [f"{duration(recent[kind]['p50'])}, {duration(recent[kind]['p99'])}" for kind in ("ttft", "tpot")]
        counts = [f"{part[name]:,}" for name in ("running", "waiting", "finished")]
        row = [*counts, *(f"{rate:,.1f}" for rate in rates), *times, f"{part['preemptions']:,}"]
        table.add_row(tenant, *row, style=_COLORS[tenant])
    if any(state["slo"].values()):
        table.add_row("target", *[""] * 5, *(_target(state, kind) for kind in ("ttft", "tpot")), "")
    return table


def _target(state: Json, kind: str) -> Text:
    """What online should not exceed, and whether its 99th percentile does."""
    from rich.text import Text

    target, reached = state["slo"][kind], state["latency"]["online"][kind]["p99"]
    if target is None:
        return Text("")
    met = reached is None or reached <= target
    return Text(f"{duration(target)}{'' if met else ' missed'}", style="green" if met else "red")


def _kv(state: Json, width: int) -> Text:
    from rich.text import Text

    slabs = state["kv"]["slabs"]
    shares = {
        name: sum(slab[at] for slab in slabs) / max(1, len(slabs)) / 100
        for at, name in enumerate(("online", "offline", "cached"), start=1)
    }
    room = max(10, width - 24)
    text = Text("KV      ")
    for name, share in shares.items():
        text.append("█" * round(share * room), _COLORS[name])
    text.append("·" * max(0, room + 8 - len(text)), "dim")
    owned = [sum(slab[0] == tenant for slab in slabs) for tenant in ("online", "offline")]
    whose = f"; slabs: {owned[0]} online, {owned[1]} offline" if any(owned) else f"; {len(slabs)} slabs, shared"
    words = "  ".join(f"{name} {share:.1%}" for name, share in shares.items())
    text.append(f"\n        {words}{whose}", "dim")
    return text


def _jobs(jobs: list[Json]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("job", "state", "done", "failed", "ETA", "slack"):
        table.add_column(name, justify="left" if name in ("job", "state") else "right")
    for job in jobs[:8]:
        late = job["slack_s"] is not None and job["slack_s"] < 0
        state = job["state"] + (f" ({job['reason']})" if job["reason"] else "")
        counts = f"{job['done']:,} of {job['total']:,}", f"{job['failed']:,}"
        times = duration(job["eta_s"]), duration(job["slack_s"])
        table.add_row(job["id"], state.replace("_", " "), *counts, *times, style="red" if late else None)
    return table


def _events(state: Json) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("last preemptions", "", "cause", "cost"):
        table.add_column(name)
    for event in reversed(folded(state["events"])[-6:]):
        ago = f"{duration((state['now'] - event['at']) / _SECOND)} ago"
        what: str = _WORDS.get(event["kind"]) or event["kind"]
        table.add_row(Text(ago, style="dim"), Text(what), Text(event["cause"]), Text(cost_of(event)))
    return table


# -- the command


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.top", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000", metavar="URL", help="of the server (%(default)s)")
    parser.add_argument("--admin-api-key-file", metavar="FILE", help="holds the admin key, where the server asks for one")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two looks (%(default)s)")
    parser.add_argument("--once", action="store_true", help="look once, print, and end")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Show until interrupted. Exit status: 0, or 1 if the server does not answer, 2 for wrong usage."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.interval <= 0:
        parser.error("--interval must be above 0")
    key = None
    if args.admin_api_key_file is not None:
        try:
            key = (Path(args.admin_api_key_file).read_text(encoding="ascii").splitlines() or [""])[0].strip()
        except (OSError, ValueError) as error:
            parser.error(f"--admin-api-key-file {args.admin_api_key_file}: {error}")
    url = args.url if "://" in args.url else "http://" + args.url
    if not url.startswith(("http://", "https://")):
        parser.error(f"{args.url} is not the address of a server; write for example http://127.0.0.1:8000")
    source = Source(url, key)
    try:
        return _once(source) if args.once else _live(source, args.interval)
    except Unreachable as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def _once(source: Source) -> int:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _PAPER)
    console.print(render(source.look(), console.width))
    return 0


def _live(source: Source, interval: float) -> int:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    with Live(render(source.look(), console.width), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(render(source.look(), console.width), refresh=True)


if __name__ == "__main__":
    sys.exit(main())
