"""Helpers shared by the tests of several areas."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 256, 257, 258: after the 256 bytes
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TINY = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 256,
}


@contextmanager
def small_file_system(folder: Path, size: str) -> Iterator[Path]:
    """A file system of `size` (256k, 1m) in a new folder; the test is skipped where this user may not mount one."""
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def tiny_checkpoint(
    tmp_path: Path,
    architecture: str = "llama",
    *,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """A new folder in `tmp_path` with a complete small random checkpoint, written by transformers and `tokenizers`.

    `architecture` is a model_type ("llama", "mistral", "qwen2", "qwen3"), `overrides` are fields of its config. 3 layers,
    4 heads over 2 KV heads, 264 tokens: the 256 bytes, `SPECIAL_TOKENS` (<|im_end|> ends a sequence), and a few without
    text. The same arguments give the same bytes; the folder is the caller's to change.
    """
    key = json.dumps([architecture, dtype, seed, max_shard_size, overrides], sort_keys=True)
    number = sum(1 for path in tmp_path.glob(f"tiny-{architecture}*"))
    folder = tmp_path / f"tiny-{architecture}{f'-{number}' if number else ''}"
    shutil.copytree(_tiny_original(key), folder)
    return folder


@functools.cache
def _originals() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tiny-checkpoints-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _tiny_original(key: str) -> Path:
    """The checkpoint described by `key`, made once per session."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture, dtype, seed, max_shard_size, overrides = json.loads(key)
    folder = Path(tempfile.mkdtemp(dir=_originals()))
    config = AutoConfig.for_model(architecture, **(_TINY | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():
            # Far from the usual 0.02: attention must prefer some tokens, and norms and biases must matter.
            center = 1.0 if weight.dim() == 1 and bool((weight == 1).all()) else 0.0
            torch.nn.init.normal_(weight, mean=center, std=0.15)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges (the token of a byte is its value) and a ChatML template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # GPT-2 writes a byte that is no visible Latin-1 character as one from U+0100 on, in order.
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    vocab = {chr(byte if byte in visible else 0x100 + hidden.index(byte)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
