"""A batch of any length takes the memory of the lines in flight: whatever is read waits for what is written."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from engine.joblines import BadLine, JobLine
from engine.joblog import Records
from engine.jobrun import Harvest, Run, Slots
from engine.openai import Answer

LINES, IN_FLIGHT = 5_000, 16


class Prompt:
    """Answers at once, and remembers how many lines it had at a time."""

    def __init__(self) -> None:
        self.open = self.most = 0

    async def answer(self, line: JobLine, request_id: str) -> Answer:
        self.open += 1
        self.most = max(self.most, self.open)
        await asyncio.sleep(0)
        self.open -= 1
        return Answer(200, {"usage": {"completion_tokens": 1}})

    def down(self) -> str | None:
        return None

    def harvest(self) -> Harvest:
        return Harvest()

    def close(self) -> None: ...


async def test_lines_are_read_no_further_than_records_are_written(tmp_path: Path) -> None:
    """Two batches that share the slots of a server, lines that are none among them."""
    slots, backend, ahead = Slots(IN_FLIGHT), Prompt(), 0
    logs = [Records(tmp_path / f"out{n}", tmp_path / f"errors{n}", say=print) for n in range(2)]

    def lines(log: Records) -> Iterator[JobLine | BadLine]:
        nonlocal ahead
        for number in range(1, LINES + 1):
            ahead = max(ahead, number - len(log.done))
            if number % 10:
                yield JobLine(number, f"id-{number}", "/v1/completions", {"prompt": "x"}, 100)
            else:
                yield BadLine(number, f"id-{number}", "invalid_json_line", "it is no JSON", size=100)

    with logs[0], logs[1]:
        for number, log in enumerate(logs):
            log.open(f"job{number}")
        await asyncio.gather(*(Run(backend, log, slots, say=print)(lines(log)) for log in logs))
        assert [len(log.done) for log in logs] == [LINES, LINES]
        assert [log.errors.count for log in logs] == [LINES // 10, LINES // 10]
    assert 1 < backend.most <= IN_FLIGHT
    assert ahead <= IN_FLIGHT + 1, "one is read and waits for its slot"
