"""What survives of files and batches: a folder under a lock, a SQLite database (WAL) in it, and one file of bytes per file id.

    DATA_DIR/lock      held by the one server that uses the folder
    DATA_DIR/jobs.db   the records of files and batches
    DATA_DIR/files/    uploads, outputs and error files under ids made here; `.part` while they are being written

A name that a client sent is only ever data. Each call is one transaction, on disk when it returns; it may wait for the disk, so
nothing on the way of an online request calls it in the event loop.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import sqlite3
import threading
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import msgspec

from engine.errors import InvalidConfig, Overloaded, SluiceError
from server.jobs_clock import Known

FILE_ID = re.compile(r"file-[0-9a-f]{32}")
BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL,
    purpose TEXT NOT NULL, bytes INTEGER NOT NULL, expires_at INTEGER, record BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS batches (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL,
    active INTEGER NOT NULL, input TEXT NOT NULL, record BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS clock (id INTEGER PRIMARY KEY CHECK (id = 1), boot TEXT NOT NULL, offset REAL NOT NULL,
    at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS batches_active ON batches (active, input);
"""
_FULL = (errno.ENOSPC, errno.EDQUOT)

Rec = TypeVar("Rec", bound=msgspec.Struct)


class StoreFull(SluiceError):
    """The disk refused: nothing was changed. `code` is disk_full or disk_error."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class DataDirInUse(InvalidConfig):
    """Another process holds the folder."""


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A stored file. Times are Unix seconds."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None = None
    sha256: str = ""
    lines: int = 0

    def moved(self, seconds: float) -> FileRecord:
        """The same by a clock that was set by so much."""
        return _moved(self, ("created_at", "expires_at"), seconds)


class LineError(msgspec.Struct, frozen=True):
    """Why a batch failed its validation."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Harvested(msgspec.Struct, frozen=True):
    """What the engine counted while a job ran. None: it does not count it."""

    requests_preempted: float = 0.0
    recomputed_tokens: float = 0.0
    worker_stops: float | None = None
    device_seconds: float | None = None


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A batch. Its counts and tokens are final once it has ended; while it runs, its records know better."""

    id: str
    owner: str
    status: str = "validating"
    endpoint: str
    input_file_id: str
    output_id: str  # where answers go; a file of the API once the batch has ended
    error_id: str
    completion_window: str
    created_at: int
    expires_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    metadata: dict[str, str] | None = None
    output_seconds: int | None = None  # life of the output files
    priority: int = 0
    skip_bad_lines: bool = False
    paused: bool = False
    lines: int = 0  # of its input file, blank ones included
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    estimate: float = 0.0  # tokens per line, guessed from the input
    models: tuple[str, ...] = ()
    errors: tuple[LineError, ...] = ()
    running_seconds: float = 0.0
    harvested: Harvested = Harvested()

    @property
    def job(self) -> str:
        """The name in its records."""
        return self.id.removeprefix("batch_")

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed", "expired", "cancelled")

    def moved(self, seconds: float) -> BatchRecord:
        """The same by a clock that was set by so much."""
        names = ("created_at", "in_progress_at", "expires_at", "finalizing_at", "cancelling_at")  # others end it
        return _moved(self, names, seconds)


def _moved(record: Rec, names: Iterable[str], seconds: float) -> Rec:
    old = {name: value for name in names if (value := getattr(record, name)) is not None}
    return msgspec.structs.replace(record, **{name: round(value + seconds) for name, value in old.items()})


def new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


class Upload:
    """A file on its way in: written in pieces, then kept by `Store.keep` or forgotten. Opened by the first write.

    Its calls come from threads, and `close` perhaps while one of them still writes: the client may leave at any moment.
    """

    def __init__(self, path: Path) -> None:
        self.id = path.stem
        self._lock = threading.Lock()
        self.path = path
        self.size = 0
        self.lines = 0
        self._digest = hashlib.sha256()
        self._last = b"\n"
        self._fd: int | None = None
        self._closed = False

    def _open(self) -> int:
        """Under the lock. Raises OSError, also if it was closed."""
        if self._closed:
            raise OSError(errno.EBADF, "it was given up")
        if self._fd is None:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        return self._fd

    def write(self, data: bytes) -> None:
        """Append. Raises StoreFull."""
        with self._lock, _disk("the upload"):
            fd, view = self._open(), memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        self.size += len(data)
        self.lines += data.count(b"\n")
        self._last = data[-1:] or self._last
        self._digest.update(data)

    def sync(self) -> None:
        with self._lock, _disk("the upload"):
            os.fsync(self._open())

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    @property
    def num_lines(self) -> int:
        """Blank ones included."""
        return self.lines + (self._last != b"\n")

    def close(self) -> None:
        """Forget it, unless it was kept."""
        with self._lock:
            self._closed = True
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None
        with contextlib.suppress(OSError):
            self.path.unlink()


class Download:
    """A file on its way out. Opened by its first read, and closed at any moment, by whatever thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._closed = False

    def read(self, size: int) -> bytes:
        """The next bytes; none at the end. Raises OSError."""
        with self._lock:
            if self._closed:
                return b""
            if self._file is None:
                self._file = self._path.open("rb")
            return self._file.read(size)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._file is not None:
                self._file.close()


