"""The durable side of a job: torn ends, refusing disks, foreign files."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import small_file_system
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.clock import ManualClock
from engine.joblines import JobError, JobLine
from engine.joblog import SYNC_LINES, AppendLog, JobLog, LineSet, OutputBlocked, Record, answer_record

MANIFEST = {"job": "abc123", "input_sha256": "1", "mtime": 1.0}


def record(number: int, *, status: int = 200, job: str = "abc123", padding: int = 0) -> Record:
    return answer_record(job, JobLine(number, f"id-{number}", "/v1/completions", {}, 10), status, {"text": "x" * padding})


def open_log(folder: Path, said: list[str] | None = None, patience: float = 0.0, **options: Any) -> JobLog:
    start = {"restart": False, "overwrite": False, "retry_errors": False, "manifest": MANIFEST}
    start |= {key: options.pop(key) for key in list(options) if key in start}
    log = JobLog(folder / "out.jsonl", say=(said if said is not None else []).append, patience=patience, **options)
    try:
        log.start(start.pop("manifest"), **start)
    except BaseException:
        log.close()
        raise
    return log


def ids(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


@given(st.lists(st.integers(0, 50_000)))
def test_line_set_is_a_set(numbers: list[int]) -> None:
    lines = LineSet()
    for number in numbers:
        lines.add(number)
    assert len(lines) == len(set(numbers))
    assert all(number in lines for number in numbers)
    assert [n for n in range(100) if n in lines] == sorted({n for n in numbers if n < 100})


def test_a_record_is_one_line_for_every_reader() -> None:
    text = "a\u0085b\u2028c\u2029d\x0b\x0c\x1ce\r\nf"
    blob = answer_record("abc123", JobLine(1, text, "/v1/completions", {}, 10), 200, {"text": text}).blob
    assert len(blob.decode().splitlines()) == 1
    item = json.loads(blob)
    assert (item["custom_id"], item["response"]["body"]["text"]) == (text, text)


def test_resume_skips_what_has_a_record(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.commit([record(1), record(3, status=404), record(7)])
    with open_log(tmp_path) as log:
        assert [n for n in range(10) if n in log.done] == [1, 3, 7]
        assert (log.out.count, log.errors.count) == (2, 1)
        log.commit([record(2)], sync=True)
    assert ids(tmp_path / "out.jsonl") == ["id-1", "id-7", "id-2"]
    assert ids(tmp_path / "out.errors.jsonl") == ["id-3"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_cut_anywhere_loses_only_what_was_cut(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("cut")
    with open_log(folder) as log:
        log.commit([record(number) for number in range(1, 6)])
    whole = (folder / "out.jsonl").read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    tail = data.draw(st.sampled_from([b"", b"\0" * 100]))  # what a power cut may leave of blocks never written
    (folder / "out.jsonl").write_bytes(whole[:cut] + tail)
    kept = whole[:cut].count(b"\n")
    with open_log(folder) as log:
        assert len(log.done) == kept
        log.commit([record(number) for number in range(1, 6) if number not in log.done])
    assert (folder / "out.jsonl").read_bytes() == whole


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious\n")
    with pytest.raises(JobError, match="choose another -o"):
        open_log(tmp_path)
    assert out.read_text() == "precious\n"
    open_log(tmp_path, restart=True).close()
    assert (tmp_path / "out.1.jsonl").read_text() == "precious\n"
    with open_log(tmp_path) as log:
        log.commit([record(1), record(2)])
    damaged = b"precious\n" + out.read_bytes()
    out.write_bytes(damaged)
    with pytest.raises(JobError, match="line at byte 0 is no record of this job"):
        open_log(tmp_path)
    assert out.read_bytes() == damaged
    open_log(tmp_path, overwrite=True).close()
    assert out.read_bytes() == b""


def test_another_job_is_refused_by_name(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.commit([record(1)])
    with pytest.raises(JobError, match="input_sha256 was '1', is '2'"):
        open_log(tmp_path, manifest={**MANIFEST, "job": "def456", "input_sha256": "2"})
    open_log(tmp_path, manifest={**MANIFEST, "mtime": 2.0}).close()  # the same content, copied
    state = tmp_path / "out.jsonl.state"
    state.write_text(state.read_text()[:20])
    with pytest.raises(JobError, match="missing or damaged"):
        open_log(tmp_path)
    assert ids(tmp_path / "out.jsonl") == ["id-1"]


def test_manifest_torn_before_the_first_record_is_harmless(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.state").write_text('{"job": "ab')
    (tmp_path / "out.jsonl").touch()
    with open_log(tmp_path) as log:
        assert len(log.done) == 0


def test_retry_errors_keeps_the_old_records(tmp_path: Path) -> None:
    for attempt in (1, 2):
        with open_log(tmp_path, retry_errors=True) as log:
            assert len(log.done) == attempt - 1
            log.commit([record(attempt), record(9, status=500)])
    with open_log(tmp_path) as log:
        assert len(log.done) == 3
    assert ids(tmp_path / "out.errors.1.jsonl") == ["id-9"]
    assert ids(tmp_path / "out.errors.jsonl") == ["id-9"]


def test_unwritable_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot write"):
        JobLog(tmp_path / "missing" / "out.jsonl", say=print, patience=0)


def test_sync_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most SYNC_LINES records, and none for longer than a second, are written but not yet synced."""
    clock = ManualClock(100.0)
    with open_log(tmp_path, clock=clock) as log:
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", synced.append)
        log.commit([record(1)])
        assert not synced and log.sync_due() == pytest.approx(1.0)
        clock.advance(0.4)
        log.commit([record(2)])
        assert not synced and log.sync_due() == pytest.approx(0.6)
        clock.advance(0.6)
        assert log.sync_due() == 0
        log.commit()
        assert len(synced) == 1 and log.sync_due() is None
        log.commit([record(3 + n) for n in range(SYNC_LINES)])
        assert len(synced) == 2 and log.sync_due() is None
        log.commit([record(900)], sync=True)
        assert len(synced) == 3


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_after_a_failed_sync_all_of_it_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """The kernel drops dirty pages when fsync fails: a second fsync that succeeds proves nothing."""
    real, calls, path = os.fsync, [0], tmp_path / "out.jsonl"
    said: list[str] = []

    def fsync(fd: int) -> None:
        calls[0] += 1
        if calls[0] <= failing:
            if calls[0] == 1:  # what was written since the last sync is gone
                os.truncate(path, 0)
                with path.open("wb") as file:
                    file.write(b"\0" * 50)
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    with open_log(tmp_path, said, patience=60.0) as log:
        log.commit([record(1), record(2)])
        monkeypatch.setattr(os, "fsync", fsync)
        log.commit([record(3)], sync=True)
    assert ids(path) == ["id-1", "id-2", "id-3"]
    assert len(said) == 2 and "Input/output error" in said[0]


