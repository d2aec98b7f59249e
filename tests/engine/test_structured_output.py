"""Grammars in a real engine: with every other parameter, whatever else runs, and through each kind of loss."""

from __future__ import annotations

import json
import re

import pytest
from helpers import tiny_checkpoint

from engine import Engine, EngineConfig, FinishReason, Grammar, SamplingParams, Tenant
from engine.clock import ManualClock
from engine.core import EngineCore
from engine.errors import InvalidRequest
from engine.fake import FakeRunner
from engine.grammar import Grammars
from engine.memory.manager import KVManager
from engine.memory.pages import PagePool
from engine.sched.policies import OnlineFirst
from engine.sched.scheduler import Scheduler
from engine.tokenizer import Tokenizer
from engine.types import Submit

EOS = 258
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 9999}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
JSON = Grammar.json_schema(SCHEMA)
LINE = Grammar("regex", r"(true|false): [0-9]{30,60}\.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder):
    config = EngineConfig(model=str(folder), served_model_name=("tiny",), threads=1, kv_cache_memory=8 << 20)
    with Engine(config=config, progress=False) as engine:
        yield engine
        engine._core.scheduler.check()


def one(engine: Engine, **params: object):
    return (
        engine.submit("x", SamplingParams(**{"max_tokens": 200, "temperature": 0.9, "seed": 5} | params)).result(60).choices[0]
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_the_output_fits_the_schema(engine, temperature):
    for seed in range(3):
        choice = one(engine, grammar=JSON, temperature=temperature, seed=seed)
        assert choice.finish_reason is FinishReason.STOP
        assert set(json.loads(choice.text)) == {"ok", "n"}


def test_other_kinds(engine):
    assert one(engine, grammar=Grammar.choice(["yes", "no"])).text in ("yes", "no")
    assert one(engine, grammar=Grammar("regex", "[a-c]{3}")).text.strip("abc") == ""
    assert one(engine, grammar=Grammar("lark", 'start: "left" | "right"')).text in ("left", "right")


def test_with_other_parameters(engine):
    choice = one(engine, grammar=JSON, logprobs=2, top_p=0.8, top_k=50, repetition_penalty=1.2, logit_bias=((ord("x"), 100.0),))
    assert set(json.loads(choice.text)) == {"ok", "n"}
    assert len(choice.logprobs) == len(choice.tokens)


@pytest.mark.parametrize("extra", [{"ignore_eos": True}, {"min_tokens": 150}, {"ignore_eos": True, "min_tokens": 150}])
def test_a_complete_output_ends_whatever_min_tokens_and_ignore_eos_say(engine, extra):
    assert one(engine, grammar=Grammar.choice(["yes"]), **extra).text == "yes"


def test_min_tokens_counts_where_the_grammar_may_go_on(engine):
    grammar = Grammar("regex", "[ab]*")
    assert len(one(engine, grammar=grammar, min_tokens=40, max_tokens=60).tokens) >= 40
    unending = one(engine, grammar=grammar, ignore_eos=True, max_tokens=60)
    assert (len(unending.tokens), unending.finish_reason) == (60, FinishReason.LENGTH)


def test_stop_strings_and_stop_ids_end_it_earlier(engine):
    early = one(engine, grammar=JSON, stop=("ok",))
    assert (early.finish_reason, early.stop_reason) == (FinishReason.STOP, "ok") and "ok" not in early.text
    early = one(engine, grammar=JSON, stop_token_ids=(ord(":"),))
    assert (early.finish_reason, early.stop_reason) == (FinishReason.STOP, ord(":")) and early.text.strip().endswith('"ok"')


def test_ids_and_words_that_may_and_may_not_come(engine):
    plain = one(engine, max_tokens=60, ignore_eos=True)
    only = one(engine, max_tokens=30, ignore_eos=True, allowed_token_ids=(97, 98))
    assert set(only.tokens) == {97, 98}
    once = plain.tokens[5]
    without = one(engine, max_tokens=60, ignore_eos=True, bad_tokens=((once,), plain.tokens[10:12]))
    assert once in plain.tokens and once not in without.tokens
    assert plain.tokens[10:12] not in zip(without.tokens, without.tokens[1:], strict=False)
    words = one(engine, max_tokens=40, ignore_eos=True, allowed_token_ids=(97, 98), bad_words=("ab",))
    assert set(words.text) <= {"a", "b"} and "ab" not in words.text


def test_several_choices_have_a_state_each(engine):
    params = SamplingParams(max_tokens=200, temperature=1.5, seed=1, n=4, grammar=JSON)
    texts = [choice.text for choice in engine.submit("x", params).result(60).choices]
    assert all(set(json.loads(text)) == {"ok", "n"} for text in texts)
    assert len(set(texts)) > 1


def test_same_tokens_whatever_else_runs(engine):
    alone = one(engine, grammar=JSON).tokens
    crowd = [
        engine.submit([n, 5], SamplingParams(max_tokens=60, seed=n, ignore_eos=not n % 2, grammar=JSON if n % 2 else None))
        for n in range(10)
    ]
    assert one(engine, grammar=JSON).tokens == alone
    for generation in crowd:
        generation.result(60)


def test_a_bad_grammar_is_refused_before_anything_runs(engine):
    with pytest.raises(InvalidRequest, match="unclosed") as refused:
        engine.submit("x", SamplingParams(grammar=Grammar("regex", "(")))
    assert refused.value.param == "grammar"


class Lives:
    """A core on a runner without a model, whose requests can be robbed of their pages, parked and replayed."""

    def __init__(self, folder) -> None:
        tokenizer = Tokenizer.load(folder)
        self.grammars = Grammars(lambda: tokenizer, 264, (EOS,))
        self.grammars.check(LINE)
        self.restart()

    def restart(self) -> None:
        self.scheduler = Scheduler(
            KVManager(PagePool(4, 8), 4),
            OnlineFirst(),
            ManualClock(),
            max_num_seqs=8,
            max_num_batched_tokens=16,
            max_model_len=120,
            eos_ids=(EOS,),
            open_guide=self.grammars.open,
        )
        self.core = EngineCore(self.scheduler, FakeRunner(vocab_size=264, page_size=4, clock=ManualClock()))

    def submit(self, resume: tuple[int, ...] = (), tenant: Tenant = Tenant.OFFLINE) -> None:
        params = SamplingParams(max_tokens=80, grammar=LINE, seed=3)
        self.core.submit(Submit(id="a", tenant=tenant, prompt=tuple(range(20)), params=params, seed=3, resume=resume))

    def step(self) -> list[int]:
        return [out.token for out in self.core.step() if out.id == "a" and out.token is not None]

    def run(self, each_step=lambda: None) -> list[int]:
        tokens: list[int] = []
        while self.core.has_work:
            tokens += self.step()
            self.scheduler.check()
            each_step()
        return tokens


@pytest.fixture(scope="module")
def lives(folder):
    lives = Lives(folder)
    yield lives
    lives.grammars.close()


@pytest.fixture(scope="module")
def expected(lives):
    lives.restart()
    lives.submit()
    tokens = lives.run()
    assert re.fullmatch(LINE.text, bytes(tokens[:-1]).decode()) and tokens[-1] == EOS
    return tokens


def test_lost_pages_change_nothing(lives, expected):
    lives.restart()
    lives.submit()
    steps = iter(range(10_000))

    def rob() -> None:
        if next(steps) % 7 == 3 and lives.core.has_work:
            slab = next((r.pages[0] // 8 for r in lives.scheduler.kv.holders()), None)
            if slab is not None:
                lives.scheduler.lose_slab(slab)
                lives.scheduler.kv.add_slab(slab)

    assert lives.run(rob) == expected
    assert lives.scheduler.counters[Tenant.OFFLINE].preemptions > 2


def test_parked_passes_change_nothing(lives, expected):
    lives.restart()
    lives.submit()
    turns = iter(range(10_000))
    lives.core.interrupted = lambda: next(turns) % 3 == 0
    assert lives.run() == expected


def test_a_replay_goes_on_where_the_dead_worker_stopped(lives, expected):
    for done in range(1, len(expected) - 1, 4):
        lives.restart()
        lives.submit(resume=tuple(expected[:done]))
        assert lives.run() == expected[done:]


def test_a_request_waits_until_its_grammar_is_compiled(lives, expected):
    lives.restart()
    lives.submit()
    request = lives.scheduler._requests["a"]
    guide = request.guide

    class NotYet:
        ready = False

    request.guide = NotYet()
    assert lives.core.step() == [] and lives.core.stalled
    request.guide = guide
    assert lives.run() == expected
