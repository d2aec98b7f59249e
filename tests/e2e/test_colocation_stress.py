"""Two models on one device under fire: both answer as if they were alone, and the bounds of colocation hold."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from colocation_cases import (
    NUM_SLABS,
    Fire,
    Models,
    ask_all,
    colocated,
    eventually,
    poisoned,
    sharing,
    stress_seconds,
    two_models,
)

from engine import Engine, Tenant


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return two_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def engines(models: Models) -> Iterator[dict[str, Engine]]:
    """Two engines at once, each with a worker of its own, that take back what they poisoned."""
    gates = ("process", "layer")
    with poisoned(), ThreadPoolExecutor() as pool:
        started = dict(zip(gates, pool.map(lambda gate: colocated(models, gate=gate), gates), strict=True))
        yield started
        list(pool.map(Engine.close, started.values()))


def check(engine: Engine) -> None:
    """What must hold of an engine at rest, whatever happened to it."""
    eventually(lambda: not any(t.running or t.waiting for t in engine.stats().tenants.values()), "rest")
    engine._core.scheduler.check()
    stats = sharing(engine)
    assert sum(stats.slabs.values()) == NUM_SLABS
    assert stats.slabs[Tenant.ONLINE] >= 1
    assert set(stats.request_preemptions) <= {0, 1}
    assert all(seconds >= 0 for seconds in stats.device_seconds.values()), stats.device_seconds
    eventually(lambda: sharing(engine).state == "offline", "thaw")


@pytest.mark.parametrize("gate", ["process", "layer"])
def test_both_tenants_alone_and_together(engines: dict[str, Engine], models: Models, gate: str) -> None:
    engine = engines[gate]
    assert sharing(engine).gate == gate

    ask_all(engine, models, Tenant.OFFLINE)
    with ThreadPoolExecutor() as pool:
        offline = pool.submit(ask_all, engine, models, Tenant.OFFLINE)
        ask_all(engine, models, Tenant.ONLINE)
        offline.result()

    check(engine)


def test_under_fire_with_the_process_gate(engines: dict[str, Engine], models: Models) -> None:
    engine = engines["process"]
    before = sharing(engine)
    fire = Fire(engine, models, seed=1, seconds=stress_seconds(25))
    fire.run(kills=True, pauses=True)

    check(engine)
    after = sharing(engine)
    print(fire.events, after)
    assert after.worker_restarts > before.worker_restarts
    assert after.reclaims > before.reclaims
    assert after.preemptions > before.preemptions
    ask_all(engine, models, Tenant.OFFLINE)


def test_under_fire_with_the_layer_gate(engines: dict[str, Engine], models: Models) -> None:
    engine = engines["layer"]
    before = sharing(engine)
    fire = Fire(engine, models, seed=2, seconds=stress_seconds(10))
    fire.run()

    check(engine)
    after = sharing(engine)
    print(fire.events, after)
    assert after.reclaims > before.reclaims
    assert after.worker_restarts == before.worker_restarts
