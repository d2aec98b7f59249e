"""Which kernels serve a device: the one place that knows what there is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from engine.errors import InvalidConfig
from engine.kernels.api import Attention, AttentionShape, DeviceMemory, Graphs, KVLayout, Ops, Pace, Packer
from engine.kernels.reference import TorchAttention, TorchOps
from engine.kernels.sampling import Sampler, sample

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backend:
    """The kernels of one device. `attention` takes the KV as `KVLayout.view` gives it.

    `own_memory`: weights and KV lie in memory of the device's own. `pace` is None where launching a layer is running it.
    `graphs`, if any, takes the model, its attention and the most rows of a step, `packer` a layout and the bytes of a window
    in memory of its own. `trim` is called when weights are packed, and
    `work_bytes` tells the most that steps have taken since, beside weights and KV, where that is known.
    """

    name: str
    device: torch.device
    ops: Ops
    attention: Callable[[torch.Tensor, AttentionShape], Attention]
    sample: Sampler = sample
    own_memory: bool = False
    pace: Callable[[], Pace] | None = None
    graphs: Callable[[Any, Any, int], Graphs] | None = None
    packer: Callable[[KVLayout, torch.Tensor], Packer] | None = None
    trim: Callable[[], None] = field(default=lambda: None)
    work_bytes: Callable[[], int] = field(default=lambda: 0)


def load_backend(device: str = "auto", attention: str = "auto") -> Backend:
    """The best kernels for `device` ("auto", "cpu" or "cuda"). Raises InvalidConfig, with the remedy, if it cannot serve.

    `attention`: "auto", "triton", "flashinfer", or "torch", which is slow and right everywhere.
    """
    device = resolve_device(device)
    if device == "cpu" and attention in ("triton", "flashinfer"):
        raise InvalidConfig(f"--attention-backend {attention} needs a GPU; use auto or torch, or --device cuda")
    backend = _cuda(attention) if device == "cuda" else _cpu()
    if attention == "torch":
        return replace(backend, attention=lambda kv, shape: TorchAttention(kv), graphs=None)
    return backend


def resolve_device(device: str) -> str:
    """"cpu" or "cuda"; "auto" is a CUDA device if one can serve. Raises InvalidConfig for any other name."""
    if device not in ("auto", "cpu", "cuda"):
        raise InvalidConfig(f"device must be auto, cpu or cuda, got {device!r}")
    if device != "auto":
        return device
    from engine.kernels import cuda

    return "cpu" if cuda.unavailable() else "cuda"


def device_memory(device: str) -> DeviceMemory | None:
    """What the device has now; None if it is the host's memory. Raises InvalidConfig if the device cannot serve."""
    if resolve_device(device) == "cpu":
        return None
    from engine.kernels import cuda

    return cuda.memory(cuda.device())


def step_tokens(device: str) -> int:
    """Most tokens of a step that suit the device. A processor is busy with a few hundred."""
    memory = device_memory(device)
    if memory is None:
        return 512
    from engine.kernels import cuda

    return cuda.step_tokens(memory.total)


def _cuda(attention: str) -> Backend:
    from engine.kernels import cuda

    device = cuda.device()
    from engine.kernels import triton_sampling
    from engine.kernels.cuda_graphs import DecodeGraphs
    from engine.kernels.triton_ops import TritonOps
    from engine.kernels.triton_pages import PagePacker

    cuda.keep_fused_arithmetic()
    return Backend(
        "cuda",
        device,
        TritonOps(),
        lambda kv, shape: cuda.make_attention(kv, shape, attention),
        sample=triton_sampling.sample,
        own_memory=True,
        pace=cuda.Pace,
        graphs=DecodeGraphs,
        packer=PagePacker,
        trim=cuda.trim,
        work_bytes=cuda.work_bytes,
    )


def _cpu() -> Backend:
    """The compiled kernels, or the reference where numba or torch's OpenMP and oneDNN are missing."""
    device = torch.device("cpu")
    if torch.backends.mkldnn.is_available():
        _log.info("loading the CPU kernels; the first start of a version compiles them, up to ten seconds")
        try:
            from engine.kernels import cpu, cpu_loops
        except ModuleNotFoundError as error:
            _log.info("no compiled CPU kernels (%s): several times slower", error)
        else:
            if cpu_loops.is_available():
                return Backend("cpu", device, cpu.CpuOps(), lambda kv, shape: cpu.make_attention(kv))
    return Backend("cpu-reference", device, TorchOps(), lambda kv, shape: TorchAttention(kv))
