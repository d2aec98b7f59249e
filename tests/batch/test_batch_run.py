"""Whole batch jobs in processes of their own: killed, interrupted, starved of disk, resumed; with a toy and with the engine."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_checkpoint

from engine.clock import ManualClock
from engine.joblog import JobLog, Record, Usage
from engine.jobrun import Progress, seeded

ROOT = Path(__file__).resolve().parents[2]
TOY = [sys.executable, str(ROOT / "tests" / "batch" / "toy_batch.py")]
REAL = [sys.executable, "-m", "engine.batch", "--threads", "1"]


def line(number: int, **body: Any) -> dict[str, Any]:
    body = {"prompt": f"hello {number}", "max_tokens": 12} | body
    return {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/completions", "body": body}


@dataclass
class Files:
    """A job's files, and processes that run it."""

    folder: Path
    command: list[str]
    source: str = "in.jsonl"
    options: list[str] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.folder / "out.jsonl"

    @property
    def errors(self) -> Path:
        return self.folder / "out.errors.jsonl"

    def write(self, lines: Iterable[dict[str, Any] | str]) -> None:
        with (self.folder / self.source).open("w") as file:
            for item in lines:
                file.write((item if isinstance(item, str) else json.dumps(item)) + "\n")

    def start(self, *options: str, prepare: Callable[[], None] | None = None, **env: str) -> subprocess.Popen[str]:
        names = ["-i", str(self.folder / self.source), "-o", str(self.out)]
        return subprocess.Popen(
            [*self.command, *names, *self.options, *options],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=prepare,
        )

    def run(self, *options: str, prepare: Callable[[], None] | None = None, **env: str) -> tuple[int, str]:
        """Exit status and everything said."""
        process = self.start(*options, prepare=prepare, **env)
        said = process.communicate(timeout=120)[1]
        return process.returncode, said

    def size(self) -> int:
        return sum(path.stat().st_size for path in (self.out, self.errors) if path.exists())

    def wait_for_records(self, process: subprocess.Popen[str], beyond: int = 0) -> None:
        while process.poll() is None and self.size() <= beyond:
            time.sleep(0.005)


@pytest.fixture
def toy(tmp_path: Path) -> Files:
    return Files(tmp_path, TOY)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def real(tmp_path: Path, checkpoint: Path) -> Files:
    return Files(tmp_path, [*REAL, "--model", str(checkpoint)])


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def by_id(path: Path) -> dict[str, dict[str, Any]]:
    found = records(path)
    table = {item["custom_id"]: item for item in found}
    assert len(table) == len(found), "a line was written twice"
    return table


# -- kill -9


def test_killed_again_and_again(toy: Files, tmp_path: Path) -> None:
    """Each line exactly once, and byte for byte what an uninterrupted run writes."""
    lines: list[dict[str, Any] | str] = [line(n) for n in range(600)]
    lines[100:100] = ["broken", json.dumps(line(7)), json.dumps(line(1000, model="missing"))]
    toy.write(lines)
    toy.options = ["--max-inflight", "32"]
    rng, kills = random.Random(5), 0
    while True:
        process = toy.start(TOY_DELAY="0.2")
        if rng.random() < 0.8:
            toy.wait_for_records(process, beyond=toy.size())
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.communicate()
        if process.returncode != -signal.SIGKILL:
            break
        kills += 1
        assert kills < 200
    assert process.returncode == 1
    assert kills >= 3
    whole = Files(tmp_path / "whole", TOY, source=str(tmp_path / "in.jsonl"))
    whole.folder.mkdir()
    assert whole.run()[0] == 1
    for killed, uninterrupted in ((toy.out, whole.out), (toy.errors, whole.errors)):
        assert sorted(killed.read_bytes().splitlines()) == sorted(uninterrupted.read_bytes().splitlines())
    assert len(records(toy.out)) == 600
    assert [item["error"]["line"] for item in records(toy.errors) if item["error"]] == [101, 102]


