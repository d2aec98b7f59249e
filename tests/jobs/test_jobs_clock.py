"""The system's clock set back and forth under batches: what is left of a window stays, in this process and in the next."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData
from serving import Server, serving

from engine import Engine
from engine.clock import ManualClock
from server.jobs import Jobs
from server.jobs_clock import Known, WallClock
from server.jobs_store import BatchRecord, FileRecord, Store, new_id

NOW, DAY, YEAR = 1_800_000_000.0, 86_400, 365 * 86_400
PATIENCE = 60.0  # seconds; only a failing test waits that long


class Machine:
    """Its clocks: one that runs evenly, and one that people set."""

    def __init__(self) -> None:
        self.steady = ManualClock(1000.0)
        self.set_by = 0.0
        self.boot = "first"

    def wall(self) -> float:
        return NOW + self.steady.now() + self.set_by

    def clock(self, known: Known | None = None) -> WallClock:
        return WallClock(known, wall=self.wall, steady=self.steady, boot=self.boot)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.mark.parametrize("jump", [YEAR, -YEAR, 3600, -5])
def test_time_goes_on_evenly_until_the_jump_is_followed(machine: Machine, jump: float) -> None:
    now = machine.clock()
    start = now()
    machine.set_by = jump
    machine.steady.advance(10)
    assert now() == start + 10
    assert now.jump() == pytest.approx(jump)
    now.follow(now.jump())
    assert now() == pytest.approx(machine.wall()) and now.jump() == 0


def test_small_corrections_are_no_jumps(machine: Machine) -> None:
    now = machine.clock()
    machine.set_by = 1.0
    assert now.jump() == 0


def test_another_process_of_the_same_boot_sees_the_jump(machine: Machine) -> None:
    known = machine.clock().known
    machine.set_by = YEAR
    machine.steady.advance(DAY)
    now = machine.clock(known)
    assert now() == pytest.approx(known.at + DAY), "a day passed, and not a year"
    assert now.jump() == pytest.approx(YEAR)


def test_after_a_reboot_the_systems_clock_is_believed_unless_it_went_back(machine: Machine) -> None:
    known = machine.clock().known
    machine.boot, machine.steady = "second", ManualClock(5.0)
    machine.set_by = known.at - NOW + DAY
    assert machine.clock(known)() == pytest.approx(known.at + DAY + 5), "it was off for a day"
    machine.set_by = -NOW  # 1970, until the network tells the time
    now = machine.clock(known)
    assert now() == pytest.approx(known.at)
    assert now.jump() < -40 * YEAR, "which is followed, and back again"


def test_where_boots_have_no_names_each_process_believes_the_system(machine: Machine) -> None:
    machine.boot = ""
    known = machine.clock().known
    machine.set_by = YEAR
    assert machine.clock(known)() == pytest.approx(machine.wall())


def test_stored_times_move_where_something_waits_for_them(tmp_path: Path) -> None:
    batch = BatchRecord(
        id=new_id("batch_"), owner="a", endpoint="/v1/completions", input_file_id=new_id("file-"), output_id=new_id("file-"),
        error_id=new_id("file-"), completion_window="24h", created_at=100, expires_at=100 + DAY,
    )  # fmt: skip
    over = replace_struct(batch, id=new_id("batch_"), status="completed", completed_at=200)
    file = FileRecord(id=new_id("file-"), owner="a", filename="x", purpose="batch", bytes=1, created_at=100)
    mortal = replace_struct(file, id=new_id("file-"), expires_at=5000)
    with Store(tmp_path) as store:
        with store._transaction() as db:
            for record in (file, mortal, replace_struct(file, id=batch.input_file_id)):
                store._insert_file(db, record)
        for record in (batch, over):
            store.add_batch(record, 10)
        store.save_batch(over)
        known = Known("b", 1.0, 2.0)
        store.move_times(1000.4, known)
    with Store(tmp_path) as store:
        assert store.known_clock() == known
        moved = store.batch(batch.id)
        assert moved == replace_struct(batch, created_at=1100, expires_at=1100 + DAY)
        assert store.batch(over.id) == over and store.file(file.id) == file
        assert store.file(mortal.id) == replace_struct(mortal, created_at=1100, expires_at=6000)
        assert store.expired_files(5500) == [] and store.expired_files(6000) == [mortal.id]


def replace_struct(record: Any, **changes: Any) -> Any:
    from msgspec.structs import replace as changed

    return changed(record, **changes)


async def submit(server: Server, lines: int, window: str) -> str:
    item = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 300, "ignore_eos": True}}
    form = FormData({"purpose": "batch"})
    data = "\n".join(json.dumps({"custom_id": str(n)} | item) for n in range(lines))
    form.add_field("file", data.encode(), filename="in.jsonl")
    async with server.client.post(server.url + "/v1/files", data=form) as response:
        file = await response.json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": window}
    status, batch = await server.post("/v1/batches", body)
    assert status == 200, batch
    return str(batch["id"])


async def until(server: Server, batch_id: str, condition: Callable[[Any], bool]) -> Any:
    async with asyncio.timeout(PATIENCE):
        while not condition(batch := (await server.get(f"/v1/batches/{batch_id}"))[1]):
            await asyncio.sleep(0.02)
    return batch


def is_sane(slack: float) -> bool:
    """Of a window of a day, whatever this machine's speed makes of the work: nowhere near a year."""
    return -YEAR / 4 < slack <= DAY + 1


async def test_a_clock_that_is_set_costs_no_batch_its_window(engine: Engine, tmp_path: Path, machine: Machine) -> None:
    """A year ahead, two years back, and a year ahead while no server runs; then the window ends when it should."""

    def jobs() -> Jobs:
        store = Store(tmp_path)
        return Jobs(store, max_inflight=1, clock=machine.clock(store.known_clock()), tick=0.01)

    async with serving(engine, jobs=jobs()) as server:
        batch_id = await submit(server, 2000, "24h")
        first = await until(server, batch_id, lambda batch: batch["sluice"]["slack_s"] is not None)
        assert is_sane(first["sluice"]["slack_s"])
        for jump in (YEAR, -2 * YEAR):
            expires, machine.set_by = first["expires_at"] + machine.set_by + jump, machine.set_by + jump
            batch = await until(server, batch_id, lambda batch, at=expires: abs(batch["expires_at"] - at) <= 1)
            assert batch["status"] == "in_progress"
            assert abs(batch["expires_at"] - batch["created_at"] - DAY) <= 1
            batch = await until(server, batch_id, lambda batch: batch["sluice"]["slack_s"] is not None)
            assert is_sane(batch["sluice"]["slack_s"])
    machine.set_by += YEAR
    machine.steady.advance(DAY / 2)
    async with serving(engine, jobs=jobs()) as server:
        batch = await until(server, batch_id, lambda batch: abs(batch["expires_at"] - first["expires_at"]) <= 2)
        assert batch["status"] == "in_progress", "half of its window is left"
        machine.steady.advance(DAY / 2)
        batch = await until(server, batch_id, lambda batch: batch["status"] == "expired")
        assert sum(batch["request_counts"][key] for key in ("completed", "failed")) == 2000
        assert batch["expired_at"] >= batch["expires_at"]
