"""A resource manager in Python: answers the ioctls of this package with the checks of a real one, for tests.

Owns open files, clients, object trees, the privilege table of each driver branch, and fault injection. The parameters
are followed by address, so the very marshalling code that talks to a device is what gets tested. Flags and access
rights are those of the generated tables of open-gpu-kernel-modules (g_*_nvoc.c of the releases in `abi.BRANCHES`); the
bits were renumbered after 550, so each branch is decoded by its own numbering.

The order of checks follows rmapi/control.c and rs_server.c, and no test of ours may depend on it.
"""

import ctypes
import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NoReturn, TypeVar

from nvdriver import abi
from nvdriver.abi import Command, HandleInfo
from nvdriver.errors import Status
from nvdriver.fake_gpu import FakeChannel, FakeGpu, FakeGroup, ManualClock

R = TypeVar("R", bound=abi.Record)

CAP_SYS_ADMIN, CAP_SYS_NICE = "SYS_ADMIN", "SYS_NICE"

# Commands a real driver answers and this package must never send.
GROUP_SCHEDULE, STOP_CHANNEL, STOP_RUNLIST, DISABLE_USER_CHANNELS = 0xA06C0101, 0xA06F0112, 0x801711, 0x20801117
GROUP_INTERLEAVE = 0xA06C0107


class Validation(Enum):
    """Whose client an open file may act for."""

    STRICT = "strict"  # a stock driver: the file the client was made on, root included
    SAME_USER = "same_user"  # RmValidateClientData=0x80, or the one-line patch
    OFF = "off"  # RmValidateClientData=0x20


@dataclass(frozen=True, slots=True)
class _Rule:
    classes: frozenset[int]
    flags: int
    right: int
    size: int

    def permits(self, branch: int, capabilities: frozenset[str]) -> bool:
        non_privileged, if_right = (0x10, 0x100) if branch <= 550 else (0x8, 0x20)
        if self.right & 0x2 and CAP_SYS_NICE not in capabilities:
            return False
        if self.flags & (non_privileged | if_right):
            return True
        return bool(self.flags & 0x4) and CAP_SYS_ADMIN in capabilities  # neither bit: kernel callers only


def _rules(branch: int) -> dict[int, _Rule]:
    root, group = abi.ROOT_CLASSES, frozenset({abi.CHANNEL_GROUP})
    subdevice, device = frozenset({abi.SUBDEVICE}), frozenset({abi.DEVICE})
    table = {  # flags in 550, flags from 570 on (privilege bits), access right, size
        Command.CLIENT_GET_HANDLE_INFO: (root, 0x811, 0x109, 0, 16),
        Command.FIFO_DISABLE_CHANNELS: (subdevice, 0x810, 0x108, 0, 536),
        Command.GROUP_SET_TIMESLICE: (group, 0x10, 0x8, 0, 8),
        Command.GROUP_GET_TIMESLICE: (group, 0x10, 0x8, 0, 8),
        Command.GROUP_PREEMPT: (group, 0x2210, 0x248, 0, 8),
        GROUP_SCHEDULE: (group, 0x10, 0x8, 0, 3 if branch >= 575 else 2),
        GROUP_INTERLEAVE: (group, 0x110, 0x28, 0x2, 4),
        STOP_CHANNEL: (abi.CHANNEL_CLASSES, 0x10, 0x8, 0, 1),
        STOP_RUNLIST: (device, 0x2204, 0x244, 0, 4),
        DISABLE_USER_CHANNELS: (subdevice, 0x2200, 0x40, 0, 1),
    }
    return {
        command: _Rule(classes, old if branch <= 550 else new, right, size)
        for command, (classes, old, new, right, size) in table.items()
    }


@dataclass(eq=False, slots=True)
class OpenFile:
    """What the driver knows a caller by. Survives dup and passing; its clients die with its last descriptor."""

    num_descriptors: int = 0


@dataclass(frozen=True, slots=True)
class Caller:
    file: OpenFile
    pid: int
    uid: int
    capabilities: frozenset[str]


@dataclass(eq=False, slots=True)
class _Object:
    parent: int
    object_class: int
    body: FakeGroup | FakeChannel | None = None


@dataclass(eq=False, slots=True)
class _Client:
    owner: Caller
    objects: dict[int, _Object] = field(default_factory=dict)


@dataclass(slots=True)
class Injection:
    """Make the next matching calls fail. `applied` entries of a disable or enable take effect first."""

    error: int = 0
    status: Status = Status.OK
    command: int | None = None
    times: int = 1
    applied: int = 0


class _Failure(Exception):
    def __init__(self, status: Status) -> None:
        self.status = status


