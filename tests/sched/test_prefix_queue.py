"""The offline order: shared beginnings one after the other, the old never starved; checked against a naive queue."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sched.trie import PrefixQueue, PromptTrie
from engine.types import Request, SamplingParams, Tenant

PAGE = 2


def request(name: str, prompt: list[int], priority: int = 0, salt: str = "") -> Request:
    return Request(
        id=name, tenant=Tenant.OFFLINE, tokens=list(prompt), num_prompt=len(prompt), params=SamplingParams(), seed=0,
        stop_ids=frozenset(), max_len=1000, arrival=0.0, priority=priority, cache_salt=salt,
    )  # fmt: skip


def shared(one: Request, other: Request) -> int:
    """Whole pages that both prompts begin with; -1 if their salts part them."""
    if one.cache_salt != other.cache_salt:
        return -1
    pages = 0
    most = min(one.num_prompt, other.num_prompt) // PAGE
    while pages < most and one.tokens[: (pages + 1) * PAGE] == other.tokens[: (pages + 1) * PAGE]:
        pages += 1
    return pages


class Naive:
    """The same order by looking at everybody."""

    def __init__(self, patience: int) -> None:
        self.patience, self.passed = patience, 0
        self.waiting: list[Request] = []
        self.place: dict[Request, int] = {}
        self.started: set[Request] = set()
        self.last: Request | None = None

    def push(self, request: Request) -> None:
        self.place.setdefault(request, len(self.place))
        self.waiting.append(request)

    def oldest(self) -> Request:
        return min(self.waiting, key=lambda r: (r.priority, self.place[r]))

    def allowed(self) -> set[Request]:
        """Who may go next: one request, or all that share equally much with the last."""
        oldest = self.oldest()
        level = [r for r in self.waiting if r.priority == oldest.priority]
        if back := [r for r in level if r in self.started]:
            return {min(back, key=lambda r: self.place[r])}
        if self.passed >= self.patience:
            return {oldest}
        if self.last is None:
            return set(level)
        best = max(shared(self.last, r) for r in level)
        return {r for r in level if shared(self.last, r) == best}

    def remove(self, request: Request) -> None:
        self.passed = 0 if request is self.oldest() else self.passed + 1
        self.waiting.remove(request)
        self.started.add(request)
        self.last = request

    def forget(self, request: Request) -> None:
        if request in self.waiting:
            self.waiting.remove(request)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(0, 5))
def test_the_order_is_that_of_a_naive_queue(data: st.DataObject, patience: int) -> None:
    queue, naive = PrefixQueue(PAGE, patience), Naive(patience)
    gone: list[Request] = []
    for number in range(data.draw(st.integers(1, 40))):
        kind = data.draw(st.sampled_from(["new", "new", "go", "go", "back", "forget"]))
        if kind == "new":
            prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=9))
            new = request(str(number), prompt, data.draw(st.integers(0, 1)), data.draw(st.sampled_from(["", "s"])))
            queue.push(new)
            naive.push(new)
        elif kind == "go" and naive.waiting:
            head = queue.peek()
            assert head in naive.allowed()
            queue.remove(head)
            naive.remove(head)
            gone.append(head)
        elif kind == "back" and gone:
            back = gone.pop(data.draw(st.integers(0, len(gone) - 1)))
            back.tokens.append(7)  # it had got an output token
            queue.push(back)
            naive.push(back)
        elif kind == "forget" and (naive.waiting or gone):
            everybody = naive.waiting + gone
            one = everybody[data.draw(st.integers(0, len(everybody) - 1))]
            queue.forget(one)
            naive.forget(one)
            if one in gone:
                gone.remove(one)
        assert len(queue) == len(naive.waiting)
        assert (queue.peek() is None) == (not naive.waiting)


def drained(queue: PrefixQueue) -> list[str]:
    order = []
    for head in queue.heads():
        order.append(head.id)
        queue.remove(head)
    return order


def test_groups_go_one_after_the_other() -> None:
    queue = PrefixQueue(PAGE)
    for number in range(12):
        queue.push(request(f"{number % 3}{number // 3}", [number % 3] * 8 + [number]))
    assert drained(queue) == [f"{group}{member}" for group in range(3) for member in range(4)]


def test_a_stream_of_friends_does_not_starve_a_stranger() -> None:
    """However many come that share with the last one, each stranger waits for a bounded number of them."""
    queue = PrefixQueue(PAGE, patience=5)
    for number in range(4):
        queue.push(request(f"friend {number}", [1, 1, 1, 1, number]))
    strangers = [request(f"stranger {number}", [9, number, number]) for number in range(3)]
    for stranger in strangers:
        queue.push(stranger)
    order = []
    for number in range(60):
        head = queue.peek()
        order.append(head.id)
        queue.remove(head)
        queue.push(request(f"later {number}", [1, 1, 1, 1, number]))
    for place, stranger in enumerate(strangers):
        assert order.index(stranger.id) <= (place + 5) * 6


def test_urgent_work_goes_first_whatever_it_shares() -> None:
    queue = PrefixQueue(PAGE)
    for number in range(3):
        queue.push(request(f"calm {number}", [1, 1, number], priority=1))
    head = queue.peek()
    queue.remove(head)
    queue.push(request("urgent", [5, 5], priority=0))
    assert drained(queue) == ["urgent", "calm 1", "calm 2"]


def test_a_refused_head_is_not_overtaken() -> None:
    queue = PrefixQueue(PAGE)
    for number in range(3):
        queue.push(request(str(number), [number] * 4))
    assert [head.id for head in queue.heads()] == ["0"]


def test_the_trie_keeps_nothing_of_who_left() -> None:
    rng, trie = random.Random(0), PromptTrie(PAGE)
    members = [request(str(n), rng.choices(range(2), k=rng.randrange(1, 20))) for n in range(200)]
    for member in members:
        trie.insert(member)
    rng.shuffle(members)
    for member in members:
        trie.remove(member)
    assert not len(trie) and not trie._root.children and not trie._root.here
