"""The one place that puts parts together: from an EngineConfig to a core that runs.

Decides what "auto" means (device, dtype, KV memory, context length) and says what it decided in the log. Everything with a
tensor behind it is imported inside functions, so that importing this file stays cheap.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from engine.clock import Clock, MonotonicClock
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.demo import DEMO_NAMES, resolve_model
from engine.errors import InvalidConfig
from engine.memory.manager import KVManager
from engine.memory.pages import PagePool
from engine.sched.plan import Runner
from engine.sched.policies import POLICIES
from engine.sched.scheduler import Scheduler
from engine.spec import ModelSpec, load_spec

if TYPE_CHECKING:
    import torch

    from engine.kernels.api import KVLayout

logger = logging.getLogger(__name__)

_KV_SHARE = 0.25  # of the machine's available memory, unless --kv-cache-memory says otherwise
_KV_CEILING = 8 * 2**30
_HOST_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model ready to run, and the numbers that describe it to clients and to the scheduler."""

    path: Path
    spec: ModelSpec
    runner: Runner
    num_slabs: int
    pages_per_slab: int


def model_names(name: str, served: tuple[str, ...]) -> tuple[str, ...]:
    """Names under which clients reach a model, the first one being its id."""
    if served:
        return served
    if name in DEMO_NAMES:
        return DEMO_NAMES
    return (Path(name).resolve().name,)


def load_model(config: EngineConfig, *, progress: bool = True) -> BuiltModel:
    """Read the checkpoint, pack its weights for the device and reserve its KV window."""
    import torch

    from engine.kernels.select import load_backend
    from engine.memory.window import HostWindow
    from engine.model import Model
    from engine.runner import ModelRunner
    from engine.weights import load_weights, random_weights

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    path = resolve_model(config.model, progress=progress)
    spec = load_spec(path)
    backend = load_backend(config.device)
    dtype = _dtype(config, spec, backend.device)
    if config.load_format == "dummy":
        weights = random_weights(spec, dtype, config.seed)
    else:
        weights = load_weights(path, spec, dtype, progress)
    layout = _layout(config, spec, dtype)
    num_slabs = _num_slabs(config, spec, layout)
    window = HostWindow(num_slabs, layout.slab_bytes)
    for slab in range(num_slabs):
        window.map(slab)
    num_pages = num_slabs * layout.pages_per_slab
    attention = backend.attention(layout.view(window.tensor, num_pages))
    model = Model(spec, weights, backend.ops, attention, dtype)
    logger.info(
        "%s on %s in %s: KV memory %.2f GiB, %d tokens",
        path.name, backend.name, dtype, num_slabs * layout.slab_bytes / 2**30, num_pages * config.page_size,
    )  # fmt: skip
    return BuiltModel(path, spec, ModelRunner(model, layout, window, backend.device), num_slabs, layout.pages_per_slab)


def build_core(config: EngineConfig, built: BuiltModel, clock: Clock | None = None) -> EngineCore:
    """A core with a scheduler over all of the model's KV memory."""
    num_pages = built.num_slabs * built.pages_per_slab
    kv = KVManager(
        PagePool(built.num_slabs, built.pages_per_slab),
        config.page_size,
        prefix_caching=config.enable_prefix_caching,
        protected=int(config.online_cache_share * num_pages),
    )
    scheduler = Scheduler(
        kv,
        POLICIES[config.policy](),
        clock or MonotonicClock(),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len(config, built.spec, num_pages),
        eos_ids=built.spec.eos_ids,
    )
    return EngineCore(scheduler, built.runner)


def max_model_len(config: EngineConfig, spec: ModelSpec, num_pages: int) -> int:
    """Longest sequence the model and the KV memory can hold, or what the config asks for if that is less."""
    if config.max_model_len is not None and config.max_model_len > spec.max_position:
        raise InvalidConfig(
            f"--max-model-len {config.max_model_len} is beyond the model's context of {spec.max_position} tokens"
        )
    wanted = config.max_model_len or spec.max_position
    room = num_pages * config.page_size
    if wanted > room:
        if config.max_model_len is not None:
            raise InvalidConfig(f"--max-model-len {wanted} needs more KV memory: there is room for {room} tokens")
        logger.warning("context limited to %d of %d tokens by the KV memory; see --kv-cache-memory", room, wanted)
    return min(wanted, room)


def _dtype(config: EngineConfig, spec: ModelSpec, device: torch.device) -> torch.dtype:
    import torch

    name = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else spec.dtype
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _layout(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype) -> KVLayout:
    from engine.kernels.api import KVLayout

    return KVLayout.fit(
        num_layers=spec.num_layers,
        page_size=config.page_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
        granularity=_HOST_PAGE,
        slab_bytes=config.slab_size,
    )


def _num_slabs(config: EngineConfig, spec: ModelSpec, layout: KVLayout) -> int:
    if config.kv_cache_memory is not None:
        slabs = config.kv_cache_memory // layout.slab_bytes
        if slabs < 1:
            raise InvalidConfig(
                f"--kv-cache-memory {config.kv_cache_memory} is less than one slab of {layout.slab_bytes} bytes; give it more"
            )
        return int(slabs)
    length = config.max_model_len or spec.max_position
    pages = config.max_num_seqs * -(-length // config.page_size)
    wanted = pages * layout.page_stride
    allowed = min(_KV_CEILING, int(_KV_SHARE * psutil.virtual_memory().available))
    return max(1, min(wanted, allowed) // layout.slab_bytes)
