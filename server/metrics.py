"""What /metrics tells: the server's own counters and histograms, the engine's numbers at scrape time, and vLLM's names.

Everything is defined here once, as `sluice_...` with labels `model_name` and `tenant`. The `vllm:` aliases are made from the
same samples: of the online tenant alone, because routers read queue and KV memory as load, and offline work gives way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.timeline import StepHistogram
from engine.types import Tenant
from server.recent import CAUSES, Recent

if TYPE_CHECKING:
    from engine.colocate.exclusive import SharingStats
    from engine.engine import Engine
    from engine.memory.host_copies import HostStats
    from engine.stats import Stats

_LABELS = ("model_name", "tenant")
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_FEW = (0, 1, 2, 3, 5, 10, 20)
_GAUGES = {
    "num_requests_running": "Requests being computed",
    "num_requests_waiting": "Requests waiting for their turn",
    "kv_cache_usage_perc": "Share of the KV memory that running requests hold, 0 to 1",
}
_COUNTERS = {
    "prompt_tokens": "Prompt tokens of requests that reached their first token",
    "generation_tokens": "Tokens generated",
    "computed_tokens": "Tokens whose KV was computed, again included",
    "recomputed_tokens": "Tokens computed again after they were lost",
    "num_preemptions": "Times a running request gave way",
    "corrupted_requests": "Requests that ended because their logits were no numbers",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache",
}
_ALIASED = {
    "cache_config_info",
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "prompt_tokens",
    "generation_tokens",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "request_success",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_num_preemptions",
    "prompt_tokens_cached",
    "prompt_tokens_by_source",
    "request_prefill_kv_computed_tokens",
    "corrupted_requests",
    "iteration_tokens_total",
}


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self, compat: str = "vllm") -> None:
        self.registry = registry = CollectorRegistry()
        self.recent = Recent()
        self._engine = _EngineNumbers(self.recent)

        def histogram(name: str, text: str, buckets: Iterable[float], labels: tuple[str, ...] = _LABELS) -> Histogram:
            return Histogram(f"sluice_{name}", text, labels, buckets=tuple(buckets), registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = _LABELS) -> Counter:
            return Counter(f"sluice_{name}", text, labels, registry=registry)

        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token", _SECONDS)
        self.itl = _TokenTimes()
        registry.register(self.itl)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first, per request", _TOKEN_SECONDS
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to end of a request", _SECONDS)
        self.stages = {
            stage: histogram(f"request_{stage}_time_seconds", text, _SECONDS)
            for stage, text in (
                ("queue", "Submission to admission"),
                ("prefill", "Admission to first token"),
                ("decode", "First token to last"),
                ("inference", "Admission to last token"),
            )
        }
        self.prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request", _COUNTS)
        self.computed_tokens = histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens of a request that were not in the prefix cache", _COUNTS
        )
        self.output_tokens = histogram("request_generation_tokens", "Output tokens of a request", _COUNTS)
        self.params_n = histogram("request_params_n", "n of a request", _COUNTS)
        self.params_max_tokens = histogram("request_params_max_tokens", "max_tokens of a request, where given", _COUNTS)
        self.given_way = histogram("request_num_preemptions", "Times a request lost its place and began again", _FEW)
        self.cached_tokens = counter("prompt_tokens_cached", "Prompt tokens of answered requests that were in the prefix cache")
        self.rejections = counter("admission_rejections", "Requests refused for lack of room or rights to it", ("reason",))
        self.success = counter("request_success", "Finished choices", (*_LABELS, "finished_reason"))
        self.http = counter("http_requests", "HTTP requests answered", ("route", "method", "status"))
        self.http_seconds = histogram("http_request_duration_seconds", "Time to the end of an answer", _SECONDS, ("route",))
        self.disconnects = counter("client_disconnects", "Requests whose client left before the end", ("phase",))
        self.slow_readers = counter("sse_backpressure_aborts", "Streams aborted because nobody read them", ())
        self.stream_errors = counter("stream_errors", "Streams that ended with an error event", ("code",))
        self.interference = counter("online_interference_seconds", "Time answered online requests spent on offline work", ())
        self.stuck_steps = counter("stuck_steps", "Steps that ran for longer than --stuck-step-timeout", ())
        self.loop_lag = histogram("event_loop_lag_seconds", "How late the event loop ran a timer", _TOKEN_SECONDS, ())
        self.startup = Gauge("sluice_startup_time_seconds", "From the start to the loaded model", registry=registry)
        self.in_flight = Gauge("sluice_http_in_flight", "Inference requests in flight", registry=registry)
        ProcessCollector(registry=registry)
        registry.register(self._engine)
        self._aliased = compat == "vllm"

    def watch(self, engine: Engine) -> None:
        """Export the numbers of `engine` from now on."""
        self._engine.engine = engine

    def render(self) -> bytes:
        """The text exposition format."""
        return text_of(self.collect())

    def collect(self) -> list[Metric]:
        """What there is to tell, for `text_of`."""
        families = list(self.registry.collect())
        return [*families, *_vllm_names(families)] if self._aliased else families


def text_of(families: Iterable[Metric]) -> bytes:
    """The text exposition format. Takes most of the time that a scrape takes, in whatever thread."""
    return bytes(generate_latest(_Collected(families)))


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class _TokenTimes(Collector):
    """Times between tokens, entered for each of them: a lock and a walk along the buckets would cost more than the rest."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], StepHistogram] = {}

    def of(self, model: str, tenant: str) -> StepHistogram:
        """What the event loop enters."""
        return self._told.setdefault((model, tenant), StepHistogram(_TOKEN_SECONDS))

    def collect(self) -> Iterator[Metric]:
        name, text = "sluice_inter_token_latency_seconds", "Time between tokens of a stream"
        family = HistogramMetricFamily(name, text, labels=_LABELS)
        for labels, times in self._told.items():
            family.add_metric(labels, buckets(times.bounds, times.counts), times.total)
        yield family


