"""What an engine tells of itself: a snapshot of its numbers, and a line on each request that is not over.

Taken from any thread without stopping anything: a glance, not a promise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.core import EngineCore, StepStats
from engine.generation import Generation
from engine.sched.scheduler import TenantCounters
from engine.served import ServedModels
from engine.timeline import Timeline
from engine.types import Tenant

if TYPE_CHECKING:
    from engine.colocate.exclusive import SharingStats
    from engine.colocate.worker import Report
    from engine.memory.host_copies import HostStats


@dataclass(frozen=True, slots=True)
class TenantStats:
    running: int
    waiting: int
    kv_pages: int  # referenced by the tenant's requests
    prefix_queries: int  # prompt tokens looked up in the prefix cache
    prefix_hits: int  # of those, found
    counters: TenantCounters
    host: HostStats | None = None  # copies of the tenant's KV in host memory


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of the engine; cheap, taken without stopping it."""

    tenants: Mapping[Tenant, TenantStats]
    paused: frozenset[Tenant]  # by `Engine.pause`
    kv_pages: int
    kv_pages_free: int
    kv_pages_cached: int
    kv_bytes: int  # the KV memory of all models together
    weight_bytes: Mapping[str, int]  # by model, where known; two names of one model have them once
    page_size: int
    step_prediction_error: float  # mean of |predicted - measured| / measured over recent steps
    part_seconds: Mapping[str, float]  # time computing since the start, by tenant and phase (`timeline.PARTS`)
    device_seconds: Mapping[str, float]  # by owner: online, offline, switch, idle; sums to the time since the start
    steps: StepStats  # how the tenants of the online model share its steps
    sharing: SharingStats | None = None  # with an offline model


@dataclass(frozen=True, slots=True)
class RequestView:
    """One request that is not over. Seconds; nothing of what it says."""

    id: str
    model: str
    tenant: Tenant
    state: str  # waiting, running, parked (between two layers), restoring (its KV comes back), stopped (with its worker)
    choices: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    max_tokens: int | None
    preemptions: int
    age: float
    first_token_after: float | None
    since_token: float | None


def snapshot(
    core: EngineCore, timeline: Timeline, models: ServedModels, sharing: SharingStats | None, paused: frozenset[Tenant]
) -> Stats:
    """Of an engine made of these parts; `sharing` of its offline worker, if it has one."""
    scheduler = core.scheduler
    kv, pool = scheduler.kv, scheduler.kv.pool
    tenants = {
        tenant: TenantStats(
            running=scheduler.num_running(tenant),
            waiting=scheduler.num_waiting(tenant),
            kv_pages=pool.num_used(tenant),
            prefix_queries=kv.prefix_queries[tenant],
            prefix_hits=kv.prefix_hits[tenant],
            counters=replace(scheduler.counters[tenant]),
            host=core.host_stats() if tenant is Tenant.OFFLINE else None,
        )
        for tenant in Tenant
    }
    if sharing is not None and sharing.worker is not None:
        tenants[Tenant.OFFLINE] = _of_worker(sharing.worker)
    parts = timeline.seconds()
    return Stats(
        tenants=tenants,
        paused=paused,
        kv_pages=pool.num_pages,
        kv_pages_free=pool.num_free,
        kv_pages_cached=pool.num_cached,
        kv_bytes=models.memory.num_slabs * models.memory.slab_bytes,
        weight_bytes=models.weight_bytes,
        page_size=kv.page_size,
        step_prediction_error=scheduler.step_time.error,
        steps=core.stats(),
        part_seconds=parts,
        device_seconds=_owners(parts, timeline) if sharing is None else sharing.device_seconds,
        sharing=sharing,
    )


def _of_worker(worker: Report) -> TenantStats:
    """The offline tenant as its worker last reported it."""
    return TenantStats(
        running=worker.running,
        waiting=worker.waiting,
        kv_pages=worker.kv_pages,
        prefix_queries=worker.prefix_queries,
        prefix_hits=worker.prefix_hits,
        counters=worker.counters,
        host=worker.host,
    )


def _owners(parts: Mapping[str, float], timeline: Timeline) -> dict[str, float]:
    """With one model nobody waits for the device to change hands: who computes owns it."""
    online = parts["online_prefill"] + parts["online_decode"]
    offline = parts["offline_prefill"] + parts["offline_decode"]
    age = timeline.clock.now() - timeline.began
    return {"online": online, "offline": offline, "switch": 0.0, "idle": max(0.0, age - online - offline)}


def view(key: str, generation: Generation, state_of: Callable[[str], str | None], now: float, *, stopped: bool) -> RequestView:
    """Of a generation whose choices the engine knows by `key`. `stopped`: the offline model's worker stands still."""
    usage, times = generation.usage, generation.times
    states = [state for index in range(generation.params.n) if (state := state_of(f"{key}.{index}")) is not None]
    if states:
        state = next((state for state in states if state != "waiting"), "waiting")
    elif times.first is None:
        state = "waiting"
    else:
        state = "stopped" if stopped else "running"
    return RequestView(
        id=generation.request_id,
        model=generation.model,
        tenant=generation.tenant,
        state=state,
        choices=generation.params.n,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        max_tokens=generation.params.max_tokens,
        preemptions=generation.num_preemptions,
        age=now - times.submitted,
        first_token_after=None if times.first is None else times.first - times.submitted,
        since_token=None if times.last is None else now - times.last,
    )
