"""What clients of the OpenAI API read: response bodies and stream chunks, as plain dictionaries.

Pure functions of finished or growing output; no HTTP, no parsing. Shapes follow the OpenAI reference; `stop_reason`,
`token_ids`, `prompt_token_ids` and `prompt_logprobs` are vLLM's additions under vLLM's names. Nothing here is a float
that JSON cannot carry: log-probabilities have a floor.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import msgspec

from engine.tool_calls import CallPart, Reader, whole_calls
from engine.types import Choice, Completion, Cost, Delta, FinishReason, ModelCard, Tenant, TokenLogprob, Usage

LOGPROB_FLOOR = -9999.0  # stands for minus infinity, which JSON lacks
Json = dict[str, Any]
_MARK = "\0"
_encode = msgspec.json.Encoder().encode


class Vocabulary(Protocol):
    """The part of a tokenizer that logprobs need."""

    def token_text(self, token: int) -> str: ...
    def token_bytes(self, token: int) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the client asked its answer to look like; the parser makes it, see `engine.openai`."""

    chat: bool
    n: int = 1
    logprobs: bool = False
    prompt_logprobs: bool = False  # as a field of its own (vLLM), not as part of an echo
    echo: bool = False
    no_output: bool = False  # max_tokens 0: one token is generated and dropped
    token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    colocation: bool = False  # tell in `usage` what colocation cost this call


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The fields that every body and chunk of one answer share."""

    id: str
    created: int
    model: str
    tier: str
    fingerprint: str

    def fields(self, kind: str) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "service_tier": self.tier,
            "system_fingerprint": self.fingerprint,
        }


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as it was submitted: `text` is what an echo shows."""

    tokens: tuple[int, ...]
    text: str = ""


def tier_of(tenant: Tenant) -> str:
    """The `service_tier` that a response tells."""
    return "flex" if tenant is Tenant.OFFLINE else "default"


@functools.lru_cache
def fingerprint(card: ModelCard) -> str:
    """Equal for servers whose outputs should be equal."""
    return "fp_" + hashlib.sha256(f"{card.id}/{card.max_model_len}/{card.vocab_size}".encode()).hexdigest()[:12]


def usage_body(usages: Iterable[Usage]) -> Json:
    """The `usage` object over all prompts of one call."""
    totals = list(usages)
    prompt = sum(usage.prompt_tokens for usage in totals)
    output = sum(usage.completion_tokens for usage in totals)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in totals)},
    }


def cost_body(cost: Cost) -> Json:
    """The ledger's entry of one call."""
    return {"waited_us": cost.waited_us, "preemptions": cost.preemptions, "slabs_reclaimed": cost.slabs_reclaimed}


def without_output(completion: Completion) -> Completion:
    """The answer to `max_tokens: 0`: what was generated never happened."""
    choices = tuple(
        replace(choice, text="", tokens=(), logprobs=(), finish_reason=FinishReason.LENGTH, stop_reason=None)
        for choice in completion.choices
    )
    return replace(completion, choices=choices, usage=replace(completion.usage, completion_tokens=0))


def chat_body(
    head: Head, shape: Shape, completion: Completion, words: Vocabulary, reader: Callable[[], Reader] | None = None
) -> Json:
    """A `chat.completion` object. `reader` makes what finds the calls of tools in a choice."""
    body = head.fields("chat.completion") | {
        "choices": [_chat_choice(shape, choice, words, reader) for choice in completion.choices],
        "usage": usage_body([completion.usage]),
    }
    if shape.prompt_logprobs:
        body["prompt_logprobs"] = prompt_logprobs(completion.prompt_tokens, completion.prompt_logprobs or (), words)
    if shape.token_ids:
        body["prompt_token_ids"] = completion.prompt_tokens
    return body


def _chat_choice(shape: Shape, choice: Choice, words: Vocabulary, reader: Callable[[], Reader] | None) -> Json:
    message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
    called = False
    if reader is not None:
        found = reader().push(choice.text, last=True)
        called = bool(found.parts)
        message["content"] = found.content or (None if called else "")
        message |= {"tool_calls": whole_calls(found.parts)} if called else {}
    body = {
        "index": choice.index,
        "message": message,
        "logprobs": chat_logprobs(choice.logprobs or (), words) if shape.logprobs else None,
        "finish_reason": _reason(choice.finish_reason, called),
        "stop_reason": choice.stop_reason,
    }
    return body | {"token_ids": choice.tokens} if shape.token_ids else body


def _reason(reason: FinishReason, called: bool) -> str:
    return "tool_calls" if called and reason is FinishReason.STOP else reason


def completion_body(
    head: Head, shape: Shape, completions: Sequence[Completion], prompts: Sequence[Prompt], words: Vocabulary
) -> Json:
    """A `text_completion` object; choice `i` of prompt `p` has index `p * n + i`."""
    choices = [
        _text_choice(shape, completion, choice, index * shape.n + choice.index, prompts[index], words)
        for index, completion in enumerate(completions)
        for choice in completion.choices
    ]
    return head.fields("text_completion") | {
        "choices": choices,
        "usage": usage_body(completion.usage for completion in completions),
    }