class _EngineNumbers(Collector):
    """`engine.stats()` at the time of the scrape."""

    def __init__(self, recent: Recent) -> None:
        self.engine: Engine | None = None
        self._recent = recent

    def collect(self) -> Iterator[Metric]:
        if self.engine is None:
            return
        stats = self.engine.stats()
        names = {tenant: self.engine.resolve(None, tenant).id for tenant in Tenant}
        gauges: dict[str, GaugeMetricFamily] = {}
        counters: dict[str, CounterMetricFamily] = {}
        for name, text in _GAUGES.items():
            gauges[name] = GaugeMetricFamily(f"sluice_{name}", text, labels=_LABELS)
        for name, text in _COUNTERS.items():
            counters[name] = CounterMetricFamily(f"sluice_{name}", text, labels=_LABELS)
        sources = CounterMetricFamily(
            "sluice_prompt_tokens_by_source", "Prompt tokens, computed or found in the cache", labels=(*_LABELS, "source")
        )
        for tenant, part in stats.tenants.items():
            labels = (names[tenant], tenant.value)
            gauges["num_requests_running"].add_metric(labels, part.running)
            gauges["num_requests_waiting"].add_metric(labels, part.waiting)
            gauges["kv_cache_usage_perc"].add_metric(labels, part.kv_pages / max(1, stats.kv_pages))
            counters["prompt_tokens"].add_metric(labels, part.counters.prompt_tokens)
            counters["generation_tokens"].add_metric(labels, part.counters.generated_tokens)
            counters["computed_tokens"].add_metric(labels, part.counters.computed_tokens)
            counters["recomputed_tokens"].add_metric(labels, part.counters.recomputed_tokens)
            counters["num_preemptions"].add_metric(labels, part.counters.preemptions)
            counters["corrupted_requests"].add_metric(labels, part.counters.corrupted)
            cached = part.counters.cached_prompt_tokens
            sources.add_metric((*labels, "local_compute"), part.counters.prompt_tokens - cached)
            sources.add_metric((*labels, "local_cache_hit"), cached)
            counters["prefix_cache_queries"].add_metric(labels, part.prefix_queries)
            counters["prefix_cache_hits"].add_metric(labels, part.prefix_hits)
        yield from gauges.values()
        yield from counters.values()
        yield sources
        pages = GaugeMetricFamily("sluice_kv_pages", "Pages of KV memory", labels=("state",))
        pages.add_metric(("total",), stats.kv_pages)
        pages.add_metric(("free",), stats.kv_pages_free)
        pages.add_metric(("cached",), stats.kv_pages_cached)
        yield pages
        yield from self._memory(stats)
        yield self._waiting(stats, names)
        info = GaugeMetricFamily(
            "sluice_cache_config_info", "KV memory", labels=("model_name", "tenant", "block_size", "num_gpu_blocks")
        )
        online = names[Tenant.ONLINE], Tenant.ONLINE.value
        info.add_metric((*online, str(stats.page_size), str(stats.kv_pages)), 1)
        yield info
        yield GaugeMetricFamily(
            "sluice_step_prediction_error_ratio",
            "Mean error of the predicted step time over recent steps",
            value=stats.step_prediction_error,
        )
        yield from _device_metrics(self.engine, stats)
        yield from self._targets()
        paused = GaugeMetricFamily("sluice_paused", "1 while an administrator has the tenant stand still", labels=("tenant",))
        for tenant in Tenant:
            paused.add_metric((tenant.value,), float(tenant in stats.paused))
        yield paused
        mode = GaugeMetricFamily("sluice_sharing_mode", "1 for how the tenants of one model share it now", labels=("mode",))
        for name in ("exclusive", "step"):
            mode.add_metric((name,), float(name == stats.steps.mode))
        yield mode
        yield GaugeMetricFamily("sluice_slo_scale", "Factor on the budget of shared steps", value=stats.steps.scale)
        host = stats.tenants[Tenant.OFFLINE].host
        if host is not None:
            yield from _host_metrics(host)
        yield _histogram(
            "sluice_preemption_layers",
            "Layers from an online arrival, or the last one at which it could wait, to the stop of an offline pass",
            stats.steps.layer_buckets,
            stats.steps.preemption_layers,
            stats.steps.preemption_layers_sum,
        )
        if stats.sharing is not None:
            yield from _sharing_metrics(stats.sharing)

    def _memory(self, stats: Stats) -> Iterator[Metric]:
        assert self.engine is not None
        size = GaugeMetricFamily("sluice_kv_bytes", "KV memory by who uses it; sums to all of it", labels=("state",))
        online, offline, cached = self.engine.kv_shares()
        shares = {"online": online, "offline": offline, "cached": cached, "free": max(0.0, 1 - online - offline - cached)}
        for state, share in shares.items():
            size.add_metric((state,), share * stats.kv_bytes)
        yield size
        memory = GaugeMetricFamily(
            "sluice_memory_bytes", "Memory of all models: weights, KV, and host copies of KV", labels=("kind", "model_name")
        )
        for name, weights in stats.weight_bytes.items():
            memory.add_metric(("weights", name), weights)
        memory.add_metric(("kv", ""), stats.kv_bytes)
        if (host := stats.tenants[Tenant.OFFLINE].host) is not None:
            memory.add_metric(("host_copies", ""), host.slots * host.page_bytes)
        yield memory

    @staticmethod
    def _waiting(stats: Stats, names: dict[Tenant, str]) -> Metric:
        """Offline requests that wait because online work goes first are told apart from those for which there is no room."""
        if stats.sharing is not None:
            stands_back = stats.sharing.state != "offline"
        else:
            online = stats.tenants[Tenant.ONLINE]
            stands_back = stats.steps.mode == "exclusive" and online.running + online.waiting > 0
        waiting = GaugeMetricFamily(
            "sluice_num_requests_waiting_by_reason",
            "Requests waiting for room (capacity), or for online work to end (deferred)",
            labels=(*_LABELS, "reason"),
        )
        for tenant, part in stats.tenants.items():
            deferred = part.waiting if tenant is Tenant.OFFLINE and stands_back else 0
            waiting.add_metric((names[tenant], tenant.value, "capacity"), part.waiting - deferred)
            waiting.add_metric((names[tenant], tenant.value, "deferred"), deferred)
        return waiting

    def _targets(self) -> Iterator[Metric]:
        targets = GaugeMetricFamily("sluice_slo_target_seconds", "What online requests should not exceed", labels=("kind",))
        missed = CounterMetricFamily(
            "sluice_slo_violations",
            "Online requests that exceeded it, by what they would have met it without",
            labels=("kind", "cause"),
        )
        for kind, seconds in self._recent.targets.items():
            targets.add_metric((kind,), seconds)
            for cause in CAUSES:
                missed.add_metric((kind, cause), self._recent.missed[kind, cause])
        yield targets
        yield missed


