"""How many slabs online keeps free beyond what it uses, so that most of its growth needs no reclaim.

`Miad` is Valve's rule (arXiv 2604.07874, abstract and section on memory): the headroom grows by a factor when a reclaim was
needed and shrinks by a step in quiet periods, which bounds the *rate* of reclaims. The paper's constants are not public; ours
are parameters. The other rules are what it is measured against.
"""

from __future__ import annotations

from typing import Protocol


class Reserve(Protocol):
    """`headroom` is the wanted number of free slabs; `fixed_share` a number of slabs that never changes hands, or None."""

    headroom: int
    fixed_share: int | None

    def reclaimed(self) -> None:
        """Online ran out of slabs and took some from offline."""
        ...

    def quiet(self) -> None:
        """A quiet period without a reclaim went by."""
        ...


class Miad:
    """Multiplicative increase (capped), additive decrease (floored)."""

    fixed_share: int | None = None

    def __init__(self, floor: int, cap: int, factor: int = 2, step: int = 1) -> None:
        self._floor, self._cap, self._factor, self._step = floor, max(floor, cap), factor, step
        self.headroom = floor

    def reclaimed(self) -> None:
        self.headroom = min(self._cap, max(1, self.headroom) * self._factor)

    def quiet(self) -> None:
        self.headroom = max(self._floor, self.headroom - self._step)


class Fixed:
    """The same headroom always; zero is no reserve at all."""

    fixed_share: int | None = None

    def __init__(self, headroom: int) -> None:
        self.headroom = headroom

    def reclaimed(self) -> None:
        pass

    def quiet(self) -> None:
        pass


class Static(Fixed):
    """Online owns `share` slabs for ever and never gets another: memory split in advance."""

    def __init__(self, share: int) -> None:
        super().__init__(0)
        self.fixed_share: int | None = share


def make_reserve(name: str, num_slabs: int) -> Reserve:
    """A reserve by the name its flag uses: miad, fixed, none or static."""
    if name == "miad":
        return Miad(floor=max(1, num_slabs // 32), cap=max(1, num_slabs // 2))
    if name == "fixed":
        return Fixed(max(1, num_slabs // 8))
    if name == "none":
        return Fixed(0)
    assert name == "static", name
    return Static(max(1, num_slabs // 2))


def kept_slabs(name: str, num_slabs: int, cache_share: float) -> int:
    """Most slabs that online may hold while it runs nothing: its reserve in quiet times and slabs of cached prefixes."""
    reserve = make_reserve(name, num_slabs)
    if reserve.fixed_share is not None:
        return reserve.fixed_share
    return reserve.headroom + most_cached(name, num_slabs, cache_share)


def most_cached(name: str, num_slabs: int, cache_share: float) -> int:
    """Slabs that online may keep for cached prefixes alone; beside its reserve one slab at least stays for offline."""
    return max(0, min(int(cache_share * num_slabs), num_slabs - 1 - make_reserve(name, num_slabs).headroom))
