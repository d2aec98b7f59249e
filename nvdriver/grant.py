"""How a process lets another one freeze it: a grant, and the descriptors that make it good.

The owner finds its own channels and sends them over a unix socket; nobody ever looks for another process's channels.
What is received is checked against the message's credentials, which the kernel vouches for.

NOTE: the driver frees a client when the last descriptor of its open file closes. A received descriptor therefore keeps
the GPU memory of a dead owner alive until it is closed; the gate watches the owner and closes it.
"""

import array
import contextlib
import json
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nvdriver.device import DeviceFile, LinuxFile
from nvdriver.errors import Refused
from nvdriver.scan import ChannelSet

_MAX_BYTES = 1 << 16
_MAX_FILES = 16
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


@dataclass(frozen=True, slots=True)
class Grant:
    """Channels that their owner allows the receiver to freeze. `sets[i]` goes with the i-th descriptor, if any."""

    pid: int
    uid: int
    release: str
    sets: tuple[ChannelSet, ...]

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Grant":
        try:
            raw = json.loads(data)
            sets = tuple(
                ChannelSet(int(s["client"]), int(s["subdevice"]), _handles(s["groups"]), _handles(s["channels"]))
                for s in raw["sets"]
            )
            return cls(int(raw["pid"]), int(raw["uid"]), str(raw["release"]), sets)
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"not a grant: {error!r}: both ends must run the same version of this package") from error


def _handles(values: Sequence[object]) -> tuple[int, ...]:
    return tuple(int(str(value)) for value in values)


def send_grant(sock: socket.socket, grant: Grant, files: Sequence[DeviceFile]) -> None:
    """Send a grant in one message of a SOCK_SEQPACKET socket; without files it serves only the cross-client route."""
    descriptors = array.array("i", [file.fileno() for file in files])
    credentials = _CREDENTIALS.pack(os.getpid(), os.geteuid(), os.getegid())
    ancillary = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)]
    if descriptors:
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors.tobytes()))
    sock.sendmsg([grant.to_bytes()], ancillary)


def receive_grant(sock: socket.socket) -> tuple[Grant, list[DeviceFile]]:
    """Receive a grant and check that it comes from the process and the user it names."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    space = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(_MAX_FILES * array.array("i").itemsize)
    data, ancillary, _flags, _address = sock.recvmsg(_MAX_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    fds, sender = _unpack(ancillary)
    with contextlib.ExitStack() as undo:
        for fd in fds:
            undo.callback(os.close, fd)
        grant = Grant.from_bytes(data)
        if sender != (grant.pid, grant.uid):
            raise Refused(
                f"a grant for pid {grant.pid} came from pid {sender[0]}: only the owner may grant its channels"
            )
        if fds and len(fds) != len(grant.sets):
            raise Refused(f"{len(grant.sets)} sets of channels with {len(fds)} descriptors: send one for each, or none")
        undo.pop_all()
    return grant, [LinuxFile(fd) for fd in fds]


def _unpack(ancillary: Sequence[tuple[int, int, bytes]]) -> tuple[list[int], tuple[int, int]]:
    """The descriptors, and the pid and uid of the sender. SO_PEERCRED would name whoever made a socket pair instead."""
    fds, sender = array.array("i"), (0, -1)
    for _level, kind, data in ancillary:
        if kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        elif kind == socket.SCM_CREDENTIALS:
            pid, uid, _gid = _CREDENTIALS.unpack(data)
            sender = (pid, uid)
    return list(fds), sender
