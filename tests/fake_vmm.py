"""A GPU's virtual memory as a driver keeps it, for windows: processes, handles, mappings, and kernels that fault.

Models what decides whether a window is right: references from handles and mappings, whole mappings only, access that a new
mapping does not have, no mapping over another, and descriptors that carry memory between processes (real ones, so that they
can be passed over a real socket).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.memory.cuda_vmm import NoDeviceMemory, VmmDriver, VmmFailed

GRAIN = 2 << 20


@dataclass(eq=False)
class Allocation:
    """Physical memory. `bytes` holds what was written, by offset."""

    size: int
    handles: int = 1
    mappers: list[FakeVmm] = field(default_factory=list)  # one entry a mapping
    bytes: dict[int, int] = field(default_factory=dict)


class FakeDevice:
    """The GPU that all processes share."""

    def __init__(self, memory: int = 1 << 40) -> None:
        self.memory = memory
        self.used = 0
        self.created = 0
        self.by_file: dict[int, Allocation] = {}


@dataclass
class Mapping:
    allocation: Allocation
    accessible: bool = False


class FakeVmm:
    """One process's driver. `fail` makes a call fail once its count is 0; `kernel` runs after every call."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.handles: dict[int, Allocation] = {}
        self.ranges: dict[int, int] = {}
        self.mappings: dict[int, Mapping] = {}
        self.calls: list[str] = []
        self.fail: dict[str, int] = {}
        self.kernel: Callable[[], None] = lambda: None
        self._numbers = itertools.count(1)

    # -- the driver's calls

    def granularity(self) -> int:
        return GRAIN

    def reserve(self, size: int) -> int:
        self._call("reserve")
        self._check_grain(size)
        address = (1 + len(self.ranges)) << 44
        self.ranges[address] = size
        return address

    def free(self, address: int, size: int) -> None:
        self._call("free")
        self._require(self.ranges.get(address) == size, "free: not a reserved range")
        self._require(not any(address <= at < address + size for at in self.mappings), "free: something is mapped")
        del self.ranges[address]

    def create(self, size: int) -> int:
        self._call("create")
        self._check_grain(size)
        if self.device.used + size > self.device.memory:
            raise NoDeviceMemory("out of memory")
        self.device.used += size
        self.device.created += 1
        return self._handle(Allocation(size))

    def release(self, handle: int) -> None:
        self._call("release")
        self._require(handle in self.handles, "release: no such handle")
        allocation = self.handles.pop(handle)
        allocation.handles -= 1
        self._collect(allocation)

    def export_fd(self, handle: int) -> int:
        self._call("export")
        fd = os.memfd_create("fake-gpu-memory", os.MFD_CLOEXEC)
        self.device.by_file[os.fstat(fd).st_ino] = self.handles[handle]
        return fd

    def import_fd(self, fd: int) -> int:
        self._call("import")
        allocation = self.device.by_file[os.fstat(fd).st_ino]
        allocation.handles += 1
        return self._handle(allocation)

    def map(self, address: int, size: int, handle: int) -> None:
        self._call("map")
        self._require(handle in self.handles, "map: no such handle")
        allocation = self.handles[handle]
        self._require(size == allocation.size, "map: a whole allocation at a time")
        reserved = any(base <= address and address + size <= base + length for base, length in self.ranges.items())
        self._require(reserved and address % GRAIN == 0, "map: not in a reserved range")
        taken = any(at < address + size and address < at + m.allocation.size for at, m in self.mappings.items())
        self._require(not taken, "map: mapped already")
        self.mappings[address] = Mapping(allocation)
        allocation.mappers.append(self)
        self.kernel()

    def set_access(self, address: int, size: int) -> None:
        self._call("set_access")
        self._require(address in self.mappings and self.mappings[address].allocation.size == size, "access: no such mapping")
        self.mappings[address].accessible = True
        self.kernel()

    def unmap(self, address: int, size: int) -> None:
        self._call("unmap")
        self._require(address in self.mappings and self.mappings[address].allocation.size == size, "unmap: not a whole mapping")
        allocation = self.mappings.pop(address).allocation
        allocation.mappers.remove(self)
        self._collect(allocation)
        self.kernel()

    def synchronize(self) -> None:
        self._call("synchronize")

    # -- what kernels do

    def at(self, address: int) -> tuple[Allocation, int]:
        """The memory that a kernel meets at the address, and where in it; a fault fails the test."""
        for base, mapping in self.mappings.items():
            if base <= address < base + mapping.allocation.size:
                assert mapping.accessible, f"fault: no access at 0x{address:x}"
                return mapping.allocation, address - base
        raise AssertionError(f"fault: nothing mapped at 0x{address:x}")

    def write(self, address: int, value: int) -> None:
        allocation, offset = self.at(address)
        allocation.bytes[offset] = value

    def read(self, address: int) -> int:
        allocation, offset = self.at(address)
        return allocation.bytes.get(offset, 0)

    def die(self) -> None:
        """The kernel module takes back what a dead process had."""
        for address in list(self.mappings):
            allocation = self.mappings.pop(address).allocation
            allocation.mappers.remove(self)
            self._collect(allocation)
        for handle in list(self.handles):
            allocation = self.handles.pop(handle)
            allocation.handles -= 1
            self._collect(allocation)
        self.ranges.clear()

    @property
    def is_clean(self) -> bool:
        return not (self.handles or self.ranges or self.mappings)

    # -- inside

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail:
            self.fail[name] -= 1
            if self.fail[name] < 0:
                del self.fail[name]
                raise VmmFailed(f"{name} was made to fail")

    def _handle(self, allocation: Allocation) -> int:
        handle = next(self._numbers)
        self.handles[handle] = allocation
        return handle

    def _collect(self, allocation: Allocation) -> None:
        if not allocation.handles and not allocation.mappers:
            self.device.used -= allocation.size

    @staticmethod
    def _check_grain(size: int) -> None:
        FakeVmm._require(size > 0 and size % GRAIN == 0, "not a multiple of the granularity")

    @staticmethod
    def _require(condition: bool, message: str) -> None:
        assert condition, message


_: type[VmmDriver] = FakeVmm
