"""Generation: one submitted request as its reader sees it, from tokens to text.

The engine's thread pushes TokenOut in; one reader takes Deltas out, by `async for`, `for`, `await completion()` or `result()`.
Text is made and stop strings are found on the engine's side, so a request ends at its stop string whether or not anybody
reads. A slow reader costs nobody anything: what it has not taken yet is merged into one delta per choice.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import msgspec

from engine.clock import MonotonicClock
from engine.errors import EngineDead, RequestFailed
from engine.types import (
    Choice,
    Completion,
    Cost,
    Delta,
    FinishReason,
    SamplingParams,
    Tenant,
    TokenOut,
    Usage,
)

_clock = MonotonicClock()


class Detokenizer(Protocol):
    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class StopStrings:
    """Finds stop strings in growing text and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, *, armed: bool = True, last: bool = False) -> str:
        """Text that is safe to show now. Sets `found` when a stop string is complete; unless `armed` nothing stops."""
        if not self._stops:
            return text
        text = self._held + text
        self._held = ""
        if not armed:
            return text
        hits = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            at, self.found = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            return text[: at + len(self.found)] if self._include else text[:at]
        keep = 0 if last else max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


class _ChoiceText:
    """The text side of one choice: detokenizer, stop strings, count of tokens."""

    def __init__(self, index: int, params: SamplingParams, detokenizer: Detokenizer) -> None:
        self.index = index
        self.finished = False
        self.num_tokens = 0
        self._params = params
        self._detokenizer = detokenizer
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)

    def push(self, out: TokenOut) -> Delta:
        params = self._params
        reason, token = out.finish_reason, out.token
        stop_reason: str | int | None = None
        text = ""
        if token is not None:
            self.num_tokens += 1
            hidden = out.stop_token is not None and reason is FinishReason.STOP and not params.include_stop_str_in_output
            text = "" if hidden else self._detokenizer.push(token)
        if reason is not None:
            text += self._detokenizer.flush()
            if out.stop_token in params.stop_token_ids:
                stop_reason = out.stop_token
        if params.stop:
            text = self._stops.push(text, armed=self.num_tokens >= params.min_tokens, last=reason is not None)
            if self._stops.found is not None:
                reason, stop_reason = FinishReason.STOP, self._stops.found
        self.finished = reason is not None
        return Delta(
            index=self.index,
            text=text,
            tokens=() if token is None else (token,),
            logprobs=() if out.logprob is None else (out.logprob,),
            prompt_logprobs=out.prompt_logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            error=out.error,
        )


def merge_deltas(deltas: list[Delta]) -> list[Delta]:
    """One delta per choice, in order of first appearance, that says the same as all of them together."""
    if len(deltas) < 2:
        return deltas
    groups: dict[int, list[Delta]] = {}
    for delta in deltas:
        groups.setdefault(delta.index, []).append(delta)
    return [group[0] if len(group) == 1 else _joined(group) for group in groups.values()]


def _joined(group: list[Delta]) -> Delta:
    last = group[-1]
    return msgspec.structs.replace(
        last,
        text="".join(delta.text for delta in group),
        tokens=tuple(token for delta in group for token in delta.tokens),
        logprobs=tuple(entry for delta in group for entry in delta.logprobs),
        prompt_logprobs=next((delta.prompt_logprobs for delta in group if delta.prompt_logprobs is not None), None),
    )


@dataclass(slots=True)
class Times:
    """When a request came and its tokens were computed, on the monotonic clock. Written by the engine's side."""

    submitted: float
    queued: float = 0.0  # seconds until it was first admitted
    first: float | None = None  # its first token, of whichever choice
    last: float | None = None  # its last token so far
    delayed_first: float = 0.0  # seconds of offline work in steps until its first token
    delayed: float = 0.0  # the same to its end

    def saw(self, out: TokenOut) -> None:
        if out.delayed > self.delayed:
            self.delayed = out.delayed
        if out.token is None:
            return
        self.last = _clock.now()
        if self.first is None:
            self.first, self.queued, self.delayed_first = self.last, out.queued, out.delayed


