"""The CUDA backend: the Triton kernels, what keeps the host from running away from the device, and the device's memory.

`torch.cuda` is asked nothing before `unavailable` said that there is a device. Not yet run on a GPU: the kernels are checked
under Triton's interpreter and compiled ahead of time, the rest is short enough to be read.
"""

from __future__ import annotations

import gc
import importlib.util
from collections import deque
from dataclasses import dataclass

import torch

from engine.errors import InvalidConfig
from engine.kernels.api import Attention, AttentionShape, DeviceMemory

GRANULE = 2 * 2**20  # the unit in which the driver hands out device memory
SLAB_BYTES = 64 * 2**20  # mapping costs the same for any size: fewer, larger slabs
_LAYERS_AHEAD = 2


def unavailable() -> str | None:
    """Why there is no serving on CUDA here, in words; None if there is."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of it, or use --device cpu"
    if not torch.cuda.is_available():
        return "torch finds no usable CUDA device: see nvidia-smi for the driver and CUDA_VISIBLE_DEVICES for what is hidden"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0; use --device cpu"
    if importlib.util.find_spec("triton") is None:
        return "the CUDA kernels need the package triton (it comes with torch's CUDA builds on Linux)"
    return None


def device() -> torch.device:
    """The device to serve on. Raises InvalidConfig, with the remedy."""
    if reason := unavailable():
        raise InvalidConfig(f"device 'cuda' cannot serve: {reason}")
    return torch.device("cuda", torch.cuda.current_device())


def memory(device: torch.device) -> DeviceMemory:
    """Of the whole device; `used` counts every process and this one's own CUDA context."""
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, total - free, GRANULE, SLAB_BYTES)


def make_attention(kv: torch.Tensor, shape: AttentionShape) -> Attention:
    from engine.kernels.triton_attention import TritonAttention

    return TritonAttention(
        kv, shape.num_heads, max_tokens=shape.max_tokens, max_rows=shape.max_rows, windows=shape.windows
    )


def keep_fused_arithmetic() -> None:
    """Have Triton contract a * b + c, as all its releases up to 3.9 do by default and as the kernels were checked."""
    import triton

    knobs = getattr(triton, "knobs", None)  # from 3.4 on
    if knobs is not None:
        knobs.language.default_fp_fusion = True


def trim() -> None:
    """Give the memory that loading left behind back to the device, so that the KV window finds it."""
    gc.collect()
    torch.cuda.empty_cache()


class Pace:
    """Keeps the host at most two layers ahead of the device, so that a pass can still be stopped at a layer boundary.

    Without it the host has launched the last layer long before the device has finished the first.
    """

    def __init__(self) -> None:
        self._events: deque[torch.cuda.Event] = deque()

    def layer_launched(self) -> None:
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._events.append(event)
        if len(self._events) > _LAYERS_AHEAD:
            self._events.popleft().synchronize()


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A CUDA device in words and numbers."""

    name: str
    capability: str
    multiprocessors: int
    cuda_runtime: str
    memory: DeviceMemory


def facts() -> DeviceFacts:
    """Of the device that would serve; makes this process's CUDA context. Raises InvalidConfig if none can."""
    chosen = device()
    torch.zeros(1, device=chosen)
    properties = torch.cuda.get_device_properties(chosen)
    return DeviceFacts(
        properties.name,
        f"{properties.major}.{properties.minor}",
        properties.multi_processor_count,
        str(torch.version.cuda),
        memory(chosen),
    )


def smoke_test() -> None:
    """Compile and run one Triton kernel and compare it with torch. Raises whatever goes wrong."""
    from engine.kernels.triton_ops import TritonOps

    x = torch.randn(3, 256, device=device())
    out = TritonOps().silu_mul(x)
    torch.testing.assert_close(out, torch.nn.functional.silu(x[:, :128]) * x[:, 128:])