def _text_choice(shape: Shape, completion: Completion, choice: Choice, index: int, prompt: Prompt, words: Vocabulary) -> Json:
    echoed = completion.prompt_logprobs or () if shape.echo else ()
    body: Json = {
        "index": index,
        "text": prompt.text + choice.text if shape.echo else choice.text,
        "logprobs": None,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    if shape.logprobs:
        parts = (*_pairs(prompt.tokens, echoed), *_pairs(choice.tokens, choice.logprobs or ()))
        body["logprobs"] = text_logprobs(parts, words)
    if shape.prompt_logprobs:
        body["prompt_logprobs"] = prompt_logprobs(prompt.tokens, completion.prompt_logprobs or (), words)
    if shape.token_ids:
        body |= {"token_ids": choice.tokens, "prompt_token_ids": prompt.tokens}
    return body


def _pairs(tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> Iterable[tuple[int, TokenLogprob | None]]:
    return zip(tokens, logprobs, strict=False)


def _finite(logprob: float) -> float:
    return logprob if logprob > LOGPROB_FLOOR else LOGPROB_FLOOR  # also for nan


def _chat_token(token: int, logprob: float, words: Vocabulary) -> Json:
    return {
        "token": words.token_text(token),
        "logprob": _finite(logprob),
        "bytes": list(words.token_bytes(token)),
    }


def chat_logprobs(logprobs: Sequence[TokenLogprob], words: Vocabulary) -> Json:
    """The `logprobs` object of a chat choice or chunk."""
    content = [
        _chat_token(entry.token, entry.logprob, words)
        | {"top_logprobs": [_chat_token(token, logprob, words) for token, logprob in entry.top]}
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def text_logprobs(parts: Iterable[tuple[int, TokenLogprob | None]], words: Vocabulary, offset: int = 0) -> dict[str, list[Any]]:
    """The `logprobs` object of a text choice. `offset` is the length of the choice's text before these tokens.

    The alternatives include the chosen token and, where two of them read the same, keep the likelier one: lm-eval
    compares the chosen token's value with the largest.
    """
    body: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, entry in parts:
        text = words.token_text(token)
        body["tokens"].append(text)
        body["text_offset"].append(offset)
        body["token_logprobs"].append(None if entry is None else _finite(entry.logprob))
        body["top_logprobs"].append(None if entry is None else _alternatives(entry, words))
        offset += len(text)
    return body


def _alternatives(entry: TokenLogprob, words: Vocabulary) -> dict[str, float]:
    table: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        table.setdefault(words.token_text(token), _finite(logprob))
    return table


def prompt_logprobs(tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None], words: Vocabulary) -> list[Json | None]:
    """vLLM's `prompt_logprobs`: for each prompt token a table from token id to its log-probability."""
    return [None if entry is None else _ranked(entry, words) for _, entry in _pairs(tokens, logprobs)]


def _ranked(entry: TokenLogprob, words: Vocabulary) -> Json:
    ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top, 1)]
    return {
        str(token): {"logprob": _finite(logprob), "rank": rank, "decoded_token": words.token_text(token)}
        for token, logprob, rank in (*ranked, (entry.token, entry.logprob, entry.rank))
    }


