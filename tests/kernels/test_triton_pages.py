"""Gathering pages and scattering them back moves exactly their bytes."""

from __future__ import annotations

import pytest
from triton_device import DEVICE, REASON

if DEVICE is None:
    pytest.skip(REASON, allow_module_level=True)

import torch

from engine.kernels.api import KVLayout, fit_slab
from engine.kernels.triton_pages import PagePacker


def window_of(dtype: torch.dtype, num_layers: int, head_dim: int) -> tuple[KVLayout, torch.Tensor]:
    shape = {"num_layers": num_layers, "page_size": 16, "num_kv_heads": 3, "head_dim": head_dim, "dtype": dtype}
    page = num_layers * 2 * 16 * 3 * head_dim * dtype.itemsize
    layout = KVLayout.fit(**shape, slab_bytes=fit_slab([page], granularity=4096, slab_bytes=4096))
    size = 12 * layout.page_stride
    return layout, torch.randint(0, 256, (size,), dtype=torch.uint8, device=DEVICE)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("dtype", "num_layers", "head_dim"), [(torch.bfloat16, 2, 64), (torch.float32, 1, 80)])
def test_there_and_back(dtype, index, num_layers, head_dim):
    layout, window = window_of(dtype, num_layers, head_dim)
    before = window.view(12, layout.page_stride).clone()
    packer = PagePacker(layout, window)
    pages = torch.tensor([7, 0, 11, 3], dtype=index, device=DEVICE)
    packed = torch.zeros(5, layout.page_bytes, dtype=torch.uint8, device=DEVICE)

    packer.gather(pages, packed)

    assert torch.equal(packed[:4], before[pages.long(), : layout.page_bytes])
    assert not packed[4].any()

    targets = torch.tensor([1, 2, 10, 5], dtype=index, device=DEVICE)
    packer.scatter(targets, packed)

    before[targets.long(), : layout.page_bytes] = packed[:4]
    assert torch.equal(window.view(12, layout.page_stride), before)


def test_wrong_buffers_and_no_pages():
    layout, window = window_of(torch.float16, 1, 64)
    packer = PagePacker(layout, window)
    packed = torch.zeros(1, layout.page_bytes, dtype=torch.uint8, device=DEVICE)

    packer.gather(torch.empty(0, dtype=torch.int32, device=DEVICE), packed)

    with pytest.raises(ValueError, match="contiguous buffer of 2 x"):
        packer.gather(torch.zeros(2, dtype=torch.int32, device=DEVICE), packed)
