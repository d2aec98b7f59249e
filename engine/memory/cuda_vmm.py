"""CudaWindow: KV slabs in GPU memory that are mapped and unmapped at run time, by the CUDA virtual memory calls.

One process, the owner, creates a physical handle per slab, once, and passes them on as file descriptors; every other process
imports them. Mapping is the only thing that happens later: no handle is ever created where somebody waits. An address of a
window is never without memory: what no slab backs points at the window's sink, one handle mapped many times, so a kernel that
was stopped in the middle of a layer and has lost its slab meanwhile reads and writes the sink and does not fault.

There is no call that replaces a mapping. Between the unmap and the new mapping's access the address is a hole, and a kernel
that touches it then costs its process the CUDA context: whoever calls `map` or `unmap` sees to it that none can (the channels
are off, the stream is drained, or no kernel knows the slab).

The driver's calls go through `VmmDriver`; `CudaVmm` makes them with cuda-python. Costs of 65 to 90 us a mapping, whatever its
size, are reported for A100 and A6000 (kvcached; vAttention, Table 3), hence slabs of 32 to 128 MiB. Not yet run on a GPU.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol

import torch

from engine.errors import InvalidConfig, SluiceError

_MAX_FDS = 128  # in one message; the kernel allows 253
_LEAST_BINDINGS = (12, 9, 1)


class VmmError(SluiceError):
    """A virtual memory call of the driver failed; the subclass says what to do.

    VmmError
    ├── VmmUnavailable   no such windows here: use another device, driver or installation
    ├── NoDeviceMemory   ask for less
    └── VmmFailed        this process's device memory is in doubt: restart the process
    """


class VmmUnavailable(VmmError, InvalidConfig):
    """Missing package, driver, device or support."""


class NoDeviceMemory(VmmError, InvalidConfig):
    """The device has no room for the slabs."""


class VmmFailed(VmmError):
    """A call that must not fail did."""


class VmmDriver(Protocol):
    """The driver's virtual memory calls, for one device. Handles and addresses are plain integers; all raise VmmError."""

    def granularity(self) -> int:
        """Sizes and addresses are multiples of it."""
        ...

    def reserve(self, size: int) -> int: ...

    def free(self, address: int, size: int) -> None:
        """Give a reserved range back, with nothing mapped in it."""
        ...

    def create(self, size: int) -> int: ...

    def release(self, handle: int) -> None:
        """Drop the handle. The memory goes when nothing maps it and no process holds a handle of it."""
        ...

    def export_fd(self, handle: int) -> int:
        """A file descriptor for the memory; the caller closes it."""
        ...

    def import_fd(self, fd: int) -> int:
        """A handle of this process for the memory behind a descriptor, which stays the caller's."""
        ...

    def map(self, address: int, size: int, handle: int) -> None:
        """The mapping may not be touched before `set_access`."""
        ...

    def set_access(self, address: int, size: int) -> None: ...

    def unmap(self, address: int, size: int) -> None:
        """Exactly one whole mapping."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done all that this process launched."""
        ...


