"""A GPU made of host memory, for two real processes: what CUDA and the resource manager would do for the engine's own classes.

Memory is memfds at fixed addresses, so a kernel that touches an address without a mapping dies of SIGSEGV, as on a device it
would lose its context. Kernels are the CPU's operations, run by a thread of their own behind a queue (`Queue`). The resource
manager (`Manager`) is nvdriver's fake, in the test's process: an open file of it is a unix socket, which survives being passed
on and closes with its last holder. Channels that are off hold a lock that every operation needs.

What no device would forgive is written to `violations`: an operation that runs while an address is a hole, an unmap under a
running operation, a slab that two processes map.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import mmap
import os
import queue
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar

import torch

import nvdriver.api
import nvdriver.grant
from engine.colocate import cuda_gate
from engine.kernels import select
from engine.kernels.api import DeviceMemory, KVLayout
from engine.memory import cuda_vmm
from nvdriver import abi
from nvdriver.device import LinuxFile, LinuxHost
from nvdriver.fake import FakeDriver
from nvdriver.fake_process import FakeContext, FakeFile, FakeProcess

GRAIN = 4096
FOLDER = "SLUICE_TEST_GPU"  # in the environment: where the machine's sockets, locks and violations are
_MAKE_CONTEXT = 1
_HEAD = struct.Struct("QII")  # request, bytes of the record, bytes of the parameters
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FIXED, _NORESERVE = 0x10, 0x4000


def folder() -> Path:
    return Path(os.environ[FOLDER])


def violation(text: str) -> None:
    with (folder() / "violations").open("a") as file:
        file.write(f"{os.getpid()}: {text}\n")


def _mmap(address: int, size: int, protection: int, flags: int, fd: int = -1) -> int:
    got = _libc.mmap(address or None, size, protection, flags, fd, 0)
    assert got not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    return int(got)


# -- memory


@dataclasses.dataclass(eq=False)
class _Handle:
    fd: int  # of this process's own open file, so that locks tell processes apart
    size: int
    shared: bool = False
    mappings: int = 0


class HostVmm:
    """`VmmDriver` over memfds. `device` is None where operations run in the thread that launches them."""

    def __init__(self, device: Queue | None = None) -> None:
        self.device = device
        self.holes: set[int] = set()
        self._handles: dict[int, _Handle] = {}
        self._mapped: dict[int, _Handle] = {}
        if device is not None:
            device.vmm = self

    def granularity(self) -> int:
        return GRAIN

    def reserve(self, size: int) -> int:
        return _mmap(0, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)

    def free(self, address: int, size: int) -> None:
        assert not any(address <= at < address + size for at in self._mapped)
        _libc.munmap(address, size)

    def create(self, size: int) -> int:
        fd = os.memfd_create("gpu-memory", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return self._enter(fd, size, shared=False)

    def _enter(self, fd: int, size: int, shared: bool) -> int:
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        os.close(fd)
        self._handles[own] = _Handle(own, size, shared)
        return own

    def release(self, handle: int) -> None:
        os.close(self._handles.pop(handle).fd)

    def export_fd(self, handle: int) -> int:
        self._handles[handle].shared = True
        return os.dup(handle)

    def import_fd(self, fd: int) -> int:
        return self._enter(os.dup(fd), os.fstat(fd).st_size, shared=True)

    def map(self, address: int, size: int, handle: int) -> None:
        found = self._handles[handle]
        assert address not in self._mapped and size == found.size
        if found.shared:
            try:
                fcntl.flock(found.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                violation("a slab is mapped in two processes")
        _mmap(address, size, 0, mmap.MAP_SHARED | _FIXED, found.fd)
        self._mapped[address] = found
        found.mappings += 1

    def set_access(self, address: int, size: int) -> None:
        assert address in self._mapped
        _libc.mprotect(address, size, mmap.PROT_READ | mmap.PROT_WRITE)
        self.holes.discard(address)

    def unmap(self, address: int, size: int) -> None:
        if self.device is not None and os.environ.get("SLUICE_TEST_STUCK"):
            self.device.wait_on()
        if self.device is not None and self.device.is_running:
            violation("an unmap under a running kernel")
        self.holes.add(address)
        found = self._mapped.pop(address)
        _mmap(address, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED | _NORESERVE)
        found.mappings -= 1
        if found.shared and not found.mappings:
            fcntl.flock(found.fd, fcntl.LOCK_UN)
        time.sleep(5e-4)  # wide enough to be fallen into

    def synchronize(self) -> None:
        if self.device is not None:
            self.device.synchronize()


def host_bytes(address: int, size: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


# -- the resource manager


class Manager:
    """The machine's driver, in the test's process; one thread an open file."""

    def __init__(self) -> None:
        self.driver = FakeDriver()
        self.driver.on_control = lambda command: self._follow()
        self._contexts: dict[FakeFile, tuple[FakeContext, int]] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(folder() / "rm"))
        self._listener.listen(64)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """Wait until the last descriptor is gone, so that nothing of this machine is left in the next test's process."""
        self._listener.shutdown(socket.SHUT_RDWR)
        for file in list(SocketFile.own):
            file.close()
        for thread in self._threads:
            thread.join(30.0)
            assert not thread.is_alive(), "somebody keeps a descriptor of the driver"
        self._listener.close()

    @property
    def num_contexts(self) -> int:
        """GPU contexts that somebody's descriptor keeps alive."""
        return len(self._contexts)

    @property
    def num_off(self) -> int:
        return sum(not c.enabled for context, _ in list(self._contexts.values()) for c in context.compute.channels)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(sock,), daemon=True))
                self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        pid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        process = FakeProcess(self.driver, pid, os.getuid())
        file = process.open_control()
        with sock:
            while True:
                data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 1)
                if not data:
                    break
                os.write(fds[0], self._answer(process, file, data))
                os.close(fds[0])
        with self.driver._lock:
            context = self._contexts.pop(file, None)
            file.close()
        if context is not None:
            os.close(context[1])

    def _answer(self, process: FakeProcess, file: FakeFile, data: bytes) -> bytes:
        request, size, _ = _HEAD.unpack_from(data)
        record = (ctypes.c_char * size).from_buffer_copy(data, _HEAD.size)
        if request == _MAKE_CONTEXT:
            process.open_control = lambda: file  # type: ignore[method-assign]
            lock = os.open(folder() / f"compute-{process.number}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
            with self.driver._lock:
                self._contexts[file] = FakeContext(process), lock
            return b"\0"
        params = ctypes.create_string_buffer(data[_HEAD.size + size :])
        if request == abi.REQUEST_CONTROL:
            abi.ControlCall.from_buffer(record).params = ctypes.addressof(params)
        try:
            file.ioctl(request, record)  # type: ignore[arg-type]
        except OSError as error:
            return bytes([error.errno or 1])
        return b"\0" + bytes(record) + params.raw[:-1]

    def _follow(self) -> None:
        """The hardware after a control call: when it returns, no channel that is off has an operation running."""
        for context, lock in self._contexts.values():
            off = all(not channel.enabled for channel in context.compute.channels)
            word = folder() / f"off-{context._file._process.number}"
            if off and not word.exists():
                word.touch()  # so that the device stops asking for the lock
                fcntl.flock(lock, fcntl.LOCK_EX)
            elif not off and word.exists():
                word.unlink()
                fcntl.flock(lock, fcntl.LOCK_UN)


class SocketFile(LinuxFile):
    """An open file of the fake driver."""

    own: ClassVar[list[SocketFile]] = []

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.own.append(self)

    def ioctl(self, request: int, record: ctypes.Structure) -> None:
        size, params, at = ctypes.sizeof(record), b"", 0
        if request == abi.REQUEST_CONTROL:
            at, length = record.params, record.params_size
            params = ctypes.string_at(at, length)
        answer = self._ask(_HEAD.pack(request, size, len(params)) + ctypes.string_at(ctypes.addressof(record), size) + params)
        if answer[0]:
            raise OSError(answer[0], os.strerror(answer[0]))
        ctypes.memmove(ctypes.addressof(record), answer[1 : 1 + size], size)
        if at:
            record.params = at
            ctypes.memmove(at, answer[1 + size :], len(params))

    def make_context(self) -> None:
        self._ask(_HEAD.pack(_MAKE_CONTEXT, 0, 0))

    def _ask(self, data: bytes) -> bytes:
        answer, reply = os.pipe()
        sock = socket.socket(fileno=os.dup(self.fileno()))
        try:
            socket.send_fds(sock, [data], [reply])
        finally:
            sock.close()
            os.close(reply)
        with os.fdopen(answer, "rb") as file:
            return file.read()

    def duplicate(self) -> SocketFile:
        return SocketFile(fcntl.fcntl(self.fileno(), fcntl.F_DUPFD_CLOEXEC, 0))

    def close(self) -> None:
        if self in self.own:
            self.own.remove(self)
        super().close()


class SocketHost(LinuxHost):
    """The machine as a process sees it."""

    def version_text(self) -> str:
        return f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {abi.BRANCHES[580]}  Release Build\n"

    def open_control(self) -> SocketFile:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(folder() / "rm"))
        return SocketFile(sock.detach())

    def own_control_files(self) -> list[Any]:
        return [file.duplicate() for file in list(SocketFile.own)]


