"""Section 4b: the same tokens as transformers, and as itself without graphs: small float32 models with random weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.gpu.common import Bench
from engine.build import build_core, load_model
from engine.config import EngineConfig
from engine.types import SamplingParams, Submit, Tenant

PROMPTS = [list(range(3, 40)), [7], [11, 250, 9] * 30, [100 + i for i in range(17)]]
NEW = 24
_SIZES = {
    "vocab_size": 300, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "tie_word_embeddings": True, "eos_token_id": 2,
}  # fmt: skip


def run(bench: Bench) -> None:
    for family in ("llama", "qwen3"):
        bench.attempt(family, lambda family=family: compare(bench, family))


def compare(bench: Bench, family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_SIZES)).float().eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=1.0 if weight.dim() == 1 else 0.0, std=0.15)
    expected = [oracle(model, prompt) for prompt in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for eager in (False, True):
            ours = generate(Path(folder), bench, enforce_eager=eager)
            same = sum(a == b for a, b in zip(ours, expected, strict=True))
            verdict = "equal" if same == len(PROMPTS) else "DIFFERENT"
            label = f"{family}: tokens of transformers on the CPU, {'eager' if eager else 'graphs'}"
            bench.row(label, same, f"of {len(PROMPTS)} prompts", note=verdict)


@torch.inference_mode()
def oracle(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def generate(folder: Path, bench: Bench, **options: Any) -> list[list[int]]:
    settings = {"model": str(folder), "device": bench.device.type, "dtype": "float32", "kv_cache_memory": 2**28, **options}
    config = EngineConfig().with_options(max_num_batched_tokens=32, max_num_seqs=3, **settings)
    core = build_core(config, load_model(config, progress=False))
    tokens: dict[str, list[int]] = {str(index): [] for index in range(len(PROMPTS))}
    for index, prompt in enumerate(PROMPTS):
        params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
        core.submit(Submit(id=str(index), tenant=Tenant.ONLINE, prompt=tuple(prompt), params=params, seed=0))
    while core.has_work:
        for out in core.step():
            if out.error:
                raise RuntimeError(out.error)
            if out.token is not None:
                tokens[out.id].append(out.token)
    core.close()
    return list(tokens.values())
