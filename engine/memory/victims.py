"""Which of offline's slabs online takes: those whose loss costs least work. Pure functions over integers.

Taking one slab of a request costs all of the request's computed tokens, since it is recomputed from the first lost page or
restored; after that its other slabs are free to take (Valve, section on selective eviction; the rule itself is ours). FIFO and
LIFO are the baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Holdings:
    """What offline's slabs hold: for each slab the requests with pages in it, for each request what its loss would cost.

    A cost is in tokens to compute again; 0 for a request whose KV is safe in host memory. Slabs not named hold nothing.
    """

    holders: Mapping[int, Sequence[int]] = field(default_factory=dict)
    costs: Mapping[int, int] = field(default_factory=dict)


Victims = Callable[[Sequence[int], int, Holdings], list[int]]
"""(offline's slabs, longest held first; how many are wanted; what they hold) -> the slabs to take."""


def least_lost_work(slabs: Sequence[int], count: int, holdings: Holdings) -> list[int]:
    """Greedily the slab with the least marginal cost: empty ones, then those whose requests are lost anyway, and so on."""
    left = set(slabs)
    lost: set[int] = set()
    taken: list[int] = []
    while left and len(taken) < count:
        best = min(left, key=lambda slab: (_marginal(slab, lost, holdings), -slab))
        left.remove(best)
        lost.update(holdings.holders.get(best, ()))
        taken.append(best)
    return taken


def _marginal(slab: int, lost: set[int], holdings: Holdings) -> int:
    return sum(holdings.costs.get(request, 0) for request in holdings.holders.get(slab, ()) if request not in lost)


def fifo(slabs: Sequence[int], count: int, holdings: Holdings) -> list[int]:
    """The slabs offline has had longest."""
    return list(slabs[:count])


def lifo(slabs: Sequence[int], count: int, holdings: Holdings) -> list[int]:
    """The slabs offline got last."""
    return list(reversed(slabs[-count:])) if count else []


VICTIMS: dict[str, Victims] = {"least-lost-work": least_lost_work, "fifo": fifo, "lifo": lifo}
