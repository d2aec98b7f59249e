"""Guardian: a third process that keeps the offline worker from being frozen, or left running, by a main process that is gone.

A frozen worker cannot look after itself. The guardian can: it never computes, holds no lock and no memory but the control page,
and knows the worker by a pidfd, so it can never hit another process that got the worker's number. It does two things:

* when its life line closes (the main process ended, even by SIGKILL) it kills the worker and ends;
* while the worker is meant to stand still (`Word.FROZEN`) and the main process has given no sign of life within the lease, it
  continues the worker and counts a rescue.

`Guardian` is the main process's side: it starts this file as a process, and starts it again should it die.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from engine.colocate.control import LEASE_SECONDS, ControlPage, Word

_LOOK_MS = LEASE_SECONDS * 1e3 / 4
_DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # it ends with the main process, not before


class Guardian:
    """The guardian process as the main process sees it. Any thread may call.

    The main process calls `check` every tenth of a lease or so, from a thread that little else can hold up.
    """

    def __init__(self, control: ControlPage) -> None:
        self._control = control
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._life_line: socket.socket | None = None
        self._worker: int | None = None  # pidfd
        self._rescues = control[Word.RESCUES]
        self._started = 0.0

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process; it is on guard from a fraction of a second later. Raises OSError if the system refuses it."""
        with self._lock:
            self._start()

    def watch(self, pid: int) -> None:
        """Guard this child from now on instead of the one before. The caller must not have waited for its end yet."""
        with self._lock:
            pidfd = os.pidfd_open(pid)
            self._forget()
            self._worker = pidfd
            self._tell()

    def check(self) -> bool:
        """Show that the main process lives, and start the guardian again if it died.

        True if the worker was continued since the last call: whoever owns the gate must then freeze it again if it should
        still stand still.
        """
        self._control.beat()
        with self._lock:
            # One that cannot stay alive is started once per lease, not at every call.
            tired = time.monotonic() - self._started > LEASE_SECONDS  # noqa: TID251
            if tired and self._process is not None and self._process.poll() is not None:
                with suppress(OSError):  # the system refuses it now; the next call tries again
                    self._start()
            rescues = self._control[Word.RESCUES]
            rescued, self._rescues = rescues != self._rescues, rescues
        return rescued

    def close(self) -> None:
        """Close the life line: the guardian kills the worker if it still lives, and ends. May be repeated."""
        with self._lock:
            if self._life_line is not None:
                self._life_line.close()
                self._life_line = None
            if self._process is not None:
                self._process.wait()
                self._process = None
            self._forget()

    def _start(self) -> None:
        if self._life_line is not None:
            self._life_line.close()
        self._started = time.monotonic()  # noqa: TID251
        self._control.beat()
        self._life_line, theirs = socket.socketpair()
        with theirs:
            arguments = (self._control.fd, self._control.num_slabs, theirs.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-m", "engine.colocate.guardian", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(self._control.fd, theirs.fileno()),
                cwd=Path(__file__).parents[2],  # `-m` finds the package there, wherever the main process was started
                start_new_session=True,  # out of reach of the terminal's ^C
            )
        self._tell()

    def _tell(self) -> None:
        if self._life_line is not None and self._worker is not None:
            # If the guardian has died, `check` starts another and tells that one.
            with suppress(BrokenPipeError, ConnectionResetError):
                socket.send_fds(self._life_line, [b"w"], [self._worker])

    def _forget(self) -> None:
        if self._worker is not None:
            os.close(self._worker)
            self._worker = None


def guard(control: ControlPage, life_line: socket.socket) -> None:
    """The guardian's whole life. Returns when the life line is closed and the worker killed."""
    worker: int | None = None  # pidfd
    rescuing = False
    poll = select.poll()
    poll.register(life_line, select.POLLIN)
    while True:
        if poll.poll(_LOOK_MS):
            data, pidfds, _, _ = socket.recv_fds(life_line, 1, 1)
            if not data:
                break
            if worker is not None:
                os.close(worker)
            worker = pidfds[0]
        abandoned = worker is not None and control[Word.FROZEN] != 0 and not control.main_is_alive()
        if worker is not None and abandoned:
            # Again at each look: the main process may have been stopped just before a SIGSTOP that it sends when it goes on.
            _send(worker, signal.SIGCONT)
            # Counted after the signal, so that a main process that sees the count freezes again with nothing still to come.
            if not rescuing:
                control[Word.RESCUES] += 1
        rescuing = abandoned
    if worker is not None:
        _send(worker, signal.SIGKILL)


def _send(worker: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it died by itself
        signal.pidfd_send_signal(worker, number)


def main(arguments: list[str]) -> None:
    control_fd, num_slabs, life_line_fd = map(int, arguments)
    for number in _DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=life_line_fd) as life_line:
        guard(ControlPage(num_slabs, control_fd), life_line)


if __name__ == "__main__":
    main(sys.argv[1:])