def test_engine_killed_and_resumed_samples_the_same(real: Files, tmp_path: Path) -> None:
    """Also where lines sample without a seed of their own."""
    real.write([line(n, max_tokens=40, temperature=n % 3 / 2) for n in range(40)])
    real.options = ["--max-inflight", "4"]
    whole = Files(tmp_path / "whole", real.command, source=str(tmp_path / "in.jsonl"))
    whole.folder.mkdir()
    status, said = whole.run()
    assert status == 0, said
    process = real.start()
    real.wait_for_records(process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    status, said = real.run()
    assert status == 0, said
    assert "resuming" in said
    killed, uninterrupted = by_id(real.out), by_id(whole.out)
    assert killed.keys() == uninterrupted.keys() == {f"id-{n}" for n in range(40)}
    for name, item in killed.items():
        assert item["response"]["body"]["choices"] == uninterrupted[name]["response"]["body"]["choices"]


# -- what the records say


def test_engine_answers_and_rejections(real: Files) -> None:
    """Rejections are HTTP-like, with `error` null; only lines that never were requests have a top-level error."""
    chat = line(1) | {
        "url": "/v1/chat/completions",
        "body": {"model": "tiny-llama", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    }
    real.write(
        [chat, line(2, model="gpt-9"), line(3, temperature=9), line(4, max_tokens=2), "", "{", line(5, prompt="x" * 600)]
    )
    status, said = real.run()
    assert status == 1, said
    assert "2 ok, 4 failed" in said and "out.errors.jsonl" in said
    good, bad = by_id(real.out), by_id(real.errors)
    answer = good["id-1"]
    job = json.loads((real.folder / "out.jsonl.state").read_text())["job"]
    assert list(answer) == ["id", "custom_id", "response", "error"]
    assert answer["id"] == f"batch_req_{job}_1"
    assert answer["response"]["request_id"] == f"{job}:1"
    assert answer["response"]["status_code"] == 200
    assert answer["response"]["body"]["object"] == "chat.completion"
    assert answer["response"]["body"]["usage"]["completion_tokens"] == 3
    assert answer["response"]["body"]["service_tier"] == "flex"
    for name, code, kind in (
        ("id-2", 404, "model_not_found"),
        ("id-3", 400, "invalid_value"),
        ("id-5", 400, "context_length_exceeded"),
    ):
        assert bad[name]["error"] is None
        assert bad[name]["response"]["status_code"] == code
        assert bad[name]["response"]["body"]["error"]["code"] == kind
    broken = bad[None]  # type: ignore[index]
    assert broken["response"] is None
    assert broken["error"]["code"] == "invalid_json_line" and broken["error"]["line"] == 6


def test_a_line_told_to_try_again_later_is_tried_again(toy: Files) -> None:
    toy.write([line(n, model="busy") for n in range(5)])
    assert toy.run()[0] == 0
    assert len(by_id(toy.out)) == 5


def test_bad_lines_can_stop_the_job_before_it_runs(toy: Files) -> None:
    toy.write([line(1), "oops", line(2)])
    status, said = toy.run("--on-bad-line", "error")
    assert status == 2
    assert "line 2: not valid JSON" in said
    assert not toy.out.exists()


def test_retry_errors(toy: Files) -> None:
    toy.write([line(1), line(2, model="missing"), "oops"])
    assert toy.run()[0] == 1
    status, said = toy.run()
    assert status == 1 and "3 of 3 lines are done" in said
    assert toy.run("--retry-errors")[0] == 1
    assert len(records(toy.out)) == 1
    assert sorted(toy.errors.read_bytes().splitlines()) == sorted((toy.folder / "out.errors.1.jsonl").read_bytes().splitlines())


# -- starting, refusing


def test_finished_job_loads_no_model(toy: Files) -> None:
    toy.write([line(1)])
    assert toy.run()[0] == 0
    assert toy.run(TOY_BROKEN="1")[0] == 0


def test_changed_input_is_refused(toy: Files) -> None:
    toy.write([line(1), line(2)])
    assert toy.run()[0] == 0
    before = toy.out.read_bytes()
    toy.write([line(1), line(3)])
    status, said = toy.run()
    assert status == 2 and "input_sha256 was" in said and "--restart" in said
    assert toy.out.read_bytes() == before
    assert toy.run("--restart")[0] == 0
    assert (toy.folder / "out.1.jsonl").read_bytes() == before
    assert by_id(toy.out).keys() == {"id-1", "id-3"}
    assert toy.run("--seed", "7")[0] == 2
    assert toy.run("--seed", "7", "--overwrite")[0] == 0


def test_touched_input_is_not_a_changed_one(toy: Files) -> None:
    toy.write([line(1)])
    assert toy.run()[0] == 0
    os.utime(toy.folder / toy.source, (1, 1))
    assert toy.run()[0] == 0


def test_second_writer_is_refused(toy: Files) -> None:
    toy.write([line(1), line(2, model="slow")])
    first = toy.start("--grace", "0")
    toy.wait_for_records(first)
    status, said = toy.run()
    assert status == 2 and "another process is writing" in said
    status, said = toy.run("--overwrite")
    assert status == 2 and len(records(toy.out)) == 1
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)


@pytest.mark.parametrize(
    ("source", "out", "says"),
    [
        ("in.jsonl", "in.jsonl", "would be overwritten"),
        ("in.jsonl", "link.jsonl", "would be overwritten"),
        ("in.errors.jsonl", "in.jsonl", "would be overwritten"),
        ("in.jsonl", "missing/out.jsonl", "does not exist"),
        ("in.jsonl", ".", "not a regular file"),
        ("missing.jsonl", "out.jsonl", "cannot read"),
        ("empty.jsonl", "out.jsonl", "is empty"),
    ],
)
def test_usage_errors(toy: Files, source: str, out: str, says: str) -> None:
    toy.write([line(1)])
    for name in ("empty.jsonl", "in.errors.jsonl"):
        (toy.folder / name).touch()
    (toy.folder / "link.jsonl").hardlink_to(toy.folder / "in.jsonl")
    before = (toy.folder / "in.jsonl").read_bytes()
    process = subprocess.run(
        [*TOY, "-i", source, "-o", out],
        cwd=toy.folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 2 and says in process.stderr, process.stderr
    assert "Traceback" not in process.stderr
    assert (toy.folder / "in.jsonl").read_bytes() == before


def test_wrong_flags_and_models(toy: Files, tmp_path: Path) -> None:
    toy.write([line(1)])
    assert toy.run("--no-such-flag")[0] == 2
    status, said = toy.run("--max-num-seqs", "0")
    assert status == 2 and "--max-num-seqs" in said
    status, said = Files(tmp_path, [*REAL, "--model", str(tmp_path / "nowhere")]).run()
    assert status == 2 and "nowhere" in said and "Traceback" not in said


def test_help_needs_no_torch() -> None:
    code = "import sys; from engine.batch import make_parser; make_parser().format_help(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# -- ends other than the last line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_keeps_what_is_done_and_says_how_to_resume(toy: Files, number: signal.Signals) -> None:
    toy.write([line(1), line(2, model="slow"), *(line(n) for n in range(3, 200))])
    process = toy.start("--max-inflight", "2", "--grace", "0.1", TOY_DELAY="0.1")
    toy.wait_for_records(process, beyond=200)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    done = by_id(toy.out)
    assert "id-1" in done and "id-2" not in done and len(done) < 198
    (command,) = re.findall("resume with: (.*)", said)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "engine.batch"]
    toy.write([line(1), line(2), line(3)])  # the same file would take its ten seconds
    assert subprocess.run([*TOY, *words[3:]], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 2


def test_second_interrupt_does_not_wait_for_the_grace(toy: Files) -> None:
    toy.write([line(1), line(2, model="slow")])
    process = toy.start("--grace", "600")
    toy.wait_for_records(process)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "in flight" not in (text := process.stderr.readline()):
        assert text
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_interrupt_makes_no_failure_of_a_line_that_waits_to_be_tried_again(toy: Files) -> None:
    toy.write([line(1), line(2, model="full")])
    process = toy.start("--grace", "60")
    toy.wait_for_records(process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert by_id(toy.out).keys() == {"id-1"} and not toy.errors.exists()


def test_engine_interrupted(real: Files) -> None:
    real.write([line(n, max_tokens=200, ignore_eos=True) for n in range(200)])
    process = real.start("--max-inflight", "8", "--grace", "0")
    real.wait_for_records(process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert 0 < len(by_id(real.out)) < 200
    assert "Traceback" not in said


def test_dead_engine_is_resumable(toy: Files) -> None:
    toy.write([*(line(n) for n in range(20)), line(20, model="dead"), *(line(n) for n in range(21, 40))])
    status, said = toy.run("--max-inflight", "1")
    assert status == 3
    assert "the toy broke" in said and "resume with:" in said
    assert by_id(toy.out).keys() == {f"id-{n}" for n in range(20)}
    assert not toy.errors.exists()
    status, said = toy.run(TOY_BROKEN="1")
    assert status == 3 and "no device" in said and "resume with:" in said


def test_output_that_cannot_grow(toy: Files) -> None:
    """A real fault of write(2), a file size limit, in the middle of a record."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    toy.write([line(n) for n in range(100)])
    status, said = toy.run("--disk-patience", "0.3", prepare=limit)
    assert status == 3, said
    assert "paused: cannot write" in said and "File too large" in said and "resume with:" in said
    assert 0 < len(by_id(toy.out)) < 100
    assert toy.out.read_bytes().endswith(b"}\n")
    assert toy.run()[0] == 0
    assert by_id(toy.out).keys() == {f"id-{n}" for n in range(100)}


def test_input_that_changes_meanwhile(toy: Files) -> None:
    toy.write([line(n) for n in range(300)])
    process = toy.start("--max-inflight", "2", TOY_DELAY="0.02")
    toy.wait_for_records(process)
    with (toy.folder / toy.source).open("a") as file:
        file.write(json.dumps(line(300)) + "\n")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "changed" in said


# -- cost and looks


def peak_bytes(files: Files, number: int) -> int:
    """Peak resident memory of a job of so many lines of 2 KB."""
    files.folder.mkdir()
    files.write(line(n, prompt="x" * 2000) for n in range(number))
    process = files.start()
    assert process.stderr is not None
    with process.stderr:
        said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, said
    assert len(records(files.out)) == number
    return usage.ru_maxrss * 1024


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    short = peak_bytes(Files(tmp_path / "short", TOY), 1_000)
    long = peak_bytes(Files(tmp_path / "long", TOY), 20_000)  # reads 40 MB, writes 40 MB
    assert long - short < 8 << 20


def test_bar_on_a_terminal(toy: Files) -> None:
    toy.write([line(n) for n in range(20)])
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    names = ["-i", str(toy.folder / toy.source), "-o", str(toy.out)]
    process = subprocess.Popen([*TOY, *names], stderr=stderr, env={**os.environ, "PYTHONPATH": str(ROOT)})
    os.close(stderr)
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(terminal)
    assert process.wait() == 0
    assert b"20/20" in shown and b"ok=20 err=0" in shown and b"done: 20 lines" in shown


def test_progress_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = ManualClock()
    with JobLog(tmp_path / "out.jsonl", say=print, patience=0) as log:
        log.start({"job": "a"}, restart=False, overwrite=False, retry_errors=False)
        progress = Progress("batch", 400, log, clock)
        progress.start()
        clock.advance(10)
        progress.show()
        for number in range(1, 101):
            log.done.add(number)
            progress.count(Record(number, True, b"", 1, Usage(completion_tokens=400)))
        progress.show()
    first, second = capsys.readouterr().err.splitlines()
    assert first == "batch: 0% 0/400 lines, ok=0 err=0, 0 tok/s, ETA unknown"
    assert second == "batch: 25% 100/400 lines, ok=0 err=0, 4.0k tok/s, ETA 0:30"


def test_seeds_depend_on_the_line_alone() -> None:
    assert seeded({}, 0, 1) == seeded({}, 0, 1)
    assert len({seeded({}, seed, number)["seed"] for seed in range(10) for number in range(10)}) == 100
    assert 0 <= seeded({"seed": None}, 0, 1)["seed"] < 2**63
    for body in ({"seed": 3}, {"seed": "x"}, {"prompt": ["a", "a"]}, {"prompt": [[1], [1]]}):
        assert seeded(body, 0, 1) == body
    for prompt in ("a", ["a"], [1, 2, 3]):
        assert "seed" in seeded({"prompt": prompt}, 0, 1)