# -- disks that are really full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "small", "256k") as folder:
        yield folder


def test_full_disk_pauses_and_goes_on(small_disk: Path) -> None:
    said: list[str] = []
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(100 * 1024))
    log = open_log(small_disk, said, patience=60.0)
    log.commit([record(1, padding=50_000)])
    worker = threading.Thread(target=log.commit, args=([record(n, padding=60_000) for n in (2, 3)],))
    worker.start()
    while not said:
        time.sleep(0.01)
    assert "No space left on device" in said[0] and str(small_disk) in said[0]
    assert 2 not in log.done and 3 not in log.done
    ballast.unlink()
    worker.join(30)
    assert not worker.is_alive()
    assert 3 in log.done and "going on" in said[1]
    log.close()
    assert ids(small_disk / "out.jsonl") == ["id-1", "id-2", "id-3"]


def test_giving_up_on_a_full_disk_loses_nothing(small_disk: Path) -> None:
    log = open_log(small_disk, patience=0.2)
    log.commit([record(1, padding=100_000)])
    with pytest.raises(OutputBlocked, match="No space left"):
        log.commit([record(2, padding=100_000), record(3, padding=100_000)])
    assert 3 not in log.done and log.out.count == 2
    log.close()
    assert ids(small_disk / "out.jsonl") == ["id-1", "id-2"]  # what fitted is kept, and no torn end left behind
    with open_log(small_disk) as log:
        assert 2 in log.done
        log.commit([record(3, padding=20_000)])
    assert ids(small_disk / "out.jsonl") == ["id-1", "id-2", "id-3"]


def test_an_interrupt_ends_the_wait_for_the_disk(small_disk: Path) -> None:
    log = open_log(small_disk, patience=3600.0)
    threading.Timer(0.2, log.stop.set).start()
    with pytest.raises(OutputBlocked):
        log.commit([record(1, padding=400_000)])
    log.close()


def test_append_log_survives_partial_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write may take less than it was given."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    log = AppendLog(tmp_path / "log")
    log.add(record(1).blob)
    log.add(record(2).blob)
    log.push()
    log.close()
    assert list(AppendLog(tmp_path / "log").scan("abc123")) == [1, 2]
