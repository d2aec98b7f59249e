"""The CUDA backend: the Triton kernels, what keeps the host from running away from the device, and the device's memory.

`torch.cuda` is asked nothing before `unavailable` said that there is a device. Not yet run on a GPU: the kernels are checked
under Triton's interpreter and compiled ahead of time, the rest is short enough to be read.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import statistics
from collections import deque
from dataclasses import dataclass

import torch

from engine.errors import InvalidConfig
from engine.kernels import phases
from engine.kernels.api import Attention, AttentionShape, BatchMeta, DeviceMemory

_log = logging.getLogger(__name__)

GRANULE = 2 * 2**20  # the unit in which the driver hands out device memory
SLAB_BYTES = 64 * 2**20  # mapping costs the same for any size: fewer, larger slabs
_LAYERS_AHEAD = 2
_TRIAL_CONTEXT, _TRIAL_ROWS, _TRIAL_ROUNDS = 2048, 32, 6  # of the start-up comparison of attentions
_LARGE_STEP = ((64 * 2**30, 8192), (32 * 2**30, 4096), (0, 2048))  # tokens of a step by the device's memory


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


def make_attention(kv: torch.Tensor, shape: AttentionShape, wanted: str = "auto") -> Attention:
    """The attention called "triton" or "flashinfer"; "auto" tries both and takes the faster for each kind of step.

    Trying writes KV, so nobody may own a page yet. Raises InvalidConfig where flashinfer is wanted and cannot serve.
    """
    from engine.kernels import flashinfer_attention
    from engine.kernels.flashinfer_attention import FlashInferAttention
    from engine.kernels.triton_attention import TritonAttention

    def make(kind: type[TritonAttention] | type[FlashInferAttention]) -> TritonAttention | FlashInferAttention:
        rows, windows = shape.max_rows, shape.windows
        return kind(kv, shape.num_heads, max_tokens=shape.max_tokens, max_rows=rows, windows=windows)

    reason = None if wanted == "triton" else flashinfer_attention.unsupported(kv)
    if wanted == "flashinfer":
        if reason is not None:
            raise InvalidConfig(f"--attention-backend flashinfer cannot serve: {reason}")
        return make(FlashInferAttention)
    ours = make(TritonAttention)
    if wanted == "triton" or reason is not None:
        return ours
    try:
        return _faster(ours, make(FlashInferAttention), kv, shape)
    except Exception as error:  # it compiles when first used, for which a machine may lack what it needs
        _log.warning("flashinfer does not work here, attention by triton (%s: %s)", type(error).__name__, error)
        return ours


def _faster(ours: Attention, other: Attention, kv: torch.Tensor, shape: AttentionShape) -> Attention:
    """The faster one for each kind of step, measured on the KV as it is."""
    attentions = {"triton": ours, "flashinfer": other}
    num_pages, page_size = kv.shape[0], kv.shape[3]
    context = min(_TRIAL_CONTEXT, num_pages * page_size - 1)
    count, rows = max(2, min(shape.max_tokens, context)), min(_TRIAL_ROWS, shape.max_rows)
    choice = phases.choose(
        tuple(attentions),
        lambda name, meta: _seconds(attentions[name], meta, kv, shape),
        phases.trial(rows=1, start=0, count=count, page_size=page_size, num_pages=num_pages),
        phases.trial(rows=rows, start=context, count=1, page_size=page_size, num_pages=num_pages),
    )
    _log.info("attention: %s", choice)
    if choice.prompts == choice.singles:
        return attentions[choice.prompts]
    return phases.PhasedAttention(attentions[choice.prompts], attentions[choice.singles])


@torch.inference_mode()
def _seconds(attention: Attention, meta: BatchMeta, kv: torch.Tensor, shape: AttentionShape) -> float:
    """Device time of one layer's attention in such a step, over all layers so that no cache helps; the median of some."""
    num_layers, kv_heads, head_dim = kv.shape[1], kv.shape[4], kv.shape[5]
    tokens = sum(meta.counts)
    heads = (shape.num_heads, kv_heads, kv_heads)
    q, k, v = (torch.randn(tokens, n, head_dim, device=kv.device, dtype=kv.dtype) for n in heads)
    handle = attention.plan(meta)
    taken: list[float] = []
    for _ in range(_TRIAL_ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for layer in range(num_layers):
            attention.run(handle, layer, q, k, v, shape.windows[0])
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3 / num_layers)
    return statistics.median(taken[1:])  # the first compiles


def keep_fused_arithmetic() -> None:
    """Have Triton contract a * b + c, as all its releases up to 3.9 do by default and as the kernels were checked."""
    import triton

    knobs = getattr(triton, "knobs", None)  # from 3.4 on
    if knobs is not None:
        knobs.language.default_fp_fusion = True


def step_tokens(total: int) -> int:
    """Most tokens of a step on a device of `total` bytes: enough to be bound by arithmetic, little beside its memory."""
    return next(tokens for least, tokens in _LARGE_STEP if total >= least)


def trim() -> None:
    """Give the memory that loading left behind back to the device, so that the KV window finds it."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def work_bytes() -> int:
    """The most that steps have taken since `trim`, beside what is allocated for good."""
    return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()


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
