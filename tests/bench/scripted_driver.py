"""A contender for tests: no engine, only scripted answers. Started as `python -m tests.bench.scripted_driver`."""

from __future__ import annotations

import os
import time

from bench.peers.pipe import Driver, Setup, Single, Tokens, serve


class Scripted(Driver):
    """Continues a prompt by counting up from its last id; `differ_at` turns one output token of every output into 0."""

    def __init__(self, setup: Setup) -> None:
        self._options = setup.options
        if self._options.get("broken"):
            raise RuntimeError("no such model")
        self.name = "scripted"
        self.batch_sizes = tuple(map(int, self._options.get("seconds_by_size", {})))
        print("engines print what they like")

    def single(self, prompt: Tokens, count: int) -> Single:
        single = Single()
        for token in self._continue(prompt, count):
            single.add(token)
        return single

    def batch(self, prompts: list[Tokens], count: int, size: int | None) -> list[Tokens]:
        time.sleep(self._options.get("seconds_by_size", {}).get(str(size), 0.0))
        return [self._continue(prompt, count) for prompt in prompts]

    def gap(self, prompt: Tokens) -> float:
        return float(self._options["gap"])

    def die(self) -> None:
        os._exit(3)

    def measure(self) -> dict[str, float]:
        return {"read_gb_s": 10.0, "sgemm_gflop_s": 100.0}

    def _continue(self, prompt: Tokens, count: int) -> Tokens:
        tokens = [prompt[-1] + 1 + index for index in range(count)]
        if (at := self._options.get("differ_at")) is not None:
            tokens[at] = 0
        return tokens


if __name__ == "__main__":
    serve(Scripted)
