"""Scheduler: decides what each step runs and learns from what came of it. The only place that changes a request's state.

One step: a View is made, the policy orders the candidates and sets the budget, each candidate is placed (pages all or nothing,
victims preempted if the policy names any) until the budget is spent. `update` applies a finished step. Legal moves:
WAITING -> RUNNING (admitted), RUNNING -> WAITING (preempted, pages lost), any -> FINISHED. No torch, no text, no threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.clock import Clock
from engine.errors import NOT_FINITE
from engine.memory.host import Transfer
from engine.memory.manager import KVManager
from engine.sched.latency import Load, StepTime
from engine.sched.parked import ParkedPasses
from engine.sched.plan import Checkpoint, PlanRow, RowResult, StepPlan, StepResult
from engine.sched.policies import Policy
from engine.sched.predictor import OutputLengths, peak_tokens
from engine.sched.queue import Queue, TenantQueue
from engine.sched.room import StepRoom
from engine.sched.rotation import Rotation
from engine.sched.slo import Delays
from engine.sched.trie import PrefixesComing, PrefixQueue
from engine.sched.view import View
from engine.types import FinishReason, Grammar, Guide, Request, RequestState, Submit, Tenant, TokenLogprob, TokenOut, uniform


@dataclass(slots=True)
class TenantCounters:
    """Running totals of one tenant."""

    submitted: int = 0
    finished: int = 0
    computed_tokens: int = 0  # tokens whose KV was computed, recomputation included
    recomputed_tokens: int = 0  # of those, the ones computed before and lost
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0  # of those, the ones whose KV was there already
    corrupted: int = 0  # requests that ended because their logits were no numbers
    generated_tokens: int = 0
    preemptions: int = 0
    lost_tokens: int = 0  # whose KV the preempted requests had


class Scheduler:
    """All requests of one engine core."""

    def __init__(
        self,
        kv: KVManager,
        policy: Policy,
        clock: Clock,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_ids: Iterable[int] = (),
        step_time: StepTime | None = None,
        max_parked_tokens: int = 16384,
        open_guide: Callable[[Grammar], Guide] | None = None,
        max_alone_tokens: int | None = None,
        prefix_order: bool = False,
    ) -> None:
        """`max_parked_tokens`: most tokens whose hidden states are kept in passes stopped between layers. `max_alone_tokens`:
        most tokens of a step without online rows, of which it uses what makes it faster. `prefix_order`: offline requests
        that share beginnings go one after the other."""
        self.kv = kv
        self.policy = policy
        self.clock = clock
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.eos_ids = frozenset(eos_ids)
        self.step_time = step_time or StepTime()
        self.delays = Delays()  # of online requests by offline work; whoever runs the steps tells it
        self._open_guide = open_guide
        self.counters = {tenant: TenantCounters() for tenant in Tenant}
        self.paused: frozenset[Tenant] = frozenset()  # whose requests are not planned
        self._requests: dict[str, Request] = {}
        self._running: dict[Tenant, dict[Request, None]] = {tenant: {} for tenant in Tenant}  # as keys, oldest first
        self._waiting: dict[Tenant, Queue] = {tenant: TenantQueue() for tenant in Tenant}
        self._coming: PrefixesComing | None = None
        if prefix_order:
            self._waiting[Tenant.OFFLINE], self._coming = PrefixQueue(kv.page_size), PrefixesComing()
        self.rotation = Rotation(kv, self.step_time)
        self._lengths = OutputLengths()
        self._prompt_logprobs: dict[str, list[TokenLogprob | None]] = {}
        self._lost: dict[str, int] = {}  # computed tokens a preempted request had, until it is admitted again
        self._max_alone_tokens = max_alone_tokens or max_num_batched_tokens
        self.parked = ParkedPasses(max(max_parked_tokens, max_num_batched_tokens, self._max_alone_tokens))
        self.slack = 0.0  # seconds that the latest step, if shared, leaves of what it may take
        self.copy_seconds: float | None = None  # of copies beside online rows that the latest step has time for, if any
        self._step = 0
        self._most_tokens = 0  # KV that the running requests hold if all run to their bounds, a wasted page each included

    # -- requests come and go

    def add(self, submit: Submit, arrival: float | None = None) -> Request:
        """Queue a request, which arrived now or earlier. The caller has checked that its prompt fits max_model_len."""
        assert submit.id not in self._requests, submit.id
        arrival = self.clock.now() if arrival is None else arrival
        params = submit.params
        longest = self.max_model_len if params.max_tokens is None else len(submit.prompt) + params.max_tokens
        guide = None
        if params.grammar is not None:
            assert self._open_guide is not None, "checked where the request entered"
            guide = self._open_guide(params.grammar)
        request = Request(
            id=submit.id,
            tenant=submit.tenant,
            tokens=[*submit.prompt, *submit.resume],
            num_prompt=len(submit.prompt),
            params=params,
            seed=submit.seed,
            # A grammar says itself where the output ends, with an end-of-sequence token.
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos and not guide else self.eos_ids),
            max_len=min(longest, self.max_model_len),
            arrival=arrival,
            delays=self.delays.at(arrival),
            priority=submit.priority,
            cache_salt=submit.cache_salt,
            guide=guide,
        )
        assert 0 < request.num_prompt < request.max_len, "checked where the request entered"
        assert len(request.tokens) < request.max_len, "it had ended already"
        if params.prompt_logprobs is not None and not submit.resume:
            self._prompt_logprobs[request.id] = [None]  # nothing predicts the first token
        self._requests[request.id] = request
        self._waiting[request.tenant].push(request)
        self.counters[request.tenant].submitted += 1
        return request

    def abort(self, request_id: str) -> TokenOut | None:
        """End a request in whatever state it is. None if it is not here (any more)."""
        request = self._requests.get(request_id)
        return None if request is None else self._finish(request, FinishReason.ABORT)

    def has_started(self, request_id: str) -> bool:
        """Whether it was ever admitted and has not ended. Any thread may ask."""
        return (request := self._requests.get(request_id)) is not None and request.started is not None

    def unfinished(self, tenant: Tenant) -> int:
        return len(self._running[tenant]) + len(self._waiting[tenant])

    def num_running(self, tenant: Tenant) -> int:
        return len(self._running[tenant])

    def num_waiting(self, tenant: Tenant) -> int:
        return len(self._waiting[tenant])

    def state_of(self, request_id: str) -> str | None:
        """Where a request stands, in a word; None if it is not here. Any thread; a glance, not a promise."""
        request = self._requests.get(request_id)
        if request is None or request.state is not RequestState.RUNNING:
            return None if request is None else request.state.value
        return "parked" if request.parked else "restoring" if request.restoring else "running"

    # -- decide

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can run."""
        view = self._view()
        step = StepRoom(self.policy.budget(view), self.step_time, self._seconds_to_copy)
        if step.left:
            for request in self.policy.order(view):
                room = step.room(request)
                if room > 0 and request.tenant not in self.paused:
                    self._place(request, room, step, view)
                if not step.left:
                    break
        self.slack, self.copy_seconds = step.slack(), step.copying
        if not step.rows:
            return None
        self._step += 1
        return StepPlan(self._step, tuple(step.rows.values()), preemptible=not step.has_online)

    def schedule_after(self, plan: StepPlan) -> StepPlan | None:
        """The step after one that is running, each row a token further; None if it is not certain that this will come next.

        Certain are online rows that all sample, while nobody else could run. A request that ends by its next token leaves a
        row whose result is ignored. Nobody gives way here: what needs room or a choice waits for `schedule`.
        """
        followed = [place for place, row in enumerate(plan.rows) if self._goes_on(row)]
        rows = [plan.rows[place] for place in followed]
        if Tenant.ONLINE in self.paused:
            return None
        if not rows or not all(row.sample and row.tenant is Tenant.ONLINE and _needs_no_history(row) for row in plan.rows):
            return None
        if self._others_could_run(plan, seat_freed=len(rows) < len(plan.rows)):
            return None
        if not all(self.kv.grow(self._requests[row.request_id], row.end + 1) for row in rows):
            return None
        self._step += 1
        self.copy_seconds = None
        return StepPlan(self._step, tuple(self._next_row(row) for row in rows), follows=tuple(followed))

    def _goes_on(self, row: PlanRow) -> bool:
        """Whether the row's request can want another token after the one that this row samples."""
        request = self._requests.get(row.request_id)
        if request is None or request.state is not RequestState.RUNNING or request.pages is not row.pages:
            return False
        return row.end + 1 < request.max_len

    def _next_row(self, row: PlanRow) -> PlanRow:
        """The row that computes the token which `row` samples."""
        request, params = self._requests[row.request_id], row.params
        num_output = row.end + 1 - row.num_prompt
        return PlanRow(
            row.request_id,
            row.tenant,
            row.tokens,
            row.num_prompt,
            row.end,
            1,
            row.pages,
            True,
            params,
            uniform(request.seed, num_output) if params.temperature else 0.0,
            self._suppressed(request, num_output),
        )

    def _others_could_run(self, plan: StepPlan, *, seat_freed: bool) -> bool:
        """Whether the policy might run anybody beside or instead of the plan's rows, were it asked now."""
        view = self._view()
        step = StepRoom(self.policy.budget(view), self.step_time)
        planned = {row.request_id for row in plan.rows}
        full = not seat_freed and sum(map(len, self._running.values())) >= self.max_num_seqs
        for request in self.policy.order(view):
            admissible = request.state is RequestState.RUNNING or not full
            if request.id not in planned and admissible and step.room(request) > 0 and request.tenant not in self.paused:
                return True
        return False

    def _view(self) -> View:
        most, alone = self.max_num_batched_tokens, self._alone_tokens()
        return View(self.clock.now(), self._running, self._waiting, most, alone, len(self.parked) > 0)

    def _alone_tokens(self) -> int:
        """Most tokens of a step of offline rows only; none if a parked pass goes first."""
        if self.parked and not self.parked.outranked_by(self._waiting[Tenant.OFFLINE].peek()):
            return 0
        most, least = self._max_alone_tokens, self.max_num_batched_tokens
        fastest = self.step_time.saturating_tokens() if most > least else most
        return min(most, max(least, fastest), self.parked.room)

    def _place(self, request: Request, room: int, step: StepRoom, view: View) -> None:
        """A row of `room` tokens, or of what is left to it once admitted; if it may run and there are pages for them."""
        if request.state is RequestState.WAITING:
            if not self._admit(request, step, view):
                return
            room = step.room(request)
        if request.restoring:
            return
        if room <= 0:
            return  # admitted with a cached prefix that leaves it too long a rest for this step
        start, known = request.num_computed, len(request.tokens)
        end = start + room
        if end > len(request.pages) * self.kv.page_size and not self._grow(request, end, step, view):
            return
        params = request.params
        sample = end == known
        num_output = known - request.num_prompt
        guide = request.guide if sample else None
        if guide is not None:
            guide.prepare(request.tokens, request.num_prompt)
        step.add(
            PlanRow(
                request.id,
                request.tenant,
                request.tokens,
                request.num_prompt,
                start,
                room,
                request.pages,
                sample,
                params,
                uniform(request.seed, num_output) if sample and params.temperature else 0.0,
                self._suppressed(request, num_output) if num_output < params.min_tokens or guide or params.bad_tokens else (),
                guide,
            )
        )

    def _suppressed(self, request: Request, num_output: int) -> tuple[int, ...]:
        """Ids that must not come now. Under a grammar that leaves nothing else they come all the same, see `sampling`."""
        params, tokens = request.params, request.tokens
        ids: tuple[int, ...] = ()
        if num_output < params.min_tokens:
            ids = tuple(request.stop_ids)
        elif request.guide is not None and params.ignore_eos:
            ids = tuple(self.eos_ids)
        for *head, last in params.bad_tokens:
            if len(head) <= num_output and tokens[len(tokens) - len(head) :] == head:
                ids += (last,)
        return ids

    def _admit(self, request: Request, step: StepRoom, view: View) -> bool:
        """Start a waiting request: pages for all its tokens, and a place among the running ones."""
        if request.guide is not None and not request.guide.ready:
            return False
        victims = [v for v in self.policy.victims(view, request) if v.id not in step.rows]
        crowd = max(0, sum(map(len, self._running.values())) + 1 - self.max_num_seqs)
        if crowd > len(victims):
            return False
        prefix = self.kv.find_prefix(request)
        if self._coming is not None and request.tenant is Tenant.OFFLINE and self._coming.awaited(request, len(prefix)):
            return False
        if not self._fits(request, prefix, victims):
            return False
        for loser in victims[:crowd]:
            self._preempt(loser)
        yielding = iter(victims[crowd:])
        copying = self.may_copy or step.is_shared
        slots = self.rotation.slots(request, prefix) if copying else []
        while not self.kv.admit(request, len(request.tokens), prefix, slots):
            if (victim := next(yielding, None)) is None:
                return False
            self._preempt(victim)
            prefix = self.kv.find_prefix(request)  # making room may have evicted some of it
            slots = self.rotation.slots(request, prefix) if copying else []
        self._start(request, len(prefix) * self.kv.page_size, len(slots) * self.kv.page_size)
        return True

    def _start(self, request: Request, num_cached: int, num_copied: int) -> None:
        request.state = RequestState.RUNNING
        request.num_computed = num_cached
        request.restoring = num_copied > 0
        self._waiting[request.tenant].remove(request)
        self._running[request.tenant][request] = None
        self._most_tokens += request.max_len + self.kv.page_size
        if not request.restoring:
            self._count_recomputed(request)
        if self._coming is not None and request.tenant is Tenant.OFFLINE:
            self._coming.started(request, (num_cached + num_copied) // self.kv.page_size)
        if request.started is None:
            request.num_cached = num_cached + num_copied
            request.queued = self.clock.now() - request.arrival
        request.started = self.clock.now()

    def _count_recomputed(self, request: Request) -> None:
        """It goes on from num_computed: what it had beyond that is computed again."""
        lost = self._lost.pop(request.id, 0)
        self.counters[request.tenant].recomputed_tokens += max(0, lost - request.num_computed)

    def _fits(self, request: Request, prefix: list[int], yielding: list[Request]) -> bool:
        """Whether everyone who would not give way to the request can run beside it to the predicted end.

        Where giving way costs little, since there are host copies, a turn is enough.
        """
        pool, page = self.kv.pool, self.kv.page_size
        if self._most_tokens + request.max_len + page <= pool.num_pages * page:
            return True  # even if all of them ran to their bounds
        running = [other for requests in self._running.values() for other in requests]
        gone = set(yielding)
        others = [other for other in running if other not in gone]
        if not others:
            return True
        if self._peak_fits(request, prefix, others, running, math.inf):
            return True
        turn = self.rotation.turn(request, others)
        return turn < math.inf and self._peak_fits(request, prefix, others, running, turn)

    def _peak_fits(
        self, request: Request, prefix: list[int], others: list[Request], running: list[Request], steps: float
    ) -> bool:
        """Whether they fit until their predicted ends, looking ahead for so many steps at most where it is offline work."""
        pool, page = self.kv.pool, self.kv.page_size

        def to_come(one: Request) -> int:
            remaining = self._lengths.remaining(one)
            return int(min(remaining, steps)) if one.tenant is Tenant.OFFLINE else remaining

        # Requests are counted as if they shared nothing; what they do share now is taken off again.
        shared = sum(len(other.pages) for other in running) - pool.num_used() + sum(pool.refs(p) > 0 for p in prefix)
        sizes = [(len(r.tokens) + page, to_come(r)) for r in (*others, request)]
        return peak_tokens(sizes) <= (self.kv.capacity + shared) * page

    def _grow(self, request: Request, num_tokens: int, step: StepRoom, view: View) -> bool:
        """Pages for the tokens of a running request, at the cost of those who give way to it, itself last."""
        while not self.kv.grow(request, num_tokens):
            victim = next((v for v in self.policy.victims(view, request) if v.id not in step.rows), None)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Back to waiting with nothing computed. What the prefix cache keeps of it, it finds again."""
        self.parked.leave(request)
        request.restoring = False
        num_computed = request.num_computed
        self._lost[request.id] = max(num_computed, self._lost.get(request.id, 0))
        self.kv.release(request)
        request.num_computed = 0
        if request.id in self._prompt_logprobs:
            self._prompt_logprobs[request.id] = [None]  # they are computed again as well
        request.num_preemptions += 1
        request.state = RequestState.WAITING
        self._stop_running(request)
        self._waiting[request.tenant].push(request)
        self.counters[request.tenant].preemptions += 1
        self.counters[request.tenant].lost_tokens += num_computed

    def _stop_running(self, request: Request) -> None:
        del self._running[request.tenant][request]
        if self._coming is not None:
            self._coming.done(request)
        self._most_tokens -= request.max_len + self.kv.page_size

    def lose_slab(self, slab: int) -> list[Request]:
        """A slab was taken: the requests with pages in it wait again, everyone else goes on."""
        hit = self.kv.remove_slab(slab)
        for request in hit:
            self._preempt(request)
        return hit

    # -- host copies

    @property
    def may_copy(self) -> bool:
        """Whether copying keeps nobody waiting: no online request is unfinished."""
        return not self.unfinished(Tenant.ONLINE)

    def _seconds_to_copy(self) -> float:
        copies = self.kv.copies
        return 0.0 if copies is None else copies.num_to_move(self.kv.holders()) * self.rotation.copy_time.blocked

    @property
    def wants_copies(self) -> bool:
        """Whether a request waits for its pages."""
        return self.kv.copies is not None and bool(self.kv.copies.restoring())

    def next_transfer(self, limit: int, *, save: bool) -> Transfer | None:
        """Pages to be copied now, at most `limit`: those that a request waits for, else (`save`) full ones without a copy."""
        copies = self.kv.copies
        if copies is None:
            return None
        transfer = copies.next_load(limit)
        return self.kv.next_save(limit) if transfer is None and save else transfer

    def landed(self, transfer: Transfer, elapsed: float, blocked: float) -> None:
        """The transfer is complete, after so many seconds, in `blocked` of which no step could run."""
        assert self.kv.copies is not None
        self.rotation.copy_time.observe(len(transfer.moves), elapsed, blocked)
        restored = self.kv.copies.landed(transfer)
        if restored is not None:
            request, num_pages = restored
            request.num_computed += num_pages * self.kv.page_size
            request.restoring = False
            self.kv.commit(request)
            self._count_recomputed(request)

    # -- parked passes

    def park(self, checkpoint: Checkpoint) -> None:
        """Keep a pass that was stopped between layers; its requests are not planned until it goes on."""
        rows = checkpoint.plan.rows
        self.parked.park(checkpoint, [self._requests[row.request_id] for row in rows if row.request_id in self._requests])

    # -- learn

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenOut]:
        """Apply a finished step. Rows of requests that are gone, or that lost their pages meanwhile, are ignored."""
        by_id = {row.request_id: row for row in plan.rows}
        outs: list[TokenOut] = []
        for row_result in result.rows:
            row = by_id[row_result.request_id]
            request = self._requests.get(row.request_id)
            if request is None or request.state is not RequestState.RUNNING or request.pages is not row.pages:
                continue
            out = self._apply(request, row, row_result)
            if out is not None:
                outs.append(out)
        return outs

    def learn(self, plan: StepPlan, seconds: float) -> None:
        """A plan ran from its first layer to its last in so many seconds."""
        self.step_time.observe(Load.of(plan.rows), seconds)
        self.rotation.observe(plan, seconds)

    def wants(self, plan: StepPlan) -> bool:
        """Whether any request of the plan is still here to be told of its results."""
        return any(row.request_id in self._requests for row in plan.rows)

    def fail(self, plan: StepPlan, error: str) -> list[TokenOut]:
        """The step could not run: its requests end with an error."""
        requests = [self._requests[row.request_id] for row in plan.rows if row.request_id in self._requests]
        return [self._finish(request, FinishReason.ERROR, error=error) for request in requests]

    def _apply(self, request: Request, row: PlanRow, result: RowResult) -> TokenOut | None:
        if result.error is not None:
            self.counters[request.tenant].corrupted += result.error == NOT_FINITE
            return self._finish(request, FinishReason.ERROR, error=result.error)
        counters = self.counters[request.tenant]
        counters.computed_tokens += row.count
        request.num_computed = end = row.start + row.count
        if end % self.kv.page_size == 0 or row.count > 1:
            self.kv.commit(request)
        if self._coming is not None and row.start < row.num_prompt <= end:
            self._coming.done(request)
        if result.prompt_logprobs and request.id in self._prompt_logprobs:
            self._prompt_logprobs[request.id].extend(result.prompt_logprobs)
        if result.token is None:
            return None
        if end == request.num_prompt:
            counters.prompt_tokens += request.num_prompt
            counters.cached_prompt_tokens += min(request.num_cached, request.num_prompt)
        counters.generated_tokens += 1
        tokens = request.tokens
        tokens.append(result.token)
        if result.token in request.stop_ids and (request.num_output >= request.params.min_tokens or request.guide is not None):
            return self._finish(request, FinishReason.STOP, result, stop_token=result.token)
        if len(tokens) >= request.max_len:
            return self._finish(request, FinishReason.LENGTH, result)
        if end > request.num_prompt:
            return TokenOut(
                id=request.id,
                token=result.token,
                logprob=result.logprob,
                num_cached=request.num_cached,
                num_preemptions=request.num_preemptions,
            )
        return self._out(request, result)

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        result: RowResult | None = None,
        *,
        stop_token: int | None = None,
        error: str | None = None,
    ) -> TokenOut:
        out = self._out(request, result, reason, stop_token, error)
        self.parked.leave(request)
        self.kv.forget(request)
        if request.state is RequestState.RUNNING:
            self._stop_running(request)
        self._waiting[request.tenant].forget(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        del self._requests[request.id]
        self._lost.pop(request.id, None)
        self._prompt_logprobs.pop(request.id, None)
        self.counters[request.tenant].finished += 1
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._lengths.observe(request.tenant, request.num_output)
        return out

    def _out(
        self,
        request: Request,
        result: RowResult | None,
        reason: FinishReason | None = None,
        stop_token: int | None = None,
        error: str | None = None,
    ) -> TokenOut:
        first = result is not None and request.num_output == 1
        logprobs = self._prompt_logprobs.pop(request.id, None) if first else None
        return TokenOut(
            id=request.id,
            token=None if result is None else result.token,
            logprob=None if result is None else result.logprob,
            prompt_logprobs=None if logprobs is None else tuple(logprobs),
            finish_reason=reason,
            stop_token=stop_token,
            error=error,
            num_cached=request.num_cached,
            num_preemptions=request.num_preemptions,
            queued=request.queued if first else 0.0,
            delayed=self.delays.total - request.delays,
        )

    def check(self) -> None:
        """Raise AssertionError unless requests, queues and pages agree. For tests."""
        self.kv.check()
        running = [request for requests in self._running.values() for request in requests]
        assert all(request.state is RequestState.RUNNING and request.pages for request in running)
        assert self._most_tokens == sum(request.max_len + self.kv.page_size for request in running)
        assert len(running) + sum(map(len, self._waiting.values())) == len(self._requests)
        assert {request.id for request in self.kv.holders()} == {request.id for request in running}
        for request in running:
            assert self.kv.pages_for(request.num_computed) <= len(request.pages), request.id
            assert request.num_computed < len(request.tokens), request.id
        self.parked.check()
        restoring = {request.id for request in running if request.restoring}
        assert restoring == (set() if self.kv.copies is None else self.kv.copies.restoring())


def _needs_no_history(row: PlanRow) -> bool:
    """Whether the token after this row's can be sampled without the host having seen this one."""
    params = row.params
    penalised = params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty
    return not penalised and row.guide is None and all(len(tokens) == 1 for tokens in params.bad_tokens)
