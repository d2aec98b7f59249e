"""Sluice itself, through its public Engine. --option sluice.NAME=VALUE sets a field of its configuration."""

from __future__ import annotations

from bench.peers.pipe import Driver, Setup, Single, Tokens, serve
from engine import Engine, SamplingParams


class Sluice(Driver):
    name = "Sluice"

    def __init__(self, setup: Setup) -> None:
        options = {"enable_prefix_caching": False, "device": "cpu", "dtype": "float32", **setup.options}
        self._engine = Engine(setup.model, threads=setup.threads, progress=False, **options)

    def single(self, prompt: Tokens, count: int) -> Single:
        single = Single()
        for delta in self._engine.submit(prompt, _greedy(count)):
            single.add(*delta.tokens)
        return single

    def batch(self, prompts: list[Tokens], count: int, size: int | None) -> list[Tokens]:
        completions = self._engine.generate(prompts, _greedy(count), progress=False)
        return [list(completion.choices[0].tokens) for completion in completions]


def _greedy(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)


if __name__ == "__main__":
    serve(Sluice)
