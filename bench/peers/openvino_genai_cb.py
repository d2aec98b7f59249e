"""OpenVINO GenAI, its continuous batching pipeline, on a model exported by optimum-intel.

--option openvino.NAME=VALUE sets a field of its SchedulerConfig.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import openvino
import openvino_genai

from bench.peers.pipe import Driver, Setup, Single, Tokens, serve


class OpenVino(Driver):
    name = f"OpenVINO GenAI {openvino_genai.__version__}"

    def __init__(self, setup: Setup) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        for field, value in {"cache_size": 1, "enable_prefix_caching": False, **setup.options}.items():
            setattr(scheduler, field, value)
        properties = {"INFERENCE_NUM_THREADS": setup.threads, "INFERENCE_PRECISION_HINT": "f32"}
        self._pipe: Any = openvino_genai.ContinuousBatchingPipeline(setup.model, scheduler, "CPU", properties)
        self._ids = itertools.count()

    def single(self, prompt: Tokens, count: int) -> Single:
        single = Single()
        handle = self._pipe.add_request(next(self._ids), _tensor(prompt), _greedy(count))
        while self._pipe.has_non_finished_requests():
            self._pipe.step()
            if handle.can_read():
                for output in handle.read().values():
                    single.add(*output.generated_ids)
        return single

    def batch(self, prompts: list[Tokens], count: int, size: int | None) -> list[Tokens]:
        results = self._pipe.generate([_tensor(prompt) for prompt in prompts], [_greedy(count)] * len(prompts))
        return [list(result.m_generation_ids[0]) for result in results]


def _tensor(prompt: Tokens) -> Any:
    return openvino.Tensor(np.array([prompt], dtype=np.int64))


def _greedy(count: int) -> Any:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = count, True, False
    return config


if __name__ == "__main__":
    serve(OpenVino)
