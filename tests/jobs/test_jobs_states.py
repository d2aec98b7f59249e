"""A batch in each of its states, as a kill left it on the disk: the next server brings it to the end that it should have."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from serving import Server, serving

from engine import Engine
from engine.joblines import JobLine
from engine.joblog import answer_record
from server.jobs_store import BatchRecord, FileRecord, Store, new_id

URL = "/v1/completions"
PATIENCE = 60.0  # seconds; only a failing test waits that long
ENDED = ("completed", "failed", "expired", "cancelled")
LINES = 4
NOW = int(time.time())
STARTED = {"total": LINES, "in_progress_at": NOW - 50, "models": ("tiny",), "estimate": 10.0}


def leave(folder: Path, answered: int, *, torn: bool = False, **state: Any) -> str:
    """What a server that was killed leaves of a batch of which so many lines have their record. Its id."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
    rows = [{"custom_id": f"id-{n}", "method": "POST", "url": URL, "body": body} for n in range(1, LINES + 1)]
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    with Store(folder) as store:
        upload = store.upload()
        upload.write(data)
        store.keep(
            upload,
            FileRecord(
                id=upload.id, owner="-", filename="in.jsonl", purpose="batch", bytes=len(data), created_at=NOW - 60,
                sha256=hashlib.sha256(data).hexdigest(), lines=LINES,
            ),
        )  # fmt: skip
        upload.close()
        batch = BatchRecord(
            id=new_id("batch_"), owner="-", endpoint=URL, input_file_id=upload.id, output_id=new_id("file-"),
            error_id=new_id("file-"), completion_window="24h", created_at=NOW - 60, expires_at=NOW + 86_400, lines=LINES,
        )  # fmt: skip
        store.add_batch(batch, 10)
        store.save_batch(replace(batch, **state))
        blobs = [
            answer_record(batch.job, JobLine(n, f"id-{n}", URL, body, 10), 200, {"usage": {"completion_tokens": 1}}).blob
            for n in range(1, answered + 1 + torn)
        ]
        if torn:
            blobs[-1] = blobs[-1][:40]
        store.path(batch.output_id).write_bytes(b"".join(blobs))
    return batch.id


async def ended(server: Server, batch_id: str) -> tuple[Any, dict[str, str | None]]:
    """The batch, and what became of each line: None if it was answered, else the code of its error."""
    async with asyncio.timeout(PATIENCE):
        while (batch := (await server.get(f"/v1/batches/{batch_id}"))[1])["status"] not in ENDED:
            await asyncio.sleep(0.02)
    lines: dict[str, str | None] = {}
    for key in ("output_file_id", "error_file_id"):
        if batch[key] is not None:
            async with server.client.get(f"{server.url}/v1/files/{batch[key]}/content") as response:
                for text in (await response.text()).splitlines():
                    item = json.loads(text)
                    assert item["custom_id"] not in lines, "twice"
                    lines[item["custom_id"]] = None if item["error"] is None else item["error"]["code"]
    counts = batch["request_counts"]
    assert counts["completed"] == sum(code is None for code in lines.values())
    assert counts["completed"] + counts["failed"] == len(lines)
    return batch, lines


PAST = {"expires_at": NOW - 5}


