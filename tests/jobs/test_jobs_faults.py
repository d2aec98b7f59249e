"""What may go wrong with files and batches, done for real: full disks, torn and foreign files, other servers, rude clients."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData
from helpers import small_file_system
from prometheus_client.parser import text_string_to_metric_families
from serving import MESSAGES, Server, serving

from engine import Engine
from engine.errors import InvalidConfig
from server.clients import client_of
from server.config import ServerConfig
from server.jobs import open_jobs
from server.jobs_store import DataDirInUse, Store

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0  # seconds; only a failing test waits that long
ENDED = ("completed", "failed", "expired", "cancelled")


def line(number: int, **body: Any) -> dict[str, Any]:
    body = {"prompt": f"hello {number}", "max_tokens": 6} | body
    return {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/completions", "body": body}


def jsonl(*lines: Any) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in lines)


async def upload(server: Server, data: bytes, name: str = "in.jsonl") -> tuple[int, Any]:
    form = FormData({"purpose": "batch"})
    form.add_field("file", io.BytesIO(data), filename=name)
    async with server.client.post(server.url + "/v1/files", data=form) as response:
        return response.status, await response.json()


async def submit(server: Server, data: bytes, **more: Any) -> str:
    status, file = await upload(server, data)
    assert status == 200, file
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"} | more
    status, batch = await server.post("/v1/batches", body)
    assert status == 200, batch
    return str(batch["id"])


async def until(server: Server, batch_id: str, condition: Any) -> Any:
    async with asyncio.timeout(PATIENCE):
        while not condition(batch := (await server.get(f"/v1/batches/{batch_id}"))[1]):
            await asyncio.sleep(0.02)
    return batch


async def ended(server: Server, batch_id: str) -> Any:
    return await until(server, batch_id, lambda batch: batch["status"] in ENDED)


async def ids_of(server: Server, batch: Any) -> list[str]:
    """The custom_ids of all records, in both files."""
    found = []
    for key in ("output_file_id", "error_file_id"):
        if batch[key] is not None:
            async with server.client.get(f"{server.url}/v1/files/{batch[key]}/content") as response:
                found += [json.loads(text)["custom_id"] for text in (await response.text()).splitlines()]
    return sorted(found)


# -- the folder


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    with Store(tmp_path / "data"):
        with pytest.raises(DataDirInUse, match=f"in use by another server \\(process {os.getpid()}\\)"):
            Store(tmp_path / "data")
        done = subprocess.run(
            [sys.executable, "-m", "engine.server", "--port", "0", "--data-dir", str(tmp_path / "data")],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 2 and "in use by another server" in done.stderr and "Traceback" not in done.stderr
    Store(tmp_path / "data").close()


def test_the_default_folder_in_use_costs_only_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_STATE", str(tmp_path))
    with Store(tmp_path):
        assert open_jobs(ServerConfig()) is None
    jobs = open_jobs(ServerConfig())
    assert jobs is not None
    jobs.close()
    assert open_jobs(ServerConfig(data_dir="none")) is None


def test_a_damaged_database_is_told(tmp_path: Path) -> None:
    Store(tmp_path).close()
    (tmp_path / "jobs.db").write_bytes(b"this is no database" * 1000)
    with pytest.raises(InvalidConfig, match="its database cannot be used"):
        Store(tmp_path)


async def test_without_a_folder_the_routes_say_so(engine: Engine) -> None:
    async with serving(engine) as server:
        status, body = await server.get("/v1/batches")
        assert (status, body["error"]["code"]) == (503, "batches_unavailable")


# -- stopped and started again


async def test_another_server_goes_on_where_one_was_closed(engine: Engine, tmp_path: Path) -> None:
    data = jsonl(*(line(n, max_tokens=40, ignore_eos=True) for n in range(60)))
    options = {"data_dir": str(tmp_path), "max_inflight": 4}
    async with serving(engine, **options) as server:
        batch_id = await submit(server, data)
        before = await until(server, batch_id, lambda batch: batch["request_counts"]["completed"] >= 4)
    (output,) = [path for path in (tmp_path / "files").iterdir() if path.stat().st_size and b"batch_req_" in path.read_bytes()]
    with output.open("ab") as file:
        file.write(b'{"id":"batch_req_' + before["id"].removeprefix("batch_").encode() + b'_60","custom_id":"id-5')  # torn
    (tmp_path / "files" / "file-0123.part").write_bytes(b"cut off")
    async with serving(engine, **options) as server:
        batch = await ended(server, batch_id)
        assert batch["status"] == "completed" and batch["request_counts"]["completed"] == 60
        assert await ids_of(server, batch) == sorted(f"id-{n}" for n in range(60))
        numbers = server.service.metrics.render().decode()
    assert not (tmp_path / "files" / "file-0123.part").exists()
    skipped = [s.value for f in text_string_to_metric_families(numbers) for s in f.samples if "resume_skipped_total" in s.name]
    assert skipped[0] >= 4


async def test_a_foreign_output_file_stops_its_job_alone(engine: Engine, tmp_path: Path) -> None:
    async with serving(engine, data_dir=str(tmp_path), max_inflight=2) as server:
        long = await submit(server, jsonl(*(line(n, max_tokens=400, ignore_eos=True) for n in range(200))))
        await until(server, long, lambda batch: batch["status"] == "in_progress")
    for path in (tmp_path / "files").iterdir():
        if b"custom_id" not in path.read_bytes()[:200]:
            path.write_text("not a record\n")
    async with serving(engine, data_dir=str(tmp_path)) as server:
        stuck = await until(server, long, lambda batch: batch["sluice"]["paused"])
        assert stuck["sluice"]["paused_reason"] == "damaged_file"
        other = await ended(server, await submit(server, jsonl(line(1))))
        assert other["status"] == "completed"


async def test_an_input_cut_short_fails_its_batch(engine: Engine, tmp_path: Path) -> None:
    async with serving(engine, data_dir=str(tmp_path)) as server:
        _, file = await upload(server, jsonl(line(1), line(2)))
        os.truncate(tmp_path / "files" / file["id"], 20)
        body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        _, batch = await server.post("/v1/batches", body)
        batch = await ended(server, batch["id"])
    assert batch["status"] == "failed" and "20 bytes" in batch["errors"]["data"][0]["message"]


# -- disks that are really full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "small", "1m") as folder:
        yield folder


async def test_a_full_disk_pauses_the_job_and_hurts_nobody_online(engine: Engine, small_disk: Path) -> None:
    data = jsonl(*(line(n, max_tokens=64, ignore_eos=True, n=8) for n in range(40)))
    async with serving(engine, data_dir=str(small_disk), max_inflight=4, min_free_disk=0) as server:
        batch_id = await submit(server, data)
        ballast = small_disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        paused = await until(server, batch_id, lambda batch: batch["sluice"]["paused"])
        assert paused["status"] in ("validating", "in_progress", "finalizing")
        assert paused["sluice"]["paused_reason"] == "disk_full"
        status, refused = await upload(server, bytes(8192))
        assert (status, refused["error"]["code"]) == (507, "disk_full")
        async with asyncio.timeout(PATIENCE):
            while (view := server.service.batches.summary()[0]).state != "paused":  # type: ignore[union-attr]
                await asyncio.sleep(0.02)
        assert (view.id, view.reason) == (batch_id, "disk_full")
        status, answer = await server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3})
        assert status == 200, answer
        ballast.unlink()
        batch = await ended(server, batch_id)
        assert (batch["status"], batch["request_counts"]["completed"]) == ("completed", 40)
        assert await ids_of(server, batch) == sorted(f"id-{n}" for n in range(40))


# -- rude clients


async def test_limits_of_uploads(engine: Engine, tmp_path: Path) -> None:
    async with serving(
        engine, data_dir=str(tmp_path), max_body_size=1000, max_body_memory=1000, max_file_size=5000, data_quota=6000
    ) as server:
        assert (await upload(server, b"x" * 5000))[0] == 200, "the limit of bodies is not that of files"
        status, body = await upload(server, b"x" * 5001)
        assert (status, body["error"]["code"]) == (413, "request_too_large")
        assert (await upload(server, b"x" * 2000))[0] == 200
        status, body = await upload(server, b"x")
        assert (status, body["error"]["code"]) == (507, "storage_full")
        assert len(list((tmp_path / "files").iterdir())) == 2


async def test_files_are_bounded_in_number(engine: Engine, tmp_path: Path) -> None:
    async with serving(engine, data_dir=str(tmp_path), max_files=2) as server:
        files = [(await upload(server, b""))[1]["id"] for _ in range(2)]
        status, body = await upload(server, b"")
        assert (status, body["error"]["code"]) == (507, "storage_full") and "2 files" in body["error"]["message"]
        async with server.client.delete(f"{server.url}/v1/files/{files[0]}") as response:
            assert response.status == 200
        assert (await upload(server, b""))[0] == 200


async def test_uploads_leave_some_of_the_disk_to_the_batches(engine: Engine, small_disk: Path) -> None:
    async with serving(engine, data_dir=str(small_disk), min_free_disk=2**19) as server:
        assert (await upload(server, b"x" * 1000))[0] == 200
        status, body = await upload(server, bytes(700_000))  # it would fit
        assert (status, body["error"]["code"]) == (507, "disk_full"), body
        batch = await ended(server, await submit(server, jsonl(line(1))))
        assert batch["status"] == "completed"


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "x" * 5000, "‮evil.jsonl", ""])
async def test_a_name_is_only_data(engine: Engine, tmp_path: Path, name: str) -> None:
    async with serving(engine, data_dir=str(tmp_path / "data")) as server:
        status, file = await upload(server, b"{}\n", name)
        assert status == 200, file
        assert [path.name for path in (tmp_path / "data" / "files").iterdir()] == [file["id"]]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
        async with server.client.get(f"{server.url}/v1/files/{file['id']}/content") as response:
            assert await response.read() == b"{}\n"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Content-Type"] == "application/octet-stream"
            assert response.headers["Content-Disposition"] == f'attachment; filename="{file["id"]}.jsonl"'
        async with server.client.head(f"{server.url}/v1/files/{file['id']}/content") as response:
            assert (response.status, response.content_length) == (200, 3)


@pytest.mark.parametrize("file_id", ["..%2Fjobs.db", "%2e%2e%2fjobs.db", "file-" + "0" * 32, "file-../lock", "a" * 3000, "%00"])
async def test_ids_lead_nowhere_else(engine: Engine, tmp_path: Path, file_id: str) -> None:
    from yarl import URL

    async with serving(engine, data_dir=str(tmp_path)) as server:
        for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content", f"/v1/batches/{file_id}"):
            async with server.client.get(URL(server.url + path, encoded=True)) as response:
                assert response.status == 404
                assert (await response.json())["error"]["code"] == "not_found"


FORM = "multipart/form-data; boundary=x"
FIELD = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n--x--\r\n'


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"", FORM, 400),
        (b"--x\r\n", FORM, 400),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\nhi\r\n--x--\r\n", FORM, 400),
        (FIELD % (b"purpose", b"batch"), FORM, 400),
        (FIELD % (b'file"; filename="a', b"{}"), FORM, 400),  # no purpose
        (FIELD % (b"other", b"z" * 9000), FORM, 400),
        (b"hello", "multipart/form-data", 400),
        (b"{}", "application/json", 415),
        (b"hello", "text/plain", 415),
    ],
)
async def test_forms_that_are_none(engine: Engine, tmp_path: Path, body: bytes, content_type: str, status: int) -> None:
    async with serving(engine, data_dir=str(tmp_path)) as server:
        headers = {"Content-Type": content_type}
        async with server.client.post(server.url + "/v1/files", data=body, headers=headers) as response:
            assert response.status == status, await response.text()
            assert (await response.json())["error"]["type"] == "invalid_request_error"
        await eventually_empty(tmp_path / "files")


async def test_a_client_that_leaves_in_its_upload_leaves_nothing(engine: Engine, tmp_path: Path) -> None:
    async with serving(engine, data_dir=str(tmp_path)) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"y" * 800_000
        writer.write(
            b"POST /v1/files HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            b"Content-Length: 9999999\r\n\r\n" + head
        )
        await writer.drain()
        async with asyncio.timeout(PATIENCE):
            while not list((tmp_path / "files").iterdir()):
                await asyncio.sleep(0.01)
        writer.transport.abort()
        await eventually_empty(tmp_path / "files")


async def test_a_client_that_leaves_before_its_upload_has_a_file_leaves_nothing(engine: Engine, tmp_path: Path) -> None:
    """It leaves while the disk is busy with something else."""
    async with serving(engine, data_dir=str(tmp_path)) as server:
        jobs = server.service.batches
        assert jobs is not None
        assert (await upload(server, b"{}"))[0] == 200  # the database has all of its files open from now on
        asked, go_on, free = threading.Event(), threading.Event(), jobs.store.free_bytes

        def busy() -> int:
            asked.set()
            assert go_on.wait(PATIENCE)
            return free()

        jobs.store.free_bytes = busy  # type: ignore[method-assign]
        before = len(os.listdir("/proc/self/fd"))
        request = asyncio.create_task(upload(server, b"x" * 1000))
        assert await asyncio.to_thread(asked.wait, PATIENCE)
        request.cancel()
        left = server.service.metrics.http.labels("/v1/files", "POST", "499")
        async with asyncio.timeout(PATIENCE):
            while not left._value.get():
                await asyncio.sleep(0.01)
            go_on.set()
            while len(os.listdir("/proc/self/fd")) > before or len(os.listdir(tmp_path / "files")) > 1:
                await asyncio.sleep(0.01)
            assert await jobs.io(jobs.store.totals) == (1, 2)


async def eventually_empty(folder: Path) -> None:
    async with asyncio.timeout(PATIENCE):
        while list(folder.iterdir()):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "tomorrow"}, "completion_window"),
        ({"completion_window": "99d"}, "completion_window"),
        ({"completion_window": 24}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"priority": "high"}}, "metadata"),
        ({"priority": 2**40}, "priority"),
        ({"on_bad_line": "maybe"}, "on_bad_line"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "expires_after"),
        ({"input_file_id": None}, "input_file_id"),
    ],
)
async def test_batches_that_are_refused(engine: Engine, tmp_path: Path, change: dict[str, Any], param: str) -> None:
    async with serving(engine, data_dir=str(tmp_path)) as server:
        _, file = await upload(server, jsonl(line(1)))
        body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"} | change
        status, answer = await server.post("/v1/batches", body)
        assert (status, answer["error"]["param"]) == (400, param), answer
        status, listed = await server.get("/v1/batches?limit=0")
        assert (status, listed["error"]["param"]) == (400, "limit")


async def test_a_file_in_use_stays(engine: Engine, tmp_path: Path) -> None:
    async with serving(None, data_dir=str(tmp_path)) as server:  # nothing runs: the model is being loaded
        batch_id = await submit(server, jsonl(line(1)))
        _, batch = await server.get(f"/v1/batches/{batch_id}")
        assert batch["status"] == "validating"
        async with server.client.delete(f"{server.url}/v1/files/{batch['input_file_id']}") as response:
            assert response.status == 409 and (await response.json())["error"]["code"] == "file_in_use"
        status, cancelled = await server.post(f"/v1/batches/{batch_id}/cancel", {})
        assert status == 200, cancelled
        assert (await ended(server, batch_id))["status"] == "cancelled"


async def test_priority_decides_who_goes_first(engine: Engine, tmp_path: Path) -> None:
    """All three are there before anything runs; one line at a time."""
    async with serving(None, data_dir=str(tmp_path), max_inflight=1) as server:
        data = jsonl(*(line(n, max_tokens=2) for n in range(40)))
        later = await submit(server, data, priority=5)
        soon = await submit(server, data, metadata={"priority": "1"})
        server.service.start(engine)
        await until(server, soon, lambda batch: batch["status"] == "completed")
        soon_batch, later_batch = await ended(server, soon), await ended(server, later)
    assert soon_batch["completed_at"] <= later_batch["completed_at"]


async def test_metrics_of_jobs(engine: Engine, tmp_path: Path) -> None:
    async with serving(None, data_dir=str(tmp_path)) as server:
        batch_id = await submit(server, jsonl(line(1), line(2, temperature=9)))

        def samples() -> dict[tuple[str, ...], float]:
            families = text_string_to_metric_families(server.service.metrics.render().decode())
            return {(s.name, *s.labels.values()): s.value for f in families for s in f.samples if "batch" in s.name}

        async with asyncio.timeout(PATIENCE):
            while not samples()[("sluice_batch_jobs", "validating")]:
                await asyncio.sleep(0.01)
        assert ("sluice_batch_progress_ratio", batch_id) in samples()
        server.service.start(engine)
        await ended(server, batch_id)
        after = samples()
        assert after[("sluice_batch_requests_total", "completed")] == 1
        assert after[("sluice_batch_requests_total", "failed")] == 1
        assert after[("sluice_batch_output_fsync_seconds_count",)] >= 1


async def test_a_job_that_will_miss_its_window_says_so_early(engine: Engine, tmp_path: Path) -> None:
    data = jsonl(*(line(n, max_tokens=50, ignore_eos=True) for n in range(20_000)))
    async with serving(engine, data_dir=str(tmp_path), max_inflight=8) as server:
        batch_id = await submit(server, data, completion_window="100s")
        batch = await until(server, batch_id, lambda batch: batch["sluice"]["on_time"] is not None)
        assert batch["sluice"]["on_time"] is False and batch["sluice"]["slack_s"] < 0
        assert batch["status"] == "in_progress"
        await server.post(f"/v1/batches/{batch_id}/pause", {})
        view = server.service.batches.summary()[0]  # type: ignore[union-attr]
        assert view.total == 20_000 and view.expires_at == batch["expires_at"]


async def test_a_batch_is_one_request_of_its_client(engine: Engine, tmp_path: Path) -> None:
    """Its lines count against none of the client's limits, and one too many is told when to come back."""
    client = dataclasses.replace(client_of("night"), requests_per_minute=2, tokens_per_minute=1, max_inflight=1)
    async with serving(engine, data_dir=str(tmp_path / "data"), clients=(client,)) as server:
        server.client.headers["Authorization"] = "Bearer night"
        for _ in range(2):
            batch = await ended(server, await submit(server, jsonl(*map(line, range(20)))))
            assert (batch["status"], batch["request_counts"]["completed"]) == ("completed", 20)
        _, file = await upload(server, jsonl(line(1)))
        body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        async with server.client.post(server.url + "/v1/batches", json=body) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (429, "rate_limit_exceeded")
            assert 0 < int(response.headers["Retry-After"]) <= 30


async def test_a_batch_changes_its_place(engine: Engine, tmp_path: Path) -> None:
    """While it is unfinished, no further forward than the server allows; a restart knows of it."""
    async with serving(engine, data_dir=str(tmp_path / "data"), max_inflight=1) as server:
        batch_id = await submit(server, jsonl(*map(line, range(1000))))
        path = f"/v1/batches/{batch_id}"
        assert (await server.post(path + "/pause", {}))[0] == 200
        for wanted, given in ((7, 7), (-9, 0), (3, 3)):
            status, batch = await server.post(path + "/priority", {"priority": wanted})
            assert (status, batch["sluice"]["priority"]) == (200, given)
        for wrong in ({}, {"priority": "first"}, {"priority": 2**40}):
            assert (await server.post(path + "/priority", wrong))[0] == 400
        assert server.service.batches is not None
        kept = server.service.batches.store.batch(batch_id)
        assert kept is not None and kept.priority == 3
        assert (await server.post(path + "/cancel", {}))[0] == 200
        assert (await ended(server, batch_id))["status"] == "cancelled"
        status, reply = await server.post(path + "/priority", {"priority": 1})
        assert (status, reply["error"]["code"]) == (409, "batch_not_running")
