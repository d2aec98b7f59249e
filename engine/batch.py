"""python -m engine.batch -i requests.jsonl -o results.jsonl: an OpenAI batch file as offline work.

Reads ahead only as far as it may run, runs each line as a request of the offline tenant, and writes each answer as it comes
(not in input order). Killed at any moment and started again with the same arguments, it goes on with the lines that have no
record yet. `engine.joblines` reads, `engine.joblog` keeps; this file is what happens in between, and the command line.

Exit status: 0 all lines answered; 1 finished, but some lines failed; 2 the job cannot start as asked; 3 the engine or the
disk failed (resumable); 130 interrupted (resumable).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import enum
import hashlib
import importlib.metadata
import itertools
import json
import logging
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from engine.clock import Clock, MonotonicClock
from engine.config import EngineConfig, add_engine_args, config_from_args, parse_bytes
from engine.errors import EngineDead, InvalidCheckpoint, InvalidConfig
from engine.joblines import MAX_LINE_BYTES, BadLine, InputFacts, JobError, JobLine, read_lines, survey
from engine.joblog import JobLog, OutputBlocked, Record, answer_record, errors_path, fault_record, state_path
from engine.types import Tenant

if TYPE_CHECKING:
    from tqdm import tqdm

    from engine.openai import Answer

logger = logging.getLogger(__name__)

OK, LINE_ERRORS, USAGE, ENGINE_FAILED, INTERRUPTED = 0, 1, 2, 3, 130
INFLIGHT_BYTES = 32 << 20  # of input lines, however many may be in flight
ATTEMPTS = 8  # at one line, where its answer says to try again later
LONGEST_RETRY = 30.0  # seconds
REPORT_SECONDS = 5.0
REJECTS_AT_ONCE = 256
_RESULT_FLAGS = ("served_model_name", "offline_served_model_name", "dtype", "load_format", "max_model_len", "seed")
_ONCE_FLAGS = ("--restart", "--overwrite", "--retry-errors")


class Backend(Protocol):
    """What answers the lines."""

    async def answer(self, line: JobLine, request_id: str) -> Answer:
        """Raises EngineDead; every other failure is an answer."""
        ...

    def close(self) -> None: ...


class EngineBackend:
    """An engine in this process, its lines the offline tenant's."""

    def __init__(self, config: EngineConfig) -> None:
        from engine.engine import Engine

        self._engine = Engine(config=config)
        self._seed = config.seed

    async def answer(self, line: JobLine, request_id: str) -> Answer:
        from engine.openai import answer

        body = seeded(line.body, self._seed, line.number)
        return await answer(self._engine, line.url, body, tenant=Tenant.OFFLINE, request_id=request_id)

    def close(self) -> None:
        self._engine.close()


def seeded(body: Mapping[str, Any], seed: int, number: int) -> Mapping[str, Any]:
    """`body` with a seed that depends on its line alone, so that a resumed job samples what an uninterrupted one would.

    Left as it is where it has a seed, or several prompts: one seed would make equal prompts give equal outputs.
    """
    prompt = body.get("prompt")
    if body.get("seed") is not None or (isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)):
        return body
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return {**body, "seed": int.from_bytes(digest, "big") >> 1}


# -- running


class Slots:
    """Bounds what is in flight, in lines and in bytes. One taker."""

    def __init__(self, lines: int, size: int) -> None:
        self._lines, self._size = lines, size
        self._taken = self._bytes = 0
        self.changed = asyncio.Event()

    def fits(self, size: int) -> bool:
        return self._taken == 0 or (self._taken < self._lines and self._bytes + size <= self._size)

    def take(self, size: int) -> None:
        self._taken += 1
        self._bytes += size

    def give(self, size: int) -> None:
        self._taken -= 1
        self._bytes -= size
        self.changed.set()


class Halt(enum.Enum):
    """Why a run ended before its last line."""

    INTERRUPTED = "interrupted"
    ENGINE = "the engine stopped"
    OUTPUT = "the output cannot be written"
    INPUT = "the input changed"


