"""Another model: a random checkpoint of its own shape, the same bytes every time, made once in the cache folder.

No second public model is needed to measure sharing: the cost of a step depends on shapes, not on what the weights say.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from engine.config import cache_dir
from engine.demo import resolve_model

OTHER = "qwen3-random-106m"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def find_model(name: str) -> Path:
    """The folder of a model: `other` is the random one, the rest as everywhere in Sluice."""
    return other_model() if name == "other" else resolve_model(name)


def other_model() -> Path:
    """A Qwen3 of 106 million random weights (seed 0) with the demo model's tokenizer."""
    folder = cache_dir() / "bench" / OTHER
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = folder.with_suffix(".part")
        shutil.rmtree(scratch, ignore_errors=True)
        _make(scratch, resolve_model("demo"))
        scratch.rename(folder)
    return folder


def _make(folder: Path, demo: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=49152,
        hidden_size=640,
        intermediate_size=1792,
        num_hidden_layers=16,
        num_attention_heads=10,
        num_key_value_heads=5,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    for name in _TOKENIZER_FILES:
        if (demo / name).is_file():
            shutil.copy(demo / name, folder / name)
