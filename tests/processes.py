"""Real child processes around a control page, and waiting for what they do."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from engine.colocate.control import ControlPage, Word

HERE = Path(__file__).parent
PATIENCE = 60.0  # seconds; only a failing test waits that long


def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait until it is true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.005)


def moves(control: ControlPage) -> bool:
    """Whether the worker makes progress before long."""
    before = control[Word.PROGRESS]
    deadline = time.monotonic() + PATIENCE
    while control[Word.PROGRESS] == before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def still(control: ControlPage, seconds: float = 0.03) -> bool:
    """Whether the worker makes no progress for that long."""
    before = control[Word.PROGRESS]
    time.sleep(seconds)
    return control[Word.PROGRESS] == before


class Watched:
    """Any process on this machine, known by a pidfd: asking for its end never meets another one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    @property
    def gone(self) -> bool:
        return bool(select.select([self._fd], [], [], 0)[0])

    @property
    def status(self) -> dict[str, str]:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {key: value.strip() for key, value in (line.split(":", 1) for line in lines)}

    def close(self) -> None:
        os.close(self._fd)


class Children:
    """Starts processes and sees to it that none is left."""

    def __init__(self, control: ControlPage) -> None:
        self._control = control
        self._started: list[subprocess.Popen[str]] = []
        self._watched: list[Watched] = []

    def toy(self, script: str, *arguments: object, stdin: int | IO[str] = subprocess.DEVNULL) -> subprocess.Popen[str]:
        control = self._control
        child = subprocess.Popen(
            [sys.executable, str(HERE / "colocate" / script), str(control.fd), str(control.num_slabs), *map(str, arguments)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[control.fd],
            env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        )
        self._started.append(child)
        return child

    def worker(self, mode: str = "spin", tag: int = 0) -> subprocess.Popen[str]:
        return self.toy("toy_worker.py", mode, tag)

    def watch(self, pid: int) -> Watched:
        watched = Watched(pid)
        self._watched.append(watched)
        return watched

    def close(self) -> None:
        for child in self._started:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()
        for watched in self._watched:
            eventually(lambda watched=watched: watched.gone, f"end of process {watched.pid}")
            watched.close()
