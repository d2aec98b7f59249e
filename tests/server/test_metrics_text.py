"""/metrics as Prometheus reads it."""

from __future__ import annotations

import math
from collections import Counter

from prometheus_client.parser import text_string_to_metric_families
from serving import MESSAGES, serving

from engine import Engine

CHAT = "/v1/chat/completions"


async def test_the_whole_of_metrics_parses(engine: Engine) -> None:
    async with serving(engine) as server:
        await server.post(CHAT, {"messages": MESSAGES, "max_tokens": 3})
        await server.events(CHAT, {"messages": MESSAGES, "max_tokens": 3, "service_tier": "flex"})
        async with server.client.get(server.url + "/metrics") as response:
            assert response.headers["Content-Type"].startswith("text/plain; version=")
            text = await response.text()
    families = list(text_string_to_metric_families(text))
    names = Counter(family.name for family in families)
    assert [name for name, times in names.items() if times > 1] == [], "a family is told once"
    assert all(family.documentation and family.type != "unknown" for family in families)
    samples = Counter((s.name, tuple(sorted(s.labels.items()))) for family in families for s in family.samples)
    assert [sample for sample, times in samples.items() if times > 1] == [], "a series is told once"
    for family in families:
        assert all(not math.isnan(sample.value) for sample in family.samples), family.name
        if family.type == "counter":
            assert all(s.value >= 0 and s.name.endswith(("_total", "_created")) for s in family.samples), family.name
        if family.type == "histogram":
            check_histogram([(s.name, s.labels, s.value) for s in family.samples])


def check_histogram(samples: list[tuple[str, dict[str, str], float]]) -> None:
    """Buckets that never fall, the last of which holds everything."""
    series: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = {}
    counts = {}
    for name, labels, value in samples:
        key = tuple(sorted((label, text) for label, text in labels.items() if label != "le"))
        if name.endswith("_bucket"):
            series.setdefault(key, []).append((float(labels["le"]), value))
        elif name.endswith("_count"):
            counts[key] = value
    for key, buckets in series.items():
        values = [value for _, value in sorted(buckets)]
        assert values == sorted(values)
        assert max(buckets)[0] == math.inf
        assert values[-1] == counts[key]
