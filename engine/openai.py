"""The OpenAI API on top of an engine: calls submitted, answers made. Shared by server and batch jobs; no HTTP here.

The way of a request is `calls.parse` (body to `Call`), `submit` (`Call` to a `Job` of running generations), then either
`finish` (the whole body) or the job's `chunks()` (a stream). `answer` is all of it for one unary request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

import engine.replies as replies
from engine.calls import CHAT, COMPLETIONS, Call, parse
from engine.chat_template import TemplateTooSlow
from engine.errors import (
    ContextTooLong,
    EngineDead,
    InvalidRequest,
    Overloaded,
    RequestAborted,
    RequestFailed,
    ShuttingDown,
    UnknownModel,
)
from engine.formats import Constraint
from engine.replies import Chunks, Head, Json, Prompt
from engine.tokenizer import CHARS_PER_TOKEN
from engine.tool_calls import FORMATS, Reader, ToolFormat, detect
from engine.types import Completion, Cost, Delta, FinishReason, Grammar, ModelCard, Tenant
from engine.wire import decode, fresh_id, unsupported

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.generation import Generation
    from engine.tokenizer import Tokenizer

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "Answer",
    "Call",
    "Job",
    "answer",
    "decode",
    "error_answer",
    "finish",
    "parse",
    "submit",
]

log = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 500  # of an error
MANY_LOGPROBS = 128  # tokens with their alternatives; more of them are written down off the event loop


@dataclass(frozen=True, slots=True)
class _Threads:
    """Those of one tenant, so that no online request ever stands in line behind a job's."""

    tokenizing: ThreadPoolExecutor
    constraining: ThreadPoolExecutor  # they wait for grammars to be compiled


