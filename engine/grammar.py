"""Grammars of one model's outputs: text compiled within bounds, and the guide that follows one request.

Owns all that touches `llguidance`. A guide consumes the tokens of its request in order and says which may come next, in threads
of this file: while the device computes a step, the masks of its rows are made beside it. What a guide knows follows from the
tokens alone, so preemption, a parked pass and another process cost it nothing but consuming them again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import InvalidRequest, Overloaded, RequestFailed
from engine.types import MAX_GRAMMAR_CHARS, Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from engine.tokenizer import Tokenizer

COMPILE_SECONDS = 5.0  # longest that a caller waits for a grammar
_MAX_REASON = 400
_CACHED = 128  # compiled grammars kept
# White space between the tokens of JSON: enough to indent by, not enough for a model to go on for ever.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
# llguidance counts work instead of time: about 20 ms for compiling, 15 ms for a mask, 50 MB for states.
_MAX_STATES, _MAX_SYMBOLS, _STEP_FUEL, _STEP_ITEMS = 25_000, 200_000, 200_000, 50_000


class Grammars:
    """Compiles grammars for one model and makes guides. Safe to use from several threads; costs nothing until it is used.

    `vocab_size` is the width of the model's logits, `eos_ids` what ends an output.
    """

    def __init__(self, tokenizer: Callable[[], Tokenizer], vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._make_tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = tuple(eos_ids)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._tokenizer_lock = threading.Lock()
        self._compiled: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()
        self._compilers = ThreadPoolExecutor(2, thread_name_prefix="grammar")
        self._masks = ThreadPoolExecutor(4, thread_name_prefix="mask")

    def warm_up(self) -> None:
        """Read the vocabulary now. It takes a fraction of a second in which no other Python thread runs."""
        with suppress(InvalidRequest):  # a model without grammars, of which those who ask for one are told
            self._words()

    def check(self, grammar: Grammar) -> None:
        """Compile `grammar`, or remember that it was. Blocks; not for an event loop or an engine's thread.

        Raises InvalidRequest, or Overloaded if too many others are being compiled.
        """
        future = self._compile(grammar)
        try:
            error = future.exception(COMPILE_SECONDS)
        except TimeoutError:
            if future.cancel():
                self._forget(grammar)
                raise Overloaded("too many grammars are being compiled; try again later") from None
            raise InvalidRequest(f"grammar: it takes more than {COMPILE_SECONDS:g} s to compile", param="grammar") from None
        if error is not None:
            raise InvalidRequest(f"grammar: {_reason(str(error))}", param="grammar")

    def open(self, grammar: Grammar) -> GrammarGuide:
        """A guide for one output. Returns at once; the guide is ready when the grammar is compiled."""
        return GrammarGuide(self._compile(grammar), self._masks)

    def close(self) -> None:
        """Let the threads end."""
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._masks.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: Grammar) -> Future[LLMatcher]:
        with self._lock:
            future = self._compiled.get(grammar)
            if future is None or future.cancelled():
                future = self._compiled[grammar] = self._compilers.submit(self._matcher, grammar)
                while len(self._compiled) > _CACHED:
                    self._compiled.popitem(last=False)
            else:
                self._compiled.move_to_end(grammar)
            return future

    def _forget(self, grammar: Grammar) -> None:
        with self._lock:
            self._compiled.pop(grammar, None)

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        """In a thread of its own. The matcher stays as it is: guides get copies."""
        from llguidance import LLMatcher, LLParserLimits

        source = _source(grammar)
        limits = LLParserLimits(
            max_lexer_states=_MAX_STATES,
            max_grammar_size=_MAX_SYMBOLS,
            step_lexer_fuel=_STEP_FUEL,
            step_max_items=_STEP_ITEMS,
            verbose_errors=False,
        )
        matcher = LLMatcher(self._words(), source, log_level=0, limits=limits)
        if matcher.is_error():
            raise InvalidRequest(_reason(matcher.get_error()))
        return matcher

    def _words(self) -> LLTokenizer:
        """The vocabulary as llguidance wants it, from the same bytes that make an output's text."""
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._tokenizer_lock:
            if self._tokenizer is None:
                tokenizer = self._make_tokenizer()
                eos_ids = self._eos_ids
                if not eos_ids:
                    raise InvalidRequest("this model has no end-of-sequence token, so an output could not end")
                size = max(self._vocab_size, tokenizer.vocab_size)
                vocabulary = _Vocabulary(tokenizer, size, eos_ids[0])
                self._tokenizer = LLTokenizer(TokenizerWrapper(vocabulary), eos_token=list(eos_ids))  # type: ignore[call-arg]
                vocabulary.greedy = self._tokenizer.greedy_tokenize
            return self._tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model folder; its library is loaded with it."""
    from engine.tokenizer import Tokenizer

    return Tokenizer.load(path)


class GrammarGuide:
    """`types.Guide` for one request. One caller at a time; its work is done by `threads`, one piece after the other."""

    def __init__(self, compiled: Future[LLMatcher], threads: ThreadPoolExecutor) -> None:
        self._compiled = compiled
        self._threads = threads
        self._matcher: LLMatcher | None = None
        self._consumed = 0  # output tokens
        self._prepared = -1  # length of the sequence that `_mask` is for
        self._mask: Future[bytes] | None = None

    @property
    def ready(self) -> bool:
        return self._compiled.done()

    def prepare(self, tokens: Sequence[int], num_prompt: int) -> None:
        length = len(tokens)
        if length != self._prepared:
            self._prepared = length
            self._mask = self._threads.submit(self._work, tokens, num_prompt, length)

    def allowed(self) -> bytes:
        assert self._mask is not None, "prepared before"
        error = self._mask.exception()  # a panic of the library's among them, which is no Exception
        if error is not None:
            raise RequestFailed(f"the grammar cannot be followed any further: {_reason(str(error))}") from error
        return self._mask.result()

    def _work(self, tokens: Sequence[int], num_prompt: int, length: int) -> bytes:
        if self._matcher is None:
            self._matcher = self._compiled.result().deep_copy()
        new = list(tokens[num_prompt + self._consumed : length])
        if new:
            self._matcher.consume_tokens(new)
            self._consumed += len(new)
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise RequestFailed(self._matcher.get_error())
        return mask


class _Vocabulary:
    """What `llguidance.TokenizerWrapper` asks of a tokenizer: bytes of all tokens, and how a text that must come is cut."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int, eos_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.greedy: Callable[[str], list[int]] | None = None  # cuts by the longest token, and never finds a special one

    def __call__(self, data: bytes) -> list[int]:
        text = data.decode("utf-8", "replace")
        tokens = self._tokenizer.encode(text, add_special=False)
        spelt = b"".join(self.tokens[token] for token in tokens)
        # Spellings of control tokens are text here, and SentencePiece begins every text with a space.
        if self.greedy is None or (spelt == data and self._tokenizer.special_ids.isdisjoint(tokens)):
            return tokens
        return self.greedy(text)


def _source(grammar: Grammar) -> str:
    """`grammar` in llguidance's own form. Raises InvalidRequest for what cannot be read as its kind."""
    from llguidance import LLMatcher, grammar_from

    if len(grammar.text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(f"it has more than {MAX_GRAMMAR_CHARS} characters")
    try:
        match grammar.kind:
            case "json_schema":
                if grammar.text == "true":
                    return _source(Grammar.json_schema({}))
                return LLMatcher.grammar_from_json_schema(grammar.text, overrides={"whitespace_pattern": _WHITESPACE})
            case "regex":
                return LLMatcher.grammar_from_regex(grammar.text)
            case "choice":
                return grammar_from("choice", grammar.text)
            case "lark":
                return grammar_from("grammar", grammar.text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(_reason(str(error))) from None


def _reason(text: str) -> str:
    """The first words of an error, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_REASON else line[: _MAX_REASON - 1] + "…"
