"""Host copies in an offline worker's own process: what online takes from it comes back from there, and a kill loses no line."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from colocation_cases import PATIENCE, Models, colocated, eventually, sharing, workers
from helpers import tiny_checkpoint

from engine import Engine, EngineConfig, SamplingParams, Tenant
from engine.batch import OK, main
from engine.jobrun import Backend, EngineBackend

PAGE = 16
PROMPT, OUTPUT = 250, 60  # most of what is lost is a prompt, which is in host memory before the first token comes
GREEDY = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, seed=3, max_tokens=OUTPUT, ignore_eos=True)
TAKER = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The offline model is large enough that its pages are copied faster than computed."""
    folder = tmp_path_factory.mktemp("models")
    large = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    return Models(tiny_checkpoint(folder), tiny_checkpoint(folder, "qwen3", seed=7, **large), {}, {})


@pytest.fixture(scope="module")
def cases(models: Models) -> list[tuple[tuple[int, ...], SamplingParams, tuple[int, ...]]]:
    """Prompts, how they are sampled, and what the offline model answers alone."""
    draw = random.Random(4)
    asked = [(tuple(draw.randrange(256) for _ in range(PROMPT)), params) for params in (GREEDY, SEEDED, GREEDY, SEEDED)]
    with Engine(str(models.offline), kv_cache_memory=4 << 20, threads=1, progress=False) as engine:
        running = [engine.submit(prompt, params) for prompt, params in asked]
        done = [generation.result(PATIENCE).choices[0].tokens for generation in running]
    return [(*one, tokens) for one, tokens in zip(asked, done, strict=True)]


def offline(engine: Engine) -> tuple[int, int, int]:
    """Tokens that offline requests lost, computed again, and got back from host memory."""
    stats = engine.stats().tenants[Tenant.OFFLINE]
    assert stats.host is not None
    return stats.counters.lost_tokens, stats.counters.recomputed_tokens, stats.host.restored_tokens


def test_what_online_takes_comes_back_from_the_host(models: Models, cases: list) -> None:
    """Until a moment was met in which offline work held copied pages that online needed."""
    deadline = time.monotonic() + 2 * PATIENCE
    with colocated(models, host_kv_memory=64 << 20, reserve="miad") as engine:
        assert workers(), "a process of its own"
        while not offline(engine)[2]:
            assert time.monotonic() < deadline, "nothing was restored"
            before = engine.stats().tenants[Tenant.OFFLINE].host.copied
            running = [engine.submit(prompt, params, tenant="offline") for prompt, params, _ in cases]
            prompts = len(cases) * (PROMPT // PAGE)

            def copied(before: int = before, prompts: int = prompts) -> bool:
                host = engine.stats().tenants[Tenant.OFFLINE].host
                return host is not None and host.copied >= before + prompts

            eventually(copied, "copies of all prompts")
            taking = [engine.submit([index] * 440, TAKER) for index in range(4)]  # nearly all the memory there is
            for generation in taking:
                generation.result(PATIENCE)
            for generation, (_, _, tokens) in zip(running, cases, strict=True):
                assert generation.result(PATIENCE).choices[0].tokens == tokens
        assert sharing(engine).reclaims > 0
        lost, recomputed, restored = offline(engine)
        assert lost >= PROMPT
        assert recomputed < lost / 2 and restored > lost / 2
        assert all(generation.cost.preemptions <= 1 for generation in taking)


@pytest.fixture
def sigterm() -> Iterator[None]:
    """The command sets its own."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm")
def test_a_job_whose_worker_is_killed_ends_with_each_line_once(models: Models, cases: list, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with source.open("w") as file:
        for number in range(24):
            prompt, params, _ = cases[number % len(cases)]
            body = {"prompt": prompt, "max_tokens": OUTPUT, "ignore_eos": True, "temperature": params.temperature}
            body |= {"seed": params.seed, "return_token_ids": True}
            json.dump({"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}, file)
            file.write("\n")
    over = threading.Event()
    kills: list[int] = []

    def kill(engine: Engine) -> None:
        """Twice, each time with copies made since the worker began."""
        while len(kills) < 2 and not over.wait(0.005):
            host = engine.stats().tenants[Tenant.OFFLINE].host
            if host is None or host.copied < 20 * (1 + len(kills)):
                continue
            for worker in workers():
                worker.kill()
            kills.append(host.copied)
            eventually(lambda: over.is_set() or sharing(engine).worker_restarts == len(kills), "a new worker")

    def opened(config: EngineConfig) -> Backend:
        engine = Engine(config=config, progress=False)
        killer.append(threading.Thread(target=kill, args=(engine,)))
        killer[0].start()
        return EngineBackend(engine)

    killer: list[threading.Thread] = []
    flags = ["--offline-model", str(models.offline), "--kv-cache-memory", "4MiB", "--slab-size", "96KiB", "--threads", "1"]
    flags += ["--host-kv-memory", "64MiB", "-i", str(source), "-o", str(out)]
    try:
        status = main(["--model", str(models.online), *flags], opened)
    finally:
        over.set()
        for thread in killer:
            thread.join()
    assert status == OK
    assert kills
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert sorted(int(line["custom_id"]) for line in lines) == list(range(24))
    for line in lines:
        tokens = line["response"]["body"]["choices"][0]["token_ids"]
        assert tuple(tokens) == cases[int(line["custom_id"]) % len(cases)][2]
