"""HostTier under random lives: slots are one thing at a time, leased copies stay, and what is found holds what it says."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.memory.host import HostTier

CHAINS = [[bytes([chain, index]) for index in range(6)] for chain in range(4)]
NAMES = [f"r{index}" for index in range(len(CHAINS))]


class Slots(RuleBasedStateMachine):
    @initialize(num_slots=st.integers(1, 12))
    def build(self, num_slots: int) -> None:
        self.tier = HostTier(num_slots)
        self.holds: dict[int, bytes] = {}  # what was last filled into each slot
        self.leased: dict[str, dict[bytes, int]] = {}

    @rule(chain=st.integers(0, 3), index=st.integers(0, 5))
    def reserve(self, chain: int, index: int) -> None:
        digest = CHAINS[chain][index]
        if self.tier.has(digest):
            return
        room = self.tier.room
        slot = self.tier.reserve(digest)
        assert (slot is None) == (room == 0)
        if slot is not None:
            assert slot not in {slot for leases in self.leased.values() for slot in leases.values()}
            self.holds.pop(slot, None)

    @precondition(lambda self: self.tier.filling())
    @rule(data=st.data(), good=st.booleans())
    def end(self, data: st.DataObject, good: bool) -> None:
        digest = data.draw(st.sampled_from(sorted(self.tier.filling())))
        if good:
            self.tier.filled(digest)
            (slot,) = self.tier.find([digest], 0)
            self.holds[slot] = digest
        else:
            self.tier.cancel(digest)
            assert not self.tier.has(digest)

    @rule(chain=st.integers(0, 3), length=st.integers(0, 6))
    def secure(self, chain: int, length: int) -> None:
        pages = CHAINS[chain][:length]
        safe = self.tier.secure(NAMES[chain], pages)
        slots = self.tier.find(CHAINS[chain], 0)
        assert safe <= len(slots)
        self.leased.setdefault(NAMES[chain], {}).update(zip(CHAINS[chain][:safe], slots, strict=False))

    @rule(chain=st.integers(0, 3))
    def end_lease(self, chain: int) -> None:
        self.tier.end_lease(NAMES[chain])
        self.leased.pop(NAMES[chain], None)
        assert self.tier.num_safe(NAMES[chain]) == 0

    @invariant()
    def whole(self) -> None:
        if not hasattr(self, "tier"):
            return
        self.tier.check()
        for leases in self.leased.values():
            for digest, slot in leases.items():
                assert self.tier.find([digest], 0) == [slot], "a leased copy is gone"
                assert self.holds[slot] == digest
        for chain in CHAINS:
            for slot, digest in zip(self.tier.find(chain, 0), chain, strict=False):
                assert self.holds[slot] == digest


Slots.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestSlots = Slots.TestCase
