"""Hugging Face transformers, `generate` with static batches: the baseline, and the oracle for the tokens."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from bench.peers.pipe import Driver, Setup, Single, Tokens, chunks, serve


class _Stamp(BaseStreamer):  # type: ignore[misc]
    """Stamps each generated id; `generate` hands over the prompt first."""

    def __init__(self, single: Single) -> None:
        self._single = single
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._single.add(*value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None: ...


class Transformers(Driver):
    name = f"transformers {transformers.__version__} generate"
    batch_sizes = (8, 16, 32)

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        self._model = load(setup.model, dtype=torch.float32, **setup.options).eval()
        config = self._model.generation_config
        self._pad = config.pad_token_id or 0
        config.eos_token_id, config.pad_token_id, config.do_sample = None, self._pad, False

    def single(self, prompt: Tokens, count: int) -> Single:
        single = Single()
        self._generate([prompt], count, streamer=_Stamp(single))
        return single

    def batch(self, prompts: list[Tokens], count: int, size: int | None) -> list[Tokens]:
        outputs: list[Tokens] = [[] for _ in prompts]
        for group in chunks(prompts, size or len(prompts)):
            rows = self._generate([prompts[index] for index in group], count)
            for index, row in zip(group, rows, strict=True):
                outputs[index] = row
        return outputs

    @torch.inference_mode()
    def gap(self, prompt: Tokens) -> float:
        top = self._model(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1].topk(2).values
        return float(top[0] - top[1])

    @torch.inference_mode()
    def _generate(self, prompts: list[Tokens], count: int, **options: Any) -> list[Tokens]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = self._model.generate(ids, attention_mask=mask, max_new_tokens=count, **options)
        rows: list[Tokens] = out[:, longest:].tolist()
        return rows


if __name__ == "__main__":
    serve(Transformers)