# -- the device's queue


class Queue:
    """What a process launches, in order, by a thread of its own; every operation needs the process's channels to be on."""

    def __init__(self) -> None:
        self.vmm: HostVmm | None = None
        self.is_running = False
        self._lock = os.open(folder() / f"compute-{os.getpid()}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        self._off = folder() / f"off-{os.getpid()}"
        self._items: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def launch(self, what: Callable[[], None]) -> None:
        self._items.put(what)

    def record(self) -> threading.Event:
        event = threading.Event()
        self.launch(event.set)
        return event

    def synchronize(self) -> None:
        assert threading.current_thread() is not self.thread
        self.record().wait()

    def wait_on(self) -> None:
        while self._off.exists():
            time.sleep(1e-4)

    @contextmanager
    def operation(self, *, touches_window: bool = True) -> Iterator[None]:
        self.wait_on()
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        self.is_running = touches_window
        try:
            if touches_window and self.vmm is not None and self.vmm.holes:
                violation("a kernel ran while an address was a hole")
            yield
        finally:
            self.is_running = False
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _run(self) -> None:
        while True:
            self._items.get()()


class QueueStreams:
    """`StreamOps`: waits in the queue."""

    device: Queue  # of this process

    def make_word(self) -> tuple[Any, int]:
        self._word = ctypes.c_uint32(0)
        return self._word, ctypes.addressof(self._word)

    def wait_zero(self, stream: int, address: int) -> None:
        if threading.current_thread() is not self.device.thread:
            self.device.launch(self._wait)

    def _wait(self) -> None:
        while self._word.value:
            time.sleep(1e-4)


class QueueDevice:
    """`cuda_gate.Device`: the queue. Makes the context, which has the channels."""

    index = 0

    def __init__(self) -> None:
        SocketHost().open_control().make_context()
        self.queue = QueueStreams.device
        self._scratch = torch.zeros(1 << 12)

    def stream(self) -> int:
        return 7

    def work(self) -> None:
        def kernel() -> None:
            with self.queue.operation(touches_window=False):
                self._scratch.add_(1.0)

        self.queue.launch(kernel)

    def synchronize(self) -> None:
        self.queue.synchronize()


class QueuePace:
    """`kernels.api.Pace`, as the GPU's: at most two layers ahead."""

    def __init__(self) -> None:
        self._events: deque[threading.Event] = deque()

    def layer_launched(self) -> None:
        self._events.append(QueueStreams.device.record())
        if len(self._events) > 2:
            self._events.popleft().wait()


class Launched:
    """Operations or an attention, each call of which is a kernel."""

    def __init__(self, inner: Any, device: Queue) -> None:
        self._inner, self._device = inner, device

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if name in ("plan", "pack_linear"):
            return method

        def call(*arguments: Any) -> Any:
            with self._device.operation():
                return method(*arguments)

        return call


class QueuePacker:
    """`kernels.api.Packer`: kernels in the queue."""

    def __init__(self, layout: KVLayout, window: torch.Tensor) -> None:
        self._layout, self._pages = layout, window.view(-1, layout.page_stride)[:, : layout.page_bytes]

    def gather(self, pages: torch.Tensor, packed: torch.Tensor) -> None:
        def kernel() -> None:
            packed[: len(pages)] = self._pages[pages.long()]

        self._launch(kernel)

    def scatter(self, pages: torch.Tensor, packed: torch.Tensor) -> None:
        def kernel() -> None:
            self._pages[pages.long()] = packed[: len(pages)]

        self._launch(kernel)

    def _launch(self, kernel: Callable[[], None]) -> None:
        device = QueueStreams.device

        def run() -> None:
            with device.operation(), torch.inference_mode():
                kernel()

        _look_at_the_window(device)
        device.launch(run)


class SideStream:
    """torch.cuda.Stream, for copies. They run when they are launched, which is when what they wait for has run."""

    def wait_stream(self, other: None) -> None:
        QueueStreams.device.synchronize()

    def synchronize(self) -> None:
        pass


class SideEvent:
    """torch.cuda.Event in such a stream."""

    def __init__(self, enable_timing: bool) -> None:
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: SideEvent) -> float:
        return 1e3 * (end._at - self._at)


