"""Every kind of malformed line in one uploaded file, with the good ones between them; and disks that only read."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData
from serving import Server, serving

from engine import Engine
from engine.errors import InvalidConfig
from server.config import ServerConfig
from server.jobs import open_jobs

PATIENCE = 60.0  # seconds; only a failing test waits that long
MAX_LINE = 20_000


def line(number: int, **changes: Any) -> bytes:
    body = changes.pop("body", {"prompt": "x", "max_tokens": 2})
    item = {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/completions", "body": body} | changes
    return json.dumps(item).encode()


MALFORMED: list[tuple[str, bytes]] = [
    ("invalid_json_line", b"hello"),
    ("invalid_json_line", line(0)[:-5]),
    ("invalid_json_line", line(0) + b" and more"),
    ("invalid_json_line", line(0).replace(b'"x"', b'"\0"')),
    ("invalid_json_line", line(0).replace(b'"x"', b'"\xff"')),
    ("invalid_json_line", b"\xef\xbb\xbf" + line(0)),
    ("invalid_json_line", line(0).replace(b'"max_tokens": 2', b'"temperature": NaN')),
    ("invalid_json_line", line(0).replace(b'"max_tokens": 2', b'"max_tokens": 2, "max_tokens": 3')),
    ("invalid_json_line", line(0).replace(b"2", b"[" * 5_000 + b"]" * 5_000)),
    ("invalid_json_line", line(0).replace(b"2", b"9" * 5_000)),
    ("invalid_request", b"[1, 2]"),
    ("missing_custom_id", b'{"method": "POST", "url": "/v1/completions", "body": {}}'),
    ("invalid_method", line(0, method="GET")),
    ("invalid_url", line(0, url="/v1/embeddings")),
    ("url_mismatch", line(0, url="/v1/chat/completions", body={"messages": []})),
    ("duplicate_custom_id", line(1)),
    ("line_too_long", line(0, body={"prompt": "x" * MAX_LINE})),
    ("line_too_long", b"z" * (10 * MAX_LINE)),
]
REFUSED = [{"n": 10**9}, {"max_tokens": -1}, {"prompt": [1] * 5_000}, {"model": "gpt-9"}, {"prompt": ""}]  # by the API itself


async def run(server: Server, data: bytes, **more: Any) -> Any:
    form = FormData({"purpose": "batch"})
    form.add_field("file", data, filename="in.jsonl")
    async with server.client.post(server.url + "/v1/files", data=form) as response:
        file = await response.json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"} | more
    _, batch = await server.post("/v1/batches", body)
    async with asyncio.timeout(PATIENCE):
        while batch["status"] not in ("completed", "failed"):
            await asyncio.sleep(0.02)
            _, batch = await server.get(f"/v1/batches/{batch['id']}")
    return batch


async def records(server: Server, file_id: str) -> list[Any]:
    async with server.client.get(f"{server.url}/v1/files/{file_id}/content") as response:
        return [json.loads(text) for text in (await response.text()).splitlines()]


async def test_each_malformed_line_is_told_by_its_number_and_the_others_run(engine: Engine, tmp_path: Path) -> None:
    """Lines end in CR LF, some are blank, and the last one does not end."""
    rows: list[tuple[str | None, bytes]] = []
    for number, (code, raw) in enumerate(MALFORMED, 1):
        rows += [(None, line(number)), (code, raw), (None, b"")]
    rows += [("refused", line(100 + n, body={"prompt": "x"} | body)) for n, body in enumerate(REFUSED)]
    data = b"\r\n".join(raw for _, raw in rows)
    async with serving(engine, data_dir=str(tmp_path), max_line_bytes=MAX_LINE) as server:
        batch = await run(server, data, on_bad_line="skip")
        good, bad = await records(server, batch["output_file_id"]), await records(server, batch["error_file_id"])
        failed = await run(server, data)

    assert batch["status"] == "completed"
    assert {item["custom_id"] for item in good} == {f"id-{number}" for number in range(1, len(MALFORMED) + 1)}
    told = sorted((item["error"]["line"], item["error"]["code"]) for item in bad if item["error"] is not None)
    assert told == [(number, code) for number, (code, _) in enumerate(rows, 1) if code not in (None, "refused")]
    refused = {item["custom_id"]: item["response"]["status_code"] for item in bad if item["response"] is not None}
    assert refused == {f"id-{100 + n}": 404 if "model" in body else 400 for n, body in enumerate(REFUSED)}
    assert batch["request_counts"] == {"total": len(good) + len(bad), "completed": len(good), "failed": len(bad)}

    assert failed["status"] == "failed" and failed["output_file_id"] is None, "unless told otherwise: all lines or none"
    named = [(error["line"], error["code"]) for error in failed["errors"]["data"]]
    unknown = next(number for number, (code, raw) in enumerate(rows, 1) if b"gpt-9" in raw)
    assert named == sorted([*told, (unknown, "model_not_found")])


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that cannot be written; skipped where this user may not mount one."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_can_only_be_read_is_refused_in_words(read_only: Path) -> None:
    with pytest.raises(InvalidConfig, match="Read-only file system; name a folder that this user may write"):
        open_jobs(ServerConfig(data_dir=str(read_only)))


async def test_by_default_such_a_folder_costs_only_the_batches(
    engine: Engine, read_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_STATE", str(read_only))
    async with serving(engine, data_dir=None) as server:
        status, body = await server.get("/v1/files")
        assert (status, body["error"]["code"]) == (503, "batches_unavailable")
        assert (await server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}))[0] == 200
