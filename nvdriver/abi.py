"""The driver's binary interface: request numbers, commands, classes, structures, and the branches they hold for.

Owns layouts and numbers only; who may issue what, and when, is decided elsewhere. `Command` is the allow-list: what is
not a member cannot be sent (`rm.ResourceManager.control`). Left out on purpose, although ordinary users may call them:
GPFIFO_SCHEDULE (takes a group off the runlist, under the exclusive API lock) and STOP_CHANNEL (destroys the channel).

Checked by compiling the headers of each release named in `BRANCHES` on x86-64: nvos.h, ctrl0000client.h,
ctrl2080fifo.h, ctrla06c.h, nv-ioctl.h of open-gpu-kernel-modules. Everything below came out the same in all of them.
"""

import ctypes
import re
from enum import IntEnum
from typing import Any, ClassVar, Final

from nvdriver.errors import UnsupportedBranch

CONTROL_NODE: Final = "/dev/nvidiactl"
VERSION_FILE: Final = "/proc/driver/nvidia/version"

# Newest release of each branch whose headers were compiled. Another branch is refused, not guessed.
BRANCHES: Final = {
    550: "550.163.01",
    570: "570.211.01",
    575: "575.64.05",
    580: "580.142",
    590: "590.48.01",
    595: "595.45.04",
}

MAX_CHANNELS_PER_CALL: Final = 64
CLIENT_HANDLE_BASE: Final = 0xC1D00000  # handed out by a counter that runs modulo CLIENT_HANDLE_COUNT
CLIENT_HANDLE_COUNT: Final = 0x100000
OBJECT_HANDLE_BASE: Final = 0x5C000000  # libcuda numbers its own objects from here; observed, not documented

ROOT_CLASSES: Final = frozenset({0x0, 0x1, 0x41})
ROOT_CLIENT: Final = 0x41
DEVICE: Final = 0x80
SUBDEVICE: Final = 0x2080
CHANNEL_GROUP: Final = 0xA06C
# Volta, Turing, Ampere, Hopper, Blackwell A and B; Ada uses Ampere's.
CHANNEL_CLASSES: Final = frozenset({0xC36F, 0xC46F, 0xC56F, 0xC86F, 0xC96F, 0xCA6F})
# Volta, Turing, Ampere A and B, Ada, Hopper, Blackwell A and B.
COMPUTE_CLASSES: Final = frozenset({0xC3C0, 0xC5C0, 0xC6C0, 0xC7C0, 0xC9C0, 0xCBC0, 0xCDC0, 0xCEC0})


class HandleInfo(IntEnum):
    """What CLIENT_GET_HANDLE_INFO may be asked."""

    PARENT = 1
    CLASS = 2


class Record(ctypes.Structure):
    """A structure the driver reads and writes; `size()` is what `paramsSize` must say, to the byte."""

    _fields_: ClassVar[list[tuple[str, Any]]] = []

    @classmethod
    def size(cls) -> int:
        return ctypes.sizeof(cls)


class ControlCall(Record):
    """NVOS54: one control command on one object of one client."""

    client: int
    object: int
    command: int
    flags: int
    params: int
    params_size: int
    status: int
    _fields_ = [
        ("client", ctypes.c_uint32),
        ("object", ctypes.c_uint32),
        ("command", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("params", ctypes.c_uint64),
        ("params_size", ctypes.c_uint32),
        ("status", ctypes.c_uint32),
    ]


class AllocCall(Record):
    """NVOS21: make an object. Only ever a root client here, which takes no parameters."""

    root: int
    parent: int
    handle: int
    object_class: int
    params: int
    params_size: int
    status: int
    _fields_ = [
        ("root", ctypes.c_uint32),
        ("parent", ctypes.c_uint32),
        ("handle", ctypes.c_uint32),
        ("object_class", ctypes.c_uint32),
        ("params", ctypes.c_uint64),
        ("params_size", ctypes.c_uint32),
        ("status", ctypes.c_uint32),
    ]


class VersionCall(Record):
    """nv_ioctl_rm_api_version: with QUERY the driver writes its release into `text`."""

    QUERY: ClassVar[int] = ord("2")
    command: int
    reply: int
    text: bytes
    _fields_ = [
        ("command", ctypes.c_uint32),
        ("reply", ctypes.c_uint32),
        ("text", ctypes.c_char * 64),
    ]


class HandleInfoParams(Record):
    object: int
    index: int
    data: int
    _fields_ = [
        ("object", ctypes.c_uint32),
        ("index", ctypes.c_uint32),
        ("data", ctypes.c_uint64),
    ]


class DisableChannelsParams(Record):
    """Disable (or, with `disable` 0, enable) up to 64 channels; returns when none of them is on the hardware.

    The other three switches stay 0: `only_disable_scheduling` would leave a running channel running, `rewind_gp_put`
    would drop queued work, and `preempt_event` is for kernel callers.
    """

    disable: int
    num_channels: int
    only_disable_scheduling: int
    rewind_gp_put: int
    preempt_event: int
    clients: Any
    channels: Any
    _fields_ = [
        ("disable", ctypes.c_uint8),
        ("num_channels", ctypes.c_uint32),
        ("only_disable_scheduling", ctypes.c_uint8),
        ("rewind_gp_put", ctypes.c_uint8),
        ("preempt_event", ctypes.c_uint64),
        ("clients", ctypes.c_uint32 * MAX_CHANNELS_PER_CALL),
        ("channels", ctypes.c_uint32 * MAX_CHANNELS_PER_CALL),
    ]


class TimesliceParams(Record):
    microseconds: int
    _fields_ = [("microseconds", ctypes.c_uint64)]


class PreemptParams(Record):
    wait: int
    manual_timeout: int
    timeout_us: int
    _fields_ = [
        ("wait", ctypes.c_uint8),
        ("manual_timeout", ctypes.c_uint8),
        ("timeout_us", ctypes.c_uint32),
    ]


class Command(IntEnum):
    """Every control command this package will ever send."""

    CLIENT_GET_HANDLE_INFO = 0xD02
    FIFO_DISABLE_CHANNELS = 0x2080110B
    GROUP_SET_TIMESLICE = 0xA06C0103
    GROUP_GET_TIMESLICE = 0xA06C0104
    GROUP_PREEMPT = 0xA06C0105


PARAMS: Final[dict[Command, type[Record]]] = {
    Command.CLIENT_GET_HANDLE_INFO: HandleInfoParams,
    Command.FIFO_DISABLE_CHANNELS: DisableChannelsParams,
    Command.GROUP_SET_TIMESLICE: TimesliceParams,
    Command.GROUP_GET_TIMESLICE: TimesliceParams,
    Command.GROUP_PREEMPT: PreemptParams,
}


def _request(number: int, record: type[Record]) -> int:
    """_IOWR('F', number, record)."""
    return 3 << 30 | record.size() << 16 | ord("F") << 8 | number


REQUEST_CONTROL: Final = _request(0x2A, ControlCall)
REQUEST_ALLOC: Final = _request(0x2B, AllocCall)
REQUEST_VERSION: Final = _request(0xD2, VersionCall)


def branch_of(release: str) -> int:
    """The supported branch a release such as "580.95.05" belongs to."""
    match = re.match(r"(\d+)\.\d+", release)
    branch = int(match.group(1)) if match else 0
    if branch not in BRANCHES:
        known = ", ".join(str(known) for known in BRANCHES)
        raise UnsupportedBranch(
            f"driver release {release or 'unknown'!r} is of no branch whose structures were checked ({known}): "
            "use a software gate, or add the branch after compiling its headers"
        )
    return branch
