"""Predictions the scheduler decides by: how long outputs get, and how much KV the running requests will need at their peak.

The peak rule is LightLLM's "past-future" admission (papers: Past-Future scheduler): sort by remaining output, longest first;
when the i-th of them ends, i requests have grown by its remaining length and the shorter ones are gone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable

from engine.types import Request, Tenant

_HISTORY = 512  # finished outputs remembered per tenant
_ENOUGH = 32  # below this many the request's own bound is the prediction
_QUANTILE = 0.9


class OutputLengths:
    """Predicts a request's output length from those of its tenant's finished requests."""

    def __init__(self) -> None:
        self._finished: dict[Tenant, deque[int]] = {tenant: deque(maxlen=_HISTORY) for tenant in Tenant}
        self._sorted: dict[Tenant, list[int]] = {tenant: [] for tenant in Tenant}

    def observe(self, tenant: Tenant, length: int) -> None:
        self._finished[tenant].append(length)
        self._sorted[tenant].clear()  # sorted again when next asked

    def remaining(self, request: Request) -> int:
        """Output tokens still to come: a high quantile of those outputs that got at least this far, never above its bound."""
        bound = max(1, request.max_len - len(request.tokens))
        finished = self._finished[request.tenant]
        if request.params.ignore_eos or len(finished) < _ENOUGH:
            return bound
        ordered = self._sorted[request.tenant]
        if not ordered:
            ordered.extend(sorted(finished))
        done = request.num_output
        first = bisect_right(ordered, done)
        longer = len(ordered) - first
        if longer < _ENOUGH // 4:  # further than almost everyone: no data, so assume a tenth more, as LightLLM does
            return min(bound, max(1, done // 10) + 64)
        return min(bound, ordered[first + int(_QUANTILE * (longer - 1))] - done)


def peak_tokens(sizes: Iterable[tuple[int, int]]) -> int:
    """Most tokens of KV held at once by requests of (tokens now, tokens to come) that all run to their predicted end."""
    held = peak = 0
    ordered = sorted(sizes, key=lambda size: -size[1])
    for count, (now, to_come) in enumerate(ordered, start=1):
        held += now
        peak = max(peak, held + to_come * count)
    return peak
