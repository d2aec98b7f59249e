"""The table of tolerances on the manual clock: the same every time, and what it says of a loose tolerance is within it."""

from __future__ import annotations

import pytest

from bench.tolerances import Simulation, main, make_trace
from engine.fake import StepCost
from engine.sched.modes import Mode
from engine.sched.slo import SloControl
from engine.types import TokenOut

COST = StepCost(0.0175, 0.00045, 2e-7)


@pytest.mark.parametrize("name", ["chat", "code"])
def test_a_loose_tolerance_is_kept_and_used(name: str) -> None:
    trace = make_trace(name, COST, 0.5, 120, 0)
    alone = Simulation(trace, COST, None, 0.0)
    assert alone.run() == 0
    runs = [Simulation(trace, COST, SloControl("mean-tpot", increase=0.5), 0.5) for _ in range(2)]
    offline = {run.run() for run in runs}
    assert len(offline) == 1, "nothing is random"
    assert offline.pop() > 100
    assert 1.05 < runs[0].metric("mean-tpot") / alone.metric("mean-tpot") <= 1.5


def test_the_table_has_a_row_for_each_metric_and_a_cell_for_each_tolerance(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--traces code --loads 0.3 --metrics p99-ttft --tolerances 0.1 0.5 --requests 12"
    assert main(arguments.split()) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| p99-ttft")]
    assert [row.count("|") for row in rows] == [5]


def test_modes_are_compared_and_exclusive_leaves_online_as_it_is_alone(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--modes --traces chat --loads 0.3 --metrics mean-tpot --tolerances 0.3 --requests 40"
    assert main(arguments.split()) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    found = {row[1].strip(): [float(cell) for cell in row[2:-1]] for row in rows[1:]}
    assert list(found) == ["none", "exclusive", "step", "auto"]
    assert found["exclusive"][2:4] == pytest.approx(found["none"][2:4], rel=0.01)
    assert found["step"][2] > 1.05 * found["none"][2]
    assert found["none"][-1] == 0 < found["exclusive"][-1]


@pytest.mark.parametrize(
    ("cost", "load", "mode"),
    [
        # A step mostly waits for the weights: what rides is nearly free.
        (StepCost(20e-3, 0.02e-3, 0.0), 0.5, Mode.STEP),
        # A step mostly computes: what rides takes the time that it would have taken anyway.
        (StepCost(0.1e-3, 0.5e-3, 0.0), 0.3, Mode.EXCLUSIVE),
    ],
)
def test_auto_rides_where_steps_wait_for_weights_and_not_where_they_compute(cost: StepCost, load: float, mode: Mode) -> None:
    trace = make_trace("chat", cost, load, 200, 0)
    run = Simulation(trace, cost, SloControl("mean-tpot", increase=0.2), 0.2, auto=True)
    seen: list[Mode] = []
    core = run._core
    step = core.step

    def watched() -> list[TokenOut]:
        seen.append(core.mode)
        return step()

    core.step = watched  # type: ignore[method-assign]
    run.run()
    late = seen[len(seen) // 4 :]
    assert late.count(mode) > 0.75 * len(late)
