"""The words every layer shares: tenants, sampling parameters, the request record, and the messages of the engine.

Owns no behaviour beyond validation. `Request` is the one mutable record; its fields have exactly one writer each, named
beside them. Everything that crosses a thread or a process is frozen.
"""

from __future__ import annotations

import enum
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, Self

import msgspec

from engine.errors import InvalidRequest

MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED_IDS = 1 << 14
MAX_BAD_WORDS = 128
MAX_GRAMMAR_CHARS = 1 << 17
_INT64 = 2**63


class Tenant(enum.StrEnum):
    """Who is waiting: a person (online) or a job (offline). A promise about latency, not a customer."""

    ONLINE = "online"
    OFFLINE = "offline"


class RequestState(enum.Enum):
    """Only `engine.sched.scheduler` moves a request from one state to another."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


def _number(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a finite number, got {value!r}", param=name)
    if value > high or value < low or (low_open and value == low):
        bracket = "(" if low_open else "["
        raise InvalidRequest(f"{name} must be in {bracket}{low:g}, {high:g}], got {value!r}", param=name)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer, got {type(value).__name__}", param=name)
    if not low <= value <= high:
        shown = str(value) if abs(value) < _INT64 else "a number beyond 64 bits"
        raise InvalidRequest(f"{name} must be between {low} and {high}, got {shown}", param=name)


@dataclass(frozen=True, slots=True)
class Grammar:
    """A language that an output must belong to, as text: it crosses processes, and `engine.grammar` compiles it."""

    kind: Literal["json_schema", "regex", "choice", "lark"]
    text: str  # a JSON schema, a regular expression for the whole output, a JSON list of strings, a grammar (Lark or GBNF)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> Self:
        """JSON that fits `schema`."""
        return cls("json_schema", json.dumps(schema, ensure_ascii=False))

    @classmethod
    def json_object(cls) -> Self:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def choice(cls, options: Sequence[str]) -> Self:
        """One of `options`, word for word."""
        return cls("choice", json.dumps(list(options), ensure_ascii=False))


class Guide(Protocol):
    """What a grammar lets one request say next. Its state follows from the output so far, so nothing of it is ever saved."""

    @property
    def ready(self) -> bool:
        """Whether the grammar is compiled, well or badly. Until then the request is not admitted."""
        ...

    def prepare(self, tokens: Sequence[int], num_prompt: int) -> None:
        """Have somebody else work out what may follow `tokens`, which only ever grow. Returns at once."""
        ...

    def allowed(self) -> bytes:
        """One bit an id, lowest first: what may follow the tokens prepared last. Waits for it; raises RequestFailed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends. Field names and meanings follow the OpenAI API and vLLM."""

    max_tokens: int | None = None  # None: as many as the context allows
    min_tokens: int = 0  # no end-of-sequence or stop token before this many
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 or -1: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    seed: int | None = None  # None: a fresh seed for each request
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # top alternatives per output token; 0: the chosen one only
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    allowed_token_ids: tuple[int, ...] | None = None  # nothing else may come
    bad_words: tuple[str, ...] = ()  # texts that must not come, as the tokenizer cuts them with and without a space before
    bad_tokens: tuple[tuple[int, ...], ...] = ()  # sequences that must not come; the engine adds those of `bad_words`
    grammar: Grammar | None = None  # what the output must be; it ends where the grammar does, whatever ignore_eos says

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def validate(self, vocab_size: int | None = None) -> None:
        """Raise InvalidRequest for the first field out of range, naming it."""
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, _INT64 - 1)
        _integer("min_tokens", self.min_tokens, 0, _INT64 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest("min_tokens must not exceed max_tokens", param="min_tokens")
        _number("temperature", self.temperature, 0.0, 2.0)
        _integer("top_k", self.top_k, -1, _INT64 - 1)
        _number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, low_open=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, -_INT64, _INT64 - 1)
        _integer("n", self.n, 1, MAX_N)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _integer(name, value, 0, MAX_LOGPROBS)
        self._validate_stops(vocab_size)
        self._validate_bias(vocab_size)
        self._validate_vocabulary(vocab_size)
        if self.grammar is not None and len(self.grammar.text) > MAX_GRAMMAR_CHARS:
            raise InvalidRequest(f"the grammar has more than {MAX_GRAMMAR_CHARS} characters", param="grammar")

    def _validate_stops(self, vocab_size: int | None) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop takes at most {MAX_STOP_STRINGS} strings", param="stop")
        for text in self.stop:
            if not isinstance(text, str) or not text or len(text) > MAX_STOP_CHARS:
                raise InvalidRequest(f"each stop string must have 1 to {MAX_STOP_CHARS} characters", param="stop")
        if len(self.stop_token_ids) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"stop_token_ids takes at most {MAX_LOGIT_BIAS} ids", param="stop_token_ids")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, (vocab_size or _INT64) - 1)

    def _validate_vocabulary(self, vocab_size: int | None) -> None:
        if self.allowed_token_ids is not None:
            if not 0 < len(self.allowed_token_ids) <= MAX_ALLOWED_IDS:
                raise InvalidRequest(f"allowed_token_ids takes 1 to {MAX_ALLOWED_IDS} ids", param="allowed_token_ids")
            for token in self.allowed_token_ids:
                _integer("allowed_token_ids", token, 0, (vocab_size or _INT64) - 1)
        if len(self.bad_words) > MAX_BAD_WORDS or len(self.bad_tokens) > 2 * MAX_BAD_WORDS:
            raise InvalidRequest(f"bad_words takes at most {MAX_BAD_WORDS} strings", param="bad_words")
        if not all(self.bad_tokens):
            raise InvalidRequest("bad_tokens must have at least one token each", param="bad_tokens")
        for token in itertools.chain(*self.bad_tokens):
            _integer("bad_tokens", token, 0, (vocab_size or _INT64) - 1)
        for text in self.bad_words:
            if not isinstance(text, str) or not text.strip() or len(text) > MAX_STOP_CHARS:
                raise InvalidRequest(f"each bad word must have 1 to {MAX_STOP_CHARS} characters", param="bad_words")

    def _validate_bias(self, vocab_size: int | None) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"logit_bias takes at most {MAX_LOGIT_BIAS} entries", param="logit_bias")
        for token, bias in self.logit_bias:
            _integer("logit_bias", token, 0, (vocab_size or _INT64) - 1)
            _number("logit_bias", bias, -100.0, 100.0)

    def for_choice(self, index: int, seed: int) -> SamplingParams:
        """The parameters of choice `index` of `n`: the same request with a seed of its own, made from the request's."""
        return replace(self, n=1, seed=seed if index == 0 else (seed + index * 0x9E3779B9) % _INT64)


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) that chooses output token `index` of a request with this seed.

    A counter-based generator (splitmix64's finaliser) keeps no state: the same request draws the same numbers whatever else
    is in its batch, after preemption, after a crash, and on every device.
    """
    mask = (1 << 64) - 1
    z = (seed * 0xD1342543DE82EF95 + (index + 1) * 0x9E3779B97F4A7C15) & mask
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & mask
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


@dataclass(slots=True, eq=False)
class Request:
    """One sequence being generated. The writer of each field stands beside it."""

    id: str
    tenant: Tenant
    tokens: list[int]  # prompt, then output; append-only. Scheduler
    num_prompt: int
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]  # token ids that end it (end of sequence and the request's own)
    max_len: int  # prompt + output never exceed this many tokens
    arrival: float
    priority: int = 0  # lower goes first within a tenant
    cache_salt: str = ""
    state: RequestState = RequestState.WAITING  # Scheduler
    num_computed: int = 0  # tokens whose KV is in `pages`. Scheduler
    pages: list[int] = field(default_factory=list)  # page table. KVManager; a request that loses pages gets a new list
    page_hashes: list[bytes] = field(default_factory=list)  # chained hash of each full page. KVManager
    num_cached: int = 0  # prompt tokens found in the prefix cache at first admission. Scheduler
    queued: float = 0.0  # seconds from arrival to its first admission. Scheduler
    delays: float = 0.0  # the reading of the scheduler's clock of delays when it arrived. Scheduler
    num_preemptions: int = 0  # Scheduler
    parked: bool = False  # its rows sit in a checkpoint and may not be planned again. ParkedPasses
    restoring: bool = False  # its pages are being copied back and may not be used yet. Scheduler
    started: float | None = None  # when it was admitted last. Scheduler
    finish_reason: FinishReason | None = None  # Scheduler
    guide: Guide | None = None  # of a request with a grammar; follows `tokens`

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """A request on its way to an engine core. `arrival` and clocks are the receiver's."""

    id: str
    tenant: Tenant
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    priority: int = 0
    cache_salt: str = ""
    resume: tuple[int, ...] = ()  # output tokens delivered before, by a worker that died; generation goes on after them


@dataclass(frozen=True, slots=True)
class Abort:
    """End the request with this id, whatever its state. Unknown ids are ignored."""

    id: str


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """Natural-log probability of `token` and of the likeliest alternatives, likeliest first."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class TokenOut(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one step did to one request. At most one per request and step."""

    id: str
    token: int | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # with the first token, if asked for
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the stop id that ended it
    error: str | None = None
    num_cached: int = 0
    num_preemptions: int = 0
    queued: float = 0.0  # with the first token: seconds until the request was admitted
    delayed: float = 0.0  # with the first and the last: seconds so far of steps, or shares of steps, that were offline work


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """New output of one choice since the last delta. A slow reader gets several merged into one."""

    index: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token, if the request asked for logprobs
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop id that ended the choice
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens served from the prefix cache

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One finished output of a request."""

    index: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished request: `n` choices in order of their index."""

    id: str
    model: str
    tenant: Tenant
    prompt_tokens: tuple[int, ...]
    choices: tuple[Choice, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text


@dataclass(slots=True)
class Cost:
    """What colocation cost one online request. Filled in while the request lives. The ledger's entry."""

    waited_us: int = 0  # microseconds it waited for the gate to close and for slabs; clients are told steps of offline work too
    preemptions: int = 0  # offline preemptions it caused: 0 or 1
    slabs_reclaimed: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.waited_us + other.waited_us,
            self.preemptions + other.preemptions,
            self.slabs_reclaimed + other.slabs_reclaimed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A served model as clients see it."""

    id: str
    aliases: tuple[str, ...]
    tenant: Tenant  # who runs it when a request does not say
    max_model_len: int
    vocab_size: int
    created: int  # unix seconds