def _host_metrics(host: HostStats) -> Iterator[Metric]:
    """Copies of offline KV in host memory. Only where there are any."""
    pages = GaugeMetricFamily("sluice_host_pages", "Pages of host memory for copies of offline KV", labels=("state",))
    pages.add_metric(("total",), host.slots)
    pages.add_metric(("used",), host.used)
    yield pages
    totals = {
        "host_copied_pages": ("Pages copied to host memory", host.copied),
        "host_copied_bytes": ("The same in bytes", host.copied * host.page_bytes),
        "host_restored_pages": ("Pages copied back for requests that had lost them", host.restored),
        "host_restored_bytes": ("The same in bytes", host.restored * host.page_bytes),
        "host_restored_tokens": ("Tokens of those pages, which were not computed again", host.restored_tokens),
        "host_evicted_pages": ("Copies given up for others", host.evicted),
    }
    for name, (text, value) in totals.items():
        yield CounterMetricFamily(f"sluice_{name}", text, value=value)


def _device_metrics(engine: Engine, stats: Stats) -> Iterator[Metric]:
    """What the device did with its time."""
    seconds = CounterMetricFamily(
        "sluice_device_time_seconds", "Time by owner of the device; sums to wall time", labels=("owner",)
    )
    for owner, value in stats.device_seconds.items():
        seconds.add_metric((owner,), value)
    yield seconds
    parts = CounterMetricFamily(
        "sluice_computing_seconds", "Time computing; a mixed step counts by its tokens", labels=("tenant", "phase")
    )
    for part, value in stats.part_seconds.items():
        parts.add_metric(tuple(part.split("_")), value)
    yield parts
    timeline = engine.timeline
    holds = timeline.parked_seconds if stats.sharing is None else timeline.hold_seconds
    steps = HistogramMetricFamily("sluice_step_seconds", "Time of a step by whom it served", labels=("tenant",))
    for tenant, times in timeline.step_seconds.items():
        steps.add_metric((tenant.value,), buckets(times.bounds, times.counts), times.total)
    yield steps
    tokens = timeline.step_tokens
    model = (engine.resolve(None, Tenant.ONLINE).id, Tenant.ONLINE.value)
    yield _histogram(
        "sluice_iteration_tokens_total", "Tokens computed in a step", tokens.bounds, tokens.counts, tokens.total, model
    )
    yield _histogram(
        "sluice_preempted_duration_seconds",
        "How long the offline worker stood still at a time, or with one model an offline pass that made way",
        holds.bounds,
        holds.counts,
        holds.total,
    )
    yield GaugeMetricFamily("sluice_step_age_seconds", "Age of the step that runs now", value=engine.step_age())