class Generation:
    """A request in the engine, or finished. Made by `Engine.submit`; exactly one reader."""

    def __init__(
        self,
        *,
        request_id: str,
        model: str,
        tenant: Tenant,
        prompt_tokens: tuple[int, ...],
        params: SamplingParams,
        make_detokenizer: Callable[[], Detokenizer],
        abort: Callable[[int], None],
    ) -> None:
        """`abort` ends the choice with the given index in the engine."""
        self.request_id = request_id
        self.model = model
        self.tenant = tenant
        self.prompt_tokens = prompt_tokens
        self.params = params
        self._choices = [_ChoiceText(index, params, make_detokenizer()) for index in range(params.n)]
        self._unfinished = params.n
        self._abort = abort
        self._lock = threading.Lock()
        self._mail: list[Delta] = []
        self._waiter: asyncio.Future[None] | threading.Event | None = None
        self._only_when_done = False
        self._cached_tokens = 0
        self._num_preemptions = 0
        self.times = Times(submitted=_clock.now())
        self._dead: EngineDead | None = None
        self.has_started: Callable[[], bool] = lambda: False  # whether the engine has admitted some of it
        self.cost = Cost()  # what colocation cost an online request
        self.revoked = False  # somebody other than its reader ends it, and it is not to be sent again
        self.counted = False  # somebody else enters the cost in the ledger, for several generations perhaps

    # -- the reader's side

    @property
    def finished(self) -> bool:
        return not self._unfinished or self._dead is not None

    @property
    def waiting(self) -> bool:
        """Whether its turn has not come yet."""
        return not self.finished and self.times.first is None and not self.has_started()

    @property
    def num_preemptions(self) -> int:
        """How often the request lost its place to others and was computed again."""
        return self._num_preemptions

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=len(self.prompt_tokens),
            completion_tokens=sum(choice.num_tokens for choice in self._choices),
            cached_tokens=self._cached_tokens,
        )

    def abort(self) -> None:
        """End the request now. Its reader gets a last delta with finish_reason ABORT. Does nothing if it has ended."""
        for choice in self._choices:
            if not choice.finished and self._dead is None:
                self._abort(choice.index)

    async def read(self) -> list[Delta]:
        """What came since the last time, merged, as soon as there is any; empty at the end. Raises EngineDead."""
        while not self._mail and not self.finished:
            await self._wait_async()
        return self._take()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while deltas := await self.read():
            for delta in deltas:
                yield delta

    def __iter__(self) -> Iterator[Delta]:
        while True:
            while not self._mail and not self.finished:
                self._wait_sync(None)
            if not (deltas := self._take()):
                return
            yield from deltas

    async def completion(self) -> Completion:
        """Wait for the end. Raises RequestFailed, or EngineDead; aborts the request if the waiting task is cancelled."""
        self._only_when_done = True
        try:
            while not self.finished:
                await self._wait_async()
        except asyncio.CancelledError:
            self.abort()
            raise
        return self._completion(self._take())

    def result(self, timeout: float | None = None) -> Completion:
        """`completion` for callers without an event loop. Raises TimeoutError after `timeout` seconds."""
        self._only_when_done = True
        while not self.finished:
            self._wait_sync(timeout)
        return self._completion(self._take())

    def _take(self) -> list[Delta]:
        with self._lock:
            mail, self._mail = self._mail, []
            if not mail and self._dead is not None:
                raise self._dead
        return merge_deltas(mail)

    async def _wait_async(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        if self._set_waiter(waiter):
            await waiter

    def _wait_sync(self, timeout: float | None) -> None:
        waiter = threading.Event()
        if self._set_waiter(waiter) and not waiter.wait(timeout):
            raise TimeoutError(f"request {self.request_id} did not finish within {timeout} s")

    def _set_waiter(self, waiter: asyncio.Future[None] | threading.Event) -> bool:
        """False if there is something to read already."""
        with self._lock:
            if self.finished or (self._mail and not self._only_when_done):
                return False
            self._waiter = waiter
            return True

    def _completion(self, deltas: list[Delta]) -> Completion:
        if self._dead is not None:
            raise self._dead
        for delta in deltas:
            if delta.error is not None:
                raise RequestFailed(delta.error)
        choices = [self._choice(delta) for delta in sorted(deltas, key=lambda delta: delta.index)]
        return Completion(
            id=self.request_id,
            model=self.model,
            tenant=self.tenant,
            prompt_tokens=self.prompt_tokens,
            choices=tuple(choices),
            usage=self.usage,
            prompt_logprobs=deltas[0].prompt_logprobs,
        )

    def _choice(self, delta: Delta) -> Choice:
        assert delta.finish_reason is not None
        return Choice(
            index=delta.index,
            text=delta.text,
            tokens=delta.tokens,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            logprobs=delta.logprobs if self.params.logprobs is not None else None,
        )

    # -- the engine's side

    def push(self, index: int, out: TokenOut) -> asyncio.Future[None] | threading.Event | None:
        """Take in what a step did to choice `index`. Returns the reader to wake, if any."""
        choice = self._choices[index]
        with self._lock:  # an abort comes from another thread than tokens if the model runs in another process
            if choice.finished:
                return None  # what the engine computed before it obeyed the abort
            self._mail.append(choice.push(out))
            self._unfinished -= choice.finished
            self._cached_tokens = max(self._cached_tokens, out.num_cached)
            self._num_preemptions = max(self._num_preemptions, out.num_preemptions)
            self.times.saw(out)
            waiter = self._take_waiter()
        if choice.finished and out.finish_reason is None:
            self._abort(index)  # a stop string ended it, of which the engine knows nothing
        return waiter

    def die(self, error: EngineDead) -> asyncio.Future[None] | threading.Event | None:
        """The engine is gone: the reader gets the error after what was delivered before."""
        with self._lock:
            if not self.finished:
                self._dead = error
            return self._take_waiter()

    def _take_waiter(self) -> asyncio.Future[None] | threading.Event | None:
        if self._only_when_done and not self.finished:
            return None
        waiter, self._waiter = self._waiter, None
        return waiter


_AT_ONCE = 32  # readers woken in one turn of an event loop, so that a large step does not keep it from everybody else


def wake(waiters: Iterable[asyncio.Future[None] | threading.Event]) -> None:
    """Wake readers: events directly, futures with one call into each event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for waiter in waiters:
        if isinstance(waiter, threading.Event):
            waiter.set()
        else:
            loops.setdefault(waiter.get_loop(), []).append(waiter)
    for loop, futures in loops.items():
        try:
            loop.call_soon_threadsafe(_resolve, loop, iter(futures))
        except RuntimeError:  # the loop is closed: nobody is waiting there any more
            continue


def _resolve(loop: asyncio.AbstractEventLoop, futures: Iterator[asyncio.Future[None]]) -> None:
    batch = list(islice(futures, _AT_ONCE))
    for future in batch:
        if not future.done():
            future.set_result(None)
    if len(batch) == _AT_ONCE:
        loop.call_soon(_resolve, loop, futures)
