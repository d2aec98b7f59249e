"""The guardian with real processes: mains that are killed and stopped, workers that die, numbers that are used again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import Children, Watched, eventually, moves, still

from engine.colocate.control import LEASE_SECONDS, ControlPage, Word
from engine.colocate.gate import ProcessGate
from engine.colocate.guardian import Guardian


class Family(NamedTuple):
    main: subprocess.Popen[str]
    worker: Watched
    guardian: Watched

    def tell(self, command: str) -> None:
        assert self.main.stdin is not None and self.main.stdout is not None
        print(command, file=self.main.stdin, flush=True)
        assert self.main.stdout.readline() == "done\n"


@pytest.fixture
def family(children: Children, control: ControlPage) -> Family:
    """A main process, its worker and its guardian, all of them up."""
    main = children.toy("toy_main.py", stdin=subprocess.PIPE)
    assert main.stdout is not None
    worker, guardian = map(int, main.stdout.readline().split())
    assert moves(control)
    return Family(main, children.watch(worker), children.watch(guardian))


@pytest.fixture
def guardian(control: ControlPage) -> Iterator[Guardian]:
    guardian = Guardian(control)
    guardian.start()
    yield guardian
    guardian.close()


def is_another(guardian: Guardian, dead: Watched) -> bool:
    """Whether a guardian lives after the `dead` one. Its number says nothing: it may be the number of the dead one again."""
    if not dead.gone:
        return False
    guardian.check()
    assert guardian.pid is not None
    now = Watched(guardian.pid)  # of the dead one, if nobody was started yet: that is gone
    try:
        return not now.gone
    finally:
        now.close()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_death_of_main_is_the_death_of_its_worker(family: Family, frozen: bool) -> None:
    if frozen:
        family.tell("freeze")
        eventually(lambda: family.worker.status["State"].startswith("T"), "worker stopped")
    family.main.kill()
    eventually(lambda: family.worker.gone, "death of the worker")
    eventually(lambda: family.guardian.gone, "end of the guardian")


def test_the_death_of_a_stopped_main_is_the_death_of_its_worker(family: Family) -> None:
    family.tell("freeze")
    family.main.send_signal(signal.SIGSTOP)
    family.main.kill()
    eventually(lambda: family.worker.gone, "death of the worker")
    eventually(lambda: family.guardian.gone, "end of the guardian")


def test_a_main_killed_before_the_guardian_is_up_takes_the_worker_along(children: Children) -> None:
    main = children.toy("toy_main.py", stdin=subprocess.PIPE)
    assert main.stdout is not None
    pids = main.stdout.readline().split()  # printed long before the guardian has loaded its code
    watched = [children.watch(int(pid)) for pid in pids]
    main.kill()
    for process in watched:
        eventually(lambda process=process: process.gone, "end of worker and guardian")


def test_a_stopped_main_loses_its_frozen_worker_and_gets_it_back(family: Family, control: ControlPage) -> None:
    for episode in (1, 2):
        family.tell("freeze")
        assert still(control)
        family.main.send_signal(signal.SIGSTOP)
        eventually(lambda: not still(control), "worker thawed by the guardian")
        eventually(lambda episode=episode: control[Word.RESCUES] == episode, "rescue counted")
        time.sleep(LEASE_SECONDS)  # many more looks of the guardian at the same episode
        assert control[Word.RESCUES] == episode
        family.main.send_signal(signal.SIGCONT)
        eventually(lambda: still(control), "worker frozen again by its owner")
        family.tell("thaw")
        assert moves(control)
    assert control[Word.RESCUES] == 2


def test_a_stop_that_main_sends_late_is_undone_as_well(family: Family, control: ControlPage) -> None:
    family.tell("freeze")
    family.main.send_signal(signal.SIGSTOP)
    eventually(lambda: control[Word.RESCUES] == 1, "first rescue")
    os.kill(family.worker.pid, signal.SIGSTOP)  # main went on for an instant, and was stopped again before its next beat
    eventually(lambda: not still(control), "worker thawed again")
    assert control[Word.RESCUES] == 1, "one episode, one rescue"


def test_a_stopped_main_without_a_frozen_worker_is_left_alone(family: Family, control: ControlPage) -> None:
    family.main.send_signal(signal.SIGSTOP)
    time.sleep(LEASE_SECONDS * 1.5)
    assert control[Word.RESCUES] == 0
    assert moves(control)


def test_a_long_freeze_by_a_living_main_is_left_alone(family: Family, control: ControlPage) -> None:
    family.tell("freeze")
    assert still(control, LEASE_SECONDS * 1.5)
    assert control[Word.RESCUES] == 0


def test_a_killed_guardian_is_started_again_and_knows_the_worker(
    children: Children, control: ControlPage, guardian: Guardian
) -> None:
    worker = children.worker()
    assert moves(control)
    guardian.watch(worker.pid)
    assert guardian.pid is not None
    first = children.watch(guardian.pid)
    os.kill(first.pid, signal.SIGKILL)
    eventually(lambda: is_another(guardian, first), "another guardian")
    guardian.close()
    assert worker.wait() == -signal.SIGKILL


def test_another_guardian_may_have_the_number_of_the_first(children: Children, guardian: Guardian) -> None:
    """As where many processes come and go: nothing may take the one for the other."""
    worker = children.worker()
    guardian.watch(worker.pid)
    assert guardian.pid is not None
    for _ in range(20):  # anybody may start a process in between
        first = children.watch(guardian.pid)
        os.kill(first.pid, signal.SIGKILL)
        eventually(lambda first=first: first.gone, "death of the guardian")
        time.sleep(LEASE_SECONDS)  # before that nobody is started again
        if not next_pid(first.pid):
            pytest.skip("process numbers cannot be chosen here")
        eventually(lambda first=first: is_another(guardian, first), "another guardian")
        if guardian.pid == first.pid:
            break
    guardian.close()
    assert worker.wait() == -signal.SIGKILL


def test_watch_outlives_a_guardian_that_just_died(children: Children, guardian: Guardian) -> None:
    assert guardian.pid is not None
    dead = children.watch(guardian.pid)
    os.kill(dead.pid, signal.SIGKILL)
    eventually(lambda: dead.gone, "death of the guardian")
    worker = children.worker()
    guardian.watch(worker.pid)  # there is nobody to be told: whoever comes next will be
    eventually(lambda: is_another(guardian, dead), "another guardian")
    guardian.close()
    assert worker.wait() == -signal.SIGKILL


def test_only_the_last_worker_told_of_is_touched(children: Children, control: ControlPage, guardian: Guardian) -> None:
    before, now = children.worker("deaf"), children.worker("deaf")
    guardian.watch(before.pid)
    guardian.watch(now.pid)
    guardian.close()
    assert now.wait() == -signal.SIGKILL
    assert before.poll() is None
    assert moves(control)


def test_it_survives_the_death_of_its_worker(children: Children, control: ControlPage, guardian: Guardian) -> None:
    first = guardian.pid
    worker = children.worker()
    guardian.watch(worker.pid)
    worker.kill()
    worker.wait()
    control[Word.FROZEN] = 1  # and no sign of life from here: it has a dead worker to thaw
    eventually(lambda: control[Word.RESCUES] == 1, "an attempt at a rescue")
    control[Word.FROZEN] = 0
    assert guardian.check(), "the owner of the gate is told"
    assert not guardian.check(), "once"
    assert guardian.pid == first
    another = children.worker()
    guardian.watch(another.pid)
    guardian.close()
    assert another.wait() == -signal.SIGKILL


def test_it_is_deaf_to_polite_signals(children: Children, guardian: Guardian) -> None:
    assert guardian.pid is not None
    process = children.watch(guardian.pid)
    wanted = sum(1 << number - 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    eventually(lambda: int(process.status["SigIgn"], 16) & wanted == wanted, "signals ignored")
    worker = children.worker()
    guardian.watch(worker.pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(process.pid, number)
    assert os.getsid(process.pid) == process.pid, "in a session of its own, out of the terminal's reach"
    guardian.close()
    assert worker.wait() == -signal.SIGKILL, "it was there to the end"


def test_it_holds_nothing_of_mains_open(children: Children, control: ControlPage) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    guardian = Guardian(control)
    try:
        guardian.start()
        worker = children.worker()
        guardian.watch(worker.pid)
        os.close(writer)
        assert os.read(reader, 1) == b"", "nobody else holds the writing end"
        folder = Path(f"/proc/{guardian.pid}/fd")

        known = ("memfd", "socket", "pidfd")  # control page, life line, worker

        def kinds() -> set[str]:
            links = []
            for fd in folder.iterdir():
                with suppress(FileNotFoundError):  # closed since: while its code loads, files come and go
                    links += [os.readlink(fd)] if int(fd.name) > 2 else []
            return {next((kind for kind in known if kind in link), link) for link in links}

        eventually(lambda: kinds() == set(known), "nothing but these, once its code is loaded")
    finally:
        os.close(reader)
        guardian.close()


def test_closing_twice_or_without_a_worker_is_nothing(control: ControlPage) -> None:
    guardian = Guardian(control)
    guardian.close()
    guardian.start()
    guardian.close()
    guardian.close()
    assert guardian.pid is None
    assert not guardian.check(), "closed: nothing is started again"
    assert guardian.pid is None


def test_who_is_gone_already_cannot_be_watched(children: Children, guardian: Guardian) -> None:
    worker = children.worker()
    worker.kill()
    worker.wait()
    with pytest.raises(ProcessLookupError):
        guardian.watch(worker.pid)


def next_pid(pid: int) -> bool:
    """Ask the kernel to give this number to the next process. False where that is not allowed."""
    try:
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
    except OSError:
        return False
    return True


def bystander_with(pid: int) -> int | None:
    """A new child with the process number of a dead one, that waits to be killed. None if the kernel does not let us choose."""
    for _ in range(200):  # anybody may start a process in between
        if not next_pid(pid):
            return None
        child = os.fork()
        if child == 0:
            while True:
                signal.pause()
        if child == pid:
            return child
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return None


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_number_used_again_is_never_hit(children: Children, control: ControlPage, guardian: Guardian) -> None:
    worker = children.worker()
    guardian.watch(worker.pid)
    gate = ProcessGate(control, worker.pid)
    worker.kill()
    worker.wait()
    bystander = bystander_with(worker.pid)
    if bystander is None:
        pytest.skip("process numbers cannot be chosen here")
    try:
        process = children.watch(bystander)
        gate.freeze()
        assert not process.status["State"].startswith("T"), "the gate stopped a stranger"
        assert guardian.pid is not None
        first = children.watch(guardian.pid)
        os.kill(first.pid, signal.SIGKILL)
        eventually(lambda: is_another(guardian, first), "another guardian")
        guardian.close()
        assert not process.gone, "the guardian killed a stranger"
    finally:
        os.kill(bystander, signal.SIGKILL)
        os.waitpid(bystander, 0)
