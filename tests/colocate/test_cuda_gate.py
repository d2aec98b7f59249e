"""The GPU's rungs on a fake driver and a fake stream: what stops the device, who lets it go on, and when memory may move."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_cuda import CHANNELS, FakeChannels, FakeStream, Machine, Spinning, beating, silence
from processes import eventually

from engine.colocate.control import ControlPage, Word
from engine.colocate.cuda_gate import (
    Agent,
    AgentGate,
    GrantedGate,
    StreamBarrier,
    StreamGate,
    open_channels,
    open_granted,
)
from engine.colocate.gate import Freeze, Gate, LayerGate, probe, rungs
from engine.errors import InvalidConfig
from nvdriver.abi import Command
from nvdriver.errors import Status
from nvdriver.fake import Injection


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.driver.injections.clear()
    for gate in made.gates:
        gate.close()


@pytest.fixture
def stream() -> FakeStream:
    return FakeStream()


# -- the stream rung


def test_a_closed_barrier_holds_what_is_queued_behind_it(stream: FakeStream) -> None:
    barrier = StreamBarrier(stream)
    for _ in range(3):
        barrier.put(7)
        stream.work()
    barrier.set(True)
    stream.run()
    assert stream.done == 0
    barrier.set(False)
    stream.run()
    assert stream.done == 3


def test_a_barrier_stops_a_graph_at_its_next_layer(stream: FakeStream) -> None:
    """Captured once, replayed: the wait looks at the word each time, not at what it was when captured."""
    barrier = StreamBarrier(stream)
    stream.capturing = graph = []
    for layer in range(4):
        barrier.put(7)
        stream.work()
        if layer == 1:
            stream.add(lambda: barrier.set(True) or True)  # frozen from outside while the second layer runs
    stream.capturing = None
    for replay in (1, 2):
        barrier.set(False)
        stream.queue += graph
        stream.run()
        assert stream.done == 4 * replay - 2, "the layer that runs is the last"
        barrier.set(False)
        stream.run()
        assert stream.done == 4 * replay


def test_draining_lets_out_what_was_launched_and_closes_again(stream: FakeStream) -> None:
    barrier = StreamBarrier(stream)
    barrier.set(True)
    barrier.put(7)
    stream.work()
    barrier.drain(stream.synchronize)
    assert stream.done == 1 and stream.word.value == 1

    def opened_meanwhile() -> None:
        barrier.set(True)  # as an agent does that looks now
        assert stream.word.value == 0, "not closed under the one that drains"
        barrier.set(False)

    barrier.drain(opened_meanwhile)
    assert stream.word.value == 0
    barrier.set(True)
    with pytest.raises(ZeroDivisionError):
        barrier.drain(lambda: 1 / 0)
    assert stream.word.value == 1


def test_only_the_stream_rung_closes_the_barrier(stream: FakeStream, control: ControlPage) -> None:
    """Otherwise a probe of another rung would show what this one does."""
    agent = Agent(control, StreamBarrier(stream))
    control.beat()
    for frozen in Freeze:
        control[Word.FROZEN] = frozen
        agent.look()
        assert stream.word.value == (frozen is Freeze.STREAM)


# -- the channel rung


def test_the_agent_switches_the_channels_and_says_so(machine: Machine, stream: FakeStream, control: ControlPage) -> None:
    agent, gate = Agent(control, StreamBarrier(stream), machine.guard(control)), AgentGate(control)
    control.beat()
    for _ in range(3):
        gate.freeze()
        gate.freeze()
        for _ in range(3):
            agent.look()
        assert machine.num_off == CHANNELS and control[Word.HELD] == 1
        gate.wait_stopped(60.0)
        gate.thaw()
        agent.look()
        assert machine.num_off == 0 and control[Word.HELD] == 0
    calls = [command for _, command in machine.driver.calls if command == Command.FIFO_DISABLE_CHANNELS]
    assert len(calls) == 1 + 2 * 3, "one call when opening, then one a change"


def test_a_new_worker_does_not_inherit_what_the_dead_one_said(stream: FakeStream, control: ControlPage) -> None:
    control[Word.HELD] = 1
    Agent(control, StreamBarrier(stream))
    assert control[Word.HELD] == 0


def test_waiting_for_an_agent_that_does_not_come_ends(control: ControlPage) -> None:
    gate = AgentGate(control)
    gate.freeze()
    gate.wait_stopped(0.001)


@pytest.mark.parametrize("rung", ["channel", "stream"])
def test_a_silent_main_process_holds_nobody(rung: str, machine: Machine, stream: FakeStream, control: ControlPage) -> None:
    gate: Gate = AgentGate(control) if rung == "channel" else StreamGate(control)
    agent = Agent(control, StreamBarrier(stream), machine.guard(control))
    control.beat()
    gate.freeze()
    agent.look()
    assert (machine.num_off or stream.word.value) and control[Word.FROZEN]
    silence(control)
    agent.look()
    assert machine.num_off == 0 and stream.word.value == 0 and control[Word.HELD] == 0
    control.beat()
    agent.look()
    assert machine.num_off or stream.word.value, "it only stalled, and still wants the worker to stand still"


def test_a_dead_agent_leaves_it_to_the_watchdog(machine: Machine, stream: FakeStream, control: ControlPage) -> None:
    channels = machine.guard(control)
    agent = Agent(control, StreamBarrier(stream), channels)
    control.beat()
    AgentGate(control).freeze()
    agent.look()
    assert machine.num_off == CHANNELS
    machine.lapse(channels)  # nobody beats, nobody looks
    assert machine.num_off == 0
    control.beat()
    agent.look()
    assert machine.num_off == CHANNELS and control[Word.HELD] == 1, "an agent that was only late makes it good"


def test_a_refused_call_is_survived_and_tried_again(
    machine: Machine, stream: FakeStream, control: ControlPage, caplog: pytest.LogCaptureFixture
) -> None:
    agent, gate = Agent(control, StreamBarrier(stream), machine.guard(control)), AgentGate(control)
    control.beat()
    machine.driver.injections.append(
        Injection(status=Status.TIMEOUT, command=Command.FIFO_DISABLE_CHANNELS, times=2, applied=3)
    )
    gate.freeze()
    agent.look()
    assert control[Word.HELD] == 0 and machine.num_off == 0, "half a freeze is undone"
    machine.driver.injections.append(Injection(status=Status.TIMEOUT, command=Command.FIFO_DISABLE_CHANNELS, times=-1))
    for _ in range(200):
        agent.look()
    assert caplog.text.count("could not switch the channels off") < 20, "it does not ask, or complain, at every look"
    machine.driver.injections.clear()

    def seen(condition: Callable[[], bool]) -> Callable[[], bool]:
        return lambda: (agent.look(), control.beat(), condition())[2]

    eventually(seen(lambda: control[Word.HELD] == 1 and machine.num_off == CHANNELS), "another try")
    machine.driver.injections.append(Injection(status=Status.TIMEOUT, command=Command.FIFO_DISABLE_CHANNELS, times=2))
    gate.thaw()
    eventually(seen(lambda: machine.num_off == 0), "thaw")


def test_closing_the_agent_lets_the_device_run(machine: Machine, stream: FakeStream, control: ControlPage) -> None:
    for gate in (AgentGate(control), StreamGate(control)):
        agent = Agent(control, StreamBarrier(stream), machine.guard(control))
        agent.start()
        control.beat()
        gate.freeze()
        eventually(lambda: machine.num_off or stream.word.value, "freeze")
        agent.close()
        assert machine.num_off == 0 and stream.word.value == 0 and control[Word.HELD] == 0


# -- the probe


@pytest.mark.parametrize(
    ("rung", "trouble", "works"),
    [
        ("channel", "", True),
        ("channel", "lies", False),
        ("channel", "fails", False),
        ("channel", "missing", False),
        ("granted", "", True),
        ("granted", "lies", False),
        ("granted", "fails", False),
        ("stream", "", True),
        ("stream", "lies", False),
        ("stream", "missing", True),
        ("layer", "missing", True),
    ],
)
def test_probe_believes_what_stands_still(rung: str, trouble: str, works: bool, machine: Machine, control: ControlPage) -> None:
    channels = None if trouble == "missing" else machine.guard(control)
    device = FakeChannels(machine)
    gate: Gate
    if rung == "granted":
        assert channels is not None
        gate = GrantedGate(control, machine.granted(channels))
    else:
        gate = {"channel": AgentGate, "stream": StreamGate, "layer": LayerGate}[rung](control)
    device.obeys = machine.driver.is_honest = trouble != "lies"
    if trouble == "fails":
        failure = Injection(status=Status.NOT_SUPPORTED, command=Command.FIFO_DISABLE_CHANNELS, times=-1)
        machine.driver.injections.append(failure)
    end = beating(control)
    with Spinning(control, device, channels):
        result = probe(gate, control, trials=3)
    end()
    assert result.works is works, str(result)
    assert machine.num_off == 0 and control[Word.FROZEN] == 0


# -- main, on descriptors it was granted


def test_main_freezes_without_the_workers_help(machine: Machine, control: ControlPage) -> None:
    gate = GrantedGate(control, machine.granted(machine.guard(control)))
    gate.freeze()
    assert machine.num_off == CHANNELS and control[Word.FROZEN] == Freeze.HELD_BY_MAIN
    gate.freeze()
    assert control[Word.FROZEN] == Freeze.HELD_BY_MAIN, "only renewed"
    gate.thaw()
    gate.thaw()
    assert machine.num_off == 0 and control[Word.FROZEN] == Freeze.NO
    gate.freeze()
    assert control[Word.FROZEN] == Freeze.HELD_BY_MAIN + 1, "every hold has a number of its own"
    gate.close()
    assert machine.num_off == 0


def test_repeating_the_freeze_keeps_the_lease_and_mends_a_lapsed_one(machine: Machine, control: ControlPage) -> None:
    channels = machine.granted(machine.guard(control))
    gate = GrantedGate(control, channels)
    gate.freeze()
    for _ in range(5):
        machine.driver.clock.sleep(0.6)
        gate.freeze()
        channels.check_lease()
        assert machine.num_off == CHANNELS and control[Word.FROZEN] == Freeze.HELD_BY_MAIN
    machine.driver.clock.sleep(3.0)
    channels.check_lease()
    assert machine.num_off == 0
    gate.freeze()
    assert machine.num_off == CHANNELS and control[Word.FROZEN] == Freeze.HELD_BY_MAIN + 1


def test_main_survives_a_driver_that_refuses(machine: Machine, control: ControlPage, caplog: pytest.LogCaptureFixture) -> None:
    gate = GrantedGate(control, machine.granted(machine.guard(control)))
    failure = Injection(status=Status.GPU_IS_LOST, command=Command.FIFO_DISABLE_CHANNELS)
    machine.driver.injections.append(failure)
    gate.freeze()
    assert control[Word.FROZEN] == Freeze.BY_MAIN, "the worker's processor stops; its memory stays where it is"
    gate.freeze()
    gate.thaw()
    assert control[Word.FROZEN] == Freeze.NO
    assert "restart the worker" in caplog.text


def test_what_is_no_grant_is_refused_in_words(control: ControlPage) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.send(b"hello")
        with pytest.raises(InvalidConfig, match="no channel gate: not a grant"):
            open_granted(control, theirs)


# -- choosing


def test_rungs_of_a_device() -> None:
    assert rungs("auto", "cuda") == ("channel", "stream", "layer", "none")
    assert rungs("auto", "cpu") == rungs("auto", "auto") == ("process", "layer", "none")
    assert rungs("stream", "cuda") == ("stream",)
    with pytest.raises(InvalidConfig, match="a GPU goes on when its process is stopped"):
        rungs("process", "cuda")
    with pytest.raises(InvalidConfig, match="--gate channel is not for the device cpu; choose one of auto, process"):
        rungs("channel", "cpu")


def test_mps_is_refused_in_words(
    control: ControlPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "control").touch()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert open_channels(control) is None
    assert "no channel gate: an MPS daemon serves" in caplog.text
