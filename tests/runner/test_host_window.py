"""Host windows: two mappings of one memory file, and slabs taken from outside."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import subprocess
import sys

import pytest
import torch

from engine.errors import InvalidConfig
from engine.memory.window import HostWindow

SLAB = 16 * mmap.PAGESIZE


@pytest.fixture
def window():
    window = HostWindow(4, SLAB)
    yield window
    window.close()


def resident(window: HostWindow) -> int:
    return os.fstat(window.fileno()).st_blocks * 512


def test_tensor_covers_the_range_and_starts_as_zeros(window: HostWindow) -> None:
    assert window.tensor.shape == (4 * SLAB,) and window.tensor.dtype == torch.uint8
    assert not window.tensor.any()


def test_reserving_costs_no_memory() -> None:
    window = HostWindow(1 << 16, 1 << 21)  # 128 GiB of addresses
    assert resident(window) == 0
    window.close()


def test_unmap_gives_the_memory_back_and_leaves_zeros(window: HostWindow) -> None:
    for slab in range(4):
        window.map(slab)
    window.tensor.fill_(7)
    assert resident(window) == 4 * SLAB

    window.unmap(2)

    assert resident(window) == 3 * SLAB
    by_slab = window.tensor.view(4, SLAB)
    assert not by_slab[2].any()
    assert all(bool((by_slab[slab] == 7).all()) for slab in (0, 1, 3))


def test_a_slab_can_be_mapped_again(window: HostWindow) -> None:
    window.map(1)
    window.tensor[SLAB] = 9
    window.unmap(1)
    window.map(1)
    assert window.is_mapped(1) and not window.is_mapped(0)
    window.tensor[SLAB] = 3
    assert window.tensor[SLAB] == 3


def test_views_see_the_same_bytes(window: HostWindow) -> None:
    view = window.tensor.view(torch.float32)
    view[5] = 1.5
    assert window.tensor[20:24].view(torch.float32).item() == 1.5


def test_a_second_mapping_sees_writes_and_holes(window: HostWindow) -> None:
    """The arbiter's way: the owner is frozen, another mapping of the same file takes the slab."""
    window.map(0)
    window.map(1)
    window.tensor[: 2 * SLAB] = 5
    other = HostWindow(4, SLAB, fd=window.fileno())
    assert bool((other.tensor[: 2 * SLAB] == 5).all())

    other.punch(0)

    assert not window.tensor[:SLAB].any()
    assert bool((window.tensor[SLAB : 2 * SLAB] == 5).all())
    other.close()
    assert window.tensor[SLAB] == 5


def test_another_process_can_take_a_slab(window: HostWindow) -> None:
    window.map(3)
    window.tensor[3 * SLAB :] = 1
    code = f"from engine.memory.window import HostWindow\nHostWindow(4, {SLAB}, fd={window.fileno()}).punch(3)"
    subprocess.run([sys.executable, "-c", code], check=True, pass_fds=[window.fileno()])
    assert not window.tensor.any()


def test_bookkeeping_refuses_what_cannot_be(window: HostWindow) -> None:
    window.map(0)
    for call, slab in ((window.map, 0), (window.unmap, 1), (window.map, 4), (window.map, -1)):
        with pytest.raises(AssertionError, match=f"slab {slab}"):
            call(slab)


@pytest.mark.parametrize(("slabs", "size"), [(0, SLAB), (2, 0), (2, mmap.PAGESIZE + 1)])
def test_impossible_sizes_are_refused(slabs: int, size: int) -> None:
    with pytest.raises(ValueError, match="whole"):
        HostWindow(slabs, size)


def test_a_file_of_another_size_is_refused(window: HostWindow) -> None:
    with pytest.raises(ValueError, match="memory file has"):
        HostWindow(3, SLAB, fd=window.fileno())


def test_no_address_space_is_said_in_words() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, before[1]))
    try:
        with pytest.raises(InvalidConfig, match=r"GiB of host memory for KV.*less KV"):
            HostWindow(1 << 20, 1 << 21)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_failed_punch_names_the_range(window: HostWindow) -> None:
    with pytest.raises(OSError, match="out of the KV window") as caught:
        window.punch(-1)
    assert caught.value.errno == errno.EINVAL


def test_close_twice_and_with_views_alive() -> None:
    window = HostWindow(1, SLAB)
    view = window.tensor[:10]
    view.fill_(3)
    window.close()
    window.close()
    assert view.tolist() == [3] * 10
    with pytest.raises(AssertionError, match="closed"):
        _ = window.tensor
