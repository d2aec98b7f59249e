"""What is decided for a GPU before anything is loaded, with a device that is only numbers; and the window of one model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoint

from engine.build import plan_memory, step_tokens
from engine.config import EngineConfig
from engine.errors import InvalidConfig
from engine.kernels import cuda, select
from engine.kernels.api import DeviceMemory
from engine.memory.window import TensorWindow
from engine.spec import ModelSpec, load_spec
from engine.weights import expected_shapes

GIB = 2**30


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    return load_spec(tiny_checkpoint(tmp_path, dtype="bfloat16"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 16 GiB, 1 of them taken."""
    memory = DeviceMemory(16 * GIB, GIB, cuda.GRANULE, cuda.SLAB_BYTES)
    monkeypatch.setattr(select, "device_memory", lambda device: memory)


def config(**options: object) -> EngineConfig:
    return EngineConfig().with_options(device="cuda", **options)


@pytest.mark.usefixtures("gpu")
def test_kv_gets_what_weights_and_work_leave(spec: ModelSpec) -> None:
    memory = plan_memory(config(max_num_seqs=10**6, gpu_memory_utilization=0.5), [spec])

    kv = memory.num_slabs * memory.slab_bytes
    weights = 2 * sum(math.prod(shape) for shape in expected_shapes(spec).values())
    logits = 16 * 10**6 * spec.vocab_size
    room = 7 * GIB - weights - logits
    assert memory.slab_bytes % cuda.GRANULE == 0 and memory.slab_bytes >= cuda.SLAB_BYTES
    assert room - 3 * GIB < kv < room - 2 * GIB  # the libraries' share, and less than a slab of rounding


@pytest.mark.usefixtures("gpu")
def test_steps_are_as_large_as_the_device_bears(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [cuda.step_tokens(size * GIB) for size in (16, 32, 80)] == [2048, 4096, 8192]
    assert step_tokens(config()) == 2048 and step_tokens(config(max_num_batched_tokens=100)) == 100
    monkeypatch.setattr(select, "device_memory", lambda device: None)
    assert step_tokens(config()) == 512


@pytest.mark.usefixtures("gpu")
def test_no_more_kv_than_can_be_used(spec: ModelSpec) -> None:
    memory = plan_memory(config(max_num_seqs=1024), [spec])
    page = spec.num_layers * 2 * 16 * spec.num_kv_heads * spec.head_dim * 2
    assert memory.num_slabs * memory.slab_bytes <= 1024 * page * math.ceil(spec.max_position / 16)


@pytest.mark.usefixtures("gpu")
def test_too_little_memory_is_refused_in_words(spec: ModelSpec) -> None:
    with pytest.raises(InvalidConfig, match=r"weights .* work space .* no slab of KV .* --gpu-memory-utilization"):
        plan_memory(config(gpu_memory_utilization=0.1), [spec])
    with pytest.raises(InvalidConfig, match="raise --kv-cache-memory"):
        plan_memory(config(kv_cache_memory=2**20), [spec])


@pytest.mark.usefixtures("gpu")
def test_two_models_share_what_both_leave(spec: ModelSpec) -> None:
    """Slabs that are cheap to move, weights and work space of both, and a sink for each."""
    alone, both = plan_memory(config(max_num_seqs=10**6), [spec]), plan_memory(config(max_num_seqs=10**6), [spec, spec])
    assert 32 * 2**20 <= both.slab_bytes <= 128 * 2**20
    less = alone.num_slabs * alone.slab_bytes - both.num_slabs * both.slab_bytes
    weights = 2 * sum(math.prod(shape) for shape in expected_shapes(spec).values())
    assert less > weights + 2 * GIB + 2 * both.slab_bytes, "the other's weights, its libraries, two sinks"


@pytest.mark.usefixtures("gpu")
def test_two_models_that_do_not_fit_are_told_what_takes_the_room(spec: ModelSpec) -> None:
    with pytest.raises(InvalidConfig, match=r"two models .* weights .* work space .* no slab of KV for each"):
        plan_memory(config(gpu_memory_utilization=0.3), [spec, spec])


@pytest.mark.parametrize("share", [0.0, 1.2])
def test_a_share_of_memory_is_a_share(share: float) -> None:
    with pytest.raises(InvalidConfig, match="gpu-memory-utilization"):
        config(gpu_memory_utilization=share)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_says_why() -> None:
    reason = cuda.unavailable()
    assert reason is not None and "CUDA" in reason
    with pytest.raises(InvalidConfig, match="cannot serve"):
        select.load_backend("cuda")
    assert select.resolve_device("auto") == "cpu" and select.device_memory("auto") is None


def test_a_tensor_window_keeps_books() -> None:
    window = TensorWindow(3, 4096, torch.device("cpu"))
    view = window.tensor[4096:8192]
    window.map(1)
    view.fill_(7)
    with pytest.raises(AssertionError):
        window.map(1)
    window.unmap(1)
    assert not window.is_mapped(1)
    with pytest.raises(AssertionError):
        window.unmap(1)
    window.close()
    assert int(view[0]) == 7  # views live on
    with pytest.raises(AssertionError):
        _ = window.tensor