class Run:
    """One pass over the lines that have no record yet: feeds the backend, hands records to one writer."""

    def __init__(self, backend: Backend, log: JobLog, progress: Progress, *, max_inflight: int, grace: float) -> None:
        self._backend = backend
        self._log = log
        self._progress = progress
        self._grace = grace  # seconds that lines in flight get to finish after an interrupt
        self._slots = Slots(max_inflight, INFLIGHT_BYTES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()  # no task is left
        self._halted = asyncio.Event()
        self._hurry = asyncio.Event()  # a second interrupt
        self._outbox: list[Record] = []
        self._filled = asyncio.Event()
        self._closing = False
        self.halt: Halt | None = None
        self.cause = ""

    async def __call__(self, lines: Iterable[JobLine | BadLine]) -> None:
        """Run `lines` to the end or to a halt; what finished is written and synced in either case."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt)
        writer = asyncio.create_task(self._write())
        reporter = asyncio.create_task(self._report())
        try:
            await self._feed(lines)
            await self._settle()
        finally:
            reporter.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(reporter, *self._tasks, return_exceptions=True)
            self._closing = True
            self._filled.set()
            await writer

    def _interrupt(self) -> None:
        if self._halted.is_set():
            self._hurry.set()
        self._stop(Halt.INTERRUPTED)

    def _stop(self, halt: Halt, cause: object = "") -> None:
        if self.halt is None:
            self.halt, self.cause = halt, str(cause)
        self._log.stop.set()
        self._halted.set()
        self._slots.changed.set()

    async def _feed(self, lines: Iterable[JobLine | BadLine]) -> None:
        try:
            for count, line in enumerate(lines):
                if count % 64 == 0:
                    await asyncio.sleep(0)  # a long stretch of lines already done must not hold up the others
                if line.number in self._log.done:
                    continue
                if not await self._slot(line.size):
                    return
                self._start(line)
        except JobError as error:
            self._stop(Halt.INPUT, error)

    async def _slot(self, size: int) -> bool:
        """Wait for room in flight. False once the run has halted."""
        while self.halt is None:
            if self._slots.fits(size):
                self._slots.take(size)
                return True
            self._slots.changed.clear()
            await self._slots.changed.wait()
        return False

    def _start(self, line: JobLine | BadLine) -> None:
        if isinstance(line, BadLine):
            self._put(fault_record(self._log.job, line))
            return
        task = asyncio.create_task(self._one(line))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._idle.set()

    async def _one(self, line: JobLine) -> None:
        try:
            reply = await self._ask(line)
            record = answer_record(self._log.job, line, reply.status, reply.body)
            self._progress.count(reply.body)
        except EngineDead as error:
            self._stop(Halt.ENGINE, error.__cause__ or error)
            return
        except Exception:  # a border: a bug that one line meets must not end a long job
            logger.exception("line %d failed", line.number)
            message = "the line met an internal error; see the log, then try --retry-errors"
            record = fault_record(
                self._log.job, BadLine(line.number, line.custom_id, "internal_error", message, size=line.size)
            )
        self._put(record)

    async def _ask(self, line: JobLine) -> Answer:
        request_id = f"{self._log.job}:{line.number}"
        for attempt in range(ATTEMPTS):
            reply = await self._backend.answer(line, request_id)
            if reply.retry_after is None or self.halt is not None:
                break
            if attempt + 1 < ATTEMPTS:
                await asyncio.sleep(min(reply.retry_after * 2**attempt, LONGEST_RETRY))
        return reply

    async def _settle(self) -> None:
        """Wait for the lines in flight: for all of them, unless halted; after an interrupt for a short grace."""
        while self._tasks and self.halt is None:
            self._idle.clear()
            await _first(self._idle, self._halted)
        if self._tasks and self.halt is Halt.INTERRUPTED:
            self._progress.say(f"interrupted: {len(self._tasks)} lines in flight get {self._grace:g} s to finish")
            self._idle.clear()
            await _first(self._idle, self._hurry, timeout=self._grace)

    # -- records out

    def _put(self, record: Record) -> None:
        self._outbox.append(record)
        self._filled.set()

    async def _write(self) -> None:
        """The one writer. A slot is free again when its record is in the file."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._filled.wait(), self._log.sync_due())
            self._filled.clear()
            last, records = self._closing, self._outbox
            self._outbox = []
            try:
                await asyncio.to_thread(self._log.commit, records, sync=last)
            except Exception as error:  # the feed waits for this writer: it must learn of any end
                self._stop(Halt.OUTPUT, error)
                return
            for record in records:
                self._slots.give(record.size)
            if last:
                return

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(self._progress.interval)
            self._progress.show()


async def _first(*events: asyncio.Event, timeout: float | None = None) -> None:
    """Wait for the first of the events."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


# -- telling


class Progress:
    """What the person at the terminal sees: a bar on a terminal, else a line every few seconds. All of it on stderr."""

    def __init__(self, name: str, total: int, log: JobLog, clock: Clock | None = None) -> None:
        self._name, self._total, self._log = name, total, log
        self._clock = clock or MonotonicClock()
        self._began = self._clock.now()
        self._before = len(log.done)
        self.tokens = 0  # generated in this run
        self._bar: tqdm[NoReturn] | None = None
        self.interval = 0.5 if sys.stderr.isatty() else REPORT_SECONDS

    def start(self) -> None:
        """The engine is loaded: rates count from now."""
        self._began = self._clock.now()
        self._before = len(self._log.done)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=self._name, total=self._total, initial=self._before, unit="line", dynamic_ncols=True)

    def count(self, body: Mapping[str, Any]) -> None:
        usage = body.get("usage")
        if isinstance(usage, Mapping):
            self.tokens += int(usage.get("completion_tokens") or 0)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(f"{self._name}: {text}", file=sys.stderr, flush=True)

    def show(self) -> None:
        done = len(self._log.done)
        counts = f"ok={self._log.out.count} err={self._log.errors.count}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{counts} {self._speed()} tok/s", refresh=False)
            self._bar.update(done - self._bar.n)
            return
        percent = 100 * done // self._total
        self.say(f"{percent}% {done}/{self._total} lines, {counts}, {self._speed()} tok/s, ETA {self._eta(done)}")

    def close(self) -> None:
        if self._bar is not None:
            self.show()
            self._bar.close()
            self._bar = None

    def summary(self) -> str:
        ran = self._clock.now() - self._began
        ok, failed = self._log.out.count, self._log.errors.count
        text = f"{ok + failed} lines, {ok} ok, {failed} failed"
        if failed:
            text += f" (see {self._log.errors.path})"
        return f"{text}; {self.tokens} tokens in {_duration(ran)} ({self._speed()} tok/s)"

    def _speed(self) -> str:
        rate = self.tokens / max(self._clock.now() - self._began, 1e-3)
        return f"{rate / 1000:.1f}k" if rate >= 1000 else f"{rate:.0f}"

    def _eta(self, done: int) -> str:
        if done <= self._before:
            return "unknown"
        return _duration((self._clock.now() - self._began) * (self._total - done) / (done - self._before))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# -- the job


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What one invocation was asked to do."""

    source: Path
    out: Path
    config: EngineConfig
    args: argparse.Namespace
    resume: str  # the command that takes up this job again

    def run(self, open_backend: Callable[[EngineConfig], Backend]) -> int:
        self._check_paths()
        facts = survey(self.source)
        if self.args.on_bad_line == "error":
            self._validate(facts)
        manifest = describe(facts, self.config)
        with JobLog(self.out, say=_say, patience=self.args.disk_patience) as log:
            log.start(
                manifest,
                restart=self.args.restart,
                overwrite=self.args.overwrite,
                retry_errors=self.args.retry_errors,
            )
            progress = Progress("batch", facts.lines, log)
            if log.done:
                progress.say(f"resuming {log.job}: {len(log.done)} of {facts.lines} lines are done")
            code = self._run_lines(log, facts, progress, open_backend)
            progress.say(("done: " if code < USAGE else "stopped: ") + progress.summary())
        if code >= ENGINE_FAILED:
            self.tell_resume()
        return code

    def _run_lines(
        self, log: JobLog, facts: InputFacts, progress: Progress, open_backend: Callable[[EngineConfig], Backend]
    ) -> int:
        lines = read_lines(self.source, facts, self.args.max_line_bytes)
        first = self._first_request(lines, log)
        if first is None:  # all done, or nothing to run: no model is needed
            return LINE_ERRORS if log.errors.count else OK
        backend = open_backend(self.config)
        try:
            run = Run(
                backend,
                log,
                progress,
                max_inflight=self.args.max_inflight or 2 * self.config.max_num_seqs,
                grace=self.args.grace,
            )
            progress.start()
            try:
                asyncio.run(run(itertools.chain([first], lines)))
            finally:
                progress.close()
        finally:
            backend.close()
        if run.halt is None:
            return LINE_ERRORS if log.errors.count else OK
        progress.say(run.halt.value + (f": {run.cause}" if run.cause else ""))
        return {Halt.INTERRUPTED: INTERRUPTED, Halt.INPUT: USAGE}.get(run.halt, ENGINE_FAILED)

    def _first_request(self, lines: Iterator[JobLine | BadLine], log: JobLog) -> JobLine | None:
        """The first line to run; bad lines before it get their records."""
        rejects: list[Record] = []
        first = None
        for line in lines:
            if line.number in log.done:
                continue
            if isinstance(line, JobLine):
                first = line
                break
            rejects.append(fault_record(log.job, line))
            if len(rejects) == REJECTS_AT_ONCE:
                log.commit(rejects)
                rejects = []
        log.commit(rejects, sync=True)
        return first

    def _check_paths(self) -> None:
        if self.out.exists() and not self.out.is_file():
            raise JobError(f"the output {self.out} is not a regular file")
        if not self.out.parent.is_dir():
            raise JobError(f"the folder of the output {self.out} does not exist; create it first")
        outputs = (self.out, errors_path(self.out), state_path(self.out))
        if any(path.exists() and self.source.exists() and path.samefile(self.source) for path in outputs):
            raise JobError(f"the input {self.source} would be overwritten; choose another -o")

    def _validate(self, facts: InputFacts) -> None:
        bad = (line for line in read_lines(self.source, facts, self.args.max_line_bytes) if isinstance(line, BadLine))
        if found := list(itertools.islice(bad, 10)):
            shown = "".join(f"\n  line {line.number}: {line.message}" for line in found)
            raise JobError(f"{self.source} has bad lines, the first being:{shown}\nNothing was run (--on-bad-line error)")

    def tell_resume(self) -> None:
        _say(f"resume with: {self.resume}")


def describe(facts: InputFacts, config: EngineConfig) -> dict[str, Any]:
    """The manifest: all that decides the results. Two runs with equal manifests continue each other."""
    manifest: dict[str, Any] = {
        "input_sha256": facts.sha256,
        "input_bytes": facts.size,
        "model": _fingerprint(config.model),
        "offline_model": config.offline_model and _fingerprint(config.offline_model),
        "defaults": {name: getattr(config, name) for name in _RESULT_FLAGS},
        "version": _version(),
    }
    text = json.dumps(manifest, sort_keys=True)
    job = hashlib.sha256(text.encode()).hexdigest()[:12]
    return {"job": job, "mtime": facts.mtime_ns / 1e9, **json.loads(text)}


def _fingerprint(model: str) -> str:
    """The model's name; for a folder also a hash of its config and of the names and sizes of its weights."""
    folder = Path(model)
    if not (folder / "config.json").is_file():
        return model
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
    return f"{folder.resolve().name}@{digest.hexdigest()[:16]}"


def _version() -> str:
    try:
        return importlib.metadata.version("sluice")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def _say(text: str) -> None:
    print(f"batch: {text}", file=sys.stderr, flush=True)


# -- the command line


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except InvalidConfig as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine.batch",
        allow_abbrev=False,
        description="Run an OpenAI batch file (JSONL) as offline work. Started again with the same arguments after a crash "
        "or an interrupt, it goes on where it was.",
        epilog="Exit status: 0 all lines answered, 1 some lines failed, 2 cannot start as asked, 3 engine or disk failed "
        "(resumable), 130 interrupted (resumable).",
    )
    add = parser.add_argument
    add("-i", "--input-file", required=True, type=Path, help="one request a line, in the format of OpenAI's batch API")
    add("-o", "--output-file", required=True, type=Path, help="answers; failures go beside it, to NAME.errors.jsonl")
    add("--max-inflight", type=_positive, help="most lines in flight (default: twice --max-num-seqs)")
    add("--max-line-bytes", type=_size, default=MAX_LINE_BYTES, help="longest line taken (default: 1MiB)")
    add("--on-bad-line", choices=("skip", "error"), default="skip",
        help="skip: bad lines go to the errors file, the others run; error: check all lines first, and run nothing if one "
        "is bad (default: skip)")  # fmt: skip
    add("--retry-errors", action="store_true", help="run failed lines again; their old records are kept in a numbered file")
    add("--restart", action="store_true", help="begin from the first line; existing results are kept in numbered files")
    add("--overwrite", action="store_true", help="begin from the first line; existing results are deleted")
    add("--grace", type=float, default=5.0, metavar="SECONDS",
        help="what lines in flight get to finish after an interrupt (default: 5)")  # fmt: skip
    add("--disk-patience", type=float, default=3600.0, metavar="SECONDS",
        help="how long to wait for a full or failing disk before giving up (default: 3600)")  # fmt: skip
    add_engine_args(parser)
    return parser


def main(argv: Sequence[str] | None = None, open_backend: Callable[[EngineConfig], Backend] = EngineBackend) -> int:
    """The command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, _terminated)
    resume = shlex.join(["python", "-m", "engine.batch", *(word for word in argv if word not in _ONCE_FLAGS)])
    try:
        job = Job(args.input_file, args.output_file, config_from_args(args), args, resume)
    except InvalidConfig as error:
        _say(f"error: {error}")
        return USAGE
    try:
        return job.run(open_backend)
    except (InvalidConfig, InvalidCheckpoint, JobError) as error:
        _say(f"error: {error}")
        return USAGE
    except OutputBlocked as error:
        _say(f"error: {error}")
        code = ENGINE_FAILED
    except KeyboardInterrupt:
        _say("interrupted")
        code = INTERRUPTED
    except Exception as error:
        logger.exception("the job stopped")
        _say(f"error: {error}")
        code = ENGINE_FAILED
    job.tell_resume()
    return code


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
