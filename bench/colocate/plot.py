"""The picture: distributions of TTFT and TPOT per arm, one window's timeline of the device, one of the slabs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.colocate.arms import AGAIN, ALONE, MIAD, NO_COOL_DOWN, NO_GATE, OS_ONLY, SLUICE, STATIC, Run
from bench.colocate.report import Results, tpots, ttfts


def draw(results: Results, path: Path) -> None:
    """Write the picture as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((ttft, tpot), (device, slabs)) = pyplot.subplots(2, 2, figsize=(13, 8), layout="constrained")
    _distribution(ttft, results, ttfts, "time to first token, ms")
    _distribution(tpot, results, tpots, "time per output token, ms")
    _device(device, results)
    _slabs(slabs, results)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _distribution(axes: Any, results: Results, value: Callable[[Run], Sequence[float]], label: str) -> None:
    for arm in (ALONE, AGAIN, SLUICE, NO_COOL_DOWN, OS_ONLY, NO_GATE):
        values = sorted(1e3 * v for run in results.of(arm) for v in value(run))
        if values:
            shares = [(i + 1) / len(values) for i in range(len(values))]
            axes.step(values, shares, where="post", label=arm, linewidth=2.5 if arm == SLUICE else 1.3)
    axes.set(xlabel=label, ylabel="share of online requests", xscale="log", ylim=(0, 1.02))
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3, which="both")


def _device(axes: Any, results: Results) -> None:
    """Who is on the device in the first window: online requests in flight, and offline answers between them."""
    names = []
    for row, arm in enumerate(arm for arm in (NO_GATE, SLUICE, ALONE) if results.has(arm)):
        run = results.of(arm)[0]
        axes.broken_barh([(a.sent, a.end - a.sent) for a in run.answers], (row - 0.15, 0.45), color="tab:blue", alpha=0.5)
        inside = [at for at, _, _ in run.offline_done if 0 <= at < run.seconds]
        axes.plot(inside, [row - 0.28] * len(inside), "|", color="tab:orange", markersize=8)
        names.append(arm)
    axes.set(xlabel="s", title="online requests in flight (bars), offline answers (ticks)")
    axes.set_yticks(range(len(names)), names)


def _slabs(axes: Any, results: Results) -> None:
    """Owners of the KV memory in the first window with little of it."""
    arm = next((arm for arm in (MIAD, STATIC) if results.has(arm)), None)
    axes.set(xlabel="s", title="slabs" if arm is None else f"slabs of KV memory by owner, {arm}")
    if arm is None:
        return
    samples = results.of(arm)[0].samples
    times = [at for at, _ in samples]
    owned = [[scrape.value("sluice_slabs", owner=owner) or 0.0 for _, scrape in samples] for owner in ("online", "offline")]
    axes.stackplot(times, *owned, labels=("online", "offline"), colors=("tab:blue", "tab:orange"), alpha=0.5)
    headroom = [scrape.value("sluice_online_headroom_slabs") or 0.0 for _, scrape in samples]
    axes.step(times, headroom, where="post", color="black", linewidth=1, label="headroom wanted")
    axes.legend(loc="lower right")
