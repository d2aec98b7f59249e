"""POST /v1/chat/completions and /v1/completions: a call from its body to its last byte, and its abort if the client leaves."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace

from aiohttp import web

from engine.calls import Call
from engine.errors import EngineDead, Overloaded, RequestFailed
from engine.openai import CHAT, COMPLETIONS, Job, aborted, error_answer, finish, next_chunks, parse, submit, tenant_of
from engine.replies import Chunks, cost_body
from engine.timeline import Served, StepHistogram, Timeline
from engine.types import Delta, FinishReason, Tenant
from server.admission import Place, Refused, clamp_priority, patience
from server.http import json_response, read_json
from server.metrics import Metrics
from server.service import CLIENT, REQUEST_ID, SERVICE, Asker, Phase, Service
from server.sse import EventStream, SlowReader, open_stream

log = logging.getLogger(__name__)

TIER_HEADER = "x-sluice-tier"  # a client that says "flex" here already spares offline work a stop for the body's sake
COST_HEADER = "x-sluice-colocation"


async def chat(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions"""
    return await _complete(request, CHAT)


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions"""
    return await _complete(request, COMPLETIONS)


async def _complete(request: web.Request, url: str) -> web.StreamResponse:
    service = request.app[SERVICE]
    engine = service.engine_for_work()
    watch = Watch(service.metrics, engine.timeline)
    # The gate closes here, before the body is read: an offline step must not run while an online prompt is tokenized.
    client = request[CLIENT]
    may_be_online = Tenant.ONLINE in client.tenants and request.headers.get(TIER_HEADER) != "flex"
    with engine.arriving(online=may_be_online) as arrival:
        await service.turns.take()
        call = await read_json(request, lambda body: parse(url, body))
        if (priority := clamp_priority(call.priority, service.config)) != call.priority:
            call = replace(call, priority=priority)
        tenant = tenant_of(call, engine.resolve(call.model, call.tenant))
        if tenant is Tenant.OFFLINE:
            arrival.withdraw()
        with service.in_flight.hold(client, tenant) as place:
            return await _run(request, service, call, watch, place)


async def _run(request: web.Request, service: Service, call: Call, watch: Watch, place: Place) -> web.StreamResponse:
    try:
        job = await submit(service.engine_for_work(), call)
    except Overloaded as error:
        raise Refused(error_answer(error, call.tenant)) from None
    watch.submitted(job)
    service.jobs[job] = Asker(request[REQUEST_ID], request[CLIENT].name)
    try:
        return await (_stream if call.stream else _unary)(request, service, job, watch)
    except (RequestFailed, EngineDead):
        watch.failed()
        raise
    except (asyncio.CancelledError, ConnectionError):
        if service.phase is not Phase.DRAINING:
            watch.left(request[REQUEST_ID])
        raise
    finally:
        job.abort()
        service.jobs.pop(job, None)
        place.tokens = sum(g.usage.prompt_tokens + g.usage.completion_tokens for g in job.generations)


def _cost_header(job: Job) -> dict[str, str]:
    """What colocation cost an online request so far; nothing for offline ones."""
    if job.tenant is Tenant.OFFLINE:
        return {}
    return {COST_HEADER: ";".join(f"{name}={value}" for name, value in cost_body(job.felt).items())}


def _patience(service: Service, job: Job) -> AbstractAsyncContextManager[None]:
    """Offline requests may wait: that is what they are for."""
    seconds = service.config.max_queue_time if job.tenant is Tenant.ONLINE else 0.0
    return patience(seconds, lambda: all(generation.waiting for generation in job.generations))


async def _unary(request: web.Request, service: Service, job: Job, watch: Watch) -> web.StreamResponse:
    try:
        async with _patience(service, job):
            body = await finish(job)
    except Overloaded as error:
        watch.failed()
        raise Refused(error_answer(error)) from None
    for choice in body["choices"]:
        watch.finished("stop" if choice["finish_reason"] == "tool_calls" else choice["finish_reason"])
    watch.end()
    return json_response(body, headers=_cost_header(job))


async def _stream(request: web.Request, service: Service, job: Job, watch: Watch) -> web.StreamResponse:
    config = service.config
    async with open_stream(
        request,
        headers=_cost_header(job),
        keep_alive_interval=config.sse_keep_alive_interval,
        write_timeout=config.sse_write_timeout,
    ) as events:
        try:
            await _to_the_end(events, request, service, job, watch)
        except SlowReader:
            service.metrics.slow_readers.inc()
            watch.given_up()
            log.info("request %s: its client stopped reading, aborted", request[REQUEST_ID])
    return events.response


async def _to_the_end(events: EventStream, request: web.Request, service: Service, job: Job, watch: Watch) -> None:
    """Everything that the stream has to tell, of an error too, and its end."""
    try:
        async with _patience(service, job):
            await _send_all(events, job, watch)
    except (SlowReader, ConnectionError):
        raise
    except Exception as error:  # the status is sent already: the stream itself has to tell
        watch.failed()
        await _tell_error(events, request, service, error)
    else:
        watch.end()
    await events.end()


async def _tell_error(events: EventStream, request: web.Request, service: Service, error: Exception) -> None:
    body = error_answer(error).body
    service.metrics.stream_errors.labels(body["error"]["code"]).inc()
    if not isinstance(error, RequestFailed | EngineDead | Overloaded):
        log.exception("request %s failed in its stream", request[REQUEST_ID])
    await events.send(body)


async def _send_all(events: EventStream, job: Job, watch: Watch) -> None:
    """Every delta of every prompt, then the usage. Raises what ended a generation early."""
    chunks = job.chunks()
    if len(job.generations) == 1:
        await _pump(events, job, 0, chunks, watch)
    else:
        tasks = [asyncio.create_task(_pump(events, job, i, chunks, watch)) for i in range(len(job.generations))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    if job.call.shape.include_usage:
        await events.send(chunks.usage(job.usage()))


async def _pump(events: EventStream, job: Job, index: int, chunks: Chunks, watch: Watch) -> None:
    while deltas := await job.generations[index].read():
        for delta in deltas:
            watch.delta((index, delta.index), delta)
            if delta.finish_reason is FinishReason.ERROR:
                raise RequestFailed(delta.error or "the request failed")
            if delta.finish_reason is FinishReason.ABORT:
                raise aborted(job.generations[index])
            if (text := chunks.push_text(index, delta)) is not None:
                await events.send_json(text)
            else:
                await events.send(*await next_chunks(job, chunks, index, delta))


@dataclass(slots=True)
class Watch:
    """What one call tells the metrics. Times count from the arrival of its headers."""

    metrics: Metrics
    timeline: Timeline
    started: float = field(default_factory=time.monotonic)
    job: Job | None = None
    labels: tuple[str, str] = ("", "")
    told: dict[tuple[int, int], float] = field(default_factory=dict)  # choice -> when it last got tokens
    token_seconds: StepHistogram | None = None
    over: bool = False  # its end is counted; a connection that is closed after it is nobody's leaving

    def submitted(self, job: Job) -> None:
        self.job = job
        self.labels = (job.head.model, job.tenant.value)
        self.token_seconds = self.metrics.itl.of(*self.labels)
        self.metrics.params_n.labels(*self.labels).observe(job.call.params.n)
        if job.call.params.max_tokens is not None:
            self.metrics.params_max_tokens.labels(*self.labels).observe(job.call.params.max_tokens)

    def delta(self, choice: tuple[int, int], delta: Delta) -> None:
        """New output of a stream. Tokens that were merged for a slow reader share their time."""
        now, count = time.monotonic(), len(delta.tokens)
        if count:
            if (last := self.told.get(choice)) is None:
                self._first_token(now - self.started, choice[0])
            else:
                assert self.token_seconds is not None
                self.token_seconds.add((now - last) / count, count)
            self.told[choice] = now
        if delta.finish_reason is not None and delta.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.finished(delta.finish_reason)

    def finished(self, reason: str) -> None:
        """A choice has ended."""
        self.metrics.success.labels(*self.labels, str(reason)).inc()

    def failed(self) -> None:
        """The call ends in an error."""
        self.over = True
        self.finished("error")

    def end(self) -> None:
        """The answer is complete."""
        assert self.job is not None
        self.over = True
        self.metrics.e2e.labels(*self.labels).observe(time.monotonic() - self.started)
        self.metrics.interference.inc(self.job.cost.waited_us / 1e6)
        for index, generation in enumerate(self.job.generations):
            usage, times = generation.usage, generation.times
            self.metrics.given_way.labels(*self.labels).observe(generation.num_preemptions)
            self.metrics.cached_tokens.labels(*self.labels).inc(usage.cached_tokens)
            if times.first is not None and times.last is not None:
                stages = times.submitted, times.submitted + times.queued, times.first, times.last
                self._stages(*stages)
                self.timeline.served.append(Served(generation.request_id, self.job.tenant, *stages))
                if not self.job.call.stream:  # nobody saw it come: this is when it was there
                    self._first_token(times.first - self.started, index)
                if (later := usage.completion_tokens // self.job.call.params.n - 1) > 0:
                    self._per_token((times.last - times.first) / later, (times.delayed - times.delayed_first) / later)
                if self.job.tenant is Tenant.ONLINE:
                    self.metrics.interference.inc(times.delayed)
            self.metrics.prompt_tokens.labels(*self.labels).observe(usage.prompt_tokens)
            self.metrics.computed_tokens.labels(*self.labels).observe(usage.prompt_tokens - usage.cached_tokens)
            self.metrics.output_tokens.labels(*self.labels).observe(usage.completion_tokens)

    def _first_token(self, seconds: float, prompt: int) -> None:
        assert self.job is not None
        self.metrics.ttft.labels(*self.labels).observe(seconds)
        times = self.job.generations[prompt].times
        delayed = times.delayed_first + self.job.cost.waited_us / 1e6
        self.metrics.recent.add(self.job.tenant, "ttft", seconds, delayed, times.queued)

    def _per_token(self, seconds: float, delayed: float) -> None:
        assert self.job is not None
        self.metrics.tpot.labels(*self.labels).observe(seconds)
        self.metrics.recent.add(self.job.tenant, "tpot", seconds, delayed)

    def _stages(self, submitted: float, admitted: float, first: float, last: float) -> None:
        stages = {
            "queue": admitted - submitted,
            "prefill": first - admitted,
            "decode": last - first,
            "inference": last - admitted,
        }
        for stage, seconds in stages.items():
            self.metrics.stages[stage].labels(*self.labels).observe(max(0.0, seconds))

    def given_up(self) -> None:
        """The client did not read to the end."""
        if not self.over:
            self.over = True
            self.finished("abort")

    def left(self, request_id: str) -> None:
        """The client went away before the end."""
        assert self.job is not None
        if self.over:
            return
        done = sum(generation.usage.completion_tokens for generation in self.job.generations)
        self.metrics.disconnects.labels("decode" if done else "prefill").inc()
        self.metrics.success.labels(*self.labels, "abort").inc()
        log.info("request %s (%s): aborted by its client after %d tokens", request_id, self.job.head.id, done)
