"""Contenders: engines as processes that stay loaded, take turns, and stand still (SIGSTOP) while another one runs.

So that engines from different virtual environments are measured in the same minutes on the same cores, none disturbed by
another's idle spinning. Also measured: processor time used by anybody else meanwhile, because that decides whether to believe
a number.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import psutil

from bench.peers.pipe import Setup

ROOT = Path(__file__).resolve().parent.parent
LOAD_SECONDS = 900.0
CALL_SECONDS = 1800.0


class ContenderError(RuntimeError):
    """A contender did not start, answer or survive; the message has the end of what it printed."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer of a contender."""

    result: Any
    seconds: float  # measured by the contender around the work itself
    outside: float  # processor time of all others meanwhile, in cores
    stolen: float  # by the hypervisor, in cores


class Contender:
    """One driver process. Use as a context manager; it is frozen except inside `turn`."""

    def __init__(self, label: str, module: str, setup: Setup, python: str = sys.executable) -> None:
        self.label = label
        self.name = label  # the driver's own name for itself, once it is ready
        self.batch_sizes: tuple[int, ...] = ()
        self._module = module
        self._setup = setup
        self._python = python
        self._log: IO[bytes] | None = None  # its stderr
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        """Start it and wait until it has loaded. Raises ContenderError."""
        threads = str(self._setup.threads)
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [self._python, "-m", self._module, json.dumps(asdict(self._setup))],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # so that it and its children can be frozen as one group
        )
        try:
            ready = self._answer(LOAD_SECONDS)["ready"]
        except BaseException:
            self.close()
            raise
        self.name, self.batch_sizes = ready["name"], tuple(ready["batch_sizes"])
        self._signal(signal.SIGSTOP)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End it and whatever it started."""
        if self._process is None:
            return
        assert self._process.stdin and self._process.stdout and self._log
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._log.close()
        self._process = None

    def turn(self, op: str, **args: Any) -> Turn:
        """Let it do one thing while everybody else stands still. Raises ContenderError."""
        process = self._running()
        assert process.stdin
        self._signal(signal.SIGCONT)
        before, own, begin = psutil.cpu_times(), self._own_cpu(), time.perf_counter()
        try:
            process.stdin.write(json.dumps({"op": op, "args": args}) + "\n")
            process.stdin.flush()
            answer = self._answer(CALL_SECONDS)
        except OSError as error:
            raise self._failed(str(error)) from error
        wall = time.perf_counter() - begin
        after, used = psutil.cpu_times(), self._own_cpu() - own
        self._signal(signal.SIGSTOP)
        return Turn(
            result=answer["result"],
            seconds=answer["seconds"],
            outside=max(0.0, (_busy(after) - _busy(before) - used) / wall),
            stolen=(after.steal - before.steal) / wall,
        )

    def memory_mb(self) -> float:
        """Resident memory of the process tree; pages shared within it count more than once."""
        return sum(process.memory_info().rss for process in self._tree()) / 1e6

    # -- inside

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise ContenderError(f"{self.label} is not running")
        return self._process

    def _tree(self) -> list[psutil.Process]:
        top = psutil.Process(self._running().pid)
        return [top, *top.children(recursive=True)]

    def _own_cpu(self) -> float:
        total = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._running().pid, number)

    def _answer(self, timeout: float) -> dict[str, Any]:
        process = self._running()
        assert process.stdout
        if not select.select([process.stdout], [], [], timeout)[0]:
            raise self._failed(f"no answer within {timeout:g} s")
        line = process.stdout.readline()
        if not line:
            raise self._failed(f"it ended (exit status {process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._failed(answer["error"])
        return answer

    def _failed(self, reason: str) -> ContenderError:
        assert self._log
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 3000))
        said = self._log.read().decode("utf-8", "replace").strip()
        return ContenderError(f"{self.label}: {reason}\n{said}")


def _busy(times: Any) -> float:
    """Seconds of processor time that anybody used, the kernel included."""
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def outside_load(seconds: float) -> float:
    """Cores in use by anybody, over `seconds` in which the caller sleeps."""
    before = _busy(psutil.cpu_times())
    time.sleep(seconds)
    return (_busy(psutil.cpu_times()) - before) / seconds


def await_quiet(below: float, patience: float) -> float:
    """Wait until less than `below` cores are in use, for at most `patience` seconds. The last load seen."""
    end = time.perf_counter() + patience
    while (load := outside_load(0.5)) >= below and time.perf_counter() < end:
        pass
    return load
