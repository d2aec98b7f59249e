"""Models with random weights: the shapes of well-known ones, as checkpoint folders that hold a config.json only."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.gpu.common import Bench
from engine.config import EngineConfig

_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": True, "attention_bias": False,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 5e5, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 8192},
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": False, "attention_bias": False,
    },
}  # fmt: skip
_TOY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 300, "max_position_embeddings": 512,
}  # fmt: skip


def config_of(name: str, bench: Bench) -> dict[str, Any]:
    """What config.json says; of a dry run's toy, with the family of the real one."""
    config = SHAPES[name] | (_TOY if bench.dry else {})
    if bench.dry:
        config.pop("rope_scaling", None)
    family = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[config["model_type"]]
    return {"architectures": [family], "torch_dtype": "bfloat16", "hidden_act": "silu", "eos_token_id": 2, **config}


@contextmanager
def folder_of(name: str, bench: Bench) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sluice-") as folder:
        path = Path(folder) / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config_of(name, bench)), encoding="utf-8")
        yield path


def engine_config(path: Path, bench: Bench, **options: Any) -> EngineConfig:
    """Sizes for throughput; on the CPU, whatever is small."""
    sizes = {"device": "cpu", "max_num_batched_tokens": 64, "max_num_seqs": 4, "kv_cache_memory": 2**22} if bench.dry else {
        "device": "cuda", "max_num_batched_tokens": 8192, "max_num_seqs": 128, "kv_cache_memory": 24 * 2**30,
        "max_model_len": 16384,
    }  # fmt: skip
    settings = {"model": str(path), "load_format": "dummy", "enable_prefix_caching": False, **sizes, **options}
    return EngineConfig().with_options(**settings)
