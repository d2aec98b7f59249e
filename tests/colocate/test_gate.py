"""Gates on real children: what stops them, what only says so, and what a probe makes of it."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time

import pytest
from processes import Children, eventually, moves, still

from engine.colocate.control import ControlPage, Word
from engine.colocate.gate import Gate, LayerGate, NoGate, ProbeResult, ProcessGate, cost_of, probe


def gate_of(name: str, control: ControlPage, pid: int) -> Gate:
    return {"process": lambda: ProcessGate(control, pid), "layer": lambda: LayerGate(control), "none": NoGate}[name]()


@pytest.mark.parametrize(
    ("name", "worker", "works"),
    [
        ("process", "spin", True),
        ("process", "deaf", True),
        ("layer", "spin", True),
        ("layer", "deaf", False),
        ("none", "spin", False),
    ],
)
def test_probe_says_what_stops_a_worker(name: str, worker: str, works: bool, children: Children, control: ControlPage) -> None:
    child = children.worker(worker)
    assert moves(control)
    result = probe(gate_of(name, control, child.pid), control, trials=10)
    assert result.works is works, str(result)
    assert result.gate == name
    assert moves(control), "a probe leaves the worker running"
    assert control[Word.FROZEN] == 0
    if works:
        assert len(result.freeze) == len(result.thaw) == 10
        assert min(result.freeze) >= 0 and min(result.thaw) >= 0
        assert cost_of(result) >= 0
        assert "p99" in str(result) and "10 trials" in str(result)
    else:
        assert "does not stop" in str(result)


def test_probe_does_not_take_a_dead_worker_for_a_stopped_one(children: Children, control: ControlPage) -> None:
    child = children.worker("mortal")
    assert moves(control)
    result = probe(LayerGate(control), control, trials=1000)
    assert not result.works
    assert len(result.freeze) <= 1, "one trial shows it"
    assert child.wait() == 1


def test_probe_without_a_worker(control: ControlPage) -> None:
    assert probe(LayerGate(control), control) == ProbeResult("layer", False, (), ())
    assert cost_of(ProbeResult("layer", False, (), ())) == 0.0


def test_probe_result_reads_as_a_line() -> None:
    samples = tuple(n / 1000 for n in range(1, 101))
    text = str(ProbeResult("process", True, samples, (0.002,)))
    assert text == "gate process: freeze p50 51.000 ms, p99 100.000 ms; thaw p50 2.000 ms, p99 2.000 ms (100 trials)"
    assert cost_of(ProbeResult("process", True, (0.001, 0.009, 0.002), (0.004,))) == pytest.approx(0.006)


@pytest.mark.parametrize("name", ["process", "layer"])
def test_freeze_and_thaw_may_be_repeated(name: str, children: Children, control: ControlPage) -> None:
    child = children.worker()
    gate = gate_of(name, control, child.pid)
    assert moves(control)
    gate.thaw()
    assert moves(control), "thawing a running worker is nothing"
    for _ in range(3):
        for _ in range(3):
            gate.freeze()
        assert control[Word.FROZEN] == 1
        eventually(lambda: still(control), "worker frozen")
        gate.thaw()
        assert control[Word.FROZEN] == 0
        assert moves(control), "one thaw undoes any number of freezes"
        gate.thaw()


def test_a_process_that_was_waited_for_stands_still(children: Children, control: ControlPage) -> None:
    child = children.worker("deaf")
    gate = ProcessGate(control, child.pid)
    assert moves(control)
    for _ in range(20):
        gate.freeze()
        gate.wait_stopped(30.0)
        before = control[Word.PROGRESS]
        time.sleep(0.002)
        assert control[Word.PROGRESS] == before
        gate.thaw()
        assert moves(control)
    gate.wait_stopped(0.001)  # nobody froze it: gives up


@pytest.mark.parametrize("name", ["process", "layer"])
@pytest.mark.parametrize("seed", range(2))
def test_storm(name: str, seed: int, children: Children, control: ControlPage) -> None:
    """However freezes and thaws follow each other, from whatever thread, the last one counts."""
    child = children.worker()
    gate = gate_of(name, control, child.pid)
    assert moves(control)
    dice = random.Random(seed)
    lock = threading.Lock()

    def storm(seed: int) -> None:
        own = random.Random(seed)
        for _ in range(300):
            with lock:
                own.choice([gate.freeze, gate.thaw])()
            if own.random() < 0.1:
                time.sleep(own.random() * 1e-3)

    for _ in range(3):
        threads = [threading.Thread(target=storm, args=(dice.random(),)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gate.freeze()
        eventually(lambda: still(control), "worker frozen")
        assert still(control, 0.05)
        gate.thaw()
        assert moves(control)


def test_a_dead_worker_is_no_trouble(children: Children, control: ControlPage) -> None:
    child = children.worker()
    gate = ProcessGate(control, child.pid)
    gate.freeze()
    child.kill()
    for wait in (lambda: None, child.wait):  # a zombie first, then gone for good
        wait()
        gate.freeze()
        gate.wait_stopped(1.0)
        gate.thaw()
    assert child.returncode == -signal.SIGKILL


def test_a_frozen_worker_can_be_killed(children: Children, control: ControlPage) -> None:
    child = children.worker()
    ProcessGate(control, child.pid).freeze()
    child.kill()
    assert child.wait() == -signal.SIGKILL


def test_a_gate_gives_its_descriptor_back(children: Children, control: ControlPage) -> None:
    child = children.worker()
    gc.collect()  # of what other tests left
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        ProcessGate(control, child.pid).thaw()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
