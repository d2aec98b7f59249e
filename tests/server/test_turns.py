"""Requests that come at once begin a few at a time, in their order, whoever of them leaves."""

from __future__ import annotations

import asyncio

import pytest

from server.turns import Turns


async def test_a_few_go_on_in_each_turn_in_their_order() -> None:
    turns, turn, begun = Turns(3), 0, []

    async def begin(number: int) -> None:
        await turns.take()
        begun.append((turn, number))

    tasks = [asyncio.create_task(begin(number)) for number in range(20)]
    tasks[7].cancel()
    tasks[19].cancel()
    while not all(task.done() for task in tasks):
        turn += 1
        await asyncio.sleep(0)

    assert [number for _, number in begun] == [number for number in range(20) if number not in (7, 19)]
    assert max(sum(at == this for at, _ in begun) for this in range(turn + 1)) == 3


@pytest.mark.parametrize("number", [1, 3, 4, 9])
async def test_who_waits_and_leaves_takes_nobodys_turn(number: int) -> None:
    turns = Turns(2)
    waiting = [asyncio.create_task(turns.take()) for _ in range(number + 2)]
    await asyncio.sleep(0)
    for task in waiting[2:]:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)

    await asyncio.wait_for(turns.take(), 30)
    await asyncio.wait_for(turns.take(), 30)
