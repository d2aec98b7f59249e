"""CTranslate2's Generator, on a model converted by ct2-transformers-converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ctranslate2

from bench.peers.pipe import Driver, Setup, Single, Tokens, serve


class CTranslate2(Driver):
    name = f"CTranslate2 {ctranslate2.__version__}"
    batch_sizes = (8, 16, 32)

    def __init__(self, setup: Setup) -> None:
        self._generator = ctranslate2.Generator(
            setup.model, device="cpu", compute_type="float32", inter_threads=1, intra_threads=setup.threads, **setup.options
        )
        self._words: list[str] = json.loads(Path(setup.model, "vocabulary.json").read_text(encoding="utf-8"))

    def single(self, prompt: Tokens, count: int) -> Single:
        single = Single()
        for step in self._generator.generate_tokens(self._text(prompt), **self._greedy(count)):
            single.add(step.token_id)
        return single

    def batch(self, prompts: list[Tokens], count: int, size: int | None) -> list[Tokens]:
        results = self._generator.generate_batch(
            [self._text(prompt) for prompt in prompts],
            max_batch_size=size,
            include_prompt_in_result=False,
            beam_size=1,
            **self._greedy(count),
        )
        return [list(result.sequences_ids[0]) for result in results]

    def _text(self, prompt: Tokens) -> list[str]:
        return [self._words[token] for token in prompt]

    def _greedy(self, count: int) -> dict[str, Any]:
        # It has no way to ignore the end of sequence: the end is declared to be a control token that no output contains.
        return {"max_length": count, "min_length": count, "sampling_topk": 1, "end_token": [self._words[0]]}


if __name__ == "__main__":
    serve(CTranslate2)
