"""Grammars in the offline worker: they cross to it as text, and outlive it."""

from __future__ import annotations

import re

import pytest
from colocation_cases import PATIENCE, Models, colocated, eventually, sharing, two_models, workers

from engine import Engine, Grammar, SamplingParams, Tenant

LINE = Grammar("regex", r"(true|false): [0-9]{150,200}\.")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return two_models(tmp_path_factory.mktemp("models"))


def ask(engine: Engine, seed: int):
    params = SamplingParams(max_tokens=300, seed=seed, grammar=LINE)
    return engine.submit([1, 2, 3], params, tenant=Tenant.OFFLINE)


def test_a_killed_worker_changes_nothing(models: Models) -> None:
    with colocated(models) as engine:
        expected = [ask(engine, seed).result(PATIENCE).choices[0] for seed in range(3)]
        assert all(re.fullmatch(LINE.text, choice.text) for choice in expected)
        running = [ask(engine, seed) for seed in range(3)]
        eventually(lambda: all(generation.usage.completion_tokens >= 5 for generation in running), "first tokens")
        for worker in workers():
            worker.kill()
        assert [generation.result(PATIENCE).choices[0].tokens for generation in running] == [c.tokens for c in expected]
        assert sharing(engine).worker_restarts == 1
