"""A real headless Chromium, driven over its DevTools protocol; no driver and no package beside the browser itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

PATIENCE = 60.0  # seconds; only a failing test waits that long
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars"),
    "--remote-debugging-port=0",
)


def find_browser() -> str | None:
    """The command of an installed Chromium or Chrome, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """One tab. `problems` is what its console, its scripts and its policy complained about."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.problems: list[str] = []
        self._socket = socket
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self._reader = asyncio.create_task(self._read())

    async def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        async with asyncio.timeout(PATIENCE):
            return await answer

    async def open(self, url: str, width: int = 1280, height: int = 900, *, dark: bool = False) -> None:
        await self.call("Runtime.enable")
        await self.call("Log.enable")
        await self.call("Page.enable")
        await self.resize(width, height, dark=dark)
        await self.call("Page.navigate", url=url)
        await self.until(f"location.href === '{url}' && document.readyState === 'complete'")

    async def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression comes to. An exception in it fails the test."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait until an expression is true, and return its value."""
        async with asyncio.timeout(PATIENCE):
            while not (value := await self.value(expression)):
                await asyncio.sleep(0.05)
        return value

    async def close(self) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        async for message in self._socket:
            body = message.json()
            if "id" in body:
                self._answers.pop(body["id"]).set_result(body.get("result", {"exceptionDetails": body.get("error")}))
            elif body["method"] == "Runtime.exceptionThrown":
                self.problems.append(body["params"]["exceptionDetails"]["text"])
            elif body["method"] == "Runtime.consoleAPICalled" and body["params"]["type"] in ("error", "warning"):
                self.problems.append(str(body["params"]["args"]))
            elif body["method"] == "Log.entryAdded" and body["params"]["entry"]["level"] in ("error", "warning"):
                self.problems.append(body["params"]["entry"]["text"])


@contextlib.asynccontextmanager
async def browsing(folder: Path) -> AsyncIterator[Page]:
    """A browser with one tab, its profile in `folder`."""
    command = find_browser()
    assert command is not None, "ask find_browser first"
    profile = folder / "profile"
    with (folder / "browser.log").open("wb") as log:
        child = subprocess.Popen(
            [command, *_FLAGS, f"--user-data-dir={profile}", "about:blank"], stderr=log, stdout=log, start_new_session=True
        )
    try:
        port = await _port(child, profile / "DevToolsActivePort")
        async with aiohttp.ClientSession() as client:
            async with client.get(f"http://127.0.0.1:{port}/json/list") as response:
                target = next(tab for tab in await response.json() if tab["type"] == "page")
            async with client.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                try:
                    yield page
                finally:
                    await page.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # the browser is a family of processes
        child.wait()


async def _port(child: subprocess.Popen[bytes], file: Path) -> int:
    async with asyncio.timeout(PATIENCE):
        while not (file.exists() and file.read_text().strip()):
            assert child.poll() is None, "the browser ended before it listened"
            await asyncio.sleep(0.05)
    return int(file.read_text().split("\n")[0])