@pytest.mark.parametrize(
    ("answered", "state", "end", "rest"),
    [
        (0, {"status": "validating"}, "completed", None),
        (0, {"status": "in_progress"} | STARTED, "completed", None),
        (2, {"status": "in_progress"} | STARTED, "completed", None),
        (LINES, {"status": "in_progress"} | STARTED, "completed", None),
        (LINES, {"status": "finalizing", "finalizing_at": NOW - 1} | STARTED, "completed", None),
        (LINES, {"status": "finalizing", "finalizing_at": NOW - 6} | STARTED | PAST, "completed", None),  # it made it
        (2, {"status": "cancelling", "cancelling_at": NOW - 1} | STARTED, "cancelled", "batch_cancelled"),
        (2, {"status": "cancelling", "cancelling_at": NOW - 9} | STARTED | PAST, "cancelled", "batch_cancelled"),
        (2, {"status": "in_progress"} | STARTED | PAST, "expired", "batch_expired"),
        (2, {"status": "in_progress", "paused": True} | STARTED | PAST, "expired", "batch_expired"),
    ],
)
@pytest.mark.parametrize("torn", [False, True])
async def test_each_state_has_its_end(
    engine: Engine, tmp_path: Path, answered: int, state: dict[str, Any], end: str, rest: str | None, torn: bool
) -> None:
    batch_id = leave(tmp_path, answered, torn=torn and answered < LINES, **state)
    async with serving(engine, data_dir=str(tmp_path)) as server:
        batch, lines = await ended(server, batch_id)
    assert batch["status"] == end and batch[f"{end}_at"] >= NOW
    assert lines == {f"id-{n}": None if n <= answered or rest is None else rest for n in range(1, LINES + 1)}


@pytest.mark.parametrize("state", [{"status": "validating"}, {"status": "in_progress"} | STARTED])
async def test_a_paused_batch_stays_so_until_it_is_resumed(engine: Engine, tmp_path: Path, state: dict[str, Any]) -> None:
    batch_id = leave(tmp_path, 0, paused=True, **state)
    async with serving(engine, data_dir=str(tmp_path)) as server:
        other = await create_another(server)
        assert (await ended(server, other))[0]["status"] == "completed", "others go by"
        _, batch = await server.get(f"/v1/batches/{batch_id}")
        assert batch["status"] == state["status"] and batch["sluice"]["paused_reason"] == "by_request"
        assert batch["request_counts"]["completed"] == 0
        assert (await server.post(f"/v1/batches/{batch_id}/resume", {}))[0] == 200
        assert (await ended(server, batch_id))[0]["status"] == "completed"


async def create_another(server: Server) -> str:
    """A batch of the same input."""
    _, files = await server.get("/v1/files")
    body = {"input_file_id": files["data"][0]["id"], "endpoint": URL, "completion_window": "24h"}
    return str((await server.post("/v1/batches", body))[1]["id"])


@pytest.mark.parametrize("state", [{"status": "validating"}, {"status": "in_progress"} | STARTED])
@pytest.mark.parametrize("paused", [False, True])
async def test_it_can_be_cancelled_whatever_it_waits_for(tmp_path: Path, state: dict[str, Any], paused: bool) -> None:
    """Nothing runs: the model is being loaded."""
    batch_id = leave(tmp_path, 0, paused=paused, **state)
    async with serving(None, data_dir=str(tmp_path)) as server:
        status, batch = await server.post(f"/v1/batches/{batch_id}/cancel", {})
        assert status == 200 and batch["status"] in ("cancelling", "cancelled")
        batch, lines = await ended(server, batch_id)
    assert batch["status"] == "cancelled"
    assert set(lines.values()) <= {"batch_cancelled"} and len(lines) == batch["request_counts"]["total"]


async def test_a_model_that_is_gone_holds_its_batch_until_it_is_back(engine: Engine, tmp_path: Path) -> None:
    batch_id = leave(tmp_path, 1, status="in_progress", **STARTED | {"models": ("other",)})
    async with serving(engine, data_dir=str(tmp_path)) as server:
        async with asyncio.timeout(PATIENCE):
            while not (batch := (await server.get(f"/v1/batches/{batch_id}"))[1])["sluice"]["paused"]:
                await asyncio.sleep(0.02)
        assert batch["sluice"]["paused_reason"] == "model_not_found" and batch["status"] == "in_progress"
        assert (await server.post(f"/v1/batches/{batch_id}/cancel", {}))[0] == 200
        _, lines = await ended(server, batch_id)
    assert lines == {"id-1": None} | {f"id-{n}": "batch_cancelled" for n in range(2, LINES + 1)}