class FakeDriver:
    """One machine's driver. `calls` logs each control command that reached it, as (pid, command)."""

    def __init__(
        self,
        branch: int = 580,
        clock: ManualClock | None = None,
        validation: Validation = Validation.STRICT,
        latency_us: Iterator[int] | None = None,
    ) -> None:
        self.branch = branch
        self.release = abi.BRANCHES.get(branch, f"{branch}.10")
        self.clock = clock or ManualClock()
        self.gpu = FakeGpu(self.clock)
        self.validation = validation
        self.gsp_checks_entries = True
        self.has_gsp = True
        self.is_honest = True  # False: says OK to a disable and does nothing, as an intercepted driver may
        self.injections: list[Injection] = []
        self.calls: list[tuple[int, int]] = []
        self.on_control: Callable[[int], None] | None = None
        self._rules = _rules(branch)
        self._latency_us = latency_us or itertools.repeat(300)
        self._clients: dict[int, _Client] = {}
        self._next_client = abi.CLIENT_HANDLE_BASE + 7
        self._lock = threading.RLock()

    # ---- descriptors ----

    def open(self) -> OpenFile:
        return OpenFile()

    def closed(self, file: OpenFile) -> None:
        """The last descriptor of a file went away: free its clients and everything below them."""
        with self._lock:
            for handle in [h for h, c in self._clients.items() if c.owner.file is file]:
                self._free_client(handle)

    def ioctl(self, caller: Caller, request: int, record: ctypes.Structure) -> None:
        with self._lock:
            match request:
                case abi.REQUEST_CONTROL:
                    self._control(caller, _view(abi.ControlCall, record))
                case abi.REQUEST_ALLOC:
                    self._alloc_root(caller, _view(abi.AllocCall, record))
                case abi.REQUEST_VERSION:
                    self._version(_view(abi.VersionCall, record))
                case _:  # wrong magic, number or size
                    _fail(errno.EINVAL)

    # ---- objects ----

    def alloc(self, client: int, parent: int, handle: int, object_class: int, body: object = None) -> int:
        """Make an object below another, as libcuda would. Returns its handle."""
        objects = self._clients[client].objects
        parents = {abi.DEVICE: abi.ROOT_CLASSES, abi.SUBDEVICE: {abi.DEVICE}, abi.CHANNEL_GROUP: {abi.DEVICE}}
        allowed = parents.get(object_class, {abi.CHANNEL_GROUP})
        if object_class in abi.COMPUTE_CLASSES:
            allowed = abi.CHANNEL_CLASSES
        if handle in objects:
            raise ValueError(f"0x{handle:x} exists ({Status.INSERT_DUPLICATE_NAME.name})")
        if parent not in objects or objects[parent].object_class not in allowed:
            raise ValueError(f"wrong parent for class 0x{object_class:x} ({Status.INVALID_OBJECT_PARENT.name})")
        assert body is None or isinstance(body, FakeGroup | FakeChannel)
        objects[handle] = _Object(parent, object_class, body)
        return handle

    def skip_clients(self, count: int) -> None:
        """Other processes came and went: the counter of client handles moved on."""
        place = self._next_client - abi.CLIENT_HANDLE_BASE + count
        self._next_client = abi.CLIENT_HANDLE_BASE + place % abi.CLIENT_HANDLE_COUNT

    def free_client(self, handle: int) -> None:
        """What libcuda does when a context is destroyed."""
        with self._lock:
            self._free_client(handle)

    def _free_client(self, handle: int) -> None:
        for found in self._clients.pop(handle).objects.values():
            if isinstance(found.body, FakeGroup):
                self.gpu.remove(found.body)
                found.body.space.destroy()

    def _alloc_root(self, caller: Caller, call: abi.AllocCall) -> None:
        if call.object_class not in abi.ROOT_CLASSES:
            call.status = Status.INVALID_CLASS
            return
        handle = self._next_client
        self.skip_clients(1)
        self._clients[handle] = _Client(caller, {handle: _Object(0, call.object_class)})
        call.handle = handle
        call.status = Status.OK

    def _version(self, call: abi.VersionCall) -> None:
        if call.command != abi.VersionCall.QUERY:
            _fail(errno.EINVAL)
        call.text = self.release.encode()
        call.reply = 1

    # ---- control ----

    def _control(self, caller: Caller, call: abi.ControlCall) -> None:
        injection = self._take_injection(call.command)
        if injection is not None and injection.error:
            _fail(injection.error)
        if call.command != Command.CLIENT_GET_HANDLE_INFO:
            self.calls.append((caller.pid, call.command))
        try:
            target = self._admit(caller, call)
            self._answer(caller, call, target, injection)
            call.status = injection.status if injection else Status.OK
        except _Failure as failure:
            call.status = failure.status
        if self.on_control is not None:
            self.on_control(call.command)

    def _take_injection(self, command: int) -> Injection | None:
        for injection in self.injections:
            if injection.command in (None, command):
                injection.times -= 1
                if not injection.times:
                    self.injections.remove(injection)
                return injection
        return None

    def _admit(self, caller: Caller, call: abi.ControlCall) -> _Object:
        """Every check a real driver makes before the body of a command runs."""
        client = self._clients.get(call.client)
        if client is None:
            raise _Failure(Status.INVALID_CLIENT)
        rule = self._rules.get(call.command)
        if rule is not None and (call.params_size != rule.size or not call.params):
            raise _Failure(Status.INVALID_ARGUMENT)
        if not self._may_act_for(caller, client):
            raise _Failure(Status.INVALID_CLIENT)
        target = client.objects.get(call.object)
        if target is None:
            raise _Failure(Status.OBJECT_NOT_FOUND)
        if rule is None or target.object_class not in rule.classes:
            raise _Failure(Status.NOT_SUPPORTED)
        if not rule.permits(self.branch, caller.capabilities):
            raise _Failure(Status.INSUFFICIENT_PERMISSIONS)
        return target

    def _may_act_for(self, caller: Caller, client: _Client) -> bool:
        if self.validation is Validation.STRICT:
            return client.owner.file is caller.file
        if self.validation is Validation.SAME_USER:
            return caller.uid == client.owner.uid or caller.pid == client.owner.pid
        return True

    def _answer(self, caller: Caller, call: abi.ControlCall, target: _Object, injection: Injection | None) -> None:
        if call.command == Command.CLIENT_GET_HANDLE_INFO:
            return self._handle_info(call)
        self.clock.advance_us(next(self._latency_us))  # the GPU runs on until the firmware has acted
        if call.command == Command.FIFO_DISABLE_CHANNELS:
            self._switch_channels(caller, abi.DisableChannelsParams.from_address(call.params), injection)
        elif injection is None and isinstance(target.body, FakeGroup):
            self._pace_group(call, target.body)

    def _handle_info(self, call: abi.ControlCall) -> None:
        params = abi.HandleInfoParams.from_address(call.params)
        found = self._clients[call.client].objects.get(params.object)
        if found is None:
            raise _Failure(Status.OBJECT_NOT_FOUND)
        params.data = found.parent if params.index == HandleInfo.PARENT else found.object_class

    def _pace_group(self, call: abi.ControlCall, group: FakeGroup) -> None:
        if call.command == Command.GROUP_SET_TIMESLICE:
            group.timeslice_us = abi.TimesliceParams.from_address(call.params).microseconds
        elif call.command == Command.GROUP_GET_TIMESLICE:
            abi.TimesliceParams.from_address(call.params).microseconds = group.timeslice_us
        if call.command in (Command.GROUP_SET_TIMESLICE, Command.GROUP_PREEMPT):  # a new slice applies at once
            for channel in group.channels:
                self.gpu.evict(channel)

    def _switch_channels(self, caller: Caller, params: abi.DisableChannelsParams, injection: Injection | None) -> None:
        if not self.has_gsp:
            raise _Failure(Status.NOT_SUPPORTED)
        if params.preempt_event:
            raise _Failure(Status.INSUFFICIENT_PERMISSIONS)
        if params.num_channels > abi.MAX_CHANNELS_PER_CALL:
            raise _Failure(Status.INVALID_ARGUMENT)
        num_applied = injection.applied if injection else params.num_channels
        for i in range(min(num_applied, params.num_channels)):  # not atomic: what came before an error stays
            channel = self._find_channel(caller, params.clients[i], params.channels[i])
            if params.disable and self.is_honest:
                self.gpu.disable(channel, evict=not params.only_disable_scheduling)
            elif not params.disable:
                self.gpu.enable(channel)

    def _find_channel(self, caller: Caller, client_handle: int, handle: int) -> FakeChannel:
        client = self._clients.get(client_handle)
        if client is None or (self.gsp_checks_entries and not self._may_act_for(caller, client)):
            raise _Failure(Status.INVALID_CHANNEL)
        body = client.objects[handle].body if handle in client.objects else None
        if not isinstance(body, FakeChannel):
            raise _Failure(Status.INVALID_CHANNEL)
        return body


def _view(kind: type[R], record: ctypes.Structure) -> R:
    """The caller's memory read as a structure, as a driver reads it."""
    if ctypes.sizeof(record) < ctypes.sizeof(kind):
        _fail(errno.EFAULT)
    return kind.from_address(ctypes.addressof(record))


def _fail(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))
