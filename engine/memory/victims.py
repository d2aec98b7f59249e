"""Which of offline's slabs online takes: those whose loss costs least work. Pure functions over integers.

A request that loses a slab computes again what came after its first page there; what lies before stays in the prefix cache and
is found again. So the end of a sequence is cheap, its beginning dear, and what follows a lost slab free (Valve, section on
selective eviction; the rule itself is ours). FIFO and LIFO are the baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Holdings:
    """What offline's slabs held when the worker last told. Slabs not named hold nothing.

    `holders`: for each slab the requests with pages in it, each with the tokens it keeps if it loses the slab. `computed`: for
    each request the tokens it would have to compute again if it lost everything, 0 if its KV is safe in host memory.
    """

    holders: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    computed: Mapping[int, int] = field(default_factory=dict)


Victims = Callable[[Sequence[int], int, Holdings], list[int]]
"""(offline's slabs, longest held first; how many are wanted; what they hold) -> the slabs to take."""


def least_lost_work(slabs: Sequence[int], count: int, holdings: Holdings) -> list[int]:
    """Greedily the slab with the least marginal cost: empty ones, then what lies behind something lost already, and so on.

    A frozen worker tells nothing new: slabs it held when it last did and that are not offline's any more are lost already.
    """
    left = set(slabs)
    kept = dict(holdings.computed)  # tokens that each request still has
    for slab in holdings.holders.keys() - left:
        _lose(slab, kept, holdings)
    taken: list[int] = []
    while left and len(taken) < count:
        best = min(left, key=lambda slab: (_marginal(slab, kept, holdings), -slab))
        left.remove(best)
        _lose(best, kept, holdings)
        taken.append(best)
    return taken


def _marginal(slab: int, kept: Mapping[int, int], holdings: Holdings) -> int:
    """Tokens lost with this slab, beyond what is lost already."""
    return sum(max(0, kept.get(request, 0) - rest) for request, rest in holdings.holders.get(slab, {}).items())


def _lose(slab: int, kept: dict[int, int], holdings: Holdings) -> None:
    for request, rest in holdings.holders.get(slab, {}).items():
        kept[request] = min(kept.get(request, 0), rest)


def fifo(slabs: Sequence[int], count: int, holdings: Holdings) -> list[int]:
    """The slabs offline has had longest."""
    return list(slabs[:count])


def lifo(slabs: Sequence[int], count: int, holdings: Holdings) -> list[int]:
    """The slabs offline got last."""
    return list(reversed(slabs[-count:])) if count else []


VICTIMS: dict[str, Victims] = {"least-lost-work": least_lost_work, "fifo": fifo, "lifo": lifo}
