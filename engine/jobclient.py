"""A batch job on a running server: `python -m engine.batch --url`. Uploads, creates, polls, downloads; plain OpenAI API.

The server keeps the job. This process only watches it: interrupted or cut off, it says how to get back, and the job runs on.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from engine.joblines import JobError
from engine.joblog import errors_path

if TYPE_CHECKING:
    import aiohttp
    from tqdm import tqdm

POLL_SECONDS = 1.0
REPORT_SECONDS = 5.0
PATIENCE = 300.0  # seconds that a server may be away, say while it starts again
_CHUNK = 1 << 18
_ENDED = ("completed", "failed", "expired", "cancelled")


class ServerRefused(JobError):
    """The server answered, and the answer is no."""


class ServerGone(JobError):
    """The server did not answer for too long. The job goes on where it is."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A server, and what one job on it was asked to be."""

    url: str
    api_key: str
    window: str
    priority: int | None
    skip_bad_lines: bool
    say: Callable[[str], None]
    patience: float = PATIENCE

    async def run(self, source: Path | None, out: Path, batch_id: str | None) -> tuple[dict[str, Any] | None, bool]:
        """Submit `source`, or go back to `batch_id`, and see it through. (the batch, or None if it was not created;
        whether its end was seen). Raises JobError.
        """
        watch = _Watch(self)
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        try:
            async with self._session() as session:
                if batch_id is None:
                    assert source is not None
                    watch.batch = await self._submit(session, source)
                    self.say(f"created {watch.batch['id']}")
                else:
                    watch.batch = await self._json(session, "GET", f"/v1/batches/{batch_id}")
                try:
                    await watch.until_ended(lambda path: self._json(session, "GET", path))
                finally:
                    watch.close()
                for key, path in (("output_file_id", out), ("error_file_id", errors_path(out))):
                    if watch.batch.get(key):
                        await self._download(session, watch.batch[key], path)
        except asyncio.CancelledError:
            return watch.batch, False
        except ServerGone as error:
            self.say(str(error))
            return watch.batch, False
        return watch.batch, True

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        import aiohttp

        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            yield session

    async def _submit(self, session: aiohttp.ClientSession, source: Path) -> dict[str, Any]:
        import aiohttp

        url = _first_url(source)

        async def upload() -> dict[str, Any]:
            with source.open("rb") as content:
                form = aiohttp.FormData({"purpose": "batch"})
                form.add_field("file", content, filename=source.name, content_type="application/jsonl")
                async with session.post(self.url + "/v1/files", data=form) as response:
                    return await self._answer(response)

        try:
            file = await self._patiently(upload, _Away)
        except aiohttp.ClientError as error:
            raise ServerRefused(f"cannot upload to {self.url}: {error}") from None
        body: dict[str, Any] = {"input_file_id": file["id"], "endpoint": url, "completion_window": self.window}
        if self.priority is not None:
            body["priority"] = self.priority
        if self.skip_bad_lines:
            body["on_bad_line"] = "skip"

        async def create() -> dict[str, Any]:
            async with session.post(self.url + "/v1/batches", json=body) as response:
                return await self._answer(response)

        try:
            batch: dict[str, Any] = await self._patiently(create, _Away)
        except BaseException as error:
            with suppress(aiohttp.ClientError, OSError):  # nobody else knows of the file; a batch that uses it keeps it
                async with session.delete(f"{self.url}/v1/files/{file['id']}"):
                    pass
            if isinstance(error, aiohttp.ClientError):
                raise ServerRefused(f"the server went away before the batch was created: {error}") from None
            raise
        return batch

    async def _json(self, session: aiohttp.ClientSession, method: str, path: str) -> dict[str, Any]:
        import aiohttp

        async def ask() -> dict[str, Any]:
            async with session.request(method, self.url + path) as response:
                return await self._answer(response)

        answer: dict[str, Any] = await self._patiently(ask, aiohttp.ClientError, TimeoutError, _Away)
        return answer

    async def _download(self, session: aiohttp.ClientSession, file_id: str, path: Path) -> None:
        """All of a file, or none of it."""
        import aiohttp

        part = path.with_name(path.name + ".part")

        async def fetch() -> None:
            async with session.get(f"{self.url}/v1/files/{file_id}/content") as response:
                if response.status != 200:
                    await self._answer(response)
                with part.open("wb") as file:
                    async for chunk in response.content.iter_chunked(_CHUNK):
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())

        try:
            await self._patiently(fetch, aiohttp.ClientError, TimeoutError, _Away)
            part.replace(path)
        except OSError as error:
            raise JobError(f"cannot write {path}: {error.strerror}; the results stay on the server") from None
        self.say(f"wrote {path}")

    async def _patiently(self, attempt: Callable[[], Awaitable[Any]], *passing: type[Exception]) -> Any:
        """Try again, for a while, what ended in one of the errors that may pass by themselves."""
        waited, pause = 0.0, 0.5
        while True:
            try:
                return await attempt()
            except passing as error:
                if waited >= self.patience:
                    what = "still says" if isinstance(error, _Away) else "does not answer"
                    raise ServerGone(f"{self.url} {what} after {waited:.0f} s: {error}") from None
                if isinstance(error, _Away) and not waited:
                    self.say(f"waiting: {error}")
                await asyncio.sleep(pause)
                waited, pause = waited + pause, min(2 * pause, 10.0)

    async def _answer(self, response: aiohttp.ClientResponse) -> dict[str, Any]:
        raw = await response.read()
        try:
            body = json.loads(raw)
        except ValueError:
            body = {}
        if response.status == 200 and isinstance(body, dict):
            return body
        error = body.get("error") if isinstance(body, dict) else None
        message = str(error.get("message")) if isinstance(error, dict) else raw[:200].decode(errors="replace")
        if response.status in (429, 503) and "Retry-After" in response.headers:
            raise _Away(message)
        raise ServerRefused(f"{self.url} answered {response.status}: {message}")


