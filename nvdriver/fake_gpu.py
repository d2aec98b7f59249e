"""A GPU that makes progress on a manual clock: channels, kernels, time slices, and virtual memory that can fault.

Owns what the hardware would do. Who may ask for it is `fake.py`. A kernel runs only while its channel is enabled and
picked; if it runs while an address it touches is not mapped and accessible, its whole group errors out, as on a device.
"""

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

DEFAULT_SLICE_US = 2048


class ManualClock:
    """Time that passes only when told to; the GPU runs along with it."""

    def __init__(self) -> None:
        self._now_us = 0
        self._lock = threading.RLock()
        self.gpus: list[FakeGpu] = []

    def now(self) -> float:
        return self._now_us / 1e6

    def sleep(self, seconds: float) -> None:
        self.advance_us(round(seconds * 1e6))

    def advance_us(self, microseconds: int) -> None:
        with self._lock:
            for gpu in self.gpus:
                gpu.run(microseconds)
            self._now_us += microseconds


@dataclass(eq=False, slots=True)
class Memory:
    """One physical allocation. It is freed when it is released and no address maps it."""

    size: int
    released: bool = False
    num_mappings: int = 0
    writers: set[str] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class _Mapping:
    memory: Memory
    accessible: bool = False


class AddressSpace:
    """The virtual memory calls of one context, with their rules: whole mappings, access after each map, no overlap."""

    def __init__(self, gpu: "FakeGpu") -> None:
        self._gpu = gpu
        self._mappings: dict[int, _Mapping] = {}
        self._memory: set[Memory] = set()
        # Open question of a real driver: does remapping need one of the frozen channels? If so, it hangs.
        self.may_proceed = threading.Event()
        self.may_proceed.set()

    def create(self, size: int) -> Memory:
        memory = Memory(size)
        self._memory.add(memory)
        self._gpu.memory_used += size
        return memory

    def map(self, address: int, memory: Memory) -> None:
        self.may_proceed.wait()
        if any(address < base + m.memory.size and base < address + memory.size for base, m in self._mappings.items()):
            raise ValueError(f"0x{address:x} is mapped already")
        self._mappings[address] = _Mapping(memory)
        memory.num_mappings += 1

    def set_access(self, address: int) -> None:
        self._mappings[address].accessible = True

    def unmap(self, address: int) -> None:
        self.may_proceed.wait()
        memory = self._mappings.pop(address).memory
        memory.num_mappings -= 1
        self._collect(memory)

    def release(self, memory: Memory) -> None:
        memory.released = True
        self._collect(memory)

    def translate(self, address: int) -> Memory | None:
        """The memory behind an address, or None where touching it faults."""
        for base, mapping in self._mappings.items():
            if base <= address < base + mapping.memory.size:
                return mapping.memory if mapping.accessible else None
        return None

    def destroy(self) -> None:
        for address in list(self._mappings):
            self.unmap(address)
        for memory in list(self._memory):
            self.release(memory)

    def _collect(self, memory: Memory) -> None:
        if memory.released and not memory.num_mappings and memory in self._memory:
            self._memory.remove(memory)
            self._gpu.memory_used -= memory.size


@dataclass(eq=False, slots=True)
class Kernel:
    left_us: int
    touches: tuple[int, ...] = ()


@dataclass(eq=False, slots=True)
class FakeGroup:
    """A channel group: one context's channels on one engine, scheduled together."""

    name: str
    engine: str
    space: AddressSpace
    timeslice_us: int = DEFAULT_SLICE_US
    channels: "list[FakeChannel]" = field(default_factory=list)


@dataclass(eq=False, slots=True)
class FakeChannel:
    group: FakeGroup
    enabled: bool = True
    errored: bool = False
    leaving: bool = False  # disabled without eviction: finishes the kernel it is in
    queue: deque[Kernel] = field(default_factory=deque)
    gp_put: int = 0
    gp_get: int = 0
    progress_us: int = 0

    def launch(self, duration_us: int, touches: Iterable[int] = ()) -> None:
        """Queue a kernel. Works on a disabled channel as well: the doorbell is ignored, the queue is not."""
        self.queue.append(Kernel(duration_us, tuple(touches)))
        self.gp_put += 1

    @property
    def is_runnable(self) -> bool:
        return bool(self.queue) and not self.errored and (self.enabled or self.leaving)


class FakeGpu:
    def __init__(self, clock: ManualClock) -> None:
        self.groups: list[FakeGroup] = []
        self.faults: list[str] = []
        self.memory_used = 0
        self._resident: dict[str, FakeChannel] = {}
        self._slice_left_us: dict[str, int] = {}
        clock.gpus.append(self)

    def run(self, microseconds: int) -> None:
        """Let time pass on every engine."""
        for engine in {group.engine for group in self.groups}:
            left_us = microseconds
            while left_us > 0 and (channel := self._pick(engine)) is not None:
                left_us -= self._execute(channel, left_us)

    def is_resident(self, channel: FakeChannel) -> bool:
        return self._resident.get(channel.group.engine) is channel

    def disable(self, channel: FakeChannel, evict: bool = True) -> None:
        channel.enabled = False
        channel.leaving = not evict and self.is_resident(channel)
        if evict:
            self.evict(channel)

    def enable(self, channel: FakeChannel) -> None:
        channel.enabled = True
        channel.leaving = False

    def evict(self, channel: FakeChannel) -> None:
        """Take a channel off the hardware, keeping its place in the kernel."""
        if self.is_resident(channel):
            del self._resident[channel.group.engine]

    def remove(self, group: FakeGroup) -> None:
        for channel in group.channels:
            self.evict(channel)
        self.groups.remove(group)

    def _pick(self, engine: str) -> FakeChannel | None:
        """The resident channel until its slice ends, then the next runnable one in turn."""
        resident = self._resident.get(engine)
        if resident is not None and resident.is_runnable and self._slice_left_us[engine] > 0:
            return resident
        channels = [c for group in self.groups if group.engine == engine for c in group.channels]
        start = channels.index(resident) + 1 if resident in channels else 0
        for channel in channels[start:] + channels[:start]:
            if channel.is_runnable:
                self._resident[engine] = channel
                self._slice_left_us[engine] = channel.group.timeslice_us
                return channel
        self._resident.pop(engine, None)
        return None

    def _execute(self, channel: FakeChannel, limit_us: int) -> int:
        """Run the kernel at the head for at most `limit_us`; return the time taken."""
        kernel, engine = channel.queue[0], channel.group.engine
        memory = [channel.group.space.translate(address) for address in kernel.touches]
        if None in memory:
            self._fault(channel.group)
            return 0
        for touched in memory:
            assert touched is not None
            touched.writers.add(channel.group.name)
        span_us = min(limit_us, kernel.left_us, self._slice_left_us[engine])
        kernel.left_us -= span_us
        self._slice_left_us[engine] -= span_us
        channel.progress_us += span_us
        if not kernel.left_us:
            channel.queue.popleft()
            channel.gp_get += 1
            channel.leaving = False
        return span_us

    def _fault(self, group: FakeGroup) -> None:
        self.faults.append(group.name)
        for channel in group.channels:
            channel.errored = True
            self.evict(channel)