def _sharing_metrics(sharing: SharingStats) -> Iterator[Metric]:
    """What changing hands cost. Only where there is an offline model."""
    preemptions = CounterMetricFamily("sluice_preemptions", "Times the offline worker was stopped", labels=("reason",))
    preemptions.add_metric(("arrival",), sharing.preemptions)
    preemptions.add_metric(("false_alarm",), sharing.false_alarms)
    yield preemptions
    yield _histogram(
        "sluice_preemption_latency_seconds",
        "Online arrival to the offline worker standing still",
        sharing.latency_buckets,
        sharing.preemption_latency,
        sharing.preemption_seconds,
    )
    caused = sharing.request_preemptions
    yield _histogram(
        "sluice_request_preemptions",
        "Offline preemptions caused by an online request; never more than 1",
        (0, 1),
        (caused.get(0, 0), caused.get(1, 0), sum(count for number, count in caused.items() if number > 1)),
        float(sum(number * count for number, count in caused.items())),
    )
    yield CounterMetricFamily("sluice_reclaims", "Times online ran out of slabs and took some", value=sharing.reclaims)
    yield CounterMetricFamily("sluice_reclaimed_slabs", "Slabs taken in reclaims", value=sharing.reclaimed_slabs)
    took = sharing.reclaim_seconds
    yield _histogram(
        "sluice_reclaim_seconds", "Time that online waited for slabs to be taken", took.bounds, took.counts, took.total
    )
    slabs = GaugeMetricFamily("sluice_slabs", "Slabs of KV memory by owner", labels=("owner",))
    for tenant, count in sharing.slabs.items():
        slabs.add_metric((tenant.value,), count)
    yield slabs
    yield GaugeMetricFamily("sluice_online_headroom_slabs", "Slabs online means to keep free", value=sharing.headroom_slabs)
    yield GaugeMetricFamily("sluice_cooldown_seconds", "Time that online keeps an idle device", value=sharing.cooldown_seconds)
    yield CounterMetricFamily("sluice_worker_restarts", "Times the worker was started again", value=sharing.worker_restarts)
    gate = GaugeMetricFamily("sluice_gate_info", "How the offline worker is stopped", labels=("gate", "state"))
    gate.add_metric((sharing.gate, sharing.state.value), 1)
    yield gate


