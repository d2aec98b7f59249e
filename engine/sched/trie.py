"""PrefixQueue: waiting offline requests in the order that computes shared beginnings of prompts once (HyGen's PSM).

Depth first over a trie of the queued prompts: next comes who shares most with who went last, so a shared beginning is used
while it is cached. That alone would starve what shares nothing, so whoever is oldest goes first after every `PATIENCE` others:
at place r of the queue one waits for at most (r + 1) * (PATIENCE + 1) others, whatever comes later. Priorities go before both.

An edge of the trie is a page of tokens, since nothing smaller is shared. A request alone in its branch is a leaf as high up as
possible, so memory and time follow what prompts share, not their length; no operation costs more than O(prompt length).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.sched.queue import TenantQueue
from engine.types import Request

PATIENCE = 64


@dataclass(slots=True, eq=False)
class _Node:
    """Requests whose prompts begin alike: `here` those that go on by less than a page, the others by their next page.

    Both lose their first entry again and again. A plain dict would look for the next one past the places of all that went.
    """

    here: OrderedDict[Request, None] = field(default_factory=OrderedDict)
    children: OrderedDict[int, _Node | Request] = field(default_factory=OrderedDict)


class PromptTrie:
    """Requests by their prompts. `first(after)` is a depth-first walk that stands where `after` left it."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._root = _Node()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def insert(self, request: Request) -> None:
        self._size += 1
        node = self._root
        for depth in range(self._depth(request)):
            key = self._key(request, depth)
            child = node.children.get(key)
            if child is None:
                node.children[key] = request
                return
            if isinstance(child, Request):  # no longer alone in its branch
                node.children[key] = child = self._branch(child, depth + 1)
            node = child
        node.here[request] = None

    def _branch(self, request: Request, depth: int) -> _Node:
        if depth == self._depth(request):
            return _Node(here=OrderedDict({request: None}))
        return _Node(children=OrderedDict({self._key(request, depth): request}))

    def remove(self, request: Request) -> None:
        """Take out a request that is in it."""
        node = self._root
        way: list[tuple[_Node, int]] = []  # how the walk came to `node`
        for depth in range(self._depth(request)):
            key = self._key(request, depth)
            child = node.children[key]
            if isinstance(child, Request):
                assert child is request
                del node.children[key]
                break
            way.append((node, key))
            node = child
        else:
            del node.here[request]
        self._size -= 1
        while way and not node.here and not node.children:
            node, key = way.pop()
            del node.children[key]

    def first(self, after: Request | None) -> Request | None:
        """Who shares the longest beginning with `after`; of several the branch that came first, and in it the shortest way."""
        if not self._size:
            return None
        node = self._root
        for depth in range(0 if after is None else self._depth(after)):
            assert after is not None
            child = node.children.get(self._key(after, depth))
            if child is None:
                break
            if isinstance(child, Request):
                return child
            node = child
        while not node.here:
            child = next(iter(node.children.values()))
            if isinstance(child, Request):
                return child
            node = child
        return next(iter(node.here))

    def _depth(self, request: Request) -> int:
        return 1 + request.num_prompt // self._page_size

    def _key(self, request: Request, depth: int) -> int:
        """The edge at this depth, as a hash: two unlike pages with the same one would cost order, and nothing else."""
        if depth == 0:
            return hash(request.cache_salt)  # other salts share nothing
        end = depth * self._page_size
        return hash(tuple(request.tokens[end - self._page_size : end]))


class PrefixQueue:
    """Fills the place of a `TenantQueue`. Who was preempted comes back ahead of all that never ran, in its old order."""

    def __init__(self, page_size: int, patience: int = PATIENCE) -> None:
        self._page_size = page_size
        self._patience = patience
        self._tries: dict[int, PromptTrie] = {}  # by priority
        self._by_age = TenantQueue()
        self._returned = TenantQueue(self._by_age)  # of those that ran before
        self._last: Request | None = None  # who went last
        self._passed = 0  # requests that went since the oldest one did
        self._started: set[Request] = set()  # ran before and may come back
        self._waiting: set[Request] = set()
        self._head: Request | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, request: Request) -> None:
        self._by_age.push(request)
        self._waiting.add(request)
        if request in self._started:
            self._returned.push(request)
        else:
            self._tries.setdefault(request.priority, PromptTrie(self._page_size)).insert(request)
        self._head = None

    def peek(self) -> Request | None:
        if self._head is None:
            self._head = self._choose()
        return self._head

    def _choose(self) -> Request | None:
        oldest = self._by_age.peek()  # of the best priority there is
        if oldest is None:
            return None
        returned = self._returned.peek()
        if returned is not None and returned.priority == oldest.priority:
            return returned
        if self._passed >= self._patience:
            return oldest
        return self._tries[oldest.priority].first(self._last)

    def remove(self, request: Request) -> None:
        """The request stops waiting (it runs now) but keeps its place should it come back."""
        if request not in self._waiting:
            return
        self._passed = 0 if request is self._by_age.peek() else self._passed + 1
        self._take_out(request)
        self._last = request
        self._started.add(request)

    def forget(self, request: Request) -> None:
        """The request is finished."""
        if request in self._waiting:
            self._take_out(request)
        self._by_age.forget(request)
        self._returned.forget(request)
        self._started.discard(request)

    def heads(self) -> Iterator[Request]:
        """The head, then the next one if the head was admitted meanwhile, and so on: nobody overtakes a refused request."""
        while (head := self.peek()) is not None:
            yield head
            if head in self._waiting:
                return

    def _take_out(self, request: Request) -> None:
        self._waiting.remove(request)
        self._by_age.remove(request)
        if request in self._started:
            self._returned.remove(request)
        else:
            trie = self._tries[request.priority]
            trie.remove(request)
            if not trie:
                del self._tries[request.priority]
        self._head = None


class PrefixesComing:
    """Pages of prompts that running requests are about to compute. Who begins with one waits, to compute it once."""

    def __init__(self) -> None:
        self._by: dict[bytes, Request] = {}
        self._of: dict[Request, list[bytes]] = {}

    def started(self, request: Request, num_cached: int) -> None:
        """The request runs now and has its first `num_cached` full pages."""
        mine = [digest for digest in request.page_hashes[num_cached:] if digest not in self._by]
        if mine:
            self._of[request] = mine
            self._by.update(dict.fromkeys(mine, request))

    def awaited(self, request: Request, num_cached: int) -> bool:
        """Whether the page after the first `num_cached` ones is on its way. Nobody waits for what is parked."""
        if num_cached >= len(request.page_hashes):
            return False
        other = self._by.get(request.page_hashes[num_cached])
        return other is not None and not other.parked

    def done(self, request: Request) -> None:
        """The request has computed its prompt, or will not."""
        for digest in self._of.pop(request, ()):
            del self._by[digest]
