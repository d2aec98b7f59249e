"""Grammars: what they allow, what is refused and why, and that a guide's state follows from its tokens."""

from __future__ import annotations

import json
import random

import pytest
from helpers import tiny_checkpoint
from tokenizer_cases import sentencepiece

from engine.errors import InvalidRequest, RequestFailed
from engine.grammar import Grammars
from engine.tokenizer import Tokenizer
from engine.types import MAX_GRAMMAR_CHARS, Grammar

EOS = 258  # <|im_end|> of the tiny model; tokens below 256 are the bytes
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def ids(mask: bytes) -> list[int]:
    return [i for i in range(8 * len(mask)) if mask[i >> 3] >> (i & 7) & 1]


def allowed(guide, tokens: list[int], num_prompt: int = 1) -> list[int]:
    guide.prepare(tokens, num_prompt)
    return ids(guide.allowed())


def write(grammars: Grammars, grammar: Grammar, seed: int, most: int = 400) -> str:
    """An output drawn at random from what the grammar allows."""
    rng, guide, tokens = random.Random(seed), grammars.open(grammar), [0]
    while len(tokens) < most:
        choices = allowed(guide, tokens)
        printable = [i for i in choices if 32 <= i < 127 or i == EOS] or choices
        token = EOS if EOS in choices else rng.choice(printable)
        if token == EOS:
            return bytes(tokens[1:]).decode()
        tokens.append(token)
    raise AssertionError(f"no end: {bytes(tokens[1:])!r}")


@pytest.mark.parametrize("seed", range(5))
def test_a_schema(grammars, seed):
    value = json.loads(write(grammars, Grammar.json_schema(SCHEMA), seed))
    assert set(value) == {"name", "age"}
    assert len(value["name"]) <= 8 and 0 <= value["age"] <= 150


def test_other_kinds(grammars):
    assert write(grammars, Grammar("regex", r"^[ab]{2}-\d$"), 0)[:2] in ("aa", "ab", "ba", "bb")
    assert write(grammars, Grammar.choice(['"quoted"', "ünï"]), 0) in ('"quoted"', "ünï")
    assert write(grammars, Grammar("lark", 'start: "a" [b]\nb: "b"'), 0) in ("a", "ab")
    assert write(grammars, Grammar("lark", 'root ::= "x" | "y"'), 0) in ("x", "y")  # llama.cpp's GBNF
    assert json.loads(write(grammars, Grammar.json_schema({"enum": [True, None, "s"]}), 0)) in (True, None, "s")
    grammars.check(Grammar.json_object())
    grammars.check(Grammar.json_schema(True))


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("lark", "start: missing"), "missing"),
        (Grammar("json_schema", '{"type": "sting"}'), "sting"),
        (Grammar("json_schema", "[1"), "EOF"),
        (Grammar.json_schema({"not": {}}), "Unimplemented"),
        (Grammar.json_schema({"$ref": "https://example.com/schema.json"}), "not fetch"),
        (Grammar("regex", "a" * (MAX_GRAMMAR_CHARS + 1)), "characters"),
    ],
)
def test_what_cannot_be_compiled_is_refused(grammars, grammar, reason):
    with pytest.raises(InvalidRequest, match=reason) as refused:
        grammars.check(grammar)
    assert refused.value.param == "grammar"


def test_a_guide_that_starts_in_the_middle_knows_what_the_first_one_knew(grammars):
    """So nothing is lost by preemption, by recomputation, or with the process."""
    text = list(b'{"name": "Bob", "age": 42}')
    first = grammars.open(Grammar.json_schema(SCHEMA))
    tokens = [9, 9]  # the prompt is no concern of the grammar
    for token in [*text, EOS]:
        now = allowed(first, tokens, 2)
        assert token in now
        assert allowed(first, tokens, 2) == now  # asked again for a row that ran twice
        assert allowed(grammars.open(Grammar.json_schema(SCHEMA)), list(tokens), 2) == now
        tokens.append(token)


def test_guides_do_not_see_each_other(grammars):
    one, two = (grammars.open(Grammar("regex", "ab|cd")) for _ in range(2))
    assert allowed(one, [0]) == allowed(two, [0]) == [ord("a"), ord("c")]
    assert allowed(one, [0, ord("a")]) == [ord("b")]
    assert allowed(two, [0, ord("c")]) == [ord("d")]


def test_only_an_end_may_follow_the_end(grammars):
    assert allowed(grammars.open(Grammar("regex", "ab")), [0, ord("a"), ord("b")]) == [EOS]


def test_control_tokens_are_not_their_spelling(grammars):
    """`<|im_end|>` in an output is text, a byte at a time; the token of that name ends the output."""
    guide = grammars.open(Grammar.choice(["<|im_end|>!"]))
    assert allowed(guide, [0]) == [ord("<")]
    assert allowed(guide, [0, ord("<")]) == [ord("|")]


def test_white_space_ends(grammars):
    guide = grammars.open(Grammar.json_schema(SCHEMA))
    tokens = [0, ord("{")]
    while ord(" ") in allowed(guide, tokens):
        tokens.append(ord(" "))
        assert len(tokens) < 100


def test_a_grammar_too_hard_to_follow_fails_its_request(grammars):
    guide = grammars.open(Grammar("regex", "ab"))
    with pytest.raises(RequestFailed, match="grammar"):
        allowed(guide, [0, ord("x")])


def test_a_grammar_that_does_not_compile_is_ready_to_say_so(grammars):
    guide = grammars.open(Grammar("regex", "(a"))
    with pytest.raises(RequestFailed, match="unclosed"):
        allowed(guide, [0])
    assert guide.ready


def test_a_model_without_an_end_has_no_grammars(tmp_path):
    tokenizer = Tokenizer.load(tiny_checkpoint(tmp_path))
    grammars = Grammars(lambda: tokenizer, 264, ())
    grammars.warm_up()
    with pytest.raises(InvalidRequest, match="end-of-sequence"):
        grammars.check(Grammar("regex", "a"))
    grammars.close()


def test_sentencepiece():
    tokenizer = Tokenizer(sentencepiece(), names={"eos_token": "</s>"})
    grammars = Grammars(lambda: tokenizer, tokenizer.vocab_size, (2,))
    guide, tokens = grammars.open(Grammar.choice(["abcd é"])), [0]
    while (choices := allowed(guide, tokens)) != [2]:
        tokens.append(choices[-1])
    assert tokenizer.decode(tokens[1:]) == "abcd é"
    grammars.close()
