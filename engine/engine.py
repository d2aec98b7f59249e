"""Engine: the public class. One model (in time two), two tenants, from prompts to text; for scripts, notebooks and servers.

Owns the tokenizer, the model's names, the table of live generations, and the loop that runs the core. Thread-safe.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from engine.backlog import Backlog
from engine.build import BuiltModel, build_core, load_model, save_learned
from engine.config import EngineConfig
from engine.errors import (
    ContextTooLong,
    EngineDead,
    InvalidRequest,
    ShuttingDown,
    UnknownModel,
)
from engine.generation import Generation, wake
from engine.loop import EngineLoop
from engine.memory.pages import SlabUse, slab_use
from engine.sched.plan import StepPlan, StepResult
from engine.served import Served, open_models, serve_built
from engine.stats import RequestView, Stats, snapshot, view
from engine.timeline import Timeline
from engine.types import Abort, Completion, Cost, Delta, FinishReason, ModelCard, SamplingParams, Submit, Tenant, TokenOut

if TYPE_CHECKING:
    from engine.colocate.exclusive import ExclusiveSharing
    from engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class Arrival:
    """A request whose head is here and whose body is not. What is submitted in its `with` block is entered under its cost."""

    def __init__(self, sharing: ExclusiveSharing | None) -> None:
        self.cost = Cost()
        self.withdrawn = False
        self._sharing = sharing

    def withdraw(self) -> None:
        """It is no online request: offline work goes on at once, as if nothing had come."""
        self.withdrawn = True
        if self._sharing is not None:
            self._sharing.withdraw(id(self))


_arrival: ContextVar[Arrival | None] = ContextVar("arrival", default=None)


class Engine:
    """An inference engine in this process.

    >>> with Engine("demo") as engine:
    ...     print(engine.generate(["The capital of France is"], SamplingParams(max_tokens=8, temperature=0))[0].text)

    `config` or keyword overrides with the names of EngineConfig's fields set it up; `tokenizer` stands for the one in the
    model's folder. Loading shows progress on stderr. Raises InvalidConfig or InvalidCheckpoint if it cannot start.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config: EngineConfig | None = None,
        built: BuiltModel | None = None,
        tokenizer: Tokenizer | None = None,
        progress: bool = True,
        **overrides: Any,
    ) -> None:
        config = (config or EngineConfig()).with_options(**overrides)
        self.config = config = config if model is None else replace(config, model=model)
        if built is None:
            self._models = open_models(config, progress=progress, tokenizer=tokenizer)
            config = self._models.online.config
            built = load_model(config, memory=self._models.memory, progress=progress)
            for served in (self._models.online, self._models.offline):
                if served is not None:
                    served.grammars.warm_up()
        else:
            self._models = serve_built(built, config, tokenizer)
        self._random = random.Random(self.config.seed)
        self._lock = threading.Lock()
        self._live: dict[str, Generation] = {}
        self._count = 0
        self._draining = False
        self._paused: frozenset[Tenant] = frozenset()
        self._dead: EngineDead | None = None
        offline = None if self._models.one_worker else self._models.offline
        self._loaded = config, built
        open_guide = self._models.online.grammars.open
        self._core = build_core(config, built, slabs=None if offline is None else (), open_guide=open_guide)
        self._backlog = Backlog(config, partial(self._core.scheduler.num_running, Tenant.ONLINE))
        self.timeline = Timeline(self._core.scheduler.clock)
        self._loop = EngineLoop(self._core, self._deliver, self._died)
        self._core.interrupted = self._loop.online_at_the_door
        self._core.on_step = self._on_step
        self._lost = dict.fromkeys(Tenant, (0, 0))  # preemptions and tokens lost by them, as of the last step
        self._core.waiting = self._loop.waiting
        self._sharing = None if offline is None else self._share_with(offline, built)

    def _share_with(self, offline: Served, built: BuiltModel) -> ExclusiveSharing:
        """Start the offline model's worker and wait until it is ready, or known not to become so."""
        from engine.colocate.exclusive import ExclusiveSharing
        from engine.kernels.select import resolve_device

        device = resolve_device(self.config.device)
        assert built.window is not None
        memory, call = self._models.memory, self._loop.call
        sharing = ExclusiveSharing(
            self.config, offline.config, memory, self._core, device, built.window, call, self._deliver, timeline=self.timeline
        )
        try:
            if not sharing.wait_ready():
                logger.error("serving without the offline model: %s", sharing.failure)
        except BaseException:
            self._loop.close()
            sharing.close()
            raise
        return sharing

    # -- life

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether requests submitted now can finish."""
        return self._dead is None and self._loop.alive

    def drain(self, timeout: float) -> bool:
        """Take no new requests and wait for those there are. True if all ended within `timeout` seconds."""
        self._draining = True
        deadline = time.monotonic() + timeout  # noqa: TID251 - the caller's time, not the engine's
        while self._live and self.alive:
            if time.monotonic() >= deadline:  # noqa: TID251
                return False
            time.sleep(0.02)
        return not self._live

    def close(self) -> None:
        """Stop now. Unfinished requests end with EngineDead."""
        self._draining = True
        self._loop.close()
        if self._sharing is not None:
            self._sharing.close()
        for served in (self._models.online, self._models.offline):
            if served is not None:
                served.grammars.close()
        with suppress(OSError):
            save_learned(*self._loaded, self._core)
        self._died(EngineDead("the engine was closed"))

    # -- what is served

    @property
    def models(self) -> tuple[ModelCard, ...]:
        """What is served, the online model first."""
        return tuple(served.card for served in (self._models.online, self._models.offline) if served is not None)

    def resolve(self, name: str | None, tenant: Tenant | None = None) -> ModelCard:
        """The model that serves `name` (None: the tenant's own). Raises UnknownModel."""
        return self._serving(name, tenant).card

    def tokenizer(self, model: str | None = None) -> Tokenizer:
        return self._serving(model, None).tokenizer

    def _serving(self, name: str | None, tenant: Tenant | None) -> Served:
        if (found := self._models.find(name, tenant)) is not None:
            return found
        known = ", ".join(card.id for card in self.models)
        raise UnknownModel(f"the model {name!r} does not exist here; served: {known}", param="model")

    # -- requests

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        tenant: Tenant | str = Tenant.ONLINE,
        model: str | None = None,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Generation:
        """Start a request and return at once.

        `prompt` is text or token ids. Lower `priority` goes first within the tenant; prompts with different `cache_salt` never
        share cached prefixes. Raises InvalidRequest, ContextTooLong, UnknownModel, Overloaded, ShuttingDown or EngineDead.
        """
        tenant = Tenant(tenant)
        served = self._serving(model, tenant)
        if served.card.tenant is Tenant.OFFLINE:
            tenant = Tenant.OFFLINE
        params = params or SamplingParams()
        params.validate(served.card.vocab_size)
        self._check_open(tenant)
        if params.grammar is not None:
            served.grammars.check(params.grammar)
        if params.bad_words:
            params = replace(params, bad_tokens=(*params.bad_tokens, *_cut(params.bad_words, served.tokenizer)))
        tokens = _encode(prompt, served)
        if tenant is Tenant.ONLINE:
            self._backlog.check_prompt(len(tokens))
        return self._start(tokens, params, served, tenant, request_id, priority, cache_salt)

    def submit_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        tenant: Tenant | str = Tenant.ONLINE,
        model: str | None = None,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Generation:
        """`submit` for a conversation, rendered with the model's chat template."""
        tenant = Tenant(tenant)
        served = self._serving(model, tenant)
        self._check_open(tenant)
        limit = served.card.max_model_len
        tokens = served.tokenizer.render_chat(messages, tools=tools, kwargs=template_kwargs, max_tokens=limit)
        return self.submit(
            tokens, params, tenant=tenant, model=served.card.id, request_id=request_id, priority=priority, cache_salt=cache_salt
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tenant: Tenant | str = Tenant.OFFLINE,
        progress: bool = True,
        **options: Any,
    ) -> list[Completion]:
        """Run prompts to their end, in order of the prompts, with a progress bar. Raises RequestFailed if one fails."""
        from tqdm import tqdm

        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        many: list[Any] = [prompts] if single else list(prompts)
        each = [params] * len(many) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(many):
            raise InvalidRequest(f"{len(many)} prompts but {len(each)} params: give one, or one for each", param="params")
        running: list[Generation] = []
        try:
            for prompt, one in zip(many, each, strict=True):
                running.append(self.submit(prompt, one, tenant=tenant, **options))
            return [g.result() for g in tqdm(running, unit="prompt", disable=not progress)]
        finally:
            for generation in running:
                generation.abort()

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Any) -> Completion:
        """Answer one conversation."""
        generation = self.submit_chat(messages, params, **options)
        try:
            return generation.result()
        finally:
            generation.abort()

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> AsyncIterator[Delta]:
        """Deltas of one request as they come. Leaving the loop early aborts the request."""
        generation = await asyncio.to_thread(self.submit, prompt, params, **options)
        try:
            async for delta in generation:
                yield delta
        finally:
            generation.abort()

    def abort(self, request_id: str) -> bool:
        """End all live requests with this id for good: who waits is told not to send them again. False if there is none."""
        with self._lock:
            found = {g for g in self._live.values() if g.request_id == request_id}
        for generation in found:
            generation.revoked = True
            generation.abort()
        return bool(found)

    def abort_all(self, tenant: Tenant | str) -> int:
        """End all live requests of the tenant, which may be sent again. Returns how many there were."""
        with self._lock:
            found = [g for g in self._live.values() if g.tenant is Tenant(tenant) and not g.revoked]
        for generation in found:
            generation.abort()
        return len(found)

    # -- pause

    @property
    def paused(self) -> frozenset[Tenant]:
        """The tenants whose requests stand still."""
        return self._paused

    def pause(self, *tenants: Tenant | str) -> None:
        """Have requests of these tenants (default: of both) stand still, new ones included, until `resume`.

        A step under way is finished. What they have computed stays, unless online needs the memory of offline. While online
        requests stand still, offline ones wait for them as ever.
        """
        self._set_paused("paused", self._paused.union(map(Tenant, tenants or Tenant)))

    def resume(self, *tenants: Tenant | str) -> None:
        """Undo `pause`."""
        self._set_paused("resumed", self._paused.difference(map(Tenant, tenants or Tenant)))

    def _set_paused(self, kind: str, paused: frozenset[Tenant]) -> None:
        with self._lock:
            changed = sorted(paused ^ self._paused)
            self._paused = paused
            self._loop.pause(paused)
            if self._sharing is not None:
                self._sharing.pause(Tenant.OFFLINE in paused)
        if changed:
            self.timeline.event(kind, f"{' and '.join(changed)} work, by an administrator")

    # -- what can be seen

    def stats(self) -> Stats:
        sharing = None if self._sharing is None else self._sharing.stats()
        return snapshot(self._core, self.timeline, self._models, sharing, self.paused)

    def requests(self) -> list[RequestView]:
        """Every request that is not over, oldest first."""
        with self._lock:
            live = list(self._live.items())
        state_of, now = self._core.scheduler.state_of, self.timeline.clock.now()
        stopped = self._sharing is not None and self._sharing.frozen
        return [view(key, generation, state_of, now, stopped=stopped) for key, generation in live]

    def slab_use(self) -> list[SlabUse]:
        """The KV memory slab by slab: whose it is, and how much of it is in use."""
        pool = self._core.scheduler.kv.pool
        if self._sharing is not None:
            return self._sharing.slab_use(pool)
        return [slab_use(pool, slab) for slab in range(pool.num_slabs)]

    def kv_shares(self) -> tuple[float, float, float]:
        """Shares of the whole KV memory that online uses, that offline uses, and that is cached."""
        pool = self._core.scheduler.kv.pool
        pages = pool.num_slabs * pool.pages_per_slab
        offline = pool.num_used(Tenant.OFFLINE) / pages if self._sharing is None else self._sharing.offline_share()
        return pool.num_used(Tenant.ONLINE) / pages, offline, pool.num_cached / pages

    def step_age(self) -> float:
        """For how many seconds the step that runs now has been running; 0 between steps."""
        since = self._core.busy_since
        return 0.0 if since is None else self._core.scheduler.clock.now() - since

    def stack(self) -> str:
        """Where the engine's thread is now, as a traceback: for a step that does not end."""
        return self._loop.stack()

    # -- inside: requests in

    def _check_open(self, tenant: Tenant) -> None:
        if self._dead is not None:
            raise self._dead
        if self._draining:
            raise ShuttingDown("the engine is shutting down and takes no new requests", retry_after=30)
        if tenant is Tenant.ONLINE:
            self._backlog.check()

    def _start(
        self,
        tokens: tuple[int, ...],
        params: SamplingParams,
        served: Served,
        tenant: Tenant,
        request_id: str | None,
        priority: int,
        cache_salt: str,
    ) -> Generation:
        with self._lock:
            self._count += 1
            key = str(self._count)
            seed = self._random.getrandbits(63) if params.seed is None else params.seed
        put = self._loop.put
        if self._sharing is not None and served.card.tenant is Tenant.OFFLINE:
            put = self._sharing.put

        def abort(index: int) -> None:
            with suppress(EngineDead):  # then it is gone anyway
                put(Abort(f"{key}.{index}"))

        generation = Generation(
            request_id=request_id or f"req-{key}",
            model=served.card.id,
            tenant=tenant,
            prompt_tokens=tokens,
            params=params,
            make_detokenizer=lambda: served.tokenizer.detokenizer(tokens),
            abort=abort,
        )
        names = tuple(f"{key}.{index}" for index in range(params.n))
        generation.has_started = lambda: any(map(self._core.scheduler.has_started, names))
        if tenant is Tenant.ONLINE:
            arrival = _arrival.get()
            if arrival is not None:
                generation.cost = arrival.cost
                generation.counted = True
            self._arrive(generation, generation.cost)
        with self._lock:
            self._live[key] = generation
        if tenant is Tenant.ONLINE:
            self._backlog.add(key, params.n, len(tokens))
        try:
            for index in range(params.n):
                one = params.for_choice(index, seed)
                assert one.seed is not None
                put(
                    Submit(
                        id=names[index],
                        tenant=tenant,
                        prompt=tokens,
                        params=one,
                        seed=one.seed,
                        priority=priority,
                        cache_salt=cache_salt,
                    )
                )
        except BaseException:
            self._forget(key)
            raise
        return generation

    @contextmanager
    def arriving(self, *, online: bool = True) -> Iterator[Arrival]:
        """A request's head is here: offline work stands still until it is known what it is, and to the end if it is online.

        For servers, which know of a request before its body is read. Unless `online`, it is known to be offline already.
        """
        arrival = Arrival(self._sharing)
        if online:
            self._arrive(arrival, arrival.cost)
        else:
            arrival.withdrawn = True
        token = _arrival.set(arrival)
        try:
            yield arrival
        finally:
            _arrival.reset(token)
            if self._sharing is not None:
                self._sharing.finish(id(arrival), arrival.cost)
                if not arrival.withdrawn:
                    self._sharing.count(arrival.cost)

    def _arrive(self, key: object, cost: Cost) -> None:
        if self._sharing is not None:
            self._sharing.arrive(id(key), cost)

    def _forget(self, key: str) -> None:
        """The generation has ended."""
        with self._lock:
            generation = self._live.pop(key, None)
        if generation is None or generation.tenant is not Tenant.ONLINE:
            return
        self._backlog.gone(key)
        if self._sharing is not None:
            names = tuple(f"{key}.{index}" for index in range(generation.params.n))
            self._sharing.finish(id(generation), generation.cost, names)
            if not generation.counted:
                self._sharing.count(generation.cost)

    # -- inside: what the device did, in the loop's thread

    def _on_step(self, plan: StepPlan, result: StepResult) -> None:
        timeline, counters = self.timeline, self._core.scheduler.counters
        timeline.step(plan, result)
        if result.checkpoint is not None:
            waited = max(0.0, timeline.clock.now() - self._loop.knocked) if self._loop.online_at_the_door() else 0.0
            cause = "an online request arrived" if waited else "the engine is closing"
            layer = result.checkpoint.layer
            timeline.event("parked", cause, layer=layer, rows=len(plan.rows), waited_ms=round(waited * 1e3, 3))
        for tenant, (preemptions, tokens) in self._lost.items():
            if counters[tenant].preemptions != preemptions:
                now = counters[tenant].preemptions, counters[tenant].lost_tokens
                timeline.event(
                    "gave_way", f"{tenant} requests made room", requests=now[0] - preemptions, lost_tokens=now[1] - tokens
                )
                self._lost[tenant] = now

    # -- inside: results out, in the loop's thread

    def _deliver(self, outs: Iterable[TokenOut]) -> None:
        waiters = []
        for out in outs:
            key, _, index = out.id.partition(".")
            generation = self._live.get(key)
            if generation is None:
                continue
            try:
                waiter = generation.push(int(index), out)
            except Exception:  # the text of one request must not end the engine
                logger.exception("request %s: its output could not be turned into text", generation.request_id)
                failed = TokenOut(id=out.id, finish_reason=FinishReason.ERROR, error="its output could not be turned into text")
                waiter = generation.push(int(index), failed)
            if out.token is not None:
                self._backlog.begun(key)
            if generation.finished:
                self._forget(key)
            if waiter is not None:
                waiters.append(waiter)
        wake(waiters)

    def _died(self, error: EngineDead) -> None:
        self._dead = self._dead or error
        with self._lock:
            live, self._live = list(self._live.values()), {}
        wake([waiter for generation in live if (waiter := generation.die(error)) is not None])


def _cut(words: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The tokens of each word, at the start of a text and behind a space."""
    cut = [tokenizer.encode(space + word.lstrip(), False, param="bad_words") for word in words for space in ("", " ")]
    return list(dict.fromkeys(tuple(tokens) for tokens in cut if tokens))


def _encode(prompt: Prompt, served: Served) -> tuple[int, ...]:
    card = served.card
    if isinstance(prompt, str):
        tokens: Sequence[int] = served.tokenizer.encode(prompt, max_tokens=card.max_model_len)
    else:
        tokens = prompt
    if not tokens:
        raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
    # Of a text as well: a tokenizer may know more tokens than the model has embeddings.
    if not {type(token) for token in tokens} <= {int} or not 0 <= min(tokens) <= max(tokens) < card.vocab_size:
        raise InvalidRequest(f"token ids must be integers from 0 to {card.vocab_size - 1}", param="prompt")
    if len(tokens) >= card.max_model_len:
        raise ContextTooLong(
            f"the prompt has {len(tokens)} tokens and the context holds {card.max_model_len}, at least one of them output; "
            "shorten the prompt",
            param="prompt",
        )
    return tuple(tokens)