# -- installing it


def install(patch: Callable[[Any, str, Any], None], slab_bytes: int, device: Queue | None = None) -> None:
    """Make this process believe in a GPU. With `device`, layers go through its queue; else they run as they are launched."""
    import engine.build

    cpu = select.load_backend("cpu")
    backend = dataclasses.replace(cpu, name="cuda", own_memory=True)
    if device is not None:
        backend = dataclasses.replace(
            backend,
            ops=Launched(cpu.ops, device),
            attention=lambda kv, shape: Launched(cpu.attention(kv, shape), device),
            pace=QueuePace,
            packer=QueuePacker,
        )
        QueueStreams.device = device
        _queue_layers(patch, device)
        patch(torch.cuda, "Stream", SideStream)
        patch(torch.cuda, "Event", SideEvent)
        patch(torch.cuda, "current_stream", lambda: None)
        patch(torch.cuda, "stream", nullcontext)
    patch(select, "resolve_device", lambda name: "cuda")
    patch(select, "load_backend", lambda name="auto", attention="auto": backend)
    patch(select, "device_memory", lambda name: DeviceMemory(1 << 30, 0, GRAIN, slab_bytes))
    patch(engine.build, "_SHARED_SLAB_BYTES", slab_bytes)
    patch(cuda_vmm, "CudaVmm", lambda index: HostVmm(device))
    patch(cuda_vmm, "_device_bytes", host_bytes)
    patch(nvdriver.api, "LinuxHost", SocketHost)
    patch(nvdriver.grant, "LinuxFile", SocketFile)
    options = cuda_gate._options
    scan = nvdriver.api.ScanLimits(clients=64, objects=128)
    patch(cuda_gate, "_options", lambda lease: dataclasses.replace(options(lease), scan=scan))


