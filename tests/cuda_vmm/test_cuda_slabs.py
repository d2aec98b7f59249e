"""Slabs that change hands between two processes' windows: never in both, never a hole under a kernel, never a lost byte."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest
from fake_vmm import GRAIN, FakeDevice, FakeVmm
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.colocate.control import ControlPage, Word
from engine.colocate.cuda_slabs import OfflineWindow, OnlineWindow
from engine.memory.cuda_vmm import CudaWindow, receive
from engine.memory.slabs import SlabPool
from engine.memory.window import Window
from engine.types import Tenant

SLABS = 3


class Polled:
    """A clock that does something whenever it is read, as others do while one waits."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self._meanwhile = meanwhile
        self._reads = 0

    def now(self) -> float:
        self._reads += 1
        self._meanwhile()
        return self._reads * 0.01


class Two:
    """Both processes on one GPU, with kernels that touch everything they may know, after every single driver call.

    The worker's kernels are in flight from `launch` to `drain`, and run unless frozen; they touch its whole window. Online's
    are in flight likewise and touch what is mapped there.
    """

    def __init__(self) -> None:
        self.device = FakeDevice()
        self.control = ControlPage(SLABS)
        self.control.beat()
        self.slabs = SlabPool(SLABS, self.control.publish_slab)
        self.frozen = False
        self.ended = 0
        self.agent_lives = True
        self.main = FakeVmm(self.device)
        self.main_window = CudaWindow(SLABS, GRAIN, self.main)
        self.known: set[int] = set()
        self.flying: set[int] = set()  # what online's kernels in flight touch
        self.online = OnlineWindow(self.main_window, self.control, self.drain_online, self.end_worker, Polled(self.agent_look))
        self.start_worker()
        self.main.kernel = self.online_kernel

    def start_worker(self) -> None:
        self.worker = FakeVmm(self.device)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.main_window.send(ours)
            handles = receive(theirs, SLABS, self.worker)
        self.worker_window = CudaWindow(SLABS, GRAIN, self.worker, handles)
        self.flight = False
        self.seen: set[int] = set()
        self.offline = OfflineWindow(self.worker_window, self.control, self.drain)
        self.worker.kernel = self.worker_kernel

    # -- kernels

    def worker_kernel(self) -> None:
        self.check_apart()
        if self.flight and not self.frozen:
            for slab in range(SLABS):
                self.worker.write(self.worker_window.address(slab), 666)

    def online_kernel(self) -> None:
        self.check_apart()
        for slab in self.flying:
            assert self.main.read(self.main_window.address(slab)) == 1 + slab, "offline wrote to online's memory"

    def check_apart(self) -> None:
        for handle in self.main_window._slabs:
            assert len(self.main.handles[handle].mappers) <= 1, "a slab is mapped in both processes"

    def drain(self) -> None:
        assert not self.frozen or not self.flight, "the engine's thread would wait for a frozen device"
        self.worker_kernel()
        self.flight = False

    def drain_online(self) -> None:
        self.online_kernel()
        self.flying = set()

    # -- who does what

    def agent_look(self) -> None:
        if self.frozen and self.agent_lives and self.offline.is_behind:
            self.offline.let_go()
        elif not self.frozen and self.agent_lives and self.offline.is_behind:
            self.offline.drain_and_let_go()

    def engine_sync(self) -> None:
        """What `worker.SlabWatch` does between two steps."""
        if self.frozen and self.flight:
            return
        if self.offline.is_behind:
            self.offline.drain_and_let_go()
        for slab in range(SLABS):
            owner, _ = self.control.slab(slab)
            if owner is not Tenant.OFFLINE and slab in self.seen:
                self.offline.unmap(slab)
                self.seen.discard(slab)
            elif owner is Tenant.OFFLINE and slab not in self.seen:
                self.offline.map(slab)
                self.seen.add(slab)

    def end_worker(self) -> None:
        self.ended += 1
        self.worker.die()

    def take(self, slab: int) -> None:
        if self.slabs.owner(slab) is Tenant.OFFLINE:
            self.slabs.transfer([slab], Tenant.ONLINE)
            self.online.map(slab)
            self.main.write(self.main_window.address(slab), 1 + slab)
            self.known.add(slab)

    def give(self, slab: int) -> None:
        if self.slabs.owner(slab) is Tenant.ONLINE:
            self.known.discard(slab)
            self.online.unmap(slab)
            self.slabs.transfer([slab], Tenant.OFFLINE)

    def do(self, what: str, slab: int) -> None:
        match what:
            case "take":
                self.take(slab)
            case "give":
                self.give(slab)
            case "freeze":
                self.frozen = True
            case "thaw":
                self.agent_look()
                self.frozen = False
            case "launch":
                self.flight, self.flying = True, set(self.known)
            case "sync":
                self.engine_sync()
            case "restart":
                self.worker.die()
                self.online.worker_ended()
                self.start_worker()

    def close(self) -> None:
        self.frozen = self.flight = False
        self.worker_kernel()
        self.worker.kernel = self.main.kernel = lambda: None
        if not self.worker.is_clean:
            self.offline.close()
        self.online.close()
        self.control.close()
        assert self.worker.is_clean and self.main.is_clean and self.device.used == 0


