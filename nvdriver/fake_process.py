"""Processes on the fake machine: descriptors, passing them on, dying; and the part of libcuda that makes channels."""

import ctypes
import errno
import itertools
import os
from collections.abc import Iterable

from nvdriver import abi
from nvdriver.errors import NoDevice
from nvdriver.fake import Caller, FakeDriver, OpenFile
from nvdriver.fake_gpu import AddressSpace, FakeChannel, FakeGroup

AMPERE_CHANNEL, HOPPER_CHANNEL = 0xC56F, 0xC86F
AMPERE_COMPUTE, HOPPER_COMPUTE = 0xC6C0, 0xCBC0

_numbers = itertools.count(1 << 29)  # above any real descriptor, so that a mix-up fails at once


class FakeFile:
    """One descriptor of one process."""

    def __init__(self, process: "FakeProcess", file: OpenFile) -> None:
        self._process = process
        self._number = next(_numbers)
        self.file = file
        self.is_open = True
        file.num_descriptors += 1
        process.files.append(self)

    def fileno(self) -> int:
        return self._number

    def ioctl(self, request: int, record: ctypes.Structure) -> None:
        if not self.is_open:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        process = self._process
        caller = Caller(self.file, process.number, process.user, process.capabilities)
        process.driver.ioctl(caller, request, record)

    def duplicate(self) -> "FakeFile":
        return FakeFile(self._process, self.file)

    def pass_to(self, process: "FakeProcess") -> "FakeFile":
        """What sending the descriptor over a unix socket does."""
        return FakeFile(process, self.file)

    def close(self) -> None:
        if not self.is_open:
            return
        self.is_open = False
        self._process.files.remove(self)
        self.file.num_descriptors -= 1
        if not self.file.num_descriptors:
            self._process.driver.closed(self.file)


class FakePeer:
    def __init__(self, process: "FakeProcess | None") -> None:
        self._process = process

    def is_alive(self) -> bool:
        return self._process is not None and self._process.is_alive

    def close(self) -> None:
        self._process = None


class FakeProcess:
    """A process, and the `Host` it sees."""

    def __init__(
        self,
        driver: FakeDriver,
        number: int,
        user: int = 1000,
        capabilities: frozenset[str] = frozenset(),
        neighbours: "Iterable[FakeProcess]" = (),
    ) -> None:
        self.driver = driver
        self.number = number
        self.user = user
        self.capabilities = capabilities
        self.files: list[FakeFile] = []
        self.is_alive = True
        self.has_node = True
        self.version = f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver.release}  Release Build\n"
        self._neighbours = {process.number: process for process in neighbours}

    def pid(self) -> int:
        return self.number

    def uid(self) -> int:
        return self.user

    def version_text(self) -> str:
        return self.version

    def open_control(self) -> FakeFile:
        if not self.has_node:
            raise NoDevice(f"open {abi.CONTROL_NODE}: no such file: check that the driver is loaded")
        return FakeFile(self, self.driver.open())

    def own_control_files(self) -> list[FakeFile]:
        return [file.duplicate() for file in list(self.files)]

    def peer(self, pid: int) -> FakePeer:
        return FakePeer(self._neighbours.get(pid))

    def die(self) -> None:
        """Gone without a word: the kernel closes its descriptors, and nobody enables anything."""
        self.is_alive = False
        for file in list(self.files):
            file.close()


class FakeContext:
    """The objects a CUDA context makes on one device: a compute group of several channels, and two copy groups.

    `first_handle` stands for the numbering that differs between releases of libcuda.
    """

    def __init__(
        self, process: FakeProcess, first_handle: int = 0x13, num_channels: int = 8, hopper: bool = True
    ) -> None:
        self._driver = process.driver
        self._file = process.open_control()
        self._handles = itertools.count(abi.OBJECT_HANDLE_BASE + first_handle)
        self._classes = (HOPPER_CHANNEL, HOPPER_COMPUTE) if hopper else (AMPERE_CHANNEL, AMPERE_COMPUTE)
        call = abi.AllocCall(object_class=abi.ROOT_CLIENT)
        self._file.ioctl(abi.REQUEST_ALLOC, call)
        self.client = call.handle
        base = abi.OBJECT_HANDLE_BASE
        self._device = self._driver.alloc(self.client, self.client, base + 2, abi.DEVICE)
        self._driver.alloc(self.client, self._device, base + 3, abi.SUBDEVICE)
        self.space = AddressSpace(self._driver.gpu)
        self.compute = self._group(f"compute of {process.number}", "compute", num_channels)
        self.copies = [self._group(f"copy {i} of {process.number}", f"copy {i}", 1) for i in range(2)]

    def launch(self, duration_us: int, touches: Iterable[int] = ()) -> FakeChannel:
        channel = self.compute.channels[0]
        channel.launch(duration_us, touches)
        return channel

    @property
    def progress_us(self) -> int:
        return sum(channel.progress_us for channel in self.compute.channels)

    def destroy(self) -> None:
        """cuCtxDestroy: the client goes, the descriptor may stay."""
        self._driver.free_client(self.client)

    def _group(self, name: str, engine: str, num_channels: int) -> FakeGroup:
        group = FakeGroup(name, engine, self.space)
        self._driver.gpu.groups.append(group)
        group_handle = self._driver.alloc(self.client, self._device, next(self._handles), abi.CHANNEL_GROUP, group)
        channel_class, compute_class = self._classes
        for _ in range(num_channels):
            channel = FakeChannel(group)
            group.channels.append(channel)
            handle = self._driver.alloc(self.client, group_handle, next(self._handles), channel_class, channel)
            if engine == "compute":
                self._driver.alloc(self.client, handle, next(self._handles), compute_class)
        return group