def _look_at_the_window(device: Queue) -> None:
    """A launch asks the driver about the window's address."""
    for _ in range(3):
        if device.vmm is not None and device.vmm.holes:
            violation("a launch met a hole")
        time.sleep(5e-5)


def _queue_layers(patch: Callable[[Any, str, Any], None], device: Queue) -> None:
    """Layers are queued and their results lie in tensors that they fill later, as on a stream."""
    from engine.model import Model
    from engine.runner import ModelRunner

    run_layer, compute_logits, resume = Model._layer, Model.logits, ModelRunner.resume

    def layer(self: Any, index: int, hidden: Any, residual: Any, rotation: Any, handle: Any) -> Any:
        outs = torch.empty_like(hidden), torch.empty_like(hidden)

        def kernel() -> None:
            with torch.inference_mode():
                for out, result in zip(outs, run_layer(self, index, hidden, residual, rotation, handle), strict=True):
                    out.copy_(result)

        with self.launching():
            _look_at_the_window(device)
            device.launch(kernel)
        return outs

    def logits(self: Any, *arguments: Any) -> Any:
        device.synchronize()
        return compute_logits(self, *arguments)

    def resume_later(self: Any, *arguments: Any) -> Any:
        device.synchronize()
        return resume(self, *arguments)

    patch(Model, "layer", layer)
    patch(Model, "logits", logits)
    patch(ModelRunner, "resume", resume_later)