class CudaWindow:
    """`memory.window.Window` on a GPU. Not thread-safe.

    Without `handles` it creates the slabs' memory; with them, it takes over those that `receive` got from the owner. `view`
    makes the tensor over (address, bytes). Raises VmmError or InvalidConfig; nothing is left behind then.
    """

    def __init__(
        self,
        num_slabs: int,
        slab_bytes: int,
        driver: VmmDriver,
        handles: Iterable[int] = (),
        view: Callable[[int, int], torch.Tensor] | None = None,
    ) -> None:
        self.num_slabs = num_slabs
        self.slab_bytes = slab_bytes
        self._driver = driver
        self._view = view or _device_bytes
        self._tensor: torch.Tensor | None = None
        self._slabs = list(handles)
        self._sink: int | None = None
        self._base: int | None = None
        self._behind: list[int | None] = [None] * num_slabs  # the handle mapped at each slab's address
        try:
            self._check_sizes()
            self._reserve()
        except BaseException:
            with suppress(VmmError):
                self.close()
            raise

    def _check_sizes(self) -> None:
        granularity = self._driver.granularity()
        if self.num_slabs < 1 or self.slab_bytes < 1 or self.slab_bytes % granularity:
            raise InvalidConfig(
                f"{self.num_slabs} slabs of {self.slab_bytes} bytes: this GPU maps multiples of {granularity} bytes; "
                "set --slab-size to 32MiB, 64MiB or 128MiB"
            )
        if self._slabs and len(self._slabs) != self.num_slabs:
            raise ValueError(f"{len(self._slabs)} handles for {self.num_slabs} slabs")

    def _reserve(self) -> None:
        driver = self._driver
        while len(self._slabs) < self.num_slabs:
            self._slabs.append(driver.create(self.slab_bytes))
        self._sink = driver.create(self.slab_bytes)
        self._base = driver.reserve(self.num_slabs * self.slab_bytes)
        for slab in range(self.num_slabs):
            self._fill(slab, self._sink)

    @property
    def tensor(self) -> torch.Tensor:
        """uint8 [num_slabs * slab_bytes] on the device. No view of it may be used after `close`."""
        assert self._base is not None, "the window is closed"
        if self._tensor is None:
            self._tensor = self._view(self._base, self.num_slabs * self.slab_bytes)
        return self._tensor

    def address(self, slab: int) -> int:
        """Where the slab begins in this process."""
        assert self._base is not None, "the window is closed"
        return self._base + slab * self.slab_bytes

    def is_mapped(self, slab: int) -> bool:
        return self._behind[slab] == self._slabs[slab]

    def map(self, slab: int) -> None:
        """Put the slab's own memory at its address, in place of the sink."""
        assert not self.is_mapped(slab), f"slab {slab} is mapped already"
        self._replace(slab, self._slabs[slab])

    def unmap(self, slab: int) -> None:
        """Put the sink at the slab's address."""
        assert self.is_mapped(slab), f"slab {slab} is not mapped"
        assert self._sink is not None
        self._replace(slab, self._sink)

    def send(self, sock: socket.socket) -> None:
        """Pass all slabs over a unix socket to a process that calls `receive`, a few descriptors at a time.

        The next ones go when the last ones were taken: what is under way counts against the limit on open files. Raises OSError
        or VmmError; returns early if the other process ends.
        """
        slabs = tuple(self._slabs)
        for first in range(0, len(slabs), _MAX_FDS):
            if first and not sock.recv(1):
                return
            fds: list[int] = []
            try:
                fds += (self._driver.export_fd(handle) for handle in slabs[first : first + _MAX_FDS])
                socket.send_fds(sock, [b"s"], fds)
            finally:
                _close_all(fds)

    def synchronize(self) -> None:
        """Wait until the device has done all that this process launched."""
        self._driver.synchronize()

    def close(self) -> None:
        """Wait for the device, unmap, give the addresses back, then the handles. May be repeated; raises the first error."""
        errors: list[VmmError] = []
        self._tensor = None
        if self._base is not None:
            _attempt(errors, self._driver.synchronize)
            for slab, handle in enumerate(self._behind):
                if handle is not None:
                    _attempt(errors, self._driver.unmap, self.address(slab), self.slab_bytes)
            _attempt(errors, self._driver.free, self._base, self.num_slabs * self.slab_bytes)
        for handle in [*self._slabs, *([] if self._sink is None else [self._sink])]:
            _attempt(errors, self._driver.release, handle)
        self._base, self._sink, self._slabs = None, None, []
        self._behind = [None] * self.num_slabs
        if errors:
            raise errors[0]

    def _replace(self, slab: int, handle: int) -> None:
        """Unmap what is there and map `handle`. If that fails, the sink is mapped so that no hole stays."""
        self._empty(slab)
        try:
            self._fill(slab, handle)
        except VmmError as error:
            assert self._sink is not None
            try:
                self._fill(slab, self._sink)
            except VmmError:
                raise VmmFailed(f"slab {slab} is a hole in the KV window, restart this process: {error}") from error
            raise

    def _empty(self, slab: int) -> None:
        if self._behind[slab] is not None:
            self._driver.unmap(self.address(slab), self.slab_bytes)
            self._behind[slab] = None

    def _fill(self, slab: int, handle: int) -> None:
        """Map `handle` at an empty address, accessible; on an error the address is empty again."""
        address = self.address(slab)
        self._driver.map(address, self.slab_bytes, handle)
        try:
            self._driver.set_access(address, self.slab_bytes)
        except VmmError:
            self._driver.unmap(address, self.slab_bytes)
            raise
        self._behind[slab] = handle


