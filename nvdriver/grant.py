"""How a process lets another one freeze it: a grant, and the descriptors that make it good.

The owner finds its own channels and sends them over a unix socket; nobody ever looks for another process's channels.
What is received is checked against the socket's credentials, which the kernel vouches for.

NOTE: the driver frees a client when the last descriptor of its open file closes. A received descriptor therefore keeps
the GPU memory of a dead owner alive until it is closed; the gate watches the owner and closes it.
"""

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
    socket.send_fds(sock, [grant.to_bytes()], [file.fileno() for file in files])


def receive_grant(sock: socket.socket) -> tuple[Grant, list[DeviceFile]]:
    """Receive a grant and check that it comes from the process and the user it names."""
    data, fds, _flags, _address = socket.recv_fds(sock, _MAX_BYTES, _MAX_FILES)
    with contextlib.ExitStack() as undo:
        for fd in fds:
            undo.callback(os.close, fd)
            os.set_inheritable(fd, False)  # recv_fds of Python 3.11 drops its flags, MSG_CMSG_CLOEXEC among them
        grant = Grant.from_bytes(data)
        pid, uid, _gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if (pid, uid) != (grant.pid, grant.uid):
            raise Refused(f"a grant for pid {grant.pid} came from pid {pid}: only the owner may grant its channels")
        if fds and len(fds) != len(grant.sets):
            raise Refused(f"{len(grant.sets)} sets of channels with {len(fds)} descriptors: send one for each, or none")
        undo.pop_all()
    return grant, [LinuxFile(fd) for fd in fds]
