"""The one place that puts parts together: from an EngineConfig to a core that runs.

Decides what "auto" means (device, dtype, KV memory, context length) and says what it decided in the log. Everything with a
tensor behind it is imported inside functions, so that importing this file stays cheap.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from engine.clock import Clock, MonotonicClock
from engine.config import EngineConfig, cache_dir
from engine.core import EngineCore
from engine.demo import resolve_model
from engine.errors import InvalidConfig
from engine.memory.host import HostTier, PageCopier
from engine.memory.manager import KVManager
from engine.memory.pages import PagePool
from engine.sched.latency import StepTime
from engine.sched.modes import ModeChooser
from engine.sched.plan import PlanRow, Runner, StepPlan
from engine.sched.policies import OnlineFirst, SharedStep
from engine.sched.scheduler import Scheduler
from engine.sched.slo import OnlineMeter, SloControl
from engine.spec import ModelSpec, load_spec
from engine.types import Grammar, Guide, SamplingParams, Tenant

if TYPE_CHECKING:
    import torch

    from engine.kernels.api import KVLayout
    from engine.kernels.select import Backend
    from engine.memory.window import Window

    MakeWindow = Callable[[int, int], Window]  # slabs, bytes of a slab

logger = logging.getLogger(__name__)

_KV_SHARE = 0.25  # of the machine's available memory, unless --kv-cache-memory says otherwise
_KV_CEILING = 8 * 2**30
_PARKED_BYTES = 256 * 2**20  # hidden states of parked passes; 16,384 tokens at 4096 numbers of two bytes, as Laser keeps
_PLENTY = 2048  # tokens of a step
_LIBRARY_BYTES = 2 * 2**30  # of a GPU, for one process; a host tier's buffers are small beside it
_SHARED_SLAB_BYTES = 32 * 2**20  # on a GPU; made up to four times as large if that wastes less
_HOST_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Memory:
    """KV memory as slabs that any of the models it was planned for can use."""

    num_slabs: int
    slab_bytes: int


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model ready to run, and the numbers that describe it to clients and to the scheduler."""

    path: Path
    spec: ModelSpec
    runner: Runner
    num_slabs: int
    pages_per_slab: int
    window: Window | None = None  # whose slabs another process can take
    copier: PageCopier | None = None  # for a host tier