def receive(sock: socket.socket, num_slabs: int, driver: VmmDriver) -> list[int]:
    """Handles, in this process, for the slabs that the owner's `CudaWindow.send` passes. Raises VmmError.

    The window that takes them over releases them; its own descriptors are closed before this returns.
    """
    handles: list[int] = []
    try:
        while len(handles) < num_slabs:
            data, fds, flags, _ = socket.recv_fds(sock, 1, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
            try:
                if flags & socket.MSG_CTRUNC:
                    raise VmmUnavailable("descriptors of GPU memory were lost: raise the limit on open files (ulimit -n)")
                if not data or not fds:
                    raise VmmFailed("the owner of the GPU memory ended before it had passed all slabs: start again")
                handles += (driver.import_fd(fd) for fd in fds)
            finally:
                _close_all(fds)
            if len(handles) < num_slabs:
                with suppress(OSError):  # an owner that has ended is seen at the next turn
                    sock.send(b"s")
    except BaseException:
        for handle in handles:
            with suppress(VmmError):
                driver.release(handle)
        raise
    return handles


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _attempt(errors: list[VmmError], call: Callable[..., None], *arguments: int) -> None:
    try:
        call(*arguments)
    except VmmError as error:
        errors.append(error)


class _DeviceRange:
    """Tells torch of device memory that it did not allocate (CUDA Array Interface, version 3)."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "strides": None,
            "data": (address, False),
            "version": 3,
        }


def _device_bytes(address: int, size: int) -> torch.Tensor:
    """The range as a tensor, on the device that the driver says the address belongs to."""
    tensor = torch.as_tensor(_DeviceRange(address, size))
    if tensor.data_ptr() != address:
        raise VmmFailed("torch copied the KV window instead of viewing it: use another version of torch")
    return tensor


def bindings_version() -> tuple[int, ...]:
    """Of cuda-python's bindings; () if they do not say."""
    import cuda.bindings

    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", getattr(cuda.bindings, "__version__", ""))
    return () if found is None else tuple(int(part or 0) for part in found.groups())


class CudaVmm:
    """`VmmDriver` by cuda-python, for the device with this number. Any thread may call.

    Raises VmmUnavailable if anything is missing. Older bindings than 12.9.1 hold the interpreter lock during a call: if a remap
    were stuck behind channels that are off, the watchdog that switches them on again could not run.
    """

    def __init__(self, device: int = 0) -> None:
        try:
            from cuda.bindings import driver as cuda
        except ImportError as error:
            raise VmmUnavailable("GPU memory windows need cuda-python: pip install 'sluice[cuda]'") from error
        if (version := bindings_version()) < _LEAST_BINDINGS:
            raise VmmUnavailable(f"cuda-python {'.'.join(map(str, version))} is too old: pip install 'cuda-python>=12.9.1'")
        self._cuda: Any = cuda
        self._thread = threading.local()
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # how cuda-python says that there is no libcuda
            raise VmmUnavailable(f"no NVIDIA driver here ({error}): install one, or use --device cpu") from error
        self._device = self._call("cuDeviceGet", device)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)  # torch's own
        for name in ("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED", "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED"):
            attribute = getattr(cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            if not self._call("cuDeviceGetAttribute", attribute, self._device):
                raise VmmUnavailable(f"GPU {device} does not support {name.lower()}: use another device")
        self._fd_type = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._properties = cuda.CUmemAllocationProp()
        self._properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = device
        self._properties.requestedHandleTypes = self._fd_type
        self._access = cuda.CUmemAccessDesc()
        self._access.location = self._properties.location
        self._access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE

    def granularity(self) -> int:
        option = self._cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        return int(self._in_context("cuMemGetAllocationGranularity", self._properties, option))

    def reserve(self, size: int) -> int:
        return int(self._in_context("cuMemAddressReserve", size, 0, 0, 0))

    def free(self, address: int, size: int) -> None:
        self._in_context("cuMemAddressFree", address, size)

    def create(self, size: int) -> int:
        return int(self._in_context("cuMemCreate", size, self._properties, 0))

    def release(self, handle: int) -> None:
        self._in_context("cuMemRelease", handle)

    def export_fd(self, handle: int) -> int:
        return int(self._in_context("cuMemExportToShareableHandle", handle, self._fd_type, 0))

    def import_fd(self, fd: int) -> int:
        return int(self._in_context("cuMemImportFromShareableHandle", fd, self._fd_type))

    def map(self, address: int, size: int, handle: int) -> None:
        self._in_context("cuMemMap", address, size, 0, handle, 0)

    def set_access(self, address: int, size: int) -> None:
        self._in_context("cuMemSetAccess", address, size, [self._access], 1)

    def unmap(self, address: int, size: int) -> None:
        self._in_context("cuMemUnmap", address, size)

    def synchronize(self) -> None:
        self._in_context("cuCtxSynchronize")

    def _in_context(self, name: str, *arguments: Any) -> Any:
        """`_call` with torch's context current in this thread, whichever it is."""
        if not hasattr(self._thread, "has_context"):
            self._call("cuCtxSetCurrent", self._context)
            self._thread.has_context = True
        return self._call(name, *arguments)

    def _call(self, name: str, *arguments: Any) -> Any:
        """What the call returns beside its status."""
        status, *results = getattr(self._cuda, name)(*arguments)
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            raise error_of(status.name, name)
        return results[0] if results else None


_NO_ROOM = "the GPU has no room: lower --kv-cache-memory, or end what else uses the device"
_UNSUPPORTED = "this driver or device does not offer it: use another device, or --device cpu"
_ADVICE: dict[str, tuple[type[VmmError], str]] = {
    "CUDA_ERROR_OUT_OF_MEMORY": (NoDeviceMemory, _NO_ROOM),
    "CUDA_ERROR_NO_DEVICE": (VmmUnavailable, "no GPU is visible: check CUDA_VISIBLE_DEVICES and nvidia-smi"),
    "CUDA_ERROR_INVALID_DEVICE": (VmmUnavailable, "there is no GPU with this number: check CUDA_VISIBLE_DEVICES"),
    "CUDA_ERROR_NOT_SUPPORTED": (VmmUnavailable, _UNSUPPORTED),
    "CUDA_ERROR_NOT_PERMITTED": (VmmUnavailable, _UNSUPPORTED),
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": (VmmUnavailable, "libcuda and the kernel module differ: reinstall the driver"),
    "CUDA_ERROR_OPERATING_SYSTEM": (VmmUnavailable, "the system refused: raise the limit on open files (ulimit -n)"),
}


def error_of(status: str, call: str) -> VmmError:
    """The exception for a CUresult by its name."""
    kind, advice = _ADVICE.get(status, (VmmFailed, "the device memory of this process is in doubt: restart the process"))
    return kind(f"{call}: {status}: {advice}")
