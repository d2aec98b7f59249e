"""Serve a model and run a batch file beside it: `python examples/serve_with_job.py JOB.jsonl [-- server flags]`.

The server is an ordinary `python -m engine.server`. The job is an ordinary client: once the model is loaded it sends the
lines of JOB.jsonl (OpenAI batch format) with `"service_tier": "flex"`, a few at a time, so each is offline work that gives way
to whoever else asks. Answers go to data/JOB.results.jsonl. When the job is done the server goes on; Ctrl-C ends both.
Standard library only. For jobs that must survive crashes use `python -m engine.batch`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import pairwise
from pathlib import Path
from typing import Any

IN_FLIGHT = 8
ATTEMPTS = 10  # at one line, while the server says that it is full
REPORT_SECONDS = 5.0


def main() -> int:
    job, *flags = sys.argv[1:] or sys.exit(f"usage: {sys.argv[0]} JOB.jsonl [-- server flags]")
    flags = flags[1:] if flags[:1] == ["--"] else flags
    lines = [json.loads(line) for line in Path(job).read_text(encoding="utf-8").splitlines() if line.strip()]
    url = f"http://127.0.0.1:{_port(flags)}"
    server = subprocess.Popen([sys.executable, "-m", "engine.server", *flags])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the server too: it drains, and this process waits for it
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    if _wait_until_ready(url, server):
        _say(f"{len(lines)} lines as offline work; try it meanwhile:")
        _say(f"  curl {url}/v1/completions -H 'Content-Type: application/json' \\")
        _say("""    -d '{"prompt": "Once upon a time", "max_tokens": 32}'""")
        _run(lines, url, server, Path("data") / (Path(job).stem + ".results.jsonl"))
    return server.wait()


def _port(flags: list[str]) -> str:
    for name, value in pairwise(flags):
        if name == "--port":
            return value
    return next((flag.partition("=")[2] for flag in flags if flag.startswith("--port=")), "8000")


def _wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> bool:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return True
        except OSError:  # not listening yet, or loading
            time.sleep(0.5)
    return False


def _run(lines: list[dict[str, Any]], url: str, server: subprocess.Popen[bytes], out: Path) -> None:
    out.parent.mkdir(exist_ok=True)
    began = told = time.monotonic()
    tokens = 0
    with ThreadPoolExecutor(IN_FLIGHT) as pool, out.open("w", encoding="utf-8") as file:
        answers = [pool.submit(_answer, line, url, server) for line in lines]
        for done, answer in enumerate(as_completed(answers), start=1):
            record = answer.result()
            file.write(json.dumps(record) + "\n")
            tokens += (record["response"]["body"].get("usage") or {}).get("completion_tokens", 0)
            now = time.monotonic()
            if now - told >= REPORT_SECONDS or done == len(lines):
                told = now
                _say(f"{done}/{len(lines)} lines, {tokens / (now - began):.0f} tok/s")
    _say(f"answers are in {out}" if server.poll() is None else "the server has stopped; what was answered is in " + str(out))


def _answer(line: dict[str, Any], url: str, server: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The batch record of one line."""
    status, body = 0, {"error": {"message": "the server has stopped", "type": "server_error", "param": None, "code": None}}
    data = json.dumps(line["body"] | {"service_tier": "flex"}).encode()
    for _ in range(ATTEMPTS):
        if server.poll() is not None:
            break
        request = urllib.request.Request(url + line["url"], data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as response:
                status, body = response.status, json.load(response)
            break
        except urllib.error.HTTPError as error:
            status, body = error.code, json.load(error)
            if status not in (429, 503):
                break
            time.sleep(float(error.headers.get("Retry-After", 1)))
        except OSError as error:
            body["error"]["message"] = str(error)
            time.sleep(1)
    return {"custom_id": line["custom_id"], "response": {"status_code": status, "body": body}}


def _say(text: str) -> None:
    print(f"job: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
