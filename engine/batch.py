"""python -m engine.batch -i requests.jsonl -o results.jsonl: an OpenAI batch file as offline work.

Reads ahead only as far as it may run, runs each line as a request of the offline tenant, and writes each answer as it comes
(not in input order). Killed at any moment and started again with the same arguments, it goes on with the lines that have no
record yet. `engine.joblines` reads, `engine.jobrun` runs, `engine.joblog` keeps; here are the command line and the job.

With `--url` the file becomes a batch of a running server instead, which this process only watches (`engine.jobclient`).

Exit status: 0 all lines answered; 1 finished, but some lines failed; 2 the job cannot start as asked; 3 the engine or the
disk failed (resumable); 130 interrupted (resumable).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import logging
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from engine.config import EngineConfig, add_engine_args, config_from_args, parse_bytes, read_environment, secret
from engine.errors import InvalidCheckpoint, InvalidConfig
from engine.joblines import MAX_LINE_BYTES, BadLine, InputFacts, JobError, JobLine, read_lines, survey
from engine.joblog import JobLog, OutputBlocked, Record, errors_path, fault_record, state_path
from engine.jobrun import Backend, EngineBackend, Halt, Progress, Run, Slots

logger = logging.getLogger(__name__)

OK, LINE_ERRORS, USAGE, ENGINE_FAILED, INTERRUPTED = 0, 1, 2, 3, 130
REJECTS_AT_ONCE = 256
_RESULT_FLAGS = ("served_model_name", "offline_served_model_name", "dtype", "load_format", "max_model_len", "seed")
_AHEAD, _MOST_AHEAD = 8, 2048  # lines in flight where the order is the engine's: per running one, and of these at most
_ONCE_FLAGS = ("--restart", "--overwrite", "--retry-errors")


def open_engine(config: EngineConfig) -> Backend:
    """The engine in this process."""
    from engine.engine import Engine

    return EngineBackend(Engine(config=config))


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
            slots = Slots(self.args.max_inflight or window(self.config))
            run = Run(backend, log, slots, say=progress.say, on_record=progress.count)
            before = backend.harvest()
            progress.start()
            try:
                asyncio.run(self._run(run, itertools.chain([first], lines), progress))
            finally:
                progress.close()
            receipt = progress.receipt(backend.harvest() - before)
        finally:
            backend.close()
        for text in receipt.lines():
            progress.say(text)
        if run.halt is None:
            return LINE_ERRORS if log.errors.count else OK
        progress.say(run.halt.value + (f": {run.cause}" if run.cause else ""))
        return {Halt.INTERRUPTED: INTERRUPTED, Halt.INPUT: USAGE}.get(run.halt, ENGINE_FAILED)

    async def _run(self, run: Run, lines: Iterator[JobLine | BadLine], progress: Progress) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, run.interrupt, self.args.grace)
        reporter = asyncio.create_task(progress.report())
        try:
            await run(lines)
        finally:
            reporter.cancel()

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


def window(config: EngineConfig) -> int:
    """Lines in flight: enough that the engine never waits for the next one; more where it looks among them for prompts that
    begin alike. Waiting lines cost their tokens and no KV."""
    twice = 2 * config.max_num_seqs
    return twice if config.offline_order == "fcfs" else max(twice, min(_AHEAD * config.max_num_seqs, _MOST_AHEAD))


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
    add("-i", "--input-file", type=Path, help="one request a line, in the format of OpenAI's batch API")
    add("-o", "--output-file", required=True, type=Path, help="answers; failures go beside it, to NAME.errors.jsonl")
    add("--max-inflight", type=_positive,
        help="most lines in flight (default: 8 times --max-num-seqs, but at most 2048, so that lines which begin alike meet; "
        "with --offline-order fcfs twice)")  # fmt: skip
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
    remote = parser.add_argument_group("on a running server, instead of a model of its own")
    add = remote.add_argument
    add("--url", help="the server, such as http://127.0.0.1:8000; the job is a batch there, and stays if this process goes")
    add("--api-key", default=None, help="its key (default: $SLUICE_API_KEY)")
    add("--batch-id", help="go back to this batch instead of submitting one")
    add("--completion-window", default="24h", help="the batch is to be done within it, e.g. 90m or 2d (default: 24h)")
    add("--priority", type=int, help="of the batch; lower goes first")
    add_engine_args(parser)
    return parser


def main(argv: Sequence[str] | None = None, open_backend: Callable[[EngineConfig], Backend] = open_engine) -> int:
    """The command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    read_environment(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, _terminated)
    if args.url is not None:
        return watch(args)
    if args.input_file is None or args.batch_id is not None:
        _say("error: " + ("-i is missing" if args.batch_id is None else "--batch-id needs --url"))
        return USAGE
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


def watch(args: argparse.Namespace) -> int:
    """The command with `--url`; returns its exit status."""
    from engine.jobclient import Remote

    if (args.input_file is None) == (args.batch_id is None):
        _say("error: give -i to submit a file, or --batch-id to go back to a batch")
        return USAGE
    if args.batch_id is None and not args.overwrite and args.output_file.exists():
        _say(f"error: {args.output_file} exists; choose another -o, or --overwrite")
        return USAGE
    url = args.url.rstrip("/").removesuffix("/v1")
    remote = Remote(
        url, args.api_key or secret("api_key") or "", args.completion_window, args.priority, args.on_bad_line == "skip", _say
    )
    try:
        batch, seen = asyncio.run(remote.run(args.input_file, args.output_file, args.batch_id))
    except JobError as error:
        _say(f"error: {error}")
        return USAGE
    if batch is None:
        _say("interrupted before the batch was created")
        return INTERRUPTED
    if not seen:
        words = ["--url", args.url, "--batch-id", batch["id"], "-o", str(args.output_file)]
        _say("the job runs on; get back to it with: " + shlex.join(["python", "-m", "engine.batch", *words]))
        _say(f"or cancel it: curl -X POST {url}/v1/batches/{batch['id']}/cancel")
        return INTERRUPTED
    return _told_end(batch)


def _told_end(batch: dict[str, Any]) -> int:
    """Say how a batch ended; the exit status for it."""
    counts, receipt = batch["request_counts"], (batch.get("sluice") or {}).get("receipt")
    _say(f"{batch['status']}: {counts['total']} lines, {counts['completed']} ok, {counts['failed']} failed")
    for error in (batch.get("errors") or {}).get("data") or ():
        _say(f"line {error['line']}: {error['message']}" if error["line"] else error["message"])
    if receipt is not None:
        told = (f"{name.replace('_', ' ')} {value}" for name, value in receipt.items() if value is not None)
        _say("receipt: " + ", ".join(told))
    if batch["status"] == "completed":
        return LINE_ERRORS if counts["failed"] else OK
    return USAGE if batch["status"] == "failed" else LINE_ERRORS


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
