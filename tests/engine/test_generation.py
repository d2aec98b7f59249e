"""From tokens to text: stop strings across token boundaries, merged deltas, readers of every kind."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import EngineDead, RequestFailed
from engine.generation import Generation, StopStrings, merge_deltas, wake
from engine.types import Delta, FinishReason, SamplingParams, Tenant, TokenOut


class Letters:
    """A detokenizer whose token is a character's code point."""

    def push(self, token: int) -> str:
        return chr(token)

    def flush(self) -> str:
        return ""


def make(params: SamplingParams | None = None) -> tuple[Generation, list[int]]:
    aborted: list[int] = []
    generation = Generation(
        request_id="r",
        model="m",
        tenant=Tenant.ONLINE,
        prompt_tokens=(1, 2),
        params=params or SamplingParams(),
        make_detokenizer=Letters,
        abort=aborted.append,
    )
    return generation, aborted


def feed(generation: Generation, text: str, *, index: int = 0, finish: FinishReason | None = None) -> None:
    for place, char in enumerate(text, start=1):
        reason = finish if place == len(text) else None
        waiter = generation.push(index, TokenOut(id="r.0", token=ord(char), finish_reason=reason))
        wake([waiter] if waiter else [])


@given(
    text=st.text(alphabet="abc", max_size=30),
    cuts=st.lists(st.integers(1, 4), max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_stop_strings_do_not_depend_on_token_boundaries(text, cuts, stops, include):
    finder = StopStrings(stops, include=include)
    shown, rest = "", text
    for cut in cuts:
        shown += finder.push(rest[:cut])
        rest = rest[cut:]
        if finder.found is not None:
            break
    else:
        shown += finder.push(rest, last=True)

    ends = [(text.index(stop) + len(stop), text.index(stop), stop) for stop in stops if stop in text]
    if not ends:
        assert finder.found is None
        assert shown == text
    else:
        assert finder.found is not None
        at = len(shown) - (len(finder.found) if include else 0)
        assert text[at : at + len(finder.found)] == finder.found
        assert all(stop not in text[:at] for stop in stops)


def test_text_that_may_become_a_stop_string_is_held_back():
    generation, aborted = make(SamplingParams(stop=("END",)))
    feed(generation, "xE")
    assert [delta.text for delta in generation._take()] == ["x"]
    feed(generation, "N")
    assert "".join(delta.text for delta in generation._take()) == ""
    feed(generation, "y")
    assert [delta.text for delta in generation._take()] == ["ENy"]
    assert not aborted


def test_a_stop_string_ends_the_choice_and_aborts_it_in_the_engine():
    generation, aborted = make(SamplingParams(stop=("END",)))
    feed(generation, "abENDxyz", finish=FinishReason.LENGTH)

    result = generation.result()

    assert result.text == "ab"
    assert result.choices[0].finish_reason is FinishReason.STOP
    assert result.choices[0].stop_reason == "END"
    assert aborted == [0]
    assert result.usage.completion_tokens == 5


def test_stop_strings_wait_for_min_tokens():
    generation, _ = make(SamplingParams(stop=("b",), min_tokens=3))
    feed(generation, "abcdb")
    assert generation.result().text == "abcd"


@given(st.lists(st.tuples(st.integers(0, 2), st.text(max_size=3)), max_size=12))
def test_merged_deltas_say_the_same(parts):
    deltas = [Delta(index=index, text=text, tokens=tuple(map(ord, text))) for index, text in parts]
    merged = merge_deltas(deltas)
    assert len({delta.index for delta in merged}) == len(merged)
    for index in {delta.index for delta in deltas}:
        whole = "".join(delta.text for delta in deltas if delta.index == index)
        (one,) = [delta for delta in merged if delta.index == index]
        assert one.text == whole
        assert one.tokens == tuple(map(ord, whole))


def test_choices_come_in_order_however_they_finish():
    generation, _ = make(SamplingParams(n=2))
    feed(generation, "late", index=1, finish=FinishReason.STOP)
    feed(generation, "early", index=0, finish=FinishReason.LENGTH)
    assert [choice.text for choice in generation.result().choices] == ["early", "late"]


def test_an_error_reaches_every_kind_of_reader():
    generation, _ = make()
    generation.push(0, TokenOut(id="r.0", finish_reason=FinishReason.ERROR, error="NaN"))
    with pytest.raises(RequestFailed, match="NaN"):
        generation.result()


def test_a_dead_engine_gives_what_it_had_and_then_the_error():
    generation, _ = make()
    feed(generation, "ab")
    generation.die(EngineDead("gone"))
    seen = []
    with pytest.raises(EngineDead, match="gone"):
        for delta in generation:
            seen.append(delta.text)
    assert "".join(seen) == "ab"


async def test_async_reader_gets_everything_from_another_thread():
    generation, _ = make()
    thread = threading.Thread(target=feed, args=(generation, "hello" * 50), kwargs={"finish": FinishReason.LENGTH})
    thread.start()
    text = "".join([delta.text async for delta in generation])
    thread.join()
    assert text == "hello" * 50


async def test_a_step_of_many_readers_does_not_keep_the_loop_from_others():
    """They are woken some at a time: whoever else has something to do on the loop has turns in between."""
    generations = [make()[0] for _ in range(200)]
    turn, woken = 0, []

    async def read(generation):
        (delta,) = await generation.read()
        woken.append(turn)
        return delta.text

    readers = [asyncio.create_task(read(generation)) for generation in generations]
    await asyncio.sleep(0)
    wake([generation.push(0, TokenOut(id="r.0", token=ord("x"))) for generation in generations])
    while len(woken) < len(generations):
        turn += 1
        await asyncio.sleep(0)

    assert await asyncio.gather(*readers) == ["x"] * len(generations)
    assert max(Counter(woken).values()) <= 64


async def test_cancelled_wait_aborts():
    generation, aborted = make()
    task = asyncio.create_task(generation.completion())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert aborted == [0]


def test_result_timeout():
    generation, _ = make()
    with pytest.raises(TimeoutError):
        generation.result(timeout=0.01)
