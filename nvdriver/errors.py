"""What can go wrong between this package and the driver, by what the caller should do about it.

NvDriverError
├── DriverUnavailable     no gate here; take a software gate instead
│   ├── NoDevice              no control node, or it may not be opened
│   ├── UnsupportedBranch     a driver release whose structures were never checked
│   ├── MpsActive             all MPS clients share one GPU context: stopping one stops all
│   ├── NoChannels            this process has no CUDA context (yet)
│   ├── RouteNotPermitted     the driver does not let this open file act for that client
│   ├── MissingPrivilege      a capability is missing
│   └── NotSupported          the resource manager does not know the command (no GSP firmware)
├── Refused               our own safety rules say no; fix the caller
├── StaleHandles          the channels are gone or were made anew; open a new gate
├── Busy                  a retry was spent already; try later or use a software gate
├── DeviceLost            the GPU fell off the bus or wants a reset; nothing left to stop
└── CallFailed            any other status or errno

Owns the exceptions and the translation of a resource manager status or an errno into one of them.
Statuses: open-gpu-kernel-modules 595, nvstatuscodes.h.
"""

import errno
from enum import IntEnum


class NvDriverError(Exception):
    """Base of every error this package raises on purpose."""


class DriverUnavailable(NvDriverError):
    """Channel control cannot be had here; the message says why."""


class NoDevice(DriverUnavailable): ...


class UnsupportedBranch(DriverUnavailable): ...


class MpsActive(DriverUnavailable): ...


class NoChannels(DriverUnavailable): ...


class RouteNotPermitted(DriverUnavailable): ...


class MissingPrivilege(DriverUnavailable): ...


class NotSupported(DriverUnavailable): ...


class Refused(NvDriverError): ...


class StaleHandles(NvDriverError): ...


class Busy(NvDriverError): ...


class DeviceLost(NvDriverError): ...


class CallFailed(NvDriverError): ...


class Status(IntEnum):
    """The resource manager's status words that this package tells apart."""

    OK = 0x00
    BUSY_RETRY = 0x03
    GPU_IS_LOST = 0x0F
    INSERT_DUPLICATE_NAME = 0x19
    INSUFFICIENT_PERMISSIONS = 0x1B
    INVALID_ARGUMENT = 0x1F
    INVALID_CHANNEL = 0x21
    INVALID_CLASS = 0x22
    INVALID_CLIENT = 0x23
    INVALID_OBJECT = 0x31
    INVALID_OBJECT_HANDLE = 0x33
    INVALID_OBJECT_PARENT = 0x36
    INVALID_STATE = 0x40
    NOT_SUPPORTED = 0x56
    OBJECT_NOT_FOUND = 0x57
    RESET_REQUIRED = 0x62
    TIMEOUT = 0x65
    TIMEOUT_RETRY = 0x66


_KNOWN = frozenset(Status)
TRANSIENT = frozenset({Status.BUSY_RETRY, Status.TIMEOUT, Status.TIMEOUT_RETRY})

_STALE = "the handle is gone: the CUDA context was destroyed or made anew; open a new gate"
_LOST = "the GPU is lost or wants a reset: restart the worker once an administrator has recovered the device"
_BUSY = "the driver did not answer in time, twice: use a software gate for now and try again later"

_BY_STATUS: dict[int, tuple[type[NvDriverError], str]] = {
    Status.BUSY_RETRY: (Busy, _BUSY),
    Status.TIMEOUT: (Busy, _BUSY),
    Status.TIMEOUT_RETRY: (Busy, _BUSY),
    Status.GPU_IS_LOST: (DeviceLost, _LOST),
    Status.RESET_REQUIRED: (DeviceLost, _LOST),
    Status.INSUFFICIENT_PERMISSIONS: (
        MissingPrivilege,
        "the driver asks for a capability this process lacks: run the agent in the process that owns the channels",
    ),
    Status.INVALID_ARGUMENT: (
        UnsupportedBranch,
        "the driver rejects the size or content of the parameters: its structures differ from the ones checked for "
        "this branch; use a software gate and report the driver release",
    ),
    Status.INVALID_CHANNEL: (StaleHandles, _STALE),
    Status.INVALID_OBJECT: (StaleHandles, _STALE),
    Status.INVALID_OBJECT_HANDLE: (StaleHandles, _STALE),
    Status.OBJECT_NOT_FOUND: (StaleHandles, _STALE),
    Status.INVALID_CLIENT: (
        RouteNotPermitted,
        "this open file may not act for that client: use the in-process agent, or pass its descriptor to this process",
    ),
    Status.NOT_SUPPORTED: (
        NotSupported,
        "the resource manager does not forward the command: channel control needs the open kernel module with GSP "
        "firmware (Turing or later); use a software gate",
    ),
}

_NO_DEVICE_ERRNOS = frozenset({errno.EPERM, errno.EACCES, errno.ENODEV, errno.ENOENT, errno.ENXIO})


def from_status(status: int, doing: str) -> NvDriverError:
    """The exception for a non-zero status word; `doing` names the call in words."""
    kind, advice = _BY_STATUS.get(status, (CallFailed, "use a software gate and report the status"))
    name = Status(status).name if status in _KNOWN else "status"
    return kind(f"{doing}: {name} (0x{status:x}): {advice}")


def from_os_error(error: OSError, doing: str) -> NvDriverError:
    """The exception for an errno of open() or ioctl()."""
    if error.errno in _NO_DEVICE_ERRNOS:
        return NoDevice(f"{doing}: {error.strerror}: check that the driver is loaded and its node is visible here")
    if error.errno == errno.EINTR:
        return Busy(f"{doing}: interrupted again and again: block signals on this thread or try again later")
    if error.errno == errno.EBADF:
        return StaleHandles(f"{doing}: the descriptor is closed: open a new gate")
    return CallFailed(f"{doing}: {error.strerror} (errno {error.errno}): use a software gate and report it")