def _histogram(
    name: str,
    text: str,
    bounds: Sequence[float],
    counts: Sequence[int],
    total: float,
    labels: tuple[str, str] | None = None,
) -> HistogramMetricFamily:
    """A histogram from counts per bucket, of which the last holds what is beyond the largest bound."""
    if labels is None:
        return HistogramMetricFamily(name, text, buckets=buckets(bounds, counts), sum_value=total)
    family = HistogramMetricFamily(name, text, labels=_LABELS)
    family.add_metric(labels, buckets(bounds, counts), total)
    return family


def buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, int]]:
    """Counts per bucket, of which the last holds what is beyond the largest bound, as Prometheus adds them up."""
    return list(zip([*(str(float(bound)) for bound in bounds), "+Inf"], accumulate(counts), strict=True))


def _vllm_names(families: Iterable[Metric]) -> Iterator[Metric]:
    """The same samples under the names that dashboards, autoscalers and benchmarks already look for."""
    for family in families:
        name = family.name.removeprefix("sluice_")
        if name not in _ALIASED:
            continue
        alias = Metric(f"vllm:{name}", family.documentation, family.type)
        for sample in family.samples:
            if sample.labels.get("tenant") == Tenant.ONLINE.value and not sample.name.endswith("_created"):
                labels = {key: value for key, value in sample.labels.items() if key != "tenant"} | {"engine": "0"}
                alias.add_sample(sample.name.replace("sluice_", "vllm:", 1), labels, sample.value)
        yield alias