class Store:
    """The folder, held until `close`. Thread-safe. Raises DataDirInUse, or InvalidConfig if the folder cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = folder / "files"
        self._lock = threading.RLock()
        try:
            self._files.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)
        except OSError as error:
            raise InvalidConfig(f"--data-dir {folder}: {error.strerror}; name a folder that this user may write") from None
        self._lock_fd = _take_lock(folder)
        try:
            self._db = self._open()
        except (sqlite3.Error, OSError) as error:
            os.close(self._lock_fd)
            raise InvalidConfig(
                f"--data-dir {folder}: its database cannot be used ({error}); restore jobs.db, or move the folder away"
            ) from None

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.folder / "jobs.db", check_same_thread=False, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.executescript(_SCHEMA)
            db.execute("SELECT count(*) FROM batches").fetchone()
        except BaseException:
            db.close()
            raise
        return db

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._db.close()
        os.close(self._lock_fd)

    # -- files

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file are. Only for ids made here."""
        assert FILE_ID.fullmatch(file_id), file_id
        return self._files / file_id

    def upload(self) -> Upload:
        return Upload(self._files / (new_id("file-") + ".part"))

    def download(self, file_id: str) -> Download:
        return Download(self.path(file_id))

    def keep(self, upload: Upload, record: FileRecord) -> None:
        """The upload is complete: from now on it is the file `record.id`. Raises StoreFull, and nothing is kept."""
        upload.sync()
        with _disk("the upload"):
            upload.path.rename(self.path(record.id))
            _sync_folder(self._files)
        try:
            with self._transaction() as db:
                self._insert_file(db, record)
        except BaseException:
            self.path(record.id).unlink(missing_ok=True)
            raise

    def file(self, file_id: str) -> FileRecord | None:
        return self._one("files", file_id, FileRecord) if FILE_ID.fullmatch(file_id) else None

    def files(
        self, owner: str, *, after: str | None, limit: int, newest_first: bool, purpose: str | None
    ) -> tuple[list[FileRecord], bool]:
        """A page of files, and whether more follow."""
        where, values = ("AND purpose = ?", (purpose,)) if purpose else ("", ())
        return self._page("files", FileRecord, owner, after, limit, newest_first, where, values)

    def delete_file(self, file_id: str) -> str | None:
        """Returns the unfinished batch that reads the file: then it stays."""
        with self._transaction() as db:
            user = db.execute("SELECT id FROM batches WHERE active AND input = ? LIMIT 1", (file_id,)).fetchone()
            if user is not None:
                return str(user[0])
            db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        with _disk("the file"):
            self.path(file_id).unlink(missing_ok=True)
        return None

    def expired_files(self, now: float) -> list[str]:
        """Files past their time that no unfinished batch reads."""
        rows = self._query(
            "SELECT id FROM files WHERE expires_at <= ? AND id NOT IN (SELECT input FROM batches WHERE active)", now
        )
        return [row[0] for row in rows]

    def totals(self) -> tuple[int, int]:
        """How many files are stored, and their bytes."""
        ((count, size),) = self._query("SELECT count(*), coalesce(sum(bytes), 0) FROM files")
        return int(count), int(size)

    def free_bytes(self) -> int:
        """What this user may still write to the disk. Raises StoreFull if it does not say."""
        with _disk("the data folder"):
            disk = os.statvfs(self._files)
        return disk.f_bavail * disk.f_frsize

    def sweep(self) -> int:
        """Remove what no record speaks of: uploads that a kill cut off, files whose deletion it did. Returns how many."""
        known = {row[0] for row in self._query("SELECT id FROM files")}
        for batch in self.active_batches():
            known |= {batch.output_id, batch.error_id}
        strays = [path for path in self._files.iterdir() if path.name not in known]
        for path in strays:
            with contextlib.suppress(OSError):
                path.unlink()
        return len(strays)

    # -- batches

    def add_batch(self, record: BatchRecord, most: int) -> None:
        """Raises KeyError if its input is gone, and Overloaded beyond `most` unfinished ones."""
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM files WHERE id = ?", (record.input_file_id,)).fetchone() is None:
                raise KeyError(record.input_file_id)
            if db.execute("SELECT count(*) FROM batches WHERE active").fetchone()[0] >= most:
                raise Overloaded(f"{most} batches are unfinished already; cancel one or wait", retry_after=30.0)
            values = (record.id, record.owner, True, record.input_file_id, msgspec.json.encode(record))
            db.execute("INSERT INTO batches (id, owner, active, input, record) VALUES (?, ?, ?, ?, ?)", values)

    def save_batch(self, record: BatchRecord, files: Iterable[FileRecord] = ()) -> None:
        """The batch as it is now, and the files that it leaves."""
        with self._transaction() as db:
            db.execute(
                "UPDATE batches SET active = ?, record = ? WHERE id = ?",
                (not record.ended, msgspec.json.encode(record), record.id),
            )
            for file in files:
                self._insert_file(db, file)

    def batch(self, batch_id: str) -> BatchRecord | None:
        return self._one("batches", batch_id, BatchRecord) if BATCH_ID.fullmatch(batch_id) else None

    def batches(self, owner: str, *, after: str | None, limit: int) -> tuple[list[BatchRecord], bool]:
        """A page of batches, newest first, and whether more follow."""
        return self._page("batches", BatchRecord, owner, after, limit, True)

    def active_batches(self) -> list[BatchRecord]:
        """The unfinished ones, oldest first."""
        rows = self._query("SELECT record FROM batches WHERE active ORDER BY seq")
        return [msgspec.json.decode(row[0], type=BatchRecord) for row in rows]

    # -- time

    def known_clock(self) -> Known | None:
        """What the stored times were written by."""
        rows = self._query("SELECT boot, offset, at FROM clock")
        return Known(*rows[0]) if rows else None

    def set_clock(self, known: Known) -> None:
        """From now on times are written by this."""
        with self._transaction() as db:
            self._set_clock(db, known)

    def move_times(self, seconds: float, known: Known) -> None:
        """Add to the times that something waits for: those of unfinished batches, and the ends of files."""
        with self._transaction() as db:
            for (blob,) in db.execute("SELECT record FROM batches WHERE active").fetchall():
                batch = msgspec.json.decode(blob, type=BatchRecord).moved(seconds)
                db.execute("UPDATE batches SET record = ? WHERE id = ?", (msgspec.json.encode(batch), batch.id))
            for (blob,) in db.execute("SELECT record FROM files WHERE expires_at IS NOT NULL").fetchall():
                file = msgspec.json.decode(blob, type=FileRecord).moved(seconds)
                values = (file.expires_at, msgspec.json.encode(file), file.id)
                db.execute("UPDATE files SET expires_at = ?, record = ? WHERE id = ?", values)
            self._set_clock(db, known)

    # -- inside

    @staticmethod
    def _set_clock(db: sqlite3.Connection, known: Known) -> None:
        values = (known.boot, known.offset, known.at)
        db.execute("INSERT OR REPLACE INTO clock (id, boot, offset, at) VALUES (1, ?, ?, ?)", values)

    def _insert_file(self, db: sqlite3.Connection, record: FileRecord) -> None:
        values = (record.id, record.owner, record.purpose, record.bytes, record.expires_at, msgspec.json.encode(record))
        db.execute(
            "INSERT OR REPLACE INTO files (id, owner, purpose, bytes, expires_at, record) VALUES (?, ?, ?, ?, ?, ?)", values
        )

    def _one(self, table: str, key: str, kind: type[Rec]) -> Rec | None:
        rows = self._query(f"SELECT record FROM {table} WHERE id = ?", key)
        return msgspec.json.decode(rows[0][0], type=kind) if rows else None

    def _page(
        self,
        table: str,
        kind: type[Rec],
        owner: str,
        after: str | None,
        limit: int,
        newest_first: bool,
        where: str = "",
        values: tuple[Any, ...] = (),
    ) -> tuple[list[Rec], bool]:
        """Rows of `owner`. A cursor that is gone ends the list: whoever pages has seen it all, or begins anew."""
        beyond, way = ("<", "DESC") if newest_first else (">", "ASC")
        if after is not None:
            where += f" AND seq {beyond} (SELECT seq FROM {table} WHERE id = ?)"
            values += (after,)
        rows = self._query(
            f"SELECT record FROM {table} WHERE owner = ? {where} ORDER BY seq {way} LIMIT ?", owner, *values, limit + 1
        )
        return [msgspec.json.decode(row[0], type=kind) for row in rows[:limit]], len(rows) > limit

    def _query(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, _database():
            return self._db.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _database():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise


@contextlib.contextmanager
def _disk(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        code = "disk_full" if error.errno in _FULL else "disk_error"
        raise StoreFull(f"{what} cannot be written: {error.strerror}", code) from error


@contextlib.contextmanager
def _database() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        code = "disk_full" if error.sqlite_errorcode == sqlite3.SQLITE_FULL else "disk_error"
        raise StoreFull(f"the job database cannot be used: {error}", code) from error


def _take_lock(folder: Path) -> int:
    try:
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidConfig(f"--data-dir {folder}: {error.strerror}; name a folder that this user may write") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise DataDirInUse(
            f"--data-dir {folder} is in use by another server (process {holder}); stop it, or give this one a folder of its own"
        ) from None
    with contextlib.suppress(OSError):  # a full disk: the number is only for people
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    return fd


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(fd)
    finally:
        os.close(fd)
