"""POST /tokenize and /detokenize, GET /tokenizer_info, as vLLM has them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
from aiohttp import web
from msgspec import Meta

from engine.calls import SMALL_PROMPT, read_messages
from engine.errors import ContextTooLong
from engine.types import ModelCard
from engine.wire import clean_text, convert, required
from server.http import json_response, read_json
from server.service import SERVICE

_TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class TokenizeBody(msgspec.Struct):
    """What /tokenize takes."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct):
    """What /detokenize takes."""

    model: str | None = None
    tokens: list[_TokenId] | None = None


async def tokenize(request: web.Request) -> web.StreamResponse:
    """POST /tokenize: a `prompt`, or `messages` through the chat template, as token ids."""
    engine = request.app[SERVICE].engine
    body = await read_json(request, lambda json: convert(json, TokenizeBody))
    card = engine.resolve(body.model)
    tokenizer = engine.tokenizer(card.id)
    limit = card.max_model_len

    def encode() -> tuple[list[int], list[str] | None]:
        tokens = ids()
        return tokens, [tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None

    def ids() -> list[int]:
        if body.messages is not None:
            kwargs = dict(body.chat_template_kwargs or {})
            if body.continue_final_message is not None:
                kwargs["continue_final_message"] = body.continue_final_message
            generation = body.add_generation_prompt is not False
            messages = read_messages(body.messages)
            return tokenizer.render_chat(
                messages, tools=body.tools, add_generation_prompt=generation, kwargs=kwargs or None, max_tokens=limit
            )
        if body.prompt is None:
            raise required("prompt")
        text = clean_text(body.prompt, "prompt")
        return tokenizer.encode(text, body.add_special_tokens is not False, max_tokens=limit)

    small = body.messages is None and len(body.prompt or "") <= SMALL_PROMPT
    tokens, texts = encode() if small else await asyncio.to_thread(encode)
    return json_response({"count": len(tokens), "max_model_len": card.max_model_len, "tokens": tokens, "token_strs": texts})


async def tokenizer_info(request: web.Request) -> web.StreamResponse:
    """GET /tokenizer_info: what lm-eval's remote tokenizer asks for; special tokens and chat template, as vLLM tells them."""
    engine = request.app[SERVICE].engine
    card = engine.resolve(request.query.get("model"))
    tokenizer = engine.tokenizer(card.id)
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # what transformers makes of the same files
        "model_max_length": card.max_model_len,
        "vocab_size": tokenizer.vocab_size,
        "chat_template": tokenizer.chat_template,
    }
    return json_response(tokenizer.names | facts)


async def detokenize(request: web.Request) -> web.StreamResponse:
    """POST /detokenize: token ids as text, control tokens spelled out."""
    engine = request.app[SERVICE].engine
    body = await read_json(request, lambda json: convert(json, DetokenizeBody))
    if body.tokens is None:
        raise required("tokens")
    card = engine.resolve(body.model)
    _check_count(len(body.tokens), card)
    tokenizer = engine.tokenizer(card.id)
    return json_response({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special=False)})


def _check_count(count: int, card: ModelCard) -> None:
    if count > card.max_model_len:
        raise ContextTooLong(f"{count} tokens are more than the context of {card.max_model_len}", param="tokens")
