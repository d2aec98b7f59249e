"""Tables of shared steps: a cap set by hand, whom the ratios are taken against, and what a run that is cut short has said."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from bench.colocate.rig import Capped, Window
from bench.colocate.sharing import ALONE, LAYERS, PRIORITY, _against, modes, slo
from engine.sched.view import View
from engine.types import Tenant


@pytest.mark.parametrize(("text", "beside", "alone"), [("8", 8, 8), ("4/64", 4, 64)])
@pytest.mark.parametrize("busy", [0, 3])
def test_a_cap_beside_online_rows_and_without_them(text: str, beside: int, alone: int, busy: int) -> None:
    running: dict[Tenant, list[Any]] = {Tenant.ONLINE: [object()] * busy, Tenant.OFFLINE: []}
    waiting: dict[Tenant, Any] = {tenant: [] for tenant in Tenant}
    view = View(now=0.0, running=running, waiting=waiting, max_tokens=512, alone_tokens=512, parked=False)
    budget = Capped.of(text).budget(view)
    assert (budget.tokens, budget.offline) == (512, beside if busy else alone)


def values(p99_tpot: float, offline: float) -> dict[str, float]:
    return {"mean-ttft": 1.0, "p99-ttft": 1.0, "mean-tpot": 1.0, "p99-tpot": p99_tpot, "offline": offline}


def test_equal_tails_are_those_of_the_best_cap_within_the_tolerance() -> None:
    caps = {"low": values(11.0, 100.0), "high": values(12.0, 200.0), "beyond": values(12.1, 400.0)}
    arms = {ALONE: values(10.0, 0.0), PRIORITY: values(100.0, 800.0), LAYERS: values(12.0, 600.0)} | caps
    with_cap = _against(arms, list(caps), 0.2)
    assert [line.split(";")[0] for line in with_cap] == [
        f"{LAYERS}: offline x0.75 of {PRIORITY}", f"{LAYERS}: offline x3.00 of high",
    ]  # fmt: skip
    assert "No cap" in _against(arms, list(caps), 0.01)[-1]
    assert len(_against(arms, [*caps, "still to come"], 0.01)) == 1, "nothing is said of caps before all had a turn"
    assert _against({ALONE: arms[ALONE]}, list(caps), 0.2) == []


class Rig:
    """Windows of one arm after another, without a model."""

    def __init__(self, rounds: int) -> None:
        self.args = argparse.Namespace(
            traces=["chat"], loads=[0.5], sharing_seconds=1.0, sharing_lead=0.0, sharing_limit=None, rounds=rounds,
            tolerance=0.2, metrics=["mean-ttft"], tolerances=[0.1, 0.5], retries=0, quiet=1.0,
        )  # fmt: skip
        self.ran: list[str] = []
        self.times: dict[str, list[float]] = {}

    def windows(self, *_: object) -> list[list[Any]]:
        return [[]] * self.args.rounds

    def run(self, arm: str, *_: object, key: str = "", **__: object) -> Window:
        self.ran.append(arm)
        if self.times:
            ttft = dict(enumerate(self.times[arm]))
            named = {f"on-{name}": took for name, took in ttft.items()}
            wall = {name: 2 * took if arm.startswith(ALONE) else 3 * took for name, took in named.items()}
            return Window(arm, key, seconds=1.0, ttft=named, wall_ttft=wall, offline_tokens=10)
        return Window(arm, key, seconds=1.0, ttft={"on-0": 0.1}, tpot={"on-0": 0.01}, offline_tokens=10 * len(self.ran))


def test_every_window_is_told_and_every_arm_has_one_before_any_has_two() -> None:
    rig = Rig(rounds=2)
    told = [[line for line in lines if line.startswith("| ")] for lines in modes(rig)]  # type: ignore[arg-type]
    assert [len(rows) - 1 for rows in told] == [1, 2, 3, 4, 4, 4, 4, 4]
    assert sorted(rig.ran[:4]) == sorted(rig.ran[4:]) == sorted(set(rig.ran))


def test_an_increase_is_against_both_turns_of_online_alone_and_paired_by_request() -> None:
    """Three requests of very different length: the mean is the long one's, the median over requests is not."""
    rig = Rig(rounds=1)
    rig.times = {"online only 0": [0.1, 0.2, 1.0], "online only 1": [0.1, 0.2, 1.2],
                 "mean-ttft 10%": [0.1, 0.2, 1.375], "mean-ttft 50%": [0.2, 0.3, 1.1]}  # fmt: skip
    *_, lines = slo(rig)  # type: ignore[arg-type]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| mean")]
    rows = {target: rest for target, *rest in cells}
    assert (rows["mean-ttft 10%"][:2], rows["mean-ttft 10%"][3]) == (["+19.6%", "+79.5%"], "+0.0%")
    assert (rows["mean-ttft 50%"][:2], rows["mean-ttft 50%"][3]) == (["+14.3%", "+71.4%"], "+50.0%")
    assert any("mean-ttft 433.3 (866.7), 500.0 (1000.0)." in line for line in lines)


def test_auto_is_compared_with_the_better_mode_round_by_round() -> None:
    rig = Rig(rounds=2)
    *_, lines = modes(rig)  # type: ignore[arg-type]
    # Windows have 10 tokens more each: exclusive 20 and 80, step 30 and 50, auto 40 and 60.
    assert "auto has 100.0% of the offline tokens of exclusive, the better one (by round 200%, 75%)." in lines