@pytest.fixture
def two() -> Iterator[Two]:
    made = Two()
    yield made
    made.close()


MOVES = st.tuples(st.sampled_from(["take", "give", "freeze", "thaw", "launch", "sync", "restart"]), st.integers(0, SLABS - 1))


@settings(max_examples=150, deadline=None)
@given(st.lists(MOVES, max_size=40))
def test_whatever_happens_memory_is_nobodys_twice_and_nowhere_missing(moves: list[tuple[str, int]]) -> None:
    two = Two()
    made = two.device.created
    restarts = sum(what == "restart" for what, _ in moves)
    for what, slab in moves:
        two.do(what, slab)
        two.worker_kernel()
        two.online_kernel()
        for address in range(SLABS):
            two.worker.read(two.worker_window.address(address))
            found = two.main.read(two.main_window.address(address))
            assert found == 1 + address or address not in two.known, "offline wrote to online's memory"
    assert not two.ended, "nobody was stuck"
    assert two.device.created == made + restarts, "a window's sink is all that is ever created later"
    two.close()


def test_freeze_remap_map_thaw(two: Two) -> None:
    """A kernel cut in mid-layer goes on in the sink: it faults nowhere, and online's bytes are as online left them."""
    two.engine_sync()
    two.do("launch", 0)
    two.worker_kernel()
    two.do("freeze", 0)
    calls = len(two.worker.calls)
    two.take(1)
    assert two.worker.calls[calls:] == ["unmap", "map", "set_access"]
    two.do("thaw", 0)
    two.worker_kernel()
    assert two.main.read(two.main_window.address(1)) == 2
    assert two.worker.read(two.worker_window.address(1)) == 666
    assert two.worker.at(two.worker_window.address(1))[0] is two.worker.handles[two.worker_window._sink]  # type: ignore[index]


def test_remapping_under_a_running_kernel_is_caught(two: Two) -> None:
    """So that the tests above can fail."""
    two.engine_sync()
    two.do("launch", 0)
    two.slabs.transfer([1], Tenant.ONLINE)
    with pytest.raises(AssertionError, match="fault: nothing mapped"):
        two.offline.let_go()
    two.worker.die()


def test_mapping_before_the_worker_let_go_is_caught() -> None:
    two = Two()
    two.engine_sync()
    two.slabs.transfer([1], Tenant.ONLINE)
    with pytest.raises(AssertionError, match="mapped in both"):
        two.main_window.map(1)
    two.control.close()


def test_a_slab_that_is_lost_between_two_looks_is_not_mapped(two: Two) -> None:
    """The engine's thread read "offline" just before main took the slab."""
    two.slabs.transfer([2], Tenant.ONLINE)
    two.offline.let_go()
    two.offline.map(2)
    assert not two.worker_window.is_mapped(2)
    two.online.map(2)


def test_a_step_that_has_lost_its_slab_runs_out_before_the_slab_goes(two: Two) -> None:
    """Where nothing froze it: the engine's thread sees the loss between two steps, and looks at nothing else first."""
    two.engine_sync()
    two.do("launch", 0)
    two.slabs.transfer([1], Tenant.ONLINE)
    two.offline.unmap(1)
    assert not two.worker_window.is_mapped(1)
    two.online.map(1)


def test_a_slab_that_went_and_came_back_can_be_mapped_again(two: Two) -> None:
    two.engine_sync()
    two.take(0)
    two.give(0)
    two.offline.unmap(0)  # as one does that sees a new epoch
    two.offline.map(0)
    assert two.worker_window.is_mapped(0)
    two.offline.map(0)


def test_nobody_waits_for_a_worker_that_has_mapped_nothing() -> None:
    two = Two()
    two.worker.die()
    two.online.worker_ended()
    two.agent_lives = False
    two.take(0)
    assert not two.ended
    two.close()


def test_a_stuck_worker_is_ended_and_online_gets_its_memory(two: Two, caplog: pytest.LogCaptureFixture) -> None:
    two.engine_sync()
    two.do("freeze", 0)
    two.agent_lives = False
    two.take(0)
    two.take(1)
    assert two.ended == 1, "once is enough"
    assert two.control[Word.LET_GO] == 0
    assert two.main_window.is_mapped(0) and two.main_window.is_mapped(1)
    assert "ending it" in caplog.text


def test_both_are_windows(two: Two) -> None:
    windows: list[Window] = [two.online, two.offline]
    for window in windows:
        assert (window.num_slabs, window.slab_bytes) == (SLABS, GRAIN)
