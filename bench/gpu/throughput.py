"""Section 4c: many requests at once, beside transformers' continuous batching in the same run; Qwen3-0.6B's shape in bf16."""

from __future__ import annotations

import random
import time
from typing import Any

import torch

from bench.gpu.common import Bench, Skip
from bench.gpu.shapes import config_of, engine_config, folder_of
from engine.build import build_core, load_model
from engine.types import SamplingParams, Submit, Tenant

NAME = "qwen3-0.6b"


def run(bench: Bench) -> None:
    rng = random.Random(0)
    count, new = bench.size(128, 3), bench.size(128, 4)
    lengths = [rng.randint(*((64, 512) if not bench.dry else (5, 12))) for _ in range(count)]
    prompts = [[rng.randrange(3, 290) for _ in range(length)] for length in lengths]
    bench.attempt("sluice", lambda: sluice(bench, prompts, new))
    bench.attempt("transformers", lambda: transformers(bench, prompts, new))


def report(bench: Bench, who: str, prompts: list[list[int]], produced: int, seconds: float) -> None:
    name = f"{NAME}, {len(prompts)} requests of {sum(map(len, prompts)) // len(prompts)} tokens: {who}"
    bench.row(name, produced / seconds, "output tokens/s")


def sluice(bench: Bench, prompts: list[list[int]], new: int) -> None:
    with folder_of(NAME, bench) as path:
        config = engine_config(path, bench)
        core = build_core(config, load_model(config, progress=False))
    for turn in range(2):  # the first one warms up
        produced, first, started = 0, {}, time.perf_counter()
        for index, prompt in enumerate(prompts):
            params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
            name = f"{turn}-{index}"
            core.submit(Submit(id=name, tenant=Tenant.ONLINE, prompt=tuple(prompt), params=params, seed=0))
        while core.has_work:
            for out in core.step():
                produced += out.token is not None
                first.setdefault(out.id, time.perf_counter() - started)
        seconds = time.perf_counter() - started
    assert produced == new * len(prompts), f"{produced} tokens instead of {new * len(prompts)}"
    report(bench, "sluice", prompts, produced, seconds)
    bench.row(f"{NAME}: sluice, median time to first token", 1e3 * sorted(first.values())[len(first) // 2], "ms")
    core.close()


def transformers(bench: Bench, prompts: list[list[int]], new: int) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if bench.dry:
        raise Skip("half a minute on a CPU")
    settings = config_of(NAME, bench)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with bench.device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    greedy = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for _ in range(2):
        started = time.perf_counter()
        outputs = model.generate_batch(inputs=prompts, generation_config=greedy)
        seconds = time.perf_counter() - started
    produced = sum(len(output.generated_tokens) for output in outputs.values())
    report(bench, "transformers continuous batching", prompts, produced, seconds)
