"""Windows over a fake driver: never a hole, no handle made late, nothing left at the end, and errors that say what to do."""

from __future__ import annotations

import os
import socket
import threading

import pytest
import torch
from fake_vmm import GRAIN, FakeDevice, FakeVmm

from engine.errors import InvalidConfig, SluiceError
from engine.memory import cuda_vmm
from engine.memory.cuda_vmm import CudaVmm, CudaWindow, NoDeviceMemory, VmmError, VmmFailed, VmmUnavailable, error_of, receive
from engine.memory.window import Window

SLABS, SLAB = 4, 2 * GRAIN


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def driver(device: FakeDevice) -> FakeVmm:
    return FakeVmm(device)


def make(driver: FakeVmm, handles: list[int] | tuple[int, ...] = ()) -> CudaWindow:
    return CudaWindow(SLABS, SLAB, driver, handles)


def touch_all(window: CudaWindow, driver: FakeVmm) -> None:
    """A kernel that reads and writes both ends of every slab."""
    for slab in range(SLABS):
        for address in (window.address(slab), window.address(slab) + SLAB - 1):
            driver.write(address, driver.read(address) + 1)


def test_every_address_has_memory_at_any_time_between_calls(driver: FakeVmm) -> None:
    window: Window = make(driver)
    assert isinstance(window, CudaWindow)
    for step in (lambda: None, lambda: window.map(1), lambda: window.map(3), lambda: window.unmap(1), lambda: window.unmap(3)):
        step()
        touch_all(window, driver)


def test_unbacked_slabs_share_the_one_sink_and_mapped_ones_are_apart(driver: FakeVmm) -> None:
    window = make(driver)
    assert len({id(driver.at(window.address(slab))[0]) for slab in range(SLABS)}) == 1
    for slab in range(SLABS):
        window.map(slab)
    assert len({id(driver.at(window.address(slab))[0]) for slab in range(SLABS)}) == SLABS
    assert len(driver.handles) == SLABS + 1


def test_a_slab_keeps_its_bytes_while_the_sink_takes_what_is_written_meanwhile(driver: FakeVmm) -> None:
    window = make(driver)
    window.map(2)
    driver.write(window.address(2) + 5, 7)
    window.unmap(2)
    driver.write(window.address(2) + 5, 99)
    window.map(2)
    assert driver.read(window.address(2) + 5) == 7


def test_handles_are_made_once(driver: FakeVmm, device: FakeDevice) -> None:
    window = make(driver)
    made = device.created
    for _ in range(3):
        for slab in range(SLABS):
            window.map(slab)
        for slab in range(SLABS):
            window.unmap(slab)
    assert device.created == made == SLABS + 1
    first = driver.calls.index("map")
    assert not {"create", "release", "export", "import", "reserve", "free"} & set(driver.calls[first:])


def test_mapping_twice_and_unmapping_twice_are_mistakes(driver: FakeVmm) -> None:
    window = make(driver)
    window.map(0)
    with pytest.raises(AssertionError, match="mapped already"):
        window.map(0)
    window.unmap(0)
    with pytest.raises(AssertionError, match="not mapped"):
        window.unmap(0)


@pytest.mark.parametrize("mapped", [(), (0, 2), tuple(range(SLABS))])
def test_close_leaves_nothing(mapped: tuple[int, ...], driver: FakeVmm, device: FakeDevice) -> None:
    window = make(driver)
    for slab in mapped:
        window.map(slab)
    assert device.used == (SLABS + 1) * SLAB
    window.close()
    window.close()
    assert driver.is_clean and device.used == 0
    order = [name for name in driver.calls if name in ("unmap", "free", "release")]
    assert order[-SLABS - 2 :] == ["free"] + ["release"] * (SLABS + 1)
    with pytest.raises(AssertionError, match="closed"):
        _ = window.tensor


def test_two_processes_see_the_same_bytes(device: FakeDevice) -> None:
    """Over a real socket, with more slabs than one message carries, and without a descriptor left open."""
    owner, other = FakeVmm(device), FakeVmm(device)
    num = 300
    window = CudaWindow(num, GRAIN, owner)
    open_before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=window.send, args=(ours,))
        sender.start()
        handles = receive(theirs, num, other)
        sender.join()
    assert len(os.listdir("/proc/self/fd")) == open_before
    seen = CudaWindow(num, GRAIN, other, handles)
    for slab in (0, 128, 299):
        window.map(slab)
        owner.write(window.address(slab) + 3, slab + 1)
        window.unmap(slab)
        seen.map(slab)
        assert other.read(seen.address(slab) + 3) == slab + 1
    other.write(seen.address(7), 1)  # a sink of its own: one tenant never reads what the other left in it
    assert owner.read(window.address(7)) == 0
    seen.close()
    assert other.is_clean and device.used == (num + 1) * GRAIN
    window.close()
    assert device.used == 0


def test_the_owners_memory_outlives_a_dead_importer_and_the_other_way_round(device: FakeDevice) -> None:
    owner, other = FakeVmm(device), FakeVmm(device)
    window = make(owner)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        window.send(ours)
        seen = make(other, receive(theirs, SLABS, other))
    seen.map(1)
    owner.die()
    other.write(seen.address(1), 5)
    assert other.read(seen.address(1)) == 5
    other.die()
    assert device.used == 0


def test_an_owner_that_ends_too_early_leaves_no_handles(device: FakeDevice) -> None:
    owner, other = FakeVmm(device), FakeVmm(device)
    window = make(owner)
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            window.send(ours)
        with pytest.raises(VmmFailed, match="ended before"):
            receive(theirs, SLABS + 1, other)
    assert other.is_clean


