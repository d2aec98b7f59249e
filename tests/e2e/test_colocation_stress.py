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
    at_rest,
    colocated,
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
    """Two engines at once, each with a worker of its own, that hand slabs back and forth and poison what they take."""
    gates = ("process", "layer")
    with poisoned(), ThreadPoolExecutor() as pool:
        started = dict(zip(gates, pool.map(lambda gate: colocated(models, gate=gate), gates), strict=True))
        yield started
        list(pool.map(Engine.close, started.values()))


def check(engine: Engine) -> None:
    """What must hold of an engine, whatever happened to it."""
    at_rest(engine)
    engine._core.scheduler.check()
    stats = sharing(engine)
    assert sum(stats.slabs.values()) == NUM_SLABS
    assert stats.slabs[Tenant.ONLINE] >= 1, "online kept no headroom"
    assert set(stats.request_preemptions) <= {0, 1}
    assert all(seconds >= 0 for seconds in stats.device_seconds.values()), stats.device_seconds


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


def test_two_engines_at_once(engines: dict[str, Engine], models: Models) -> None:
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(ask_all, engine, models, tenant) for engine in engines.values() for tenant in Tenant]
        for done in asked:
            done.result()


@pytest.mark.parametrize("gate", ["process", "layer"])
def test_frozen_and_robbed(engines: dict[str, Engine], models: Models, gate: str) -> None:
    engine = engines[gate]
    before = sharing(engine)
    fire = Fire(engine, models, seed=1, seconds=stress_seconds(5))
    fire.run()

    check(engine)
    after = sharing(engine)
    assert after.worker_restarts == before.worker_restarts
    assert after.preemptions > before.preemptions
    assert after.reclaims > before.reclaims
    assert after.worker is not None and after.worker.counters.recomputed_tokens > 0, "nobody lost anything: no test"
    assert fire.events["offline"] and fire.events["online"] and fire.events["abort"]


def test_killed_and_paused_as_well(engines: dict[str, Engine], models: Models) -> None:
    engine = engines["process"]
    before = sharing(engine)
    fire = Fire(engine, models, seed=2, seconds=stress_seconds(8))
    fire.run(kills=True, pauses=True)

    check(engine)
    assert sharing(engine).worker_restarts > before.worker_restarts
    assert fire.events["pause"]
    ask_all(engine, models, Tenant.OFFLINE)
