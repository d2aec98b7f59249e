"""A server to be loaded: the real HTTP side on an engine whose model is the fake runner, or a bare aiohttp echo beside it.

Run as a process of its own by `bench.server` and `bench.load`, which talk to it by lines of JSON on stdin and stdout: it says
{"port": ...} once it listens, and answers each line it gets with how late its event loop was since the last one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from engine import Engine, EngineConfig
from engine.build import BuiltModel
from engine.demo import resolve_model
from engine.fake import FakeRunner
from engine.sched.plan import Checkpoint, StepPlan, StepResult, StopCondition
from engine.spec import load_spec
from server.admission import Connections
from server.app import app_of
from server.config import ServerConfig
from server.jobs import Jobs, open_jobs
from server.listen import bind
from server.run import settle_garbage
from server.service import Service

_TICK = 0.005  # seconds between two looks at how late the loop is


class PacedRunner(FakeRunner):
    """A fake runner whose steps take real time: as on a device, the interpreter is free meanwhile."""

    def __init__(self, seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self._seconds = seconds

    def launch(self, plan: StepPlan, stop: StopCondition | None = None) -> StepResult:
        self._wait()
        return super().launch(plan, stop)

    def resume(
        self, checkpoint: Checkpoint, dropped: frozenset[str] = frozenset(), stop: StopCondition | None = None
    ) -> StepResult:
        self._wait()
        return super().resume(checkpoint, dropped, stop)

    def _wait(self) -> None:
        if self._seconds:
            time.sleep(self._seconds)


def fake_engine(folder: Path, *, step_seconds: float = 0.0, pages: int = 65_536, **options: Any) -> Engine:
    """A real engine, scheduler and tokenizer for the checkpoint in `folder`, without its model."""
    spec = load_spec(folder)
    runner = PacedRunner(step_seconds, vocab_size=spec.vocab_size, page_size=16)
    built = BuiltModel(folder, spec, runner, num_slabs=pages // 16, pages_per_slab=16)
    config = EngineConfig(model=str(folder), served_model_name=("fake",), enable_prefix_caching=False, **options)
    return Engine(config=config, built=built)


class Lag:
    """How late the event loop runs a timer."""

    def __init__(self) -> None:
        self.samples: list[float] = []

    async def watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _TICK
            await asyncio.sleep(_TICK)
            self.samples.append(max(0.0, loop.time() - due))

    def take(self) -> dict[str, float]:
        late, self.samples = sorted(self.samples), []
        if not late:
            return {}
        rank = lambda share: late[min(len(late) - 1, int(share * len(late)))]  # noqa: E731
        return {"p50": rank(0.5), "p99": rank(0.99), "max": late[-1]}


def echo_app(chunks: Sequence[bytes], step_seconds: float) -> web.Application:
    """Sends `chunks` to everybody who posts something, one a step, as a stream of the server's does."""

    async def stream(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            await asyncio.sleep(step_seconds)
        await response.write_eof()
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", stream)
    return app


async def _serve(args: argparse.Namespace) -> None:
    reader = asyncio.StreamReader(limit=2**26)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    engine: Engine | None = None
    jobs: Jobs | None = None
    if args.arm == "echo":
        chunks = [bytes.fromhex(chunk) for chunk in json.loads(await reader.readline())]
        runner = web.AppRunner(echo_app(chunks, args.step_ms / 1e3), access_log=None)
        await runner.setup()
        assert runner.server is not None
        factory: Any = runner.server
    else:
        folder = Path(args.model) if args.model else resolve_model("demo", progress=False)
        options = {"max_num_seqs": args.max_num_seqs, "max_num_batched_tokens": max(2048, args.max_num_seqs)}
        options["max_num_queued_reqs"] = args.max_num_queued_reqs
        engine = fake_engine(folder, step_seconds=args.step_ms / 1e3, pages=args.pages, **options)
        config = ServerConfig(max_connections=4096, sse_write_timeout=args.sse_write_timeout, data_dir=args.data_dir)
        jobs = open_jobs(config)
        service = Service(config, engine, jobs)
        runner = web.AppRunner(app_of(service), handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        assert runner.server is not None
        factory = service.connections = Connections(runner.server, config)
    listener = await loop.create_server(factory, sock=bind(ServerConfig(port=0)), backlog=4096)
    lag = Lag()
    watch = asyncio.create_task(lag.watch())
    settle_garbage()
    print(json.dumps({"port": listener.sockets[0].getsockname()[1]}), flush=True)
    while await reader.readline():
        print(json.dumps(lag.take()), flush=True)
    watch.cancel()
    listener.close()
    await runner.cleanup()
    if jobs is not None:
        jobs.close()
    if engine is not None:
        engine.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fake_server", description=__doc__.split("\n")[0])
    parser.add_argument("arm", choices=("sluice", "echo"))
    parser.add_argument("--model", help="folder whose tokenizer and sizes to use (default: the demo model)")
    parser.add_argument("--step-ms", type=float, default=0.0, help="time of a step; 0: as fast as it goes")
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--max-num-queued-reqs", type=int, default=1024)
    parser.add_argument("--pages", type=int, default=65_536, help="pages of KV memory")
    parser.add_argument("--sse-write-timeout", type=float, default=30.0)
    parser.add_argument("--data-dir", default="none", help="folder for files and batches")
    asyncio.run(_serve(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
