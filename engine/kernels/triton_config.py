"""Launch shapes of the attention kernels: one small table per architecture, looked up and never searched at run time.

The numbers follow from the shared memory and registers that the compiler reports (bench/triton_compile.py prints them);
they have not yet been measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Launch:
    """One attention kernel's shape."""

    block_m: int  # query rows of a tile: tokens x heads of one KV head
    block_n: int  # keys of a tile
    num_warps: int
    num_stages: int
    resident: int  # programs that share a multiprocessor
    min_keys: int  # a row is not cut into shorter pieces: a partial result would cost more than it spreads


@dataclass(frozen=True, slots=True)
class Tuning:
    """How attention runs on one device."""

    prefill: Launch
    decode: Launch
    multiprocessors: int

    def holding(self, group: int) -> Tuning:
        """With tiles that hold at least one token of `group` query heads."""
        least = 1 << (group - 1).bit_length()
        prefill, decode = (replace(x, block_m=max(x.block_m, least)) for x in (self.prefill, self.decode))
        return replace(self, prefill=prefill, decode=decode)


def _prefill(block_m: int, block_n: int, num_warps: int, num_stages: int, resident: int) -> Launch:
    return Launch(block_m, block_n, num_warps, num_stages, resident, min_keys=1024)


def _decode(block_n: int, num_stages: int, resident: int) -> Launch:
    return Launch(16, block_n, 4, num_stages, resident, min_keys=256)


# (architecture, padded head size) -> (prefill, decode) for two-byte types. Larger prefill tiles spill registers.
_HALF: dict[tuple[int, int], tuple[Launch, Launch]] = {
    (80, 64): (_prefill(128, 64, 4, 3, 2), _decode(64, 4, 3)),
    (80, 128): (_prefill(128, 64, 8, 3, 1), _decode(64, 3, 2)),
    (80, 256): (_prefill(64, 32, 8, 2, 1), _decode(32, 3, 2)),
    (90, 64): (_prefill(128, 64, 4, 3, 2), _decode(64, 4, 4)),
    (90, 128): (_prefill(128, 64, 8, 3, 1), _decode(64, 3, 3)),
    (90, 256): (_prefill(128, 32, 8, 2, 1), _decode(32, 3, 2)),
}
# No tensor cores: float32 is for tests and small models.
_FLOAT = (_prefill(32, 16, 8, 2, 2), Launch(16, 32, 8, 2, 2, min_keys=256))
_INTERPRETED = 8  # multiprocessors of the imaginary sm_80 that the interpreter stands for


def tuning(device: torch.device, head_block: int, dtype: torch.dtype) -> Tuning:
    """The tuning for a device and a padded head size."""
    capability, multiprocessors = 80, _INTERPRETED
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability, multiprocessors = properties.major * 10 + properties.minor, properties.multi_processor_count
    prefill, decode = launches(capability, head_block, dtype)
    return Tuning(prefill, decode, multiprocessors)


def launches(capability: int, head_block: int, dtype: torch.dtype) -> tuple[Launch, Launch]:
    """(prefill, decode) for a compute capability (major * 10 + minor). Raises ValueError for heads over 256."""
    if head_block > 256:
        raise ValueError(f"attention heads of {head_block} are not supported, 256 is the most")
    if dtype == torch.float32:
        return _FLOAT
    small = capability in (86, 87, 89) or capability >= 120  # 99 KiB of shared memory: the shapes of a larger head fit
    architecture = 90 if 90 <= capability < 120 else 80  # sm_100 has room for what fits sm_90
    size = 256 if small and head_block == 128 else max(64, head_block)
    return _HALF[architecture, size]