@dataclass(slots=True)
class Chunks:
    """The stream of one call: deltas in, chunks out. Per choice: the role (chat) or the echo (text) with the first
    token, then content, then one chunk with the finish reason; `usage` chunks carry no choices.
    """

    head: Head
    shape: Shape
    prompts: Sequence[Prompt]
    words: Vocabulary
    reader: Callable[[], Reader] | None = None  # makes what finds the calls of tools in a choice
    _readers: dict[int, Reader] = field(default_factory=dict)
    _started: set[int] = field(default_factory=set)
    _offsets: dict[int, int] = field(default_factory=dict)  # index -> length of the text that logprobs have covered
    _counts: dict[int, int] = field(default_factory=dict)  # prompt -> output tokens so far
    _echoes: dict[int, Sequence[TokenLogprob | None]] = field(default_factory=dict)
    _frames: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)  # index -> the JSON around a piece of text

    def push(self, prompt: int, delta: Delta) -> list[Json]:
        """The chunks for new output of the generation of prompt number `prompt`."""
        if self.shape.no_output:
            delta = msgspec.structs.replace(delta, text="", tokens=(), logprobs=())
        self._counts[prompt] = self._counts.get(prompt, 0) + len(delta.tokens)
        if delta.prompt_logprobs is not None:
            self._echoes[prompt] = delta.prompt_logprobs
        index = prompt * self.shape.n + delta.index
        make = self._chat if self.shape.chat else self._text
        return [self._chunk(choice, prompt) for choice in make(prompt, index, delta)]

    def push_text(self, prompt: int, delta: Delta) -> bytes | None:
        """The one chunk of `push`, as JSON, for a delta that has nothing to tell but text, as most have; None for any other.

        Only the text is encoded anew.
        """
        if not delta.text or delta.finish_reason is not None:
            return None
        index = prompt * self.shape.n + delta.index
        frame = self._frames.get(index) or self._frame(prompt, index, delta.index)
        return None if frame is None else frame[0] + _encode(delta.text) + frame[1]

    def _frame(self, prompt: int, index: int, choice: int) -> tuple[bytes, bytes] | None:
        """The JSON around the text of a chunk, if that is all that varies from one to the next."""
        shape = self.shape
        told = shape.logprobs or shape.token_ids or shape.continuous_usage or shape.no_output
        if told or self.reader is not None or index not in self._started:
            return None
        (chunk,) = self.push(prompt, Delta(index=choice, text=_MARK))
        before, _, after = _encode(chunk).rpartition(_encode(_MARK))  # no other string stands behind it
        self._frames[index] = before, after
        return before, after

    def usage(self, usage: Json) -> Json:
        """The last chunk of a stream with `include_usage`."""
        return self._object() | {"choices": [], "usage": usage}

    def _object(self) -> Json:
        return self.head.fields("chat.completion.chunk" if self.shape.chat else "text_completion")

    def _chunk(self, choice: Json, prompt: int) -> Json:
        body = self._object() | {"choices": [choice]}
        if self.shape.continuous_usage:
            usage = Usage(prompt_tokens=len(self.prompts[prompt].tokens), completion_tokens=self._counts[prompt])
            body["usage"] = usage_body([usage])
        elif self.shape.include_usage:
            body["usage"] = None
        return body

    def _first(self, index: int) -> bool:
        first = index not in self._started
        self._started.add(index)
        return first

    def _chat(self, prompt: int, index: int, delta: Delta) -> Iterable[Json]:
        if self._first(index):
            role: Json = {"index": index, "delta": {"role": "assistant", "content": ""}}
            role |= {"logprobs": None, "finish_reason": None}
            yield role | self._prompt_facts(prompt)
        text, called, parts = delta.text, False, list[CallPart]()
        if self.reader is not None:
            reader = self._readers.setdefault(index, self.reader())
            found = reader.push(text, last=delta.finish_reason is not None)
            text, called, parts = found.content, reader.num_calls > 0, found.parts
        if text or (delta.tokens and (self.shape.logprobs or self.shape.token_ids)):
            choice: Json = {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
            if self.shape.logprobs:
                choice["logprobs"] = chat_logprobs(delta.logprobs, self.words)
            yield choice | {"token_ids": delta.tokens} if self.shape.token_ids else choice
        for part in parts:
            yield {"index": index, "delta": {"tool_calls": [part.body()]}, "logprobs": None, "finish_reason": None}
        if delta.finish_reason is not None:
            yield {
                "index": index,
                "delta": {},
                "logprobs": None,
                "finish_reason": FinishReason.LENGTH if self.shape.no_output else _reason(delta.finish_reason, called),
                "stop_reason": None if self.shape.no_output else delta.stop_reason,
            }

    def _text(self, prompt: int, index: int, delta: Delta) -> Iterable[Json]:
        first = self._first(index)
        source = self.prompts[prompt]
        echo = source.text if first and self.shape.echo else ""
        parts: list[tuple[int, TokenLogprob | None]] = list(_pairs(delta.tokens, delta.logprobs))
        if first and self.shape.echo:
            parts = [*_pairs(source.tokens, self._echoes.get(prompt, ())), *parts]
        if echo or delta.text or parts or first or (delta.tokens and self.shape.token_ids):
            choice: Json = {"index": index, "text": echo + delta.text, "logprobs": None, "finish_reason": None}
            if self.shape.logprobs:
                choice["logprobs"] = self._text_logprobs(index, parts)
            if self.shape.token_ids:
                choice["token_ids"] = delta.tokens
            yield choice | (self._prompt_facts(prompt) if first else {})
        if delta.finish_reason is not None:
            yield {
                "index": index,
                "text": "",
                "logprobs": None,
                "finish_reason": FinishReason.LENGTH if self.shape.no_output else delta.finish_reason,
                "stop_reason": None if self.shape.no_output else delta.stop_reason,
            }

    def _prompt_facts(self, prompt: int) -> Json:
        """What a choice's first chunk tells of its prompt."""
        tokens = self.prompts[prompt].tokens
        facts: Json = {"prompt_token_ids": tokens} if self.shape.token_ids else {}
        if self.shape.prompt_logprobs:
            facts["prompt_logprobs"] = prompt_logprobs(tokens, self._echoes.get(prompt, ()), self.words)
        return facts

    def _text_logprobs(self, index: int, parts: Sequence[tuple[int, TokenLogprob | None]]) -> Json:
        offset = self._offsets.get(index, 0)
        body = text_logprobs(parts, self.words, offset)
        self._offsets[index] = offset + sum(map(len, body["tokens"]))
        return body