def plan_memory(config: EngineConfig, specs: Sequence[ModelSpec]) -> Memory:
    """How much KV memory there is and how it is cut into slabs, for one model or for two that share it."""
    from engine.kernels.api import fit_slab
    from engine.kernels.select import device_memory

    device = device_memory(config.device)
    pages = [_page_bytes(config, spec) for spec in specs]
    granularity, least = (_HOST_PAGE, config.slab_size) if device is None else (device.granule, device.slab_bytes)
    if device is not None and len(specs) > 1:
        least = _SHARED_SLAB_BYTES
    slab_bytes = fit_slab(pages, granularity=granularity, slab_bytes=max(least, config.slab_size))
    if config.kv_cache_memory is not None:
        wanted = config.kv_cache_memory
    else:
        lengths = [config.max_model_len or spec.max_position for spec in specs]
        longest = max(page * -(-length // config.page_size) for page, length in zip(pages, lengths, strict=True))
        if device is None:
            allowed = min(_KV_CEILING, int(_KV_SHARE * psutil.virtual_memory().available))
        else:
            weights, work = (sum(size(config, spec) for spec in specs) for size in (weight_bytes, _work_bytes))
            sinks = slab_bytes * len(specs) if len(specs) > 1 else 0
            allowed = int(config.gpu_memory_utilization * device.total) - device.used - weights - work - sinks
            if allowed < slab_bytes * len(specs):
                subject = "the model does" if len(specs) == 1 else "two models do"
                raise InvalidConfig(
                    f"{subject} not fit this GPU: of {_gib(device.total)} others use {_gib(device.used)}, and weights "
                    f"({_gib(weights)}) and work space ({_gib(work)}) leave no slab of KV for each; raise "
                    "--gpu-memory-utilization, lower --max-num-batched-tokens or --max-num-seqs, or take a smaller model"
                )
        wanted = min(max(config.max_num_seqs * longest, slab_bytes * len(specs)), allowed)
    if wanted < slab_bytes * len(specs):
        raise InvalidConfig(
            f"KV memory of {wanted} bytes is less than a slab of {slab_bytes} for each model; raise --kv-cache-memory"
        )
    return Memory(wanted // slab_bytes, slab_bytes)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def pages_in(config: EngineConfig, spec: ModelSpec, memory: Memory) -> int:
    """The model's KV pages in the memory."""
    from engine.kernels.api import pages_per_slab

    return memory.num_slabs * pages_per_slab(_page_bytes(config, spec), memory.slab_bytes)


def load_model(
    config: EngineConfig,
    *,
    memory: Memory | None = None,
    make_window: MakeWindow | None = None,
    launching: Callable[[], AbstractContextManager[None]] | None = None,
    progress: bool = True,
) -> BuiltModel:
    """Read the checkpoint, pack its weights for the device and reserve its KV window.

    `memory` is given where two models share it; `make_window` where the window's memory is another process's; `launching` is
    entered, in the thread that launches, for each layer.
    """
    import torch

    threads = config.threads or torch.get_num_threads()
    # This thread loads and another one runs the steps. If each had a pool of compute threads, OpenMP would count more threads
    # than cores and send them all to sleep between two operations, which makes a small step half as long again.
    torch.set_num_threads(1)
    try:
        return _load_model(config, memory, make_window, launching, progress)
    finally:
        torch.set_num_threads(threads)


def _load_model(
    config: EngineConfig,
    memory: Memory | None,
    make_window: MakeWindow | None,
    launching: Callable[[], AbstractContextManager[None]] | None,
    progress: bool,
) -> BuiltModel:
    import torch

    from engine.kernels.api import AttentionShape, KVLayout
    from engine.kernels.select import load_backend
    from engine.model import Model
    from engine.runner import ModelRunner
    from engine.weights import load_weights, random_weights

    path = resolve_model(config.model, progress=progress)
    spec = load_spec(path)
    memory = memory or plan_memory(config, [spec])
    backend = load_backend(config.device, config.attention_backend)
    dtype = getattr(torch, _dtype(config, spec))
    layout = KVLayout.fit(
        num_layers=spec.num_layers,
        page_size=config.page_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
        slab_bytes=memory.slab_bytes,
    )
    num_pages = memory.num_slabs * layout.pages_per_slab
    longest = max_model_len(config, spec, num_pages)
    if config.load_format == "dummy":
        weights = random_weights(spec, dtype, config.seed, backend.device)
    else:
        weights = load_weights(path, spec, dtype, progress)
    is_shared = make_window is not None or config.offline_model is not None
    make_window = make_window or _window_maker(backend, is_shared)
    window = make_window(memory.num_slabs, layout.slab_bytes)
    attention = backend.attention(
        layout.view(window.tensor, num_pages),
        AttentionShape(spec.num_heads, largest_step(config), config.max_num_seqs, spec.windows),
    )
    model = Model(spec, weights, backend.ops, attention, dtype, device=backend.device, max_len=longest)
    if launching is not None:
        model.launching = launching
    backend.trim()
    logger.info(
        "%s on %s in %s: KV memory %.2f GiB, %d tokens",
        path.name, backend.name, dtype, memory.num_slabs * layout.slab_bytes / 2**30, num_pages * config.page_size,
    )  # fmt: skip
    graphs = None
    if backend.graphs is not None and not config.enforce_eager:
        graphs = backend.graphs(model, attention, min(config.max_num_seqs, step_tokens(config)))
    runner = ModelRunner(model, layout, window, backend.device, sampler=backend.sample, pace=backend.pace, graphs=graphs)
    # A device's memory must do for the largest step; a processor only has kernels to load.
    _warm_up(runner, config, min(longest, largest_step(config) if backend.own_memory else 32))
    if work := backend.work_bytes():
        logger.info("steps take up to %.2f GiB; %.2f were set aside", work / 2**30, _work_bytes(config, spec) / 2**30)
    lendable = window if is_shared or not backend.own_memory else None
    copier = _make_copier(config, backend, layout, window.tensor, launching)
    return BuiltModel(path, spec, runner, memory.num_slabs, layout.pages_per_slab, lendable, copier)


def _window_maker(backend: Backend, is_shared: bool) -> MakeWindow:
    """Memory for one process alone, or to be lent slab by slab. Host memory can be lent always."""
    from engine.memory.window import HostWindow, TensorWindow

    if not backend.own_memory:
        return HostWindow
    if not is_shared:
        return lambda num_slabs, slab_bytes: TensorWindow(num_slabs, slab_bytes, backend.device)
    from engine.memory.cuda_vmm import CudaVmm, CudaWindow

    driver = CudaVmm(backend.device.index or 0)
    return lambda num_slabs, slab_bytes: CudaWindow(num_slabs, slab_bytes, driver)


def _make_copier(
    config: EngineConfig,
    backend: Backend,
    layout: KVLayout,
    window: torch.Tensor,
    launching: Callable[[], AbstractContextManager[None]] | None,
) -> PageCopier | None:
    """The host tier's bytes, if it is to have any."""
    from engine.memory.host_store import HostStore

    num_slots = config.host_kv_memory // layout.page_bytes
    if not num_slots:
        if config.host_kv_memory:
            raise InvalidConfig(f"--host-kv-memory is less than a page of {layout.page_bytes} bytes; give it more, or 0")
        return None
    if backend.packer is None:
        return HostStore(window, layout.page_bytes, layout.page_stride, num_slots, MonotonicClock())
    from engine.kernels.cuda_host_store import CudaHostStore, PackedHostStore

    if launching is None:
        return CudaHostStore(layout, window, num_slots)
    return PackedHostStore(layout, window, num_slots, backend.packer(layout, window), launching)


def _warm_up(runner: Runner, config: EngineConfig, count: int) -> None:
    """Run a step of `count` tokens and a sampling one before anybody waits: kernels compile, and memory that is too little
    shows now. Whatever it writes lies in pages that nobody owns yet."""
    drawn = SamplingParams(temperature=1.0, top_p=0.9, top_k=40, presence_penalty=0.5)
    pages = tuple(range(-(-count // config.page_size)))
    for tokens, params in ((count, SamplingParams(temperature=0.0)), (1, drawn)):
        row = PlanRow("warm-up", Tenant.ONLINE, (0,) * tokens, tokens, 0, tokens, pages, True, params, 0.5)
        runner.collect(runner.launch(StepPlan(0, (row,))))


def build_core(
    config: EngineConfig,
    built: BuiltModel,
    *,
    slabs: Iterable[int] | None = None,
    clock: Clock | None = None,
    open_guide: Callable[[Grammar], Guide] | None = None,
    step_time: StepTime | None = None,
    control: SloControl | None = None,
) -> EngineCore:
    """A core whose scheduler has the given slabs of the model's KV memory to begin with (default: all), and knows this of the
    times of steps and, where such are shared, of their budget (default: what an earlier run learned)."""
    num_pages = built.num_slabs * built.pages_per_slab
    longest = max_model_len(config, built.spec, num_pages)
    slabs = range(built.num_slabs) if slabs is None else slabs
    if built.window is not None:
        for slab in slabs:
            built.window.map(slab)
    kv = KVManager(
        PagePool(built.num_slabs, built.pages_per_slab, slabs),
        config.page_size,
        prefix_caching=config.enable_prefix_caching,
        # The longest offline request must fit beside whatever online prefixes are protected, or it would wait for ever.
        protected=max(0, min(int(config.online_cache_share * num_pages), num_pages - -(-longest // config.page_size))),
        host=None if built.copier is None else HostTier(built.copier.num_slots),
    )
    clock = clock or MonotonicClock()
    if control is None and (control := make_control(config)) is not None:
        control.load(slo_file(config, built))
    modes = ModeChooser(clock.now()) if config.sharing == "auto" else None
    scheduler = Scheduler(
        kv,
        OnlineFirst() if control is None else SharedStep(_tpot(config), config.slo_increase, control, modes),
        clock,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=step_tokens(config),
        max_alone_tokens=largest_step(config),
        max_parked_tokens=_PARKED_BYTES // (2 * built.spec.hidden_size * _value_bytes(config, built.spec)),
        prefix_order=config.offline_order == "prefix",
        max_model_len=longest,
        eos_ids=built.spec.eos_ids,
        step_time=step_time or StepTime.load(step_time_file(config, built)),
        open_guide=open_guide,
    )
    core = EngineCore(scheduler, built.runner, copier=built.copier, ttft=_ttft(config))
    core.modes = modes
    if control is not None:
        core.meter = OnlineMeter(control, scheduler.delays, scheduler.step_time, scheduler.max_num_batched_tokens)
    return core


def make_control(config: EngineConfig) -> SloControl | None:
    """What sizes shared steps, if there may be such; it knows nothing yet."""
    if config.sharing == "exclusive":
        return None
    seconds = _ttft(config) if config.slo_metric.endswith("ttft") else _tpot(config)
    return SloControl(config.slo_metric, seconds=seconds, increase=config.slo_increase)


def _ttft(config: EngineConfig) -> float | None:
    return None if config.ttft_slo_ms is None else config.ttft_slo_ms / 1e3


def _tpot(config: EngineConfig) -> float | None:
    return None if config.tpot_slo_ms is None else config.tpot_slo_ms / 1e3


def step_time_file(config: EngineConfig, built: BuiltModel) -> Path:
    """Where what was learned of step times is kept: one file per model, device, number format and number of threads."""
    facts = (built.spec, config.device, _dtype(config, built.spec), config.threads or os.cpu_count(), config.page_size)
    return cache_dir() / "step-time" / f"{built.path.name}-{blake2b(repr(facts).encode(), digest_size=6).hexdigest()}.json"


def slo_file(config: EngineConfig, built: BuiltModel) -> Path:
    """Where the scales are kept that met the targets of online requests: beside the step times."""
    return step_time_file(config, built).with_suffix(".slo.json")


def save_learned(config: EngineConfig, built: BuiltModel, core: EngineCore) -> None:
    """Keep what a core learned of step times and of their budget for the next start. Raises OSError."""
    core.scheduler.step_time.save(step_time_file(config, built))
    if core.meter is not None:
        core.meter.control.save(slo_file(config, built))


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


def step_tokens(config: EngineConfig) -> int:
    """Most tokens of a step: what the config says, or what suits the device."""
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    from engine.kernels.select import step_tokens as suitable

    return suitable(config.device)


def largest_step(config: EngineConfig) -> int:
    """Most tokens of a step without online rows: what the config says, or so many that more are hardly faster."""
    tokens = step_tokens(config)
    wanted, most = config.offline_max_batched_tokens, min(4 * tokens, max(tokens, _PLENTY))
    if wanted is not None and wanted < tokens:
        raise InvalidConfig(f"--offline-max-batched-tokens {wanted} is less than the {tokens} of any step; give it more")
    return wanted or most


def _dtype(config: EngineConfig, spec: ModelSpec) -> str:
    """Name of the number format the model runs in."""
    if config.dtype != "auto":
        return config.dtype
    from engine.kernels.select import resolve_device

    return spec.dtype if resolve_device(config.device) == "cuda" else "float32"


def weight_bytes(config: EngineConfig, spec: ModelSpec) -> int:
    """What the model's weights take in the number format it runs in."""
    from engine.weights import expected_shapes

    return sum(math.prod(shape) for shape in expected_shapes(spec).values()) * _value_bytes(config, spec)


def _work_bytes(config: EngineConfig, spec: ModelSpec) -> int:
    """Beside weights and KV, an upper estimate: activations of the largest step, logits and their copies, and what the
    libraries, compiled kernels and graphs take."""
    heads = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    activations = largest_step(config) * (6 * spec.hidden_size + heads + 3 * spec.intermediate_size)
    logits = 4 * 4 * config.max_num_seqs * spec.vocab_size
    return activations * _value_bytes(config, spec) + logits + _PARKED_BYTES + _LIBRARY_BYTES


def _value_bytes(config: EngineConfig, spec: ModelSpec) -> int:
    return 4 if _dtype(config, spec) == "float32" else 2


def _page_bytes(config: EngineConfig, spec: ModelSpec) -> int:
    values = spec.num_layers * 2 * config.page_size * spec.num_kv_heads * spec.head_dim
    return values * _value_bytes(config, spec)