@pytest.mark.parametrize(
    ("call", "after"), [("reserve", 0), *((call, after) for call in ("create", "map", "set_access") for after in (0, 2))]
)
def test_a_start_that_fails_leaves_nothing(call: str, after: int, driver: FakeVmm, device: FakeDevice) -> None:
    driver.fail[call] = after
    with pytest.raises(VmmFailed):
        make(driver)
    assert driver.is_clean and device.used == 0


@pytest.mark.parametrize("call", ["unmap", "map", "set_access"])
@pytest.mark.parametrize("which", ["map", "unmap"])
def test_a_failing_call_leaves_no_hole(call: str, which: str, driver: FakeVmm, device: FakeDevice) -> None:
    window = make(driver)
    window.map(1)
    window.map(2)
    change, slab = (window.map, 0) if which == "map" else (window.unmap, 1)
    driver.fail[call] = 0
    with pytest.raises(VmmFailed):
        change(slab)
    touch_all(window, driver)
    assert window.is_mapped(1) is (which == "map" or call == "unmap")
    assert not window.is_mapped(0) and window.is_mapped(2)
    window.close()
    assert driver.is_clean and device.used == 0


def test_a_hole_that_cannot_be_mended_is_said_aloud(driver: FakeVmm) -> None:
    window = make(driver)

    def broken(*_: int) -> None:
        raise VmmFailed("cuMemMap: CUDA_ERROR_UNKNOWN")

    driver.map = broken  # type: ignore[method-assign]
    with pytest.raises(VmmFailed, match="slab 3 is a hole in the KV window, restart this process: cuMemMap"):
        window.map(3)
    window.close()
    assert driver.is_clean


def test_a_failing_close_goes_on_with_the_rest(driver: FakeVmm) -> None:
    window = make(driver)
    driver.fail["release"] = 1
    with pytest.raises(VmmFailed):
        window.close()
    assert len(driver.handles) == 1 and not driver.ranges


@pytest.mark.parametrize(("slabs", "size"), [(0, SLAB), (4, 0), (4, GRAIN // 2), (4, SLAB + 1)])
def test_sizes_that_the_gpu_cannot_map(slabs: int, size: int, driver: FakeVmm) -> None:
    with pytest.raises(InvalidConfig, match="--slab-size"):
        CudaWindow(slabs, size, driver)
    assert driver.is_clean


def test_too_little_memory(device: FakeDevice) -> None:
    device.memory = 3 * SLAB
    driver = FakeVmm(device)
    with pytest.raises(NoDeviceMemory):
        make(driver)
    assert driver.is_clean and device.used == 0


def test_the_tensor_is_made_once_over_the_whole_range(driver: FakeVmm) -> None:
    asked: list[tuple[int, int]] = []

    def view(address: int, size: int) -> torch.Tensor:
        asked.append((address, size))
        return torch.zeros(1, dtype=torch.uint8)

    window = CudaWindow(SLABS, SLAB, driver, view=view)
    assert window.tensor is window.tensor
    assert asked == [(window.address(0), SLABS * SLAB)]


def test_a_copy_is_not_taken_for_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "as_tensor", lambda _: torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(VmmFailed, match="copied"):
        cuda_vmm._device_bytes(0x7F0000000000, 8)


def test_torch_is_told_of_bytes_in_place() -> None:
    told = cuda_vmm._DeviceRange(0x7F0000000000, 123).__cuda_array_interface__
    assert told == {"shape": (123,), "typestr": "|u1", "strides": None, "data": (0x7F0000000000, False), "version": 3}


@pytest.mark.parametrize(
    ("status", "kind", "advice"),
    [
        ("CUDA_ERROR_OUT_OF_MEMORY", NoDeviceMemory, "lower --kv-cache-memory"),
        ("CUDA_ERROR_NOT_SUPPORTED", VmmUnavailable, "another device"),
        ("CUDA_ERROR_NO_DEVICE", VmmUnavailable, "CUDA_VISIBLE_DEVICES"),
        ("CUDA_ERROR_ILLEGAL_ADDRESS", VmmFailed, "restart the process"),
        ("CUDA_ERROR_OF_TOMORROW", VmmFailed, "restart the process"),
    ],
)
def test_errors_say_what_to_do(status: str, kind: type[VmmError], advice: str) -> None:
    error = error_of(status, "cuMemCreate")
    assert type(error) is kind and isinstance(error, SluiceError)
    assert f"cuMemCreate: {status}: " in str(error) and advice in str(error)
    assert isinstance(error, InvalidConfig) is (kind is not VmmFailed), "what a start can meet is a matter of configuration"


def test_a_machine_without_cuda_is_told_so_in_words() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(VmmUnavailable, match=r"pip install|no NVIDIA driver|no GPU"):
        CudaVmm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_window_on_a_gpu() -> None:
    """The real calls: bytes written through one mapping are there after the slab was away, and the sink takes the rest."""
    torch.cuda.init()
    driver = CudaVmm(torch.cuda.current_device())
    slab = 16 * driver.granularity()
    window = CudaWindow(3, slab, driver)
    window.map(1)
    middle = window.tensor[slab : 2 * slab]
    assert middle.data_ptr() == window.address(1)
    middle.fill_(7)
    torch.cuda.synchronize()
    window.unmap(1)
    middle.fill_(9)
    torch.cuda.synchronize()
    window.map(1)
    assert int(middle.min()) == int(middle.max()) == 7
    torch.cuda.synchronize()
    window.close()
