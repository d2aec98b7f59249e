"""The durable side of a batch job: two append-only files of records, one line each.

One file holds answers, the other what failed. A record in either is the only mark that its line is done, so a kill at any
moment loses nothing: on the next start a torn last record is cut off and its line runs again. The tokens that a job took are
read from its records too, so their sum is right however often it was killed. `Records` are the two files; `JobLog` adds what
a job of the command line needs: `OUT.state`, with its manifest and its lock.

Durability: a record is in the file (safe from a kill of the process) before its line counts as done, and synced to disk
(safe from a power cut) within SYNC_SECONDS or SYNC_LINES records, whichever comes first. While the disk refuses, nothing is
done: what is not synced is kept in memory and written again, also after a failed fsync, whose pages the kernel drops.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import msgspec

from engine.clock import Clock, MonotonicClock
from engine.errors import SluiceError
from engine.joblines import BadLine, JobError, JobLine

SYNC_SECONDS = 1.0
SYNC_LINES = 256
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds between attempts while the disk refuses
_REMIND = 30.0
_KINDS = {errno.ENOSPC: "disk_full", errno.EDQUOT: "disk_full", errno.EFBIG: "disk_full"}
# Characters that JSON leaves as they are and at which many readers, such as str.splitlines, end a line: NEL, LS and PS.
_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))
_RECORD = re.compile(rb'\{"id":"batch_req_([0-9a-f]+)_(\d+)","custom_id":')


class OutputBlocked(SluiceError):
    """The disk refused to take records for longer than the job was willing to wait. Nothing that was done is lost."""


class Blocked(msgspec.Struct, frozen=True):
    """Why records cannot be written now: `code` is disk_full or disk_error."""

    code: str
    reason: str


class Usage(msgspec.Struct, frozen=True):
    """Tokens as an answer's `usage` tells them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: CachedTokens | None = None

    def __add__(self, other: Usage) -> Usage:
        cached = CachedTokens(self.cached_tokens + other.cached_tokens)
        return Usage(self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens, cached)

    @property
    def cached_tokens(self) -> int:
        return 0 if self.prompt_tokens_details is None else self.prompt_tokens_details.cached_tokens

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class CachedTokens(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class _Body(msgspec.Struct, frozen=True):
    usage: Usage | None = None


class _Response(msgspec.Struct, frozen=True):
    body: _Body | None = None


class _Known(msgspec.Struct, frozen=True):
    """What a resumed job wants to know of a record; the decoder passes over the rest."""

    response: _Response | None = None

    @property
    def usage(self) -> Usage:
        body = None if self.response is None else self.response.body
        return (None if body is None else body.usage) or Usage()


_known = msgspec.json.Decoder(_Known)


class Record(msgspec.Struct, frozen=True):
    """One encoded output line. `size` is the input line's, in bytes."""

    line: int
    ok: bool
    blob: bytes
    size: int
    usage: Usage = Usage()


def answer_record(job: str, line: JobLine, status: int, body: Mapping[str, Any]) -> Record:
    """What the HTTP API would have said; rejections (4xx, 5xx) have `error` null like OpenAI's."""
    response = {"status_code": status, "request_id": f"{job}:{line.number}", "body": body}
    blob = _encode(job, line.number, line.custom_id, response, None)
    return Record(line.number, status < 400, blob, line.size, _known.decode(blob).usage)


def fault_record(job: str, line: BadLine) -> Record:
    """A line that never became a request."""
    error = {"code": line.code, "message": line.message, "param": line.param, "line": line.number}
    return Record(line.number, False, _encode(job, line.number, line.custom_id, None, error), line.size)


def _encode(job: str, number: int, custom_id: str | None, response: object, error: object) -> bytes:
    # `id` and `custom_id` come first: the scan on resume knows a record by them.
    record = {"id": f"batch_req_{job}_{number}", "custom_id": custom_id, "response": response, "error": error}
    blob = msgspec.json.encode(record)
    for raw, escaped in _LINE_ENDS:
        blob = blob.replace(raw, escaped)
    return blob + b"\n"


class LineSet:
    """A set of line numbers, one bit each."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def add(self, number: int) -> None:
        byte, bit = divmod(number, 8)
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 1 - len(self._bits) + 4096))
        if not self._bits[byte] >> bit & 1:
            self._bits[byte] |= 1 << bit
            self._count += 1

    def __contains__(self, number: int) -> bool:
        byte, bit = divmod(number, 8)
        return byte < len(self._bits) and bool(self._bits[byte] >> bit & 1)

    def __len__(self) -> int:
        return self._count


class AppendLog:
    """One append-only file. Knows what is durable, what is written, and what only memory has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None
        self._durable = 0  # bytes known to be on disk
        self._durable_count = 0  # the records in them
        self._unsynced: list[bytes] = []
        self._written = 0  # of those, already in the file
        self._torn = False  # the file may end in something else than the last written record
        self.scanned = Usage()  # the tokens of the records that a scan found

    @property
    def count(self) -> int:
        """Records in the file."""
        return self._durable_count + self._written

    @property
    def num_unsynced(self) -> int:
        return len(self._unsynced)

    def add(self, blob: bytes) -> None:
        """Take over a record; `push` writes it."""
        self._unsynced.append(blob)

    def scan(self, job: str) -> Iterable[int]:
        """Line numbers of the records in the file; cuts off a torn last one. Raises JobError for any other content."""
        if not self.path.exists():
            return
        self._open()
        with self.path.open("rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    self._torn = True
                    break
                match = _RECORD.match(raw)
                known = _read(raw)
                if not match or match[1].decode() != job or known is None:
                    raise JobError(
                        f"{self.path}: the line at byte {self._durable} is no record of this job; remove it to have its "
                        "request run again, or start anew with --restart (keeps the old files) or --overwrite"
                    )
                self._durable += len(raw)
                self._durable_count += 1
                self.scanned += known.usage
                yield int(match[2])

    def push(self) -> None:
        """Write what is not in the file yet. After an OSError call it again: it first removes what it left half done."""
        fd = self._open()
        if self._torn:
            os.ftruncate(fd, self._end)
        fresh = self._unsynced[self._written :]
        blob, taken = memoryview(b"".join(fresh)), 0
        self._torn = True  # until all of it is in
        try:
            while taken < len(blob):
                taken += os.write(fd, blob[taken:])
            self._torn = False
        finally:
            for size in map(len, fresh):
                if taken < size:
                    break
                taken -= size
                self._written += 1

    def sync(self) -> None:
        """Make everything written durable. After an OSError `push` writes all of it again."""
        try:
            os.fsync(self._open())
        except OSError:
            self._written, self._torn = 0, True
            raise
        self._durable = self._end
        self._durable_count += self._written
        del self._unsynced[: self._written]
        self._written = 0

    def close(self) -> None:
        if self._fd is None:
            return
        if self._torn:
            with contextlib.suppress(OSError):  # the next start does it too
                os.ftruncate(self._fd, self._end)
        os.close(self._fd)
        self._fd = None

    @property
    def _end(self) -> int:
        """Where the last whole record ends."""
        return self._durable + sum(map(len, self._unsynced[: self._written]))

    def _open(self) -> int:
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            _sync_folder(self.path.parent)
        return self._fd


def _read(raw: bytes) -> _Known | None:
    try:
        return _known.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


class Records:
    """The two files of one job, written by one thread at a time. `done` are the lines that need not run."""

    def __init__(
        self, out: Path, errors: Path, *, say: Callable[[str], None], patience: float = math.inf, clock: Clock | None = None
    ) -> None:
        """`say` is told when the disk refuses and when it takes records again; `patience` is how long to try, in seconds."""
        self.out = AppendLog(out)
        self.errors = AppendLog(errors)
        self.done = LineSet()
        self.job = ""
        self.usage = Usage()
        self.stop = threading.Event()  # set: wait for nothing
        self.blocked: Blocked | None = None  # set while the disk refuses
        self.num_refusals = 0
        self.on_sync: Callable[[float], None] = lambda seconds: None  # told how long a sync took
        self._say = say
        self._patience = patience
        self._clock = clock or MonotonicClock()
        self._last_sync = self._clock.now()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, job: str) -> None:
        """Take up `job` where its files stand. Raises JobError for foreign content, and OSError."""
        self.job = job
        for log in (self.out, self.errors):
            for number in log.scan(job):
                self.done.add(number)
            self.usage += log.scanned
        self.out.push()  # cuts a torn end, and shows now whether the folder can be written
        if self.errors.path.exists():
            self.errors.push()

    # -- writing

    def commit(self, records: Iterable[Record] = (), *, sync: bool = False) -> None:
        """Write records, and sync if that is due. Blocks while the disk refuses; raises OutputBlocked when giving up."""
        fresh = list(records)
        for record in fresh:
            (self.out if record.ok else self.errors).add(record.blob)
        self._insist(sync)
        for record in fresh:
            self.done.add(record.line)
            self.usage += record.usage

    def sync_due(self) -> float | None:
        """Seconds until the next sync is due; None where all is durable."""
        if not self._unsynced:
            return None
        return max(0.0, self._last_sync + SYNC_SECONDS - self._clock.now())

    @property
    def _unsynced(self) -> int:
        return self.out.num_unsynced + self.errors.num_unsynced

    def _insist(self, sync: bool) -> None:
        began, reminded, pause = self._clock.now(), -_REMIND, _FIRST_PAUSE
        while True:
            try:
                self._try(sync)
            except OSError as error:
                waited = self._clock.now() - began
                reason = f"cannot write {error.filename or self.out.path.parent}: {error.strerror}"
                self.blocked = Blocked(_KINDS.get(error.errno or 0, "disk_error"), reason)
                self.num_refusals += 1
                if self.stop.is_set() or waited >= self._patience:
                    raise OutputBlocked(f"{reason}; finished lines are safe, the others run again on resume") from None
                if waited - reminded >= _REMIND:
                    self._say(f"paused: {reason}. Nothing is lost; the job goes on as soon as it can write")
                    reminded = waited
                self.stop.wait(min(pause, self._patience - waited))
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            self.blocked = None
            if reminded >= 0:
                self._say("the output can be written again: going on")
            return

    def _try(self, sync: bool) -> None:
        logs = [log for log in (self.out, self.errors) if log.num_unsynced]
        for log in logs:
            with _named(log.path):
                log.push()
        if logs and (sync or self._unsynced >= SYNC_LINES or not self.sync_due()):
            began = self._clock.now()
            for log in logs:
                with _named(log.path):
                    log.sync()
            self._last_sync = self._clock.now()
            self.on_sync(self._last_sync - began)

    def close(self) -> None:
        self.out.close()
        self.errors.close()


class JobLog(Records):
    """The files of a job of the command line, held under a lock by one process."""

    def __init__(self, out: Path, *, say: Callable[[str], None], patience: float, clock: Clock | None = None) -> None:
        super().__init__(out, errors_path(out), say=say, patience=patience, clock=clock)
        self._state = state_path(out)
        self._state_fd = self._lock()

    def close(self) -> None:
        super().close()
        os.close(self._state_fd)

    def start(self, manifest: Mapping[str, Any], *, restart: bool, overwrite: bool, retry_errors: bool) -> None:
        """Begin the job, or take up where it was left. Raises JobError where that would mix or destroy results."""
        try:
            self._start(manifest, restart, overwrite, retry_errors)
        except OSError as error:
            raise JobError(f"cannot write {error.filename or self.out.path}: {error.strerror}") from None

    def _start(self, manifest: Mapping[str, Any], restart: bool, overwrite: bool, retry_errors: bool) -> None:
        known = self._read_manifest()
        if overwrite or restart:
            for log in (self.out, self.errors):
                if log.path.exists():
                    _remove(log.path) if overwrite else _move_aside(log.path)
            known = None
        used = [log.path for log in (self.out, self.errors) if log.path.exists() and log.path.stat().st_size]
        if used and known is None:
            raise JobError(
                f"{used[0]} exists and is not the output of a job that can be resumed ({self._state} is missing or damaged); "
                "choose another -o, or --restart (keeps it under another name) or --overwrite (deletes it)"
            )
        if used and known is not None:
            _compare(known, manifest)
        if not used:
            self._write_manifest(manifest)
        if retry_errors and self.errors.path.exists():
            _move_aside(self.errors.path)
        self.open(str(manifest["job"]))

    def _lock(self) -> int:
        try:
            fd = os.open(self._state, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise JobError(f"cannot write {self._state}: {error.strerror}") from None
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise JobError(f"another process is writing {self.out.path}; wait for it, or choose another -o") from None
        return fd

    def _read_manifest(self) -> dict[str, Any] | None:
        try:
            manifest = json.loads(os.pread(self._state_fd, 1 << 20, 0))
        except ValueError:
            return None
        return manifest if isinstance(manifest, dict) else None

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """In place, under the lock. A manifest torn by a kill is harmless: there are no records yet."""
        os.ftruncate(self._state_fd, 0)
        os.pwrite(self._state_fd, json.dumps(manifest, indent=1).encode() + b"\n", 0)
        os.fsync(self._state_fd)
        _sync_folder(self._state.parent)


def errors_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}.errors{out.suffix}")


def state_path(out: Path) -> Path:
    return out.with_name(out.name + ".state")


@contextlib.contextmanager
def _named(path: Path) -> Any:
    """Errors of calls on a descriptor know no file name: tell it."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _compare(known: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    names = sorted((known.keys() | manifest.keys()) - {"mtime"})
    if different := [name for name in names if known.get(name) != manifest.get(name)]:
        changes = "; ".join(f"{name} was {known.get(name)!r}, is {manifest.get(name)!r}" for name in different if name != "job")
        raise JobError(
            f"the output belongs to another job: {changes}. Choose another -o, or --restart (keeps the old results under "
            "another name) or --overwrite (deletes them)"
        )


def _remove(path: Path) -> None:
    path.unlink()
    _sync_folder(path.parent)


def _move_aside(path: Path) -> None:
    """Rename to the first free NAME.1.SUFFIX, NAME.2.SUFFIX, …"""
    free = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    path.rename(next(name for name in free if not name.exists()))
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(fd)
    finally:
        os.close(fd)
