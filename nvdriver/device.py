"""The seam to the machine: one open control node (`DeviceFile`) and the process that holds it (`Host`).

Everything that touches a file, a process or a clock goes through these three protocols, so `fake.py` can answer in
their place. There is no mmap here, on purpose: nothing this package does needs a register or a doorbell, and what
cannot be mapped cannot be written.
"""

import ctypes
import errno
import fcntl
import os
import re
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from nvdriver import abi
from nvdriver.errors import NoDevice, from_os_error


class Clock(Protocol):
    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class DeviceFile(Protocol):
    """One descriptor of the control node. The driver knows a caller by the open file behind it, not by its pid."""

    def fileno(self) -> int: ...

    def ioctl(self, request: int, record: ctypes.Structure) -> None:
        """Run one ioctl; `record` is read and written in place. Raises OSError."""

    def duplicate(self) -> "DeviceFile":
        """Another descriptor of the same open file; the driver frees its clients when the last one closes."""

    def close(self) -> None: ...


class Peer(Protocol):
    """Another process, held by a handle that a reused pid cannot fool."""

    def is_alive(self) -> bool: ...

    def close(self) -> None: ...


class Host(Protocol):
    """The machine as this one process sees it."""

    def pid(self) -> int: ...

    def uid(self) -> int: ...

    def version_text(self) -> str:
        """What the kernel module says about itself, or "" where it says nothing."""

    def open_control(self) -> DeviceFile: ...

    def own_control_files(self) -> list[DeviceFile]:
        """A duplicate of each descriptor this process itself holds on the control node. Never another process's."""

    def peer(self, pid: int) -> Peer: ...


class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()  # noqa: TID251 - this package knows nobody, the engine's clock included

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class LinuxFile:
    """A real descriptor. fcntl.ioctl releases the interpreter lock for the length of the call."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def ioctl(self, request: int, record: ctypes.Structure) -> None:
        if self._fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        fcntl.ioctl(self._fd, request, record, True)

    def duplicate(self) -> "LinuxFile":
        return LinuxFile(fcntl.fcntl(self._fd, fcntl.F_DUPFD_CLOEXEC, 0))

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class LinuxPeer:
    def __init__(self, pid: int) -> None:
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._pidfd = -1

    def is_alive(self) -> bool:
        if self._pidfd < 0:
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)


class LinuxHost:
    """This process, on Linux. The paths are arguments so that a test can point them elsewhere."""

    def __init__(self, node: str = abi.CONTROL_NODE, version_file: str = abi.VERSION_FILE) -> None:
        self._node = node
        self._version_file = Path(version_file)

    def pid(self) -> int:
        return os.getpid()

    def uid(self) -> int:
        return os.geteuid()

    def version_text(self) -> str:
        try:
            return self._version_file.read_text()
        except OSError:
            return ""

    def open_control(self) -> DeviceFile:
        try:
            return LinuxFile(os.open(self._node, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise from_os_error(error, f"open {self._node}") from error

    def own_control_files(self) -> list[DeviceFile]:
        try:
            node = os.stat(self._node)
        except OSError as error:
            raise from_os_error(error, f"find {self._node}") from error
        return [LinuxFile(fd) for fd in _duplicates(lambda found: os.path.samestat(found, node))]

    def peer(self, pid: int) -> Peer:
        return LinuxPeer(pid)


def _duplicates(wanted: Callable[[os.stat_result], bool]) -> list[int]:
    """Duplicate each own descriptor whose file is wanted. Another thread may close one while we look: skip it."""
    found: list[int] = []
    for name in os.listdir("/proc/self/fd"):
        if int(name) in found:  # the number that listing the folder had taken, free again and given to a duplicate
            continue
        try:
            fd = fcntl.fcntl(int(name), fcntl.F_DUPFD_CLOEXEC, 0)
        except OSError:
            continue
        if wanted(os.fstat(fd)):  # asked of the duplicate: its number cannot be reused under us
            found.append(fd)
        else:
            os.close(fd)
    return found


def release_of(version_text: str) -> str:
    """The release in the text of the version file, as in "... Kernel Module  580.95.05  Release Build ..."."""
    match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", version_text)
    if match is None:
        raise NoDevice(f"{abi.VERSION_FILE} names no driver release: check that the NVIDIA kernel module is loaded")
    return match.group(1)