_threads = {
    Tenant.ONLINE: _Threads(ThreadPoolExecutor(2, "tokenize-online"), ThreadPoolExecutor(4, "constrain-online")),
    # One that waits: of the two compilers of a model, the other is left to online requests.
    Tenant.OFFLINE: _Threads(ThreadPoolExecutor(1, "tokenize-offline"), ThreadPoolExecutor(1, "constrain-offline")),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """A status and a body, and for errors what the client should do next."""

    status: int
    body: Json
    retry_after: float | None = None  # seconds
    should_retry: bool | None = None  # None: the status says it


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A submitted call: one generation per prompt, and what its answer needs."""

    call: Call
    tenant: Tenant
    head: Head
    words: Tokenizer
    prompts: tuple[Prompt, ...]
    generations: tuple[Generation, ...]
    tools: ToolFormat | None = None  # in which the answer may call

    @property
    def cost(self) -> Cost:
        """What colocation cost this call so far. Generations of one HTTP request share one entry."""
        entries = {id(generation.cost): generation.cost for generation in self.generations}
        return sum(entries.values(), Cost())

    @property
    def felt(self) -> Cost:
        """The same with the time of offline work in its own model's steps: all that its client waited for others."""
        if self.tenant is Tenant.OFFLINE:
            return self.cost
        delayed = max(generation.times.delayed for generation in self.generations)  # they run at the same time
        return self.cost + Cost(waited_us=round(delayed * 1e6))

    def usage(self) -> Json:
        """The call's `usage` object, with the ledger's entry if the client asked for it."""
        usage = replies.usage_body(generation.usage for generation in self.generations)
        return usage | {"colocation": replies.cost_body(self.felt)} if self.call.shape.colocation else usage

    def chunks(self) -> Chunks:
        """The chunk maker of this job's stream."""
        return Chunks(self.head, self.call.shape, self.prompts, self.words, self.reader)

    @property
    def reader(self) -> Callable[[], Reader] | None:
        """Makes what finds the calls of one choice; None where there can be none."""
        tools, offer = self.tools, self.call.offer
        return None if tools is None or offer is None else lambda: tools.reader(offer)

    def abort(self) -> None:
        """Stop what is not finished; harmless where everything is."""
        for generation in self.generations:
            generation.abort()


def error_body(message: str, kind: str, code: str, param: str | None = None) -> Json:
    """The error object, all four keys, of bounded size."""
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[: MAX_MESSAGE_CHARS - 1] + "…"
    return {"error": {"message": message, "type": kind, "param": param and param[:100], "code": code}}


def error_answer(exc: BaseException, tenant: Tenant | None = None) -> Answer:
    """What a client is told about `exc`. Only errors raised on purpose are quoted; of others nothing leaks.

    A full offline queue is the caller's share (429), a full online queue is ours (503).
    """
    text = str(exc)
    match exc:
        case UnknownModel():
            return Answer(404, error_body(text, "invalid_request_error", exc.code, exc.param or "model"))
        case InvalidRequest():
            return Answer(400, error_body(text, "invalid_request_error", exc.code, exc.param))
        case ShuttingDown():
            return Answer(503, error_body(text, "server_error", "shutting_down"), exc.retry_after)
        case Overloaded() if tenant is Tenant.OFFLINE:
            return Answer(429, error_body(text, "rate_limit_error", "resource_unavailable"), exc.retry_after)
        case Overloaded():
            return Answer(503, error_body(text, "server_error", "server_overloaded"), exc.retry_after)
        case RequestAborted():
            return Answer(503, error_body(text, "server_error", "request_aborted"), should_retry=False)
        case RequestFailed() if exc.retryable:
            return Answer(503, error_body(text, "server_error", "request_failed"), 1.0)
        case RequestFailed():
            return Answer(500, error_body(text, "server_error", "request_failed"), should_retry=False)
        case EngineDead():
            return Answer(503, error_body("the engine stopped", "server_error", "engine_dead"), 5.0)
        case _:
            return Answer(500, error_body("internal error", "server_error", "internal_error"), should_retry=False)


async def answer(
    engine: Engine,
    url: str,
    body: Mapping[str, Any],
    *,
    tenant: Tenant | None = None,
    request_id: str | None = None,
) -> Answer:
    """Run one unary request to `url` (chat or text completions) and return its answer, errors included.

    `tenant` wins over the body's `service_tier`. `request_id` names the generation in the engine (`-i` is added where
    there are several prompts). Only cancellation, which aborts the generation, and EngineDead escape.
    """
    try:
        call = parse(url, body, tenant=tenant)
        if call.stream:
            raise unsupported("stream", "this request cannot be streamed")
        tenant = tenant_of(call, engine.resolve(call.model, call.tenant))
        job = await submit(engine, call, request_id=request_id)
        try:
            return Answer(200, await finish(job))
        finally:
            job.abort()
    except EngineDead:
        raise
    except Exception as exc:  # a border: whatever it is, the other requests of this process go on
        reply = error_answer(exc, tenant)
        if reply.body["error"]["code"] == "internal_error":
            log.exception("request %s failed", request_id)
        return reply


async def submit(engine: Engine, call: Call, *, request_id: str | None = None) -> Job:
    """Hand `call` to the engine: all of its prompts or none. Large calls and grammars are dealt with in other threads."""
    constrained = call.params.grammar is not None or (call.offer is not None and call.offer.constrains)
    if call.small and not constrained and not _has_slow_template(engine, call):
        with suppress(TemplateTooSlow):  # there it has more time
            return _submit(engine, call, request_id)
    threads = _threads[tenant_of(call, engine.resolve(call.model, call.tenant))]
    pool = threads.constraining if constrained else threads.tokenizing
    loop = asyncio.get_running_loop()
    future = pool.submit(copy_context().run, _submit, engine, call, request_id)
    try:
        return await asyncio.wrap_future(future, loop=loop)
    except asyncio.CancelledError:
        future.add_done_callback(_abort_orphan)  # the thread may still submit, and nobody would read it
        raise
    finally:
        del future  # it has the error, and that this frame: a circle, in which the prompt would stay until it is collected


def _has_slow_template(engine: Engine, call: Call) -> bool:
    return call.messages is not None and engine.tokenizer(engine.resolve(call.model, call.tenant).id).template_is_slow


def _abort_orphan(future: Future[Job]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().abort()


def tenant_of(call: Call, card: ModelCard) -> Tenant:
    """Who runs `call`: a model of the offline tenant serves nobody else."""
    return Tenant.OFFLINE if card.tenant is Tenant.OFFLINE else call.tenant or card.tenant


def _submit(engine: Engine, call: Call, request_id: str | None) -> Job:
    card = engine.resolve(call.model, call.tenant)
    _check_length(call, card)
    tenant = tenant_of(call, card)
    words = engine.tokenizer(card.id)
    tools = None if call.offer is None else _tool_format(engine, words)
    if tools is not None:
        call = _with_calls(call, tools)
    head = Head(
        id=("chatcmpl-" if call.shape.chat else "cmpl-") + fresh_id(),
        created=int(time.time()),  # noqa: TID251 - a stamp for clients
        model=card.id,
        tier=replies.tier_of(tenant),
        fingerprint=replies.fingerprint(card),
    )
    generations: list[Generation] = []
    try:
        generations.extend(_generations(engine, call, card, tenant, request_id or head.id))
        prompts = tuple(_prompts(call, generations, words))
    except BaseException as error:
        for generation in generations:
            generation.abort()
        if isinstance(error, InvalidRequest) and (renamed := _in_their_words(error, call)) is not error:
            raise renamed from None
        raise
    return Job(call, tenant, head, words, prompts, tuple(generations), tools)


def _tool_format(engine: Engine, words: Tokenizer) -> ToolFormat:
    """How this model writes calls. Raises InvalidRequest if nobody knows."""
    chosen = engine.config.tool_call_parser
    found = detect(words.tool_template) if chosen == "auto" else FORMATS[chosen]
    if found is None:
        raise unsupported("tools", "this model's chat template knows no tools; --tool-call-parser can name their format")
    return found


def _with_calls(call: Call, tools: ToolFormat) -> Call:
    """The call with a grammar, if it must be answered by calls, by calls or JSON that fits a schema, or calls must be right."""
    offer, grammar = call.offer, call.params.grammar
    assert offer is not None
    if offer.must or (offer.constrains and grammar is None):
        text, param = tools.grammar(offer), "tools"
    elif call.constraint is not None and grammar is not None and grammar.kind == "json_schema":
        text, param = tools.grammar(offer, msgspec.json.decode(grammar.text)), call.constraint.param
    else:
        return call
    grammar = Grammar("lark", text)
    return replace(call, params=replace(call.params, grammar=grammar), constraint=Constraint(grammar, param))


def _in_their_words(error: InvalidRequest, call: Call) -> InvalidRequest:
    """`error` with the field that the caller wrote."""
    param = error.param
    if param == "prompt" and call.messages is not None:
        param = "messages"
    elif param == "grammar" and call.constraint is not None:
        param = call.constraint.param
    if param == error.param or param is None:
        return error
    text = str(error) if error.param == "prompt" else str(error).replace("grammar", param, 1)
    return type(error)(text, param=param, code=error.code)


def _check_length(call: Call, card: ModelCard) -> None:
    """Refuse at once what cannot fit, before anybody spends time on it."""
    limit = card.max_model_len
    tokens = max((len(prompt) for prompt in call.prompts if not isinstance(prompt, str)), default=0)
    chars = call.chars if call.messages is not None else max((len(p) for p in call.prompts if isinstance(p, str)), default=0)
    if tokens >= limit or chars > limit * CHARS_PER_TOKEN:
        size = f"{tokens} tokens" if tokens else f"{chars} characters"
        raise ContextTooLong(
            f"the input has {size} and cannot fit the context of {limit} tokens; shorten it",
            param="prompt" if call.messages is None else "messages",
        )


def _generations(engine: Engine, call: Call, card: ModelCard, tenant: Tenant, request_id: str) -> Iterator[Generation]:
    common: dict[str, Any] = {
        "tenant": tenant,
        "model": card.id,
        "priority": call.priority,
        "cache_salt": call.cache_salt,
    }
    if call.messages is not None:
        tools = None if call.offer is None else [tool.body for tool in call.offer.tools]
        kwargs = call.template_kwargs
        yield engine.submit_chat(
            call.messages, call.params, tools=tools, template_kwargs=kwargs, request_id=request_id, **common
        )
        return
    for index, prompt in enumerate(call.prompts):
        name = request_id if len(call.prompts) == 1 else f"{request_id}-{index}"
        yield engine.submit(prompt, call.params, request_id=name, **common)


def _prompts(call: Call, generations: list[Generation], words: Tokenizer) -> Iterator[Prompt]:
    """Prompts as they will be told back: only an echo needs text."""
    for index, generation in enumerate(generations):
        text = ""
        if call.shape.echo:
            given = call.prompts[index]
            text = given if isinstance(given, str) else words.decode(list(given), skip_special=False)
        yield Prompt(generation.prompt_tokens, text)


async def finish(job: Job) -> Json:
    """The body of a unary answer, once every choice is finished. Raises RequestFailed where one was cut short."""
    completions = [_whole(await generation.completion(), generation) for generation in job.generations]
    if job.call.shape.no_output:
        completions = [replies.without_output(completion) for completion in completions]
    if sum(map(_num_logprobs, completions)) <= MANY_LOGPROBS:
        return _body(job, completions)
    return await asyncio.get_running_loop().run_in_executor(_threads[job.tenant].tokenizing, _body, job, completions)


def _num_logprobs(completion: Completion) -> int:
    return len(completion.prompt_logprobs or ()) + sum(len(choice.logprobs or ()) for choice in completion.choices)


def _body(job: Job, completions: list[Completion]) -> Json:
    if job.call.shape.chat:
        body = replies.chat_body(job.head, job.call.shape, completions[0], job.words, job.reader)
    else:
        body = replies.completion_body(job.head, job.call.shape, completions, job.prompts, job.words)
    if job.call.shape.colocation:
        body["usage"]["colocation"] = replies.cost_body(job.felt)
    return body


def _whole(completion: Completion, generation: Generation) -> Completion:
    if any(choice.finish_reason is FinishReason.ABORT for choice in completion.choices):
        raise aborted(generation)
    return completion


async def next_chunks(job: Job, chunks: Chunks, prompt: int, delta: Delta) -> list[Json]:
    """`chunks.push`, off the event loop where it has much to write."""
    if len(delta.prompt_logprobs or ()) + len(delta.logprobs) <= MANY_LOGPROBS:
        return chunks.push(prompt, delta)
    pool = _threads[job.tenant].tokenizing
    return await asyncio.get_running_loop().run_in_executor(pool, chunks.push, prompt, delta)


def aborted(generation: Generation) -> RequestFailed:
    """A request that something other than its client stopped: what there is of it must not look complete."""
    if generation.revoked:
        return RequestAborted("the request was aborted by an administrator")
    return RequestFailed("the request was aborted before it finished", retryable=True)