class _Away(Exception):
    """The server says to come back later."""


class _Watch:
    """A batch as the person at the terminal sees it: a bar on a terminal, else a line every few seconds."""

    def __init__(self, remote: Remote) -> None:
        self.batch: dict[str, Any] | None = None
        self._say = remote.say
        self._bar: tqdm[NoReturn] | None = None
        self._told = 0.0

    async def until_ended(self, ask: Callable[[str], Awaitable[dict[str, Any]]]) -> None:
        assert self.batch is not None
        while self.batch["status"] not in _ENDED:
            self._show(self.batch)
            await asyncio.sleep(POLL_SECONDS)
            self.batch = await ask(f"/v1/batches/{self.batch['id']}")
        self._show(self.batch)

    def _show(self, batch: dict[str, Any]) -> None:
        counts, ours = batch["request_counts"], batch.get("sluice") or {}
        done = counts["completed"] + counts["failed"]
        text = f"ok={counts['completed']} err={counts['failed']} {ours.get('tokens_per_s') or 0:.0f} tok/s"
        state = f"paused: {ours.get('paused_reason')}" if ours.get("paused") else batch["status"]
        if ours.get("on_time") is False:
            state += ", will miss its window"
        if sys.stderr.isatty():
            if self._bar is None and counts["total"]:
                from tqdm import tqdm

                self._bar = tqdm(desc="batch", total=counts["total"], unit="line", dynamic_ncols=True)
            if self._bar is not None:
                self._bar.set_postfix_str(f"{text} {state}", refresh=False)
                self._bar.update(done - self._bar.n)
            return
        now = asyncio.get_running_loop().time()
        if now - self._told >= REPORT_SECONDS:
            self._told = now
            eta = ours.get("eta_s")
            self._say(f"{done}/{counts['total']} lines, {text}, {state}, ETA {'unknown' if eta is None else f'{eta:.0f} s'}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _first_url(source: Path) -> str:
    """The endpoint that the first line names; the server checks that all others name it too. Raises JobError."""
    try:
        with source.open("rb") as file:
            while raw := file.readline(1 << 22):
                if raw.strip():
                    break
    except OSError as error:
        raise JobError(f"cannot read the input {source}: {error.strerror}") from None
    try:
        item = json.loads(raw)
    except ValueError:
        item = None
    if not isinstance(item, dict) or not isinstance(item.get("url"), str):
        raise JobError(f"{source}: the first line must be a request with a url, such as /v1/chat/completions")
    return str(item["url"])
