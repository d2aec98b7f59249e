"""The doctor on this machine, and on one where things are broken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import doctor
from engine.doctor import Finding


def test_a_machine_that_runs_the_tests_can_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["can_serve"] is True
    found = {(finding["topic"], finding["name"]): finding for finding in report["findings"]}
    assert found["packages", "torch"]["state"] == "ok"
    assert found["kernels", "cpu"]["state"] == "ok"
    assert found["gates", "process"]["state"] == "ok"
    assert {"cuda", "nvidia", "channel", "stream", "cache", "demo"} <= {name for _, name in found}
    for finding in found.values():
        assert finding["text"] and "\n" not in finding["text"]


def test_text_says_the_same(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "engine.doctor"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env={"SLUICE_CACHE": str(tmp_path), "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "models can be served here"
    assert f"+ cache: {tmp_path}" in done.stdout and "- demo: made on first use" in done.stdout


def test_a_broken_check_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("kernels", "cpu", "missing", "none")
        raise OSError("libgomp.so.1: cannot open\nshared object file")

    monkeypatch.setitem(doctor._CHECKS, "kernels", broken)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "  ! kernels: OSError: libgomp.so.1: cannot open\n" in out
    assert "  - cpu: none\n" in out and "+ cache" in out
    assert out.splitlines()[-1].startswith("no model can be served here")


def test_a_missing_package_that_is_needed_decides() -> None:
    works = Finding("kernels", "cpu", "ok", "compiled")
    assert doctor.can_serve([works, Finding("packages", "msgspec", "ok", "1")])
    assert not doctor.can_serve([works, Finding("packages", "msgspec", "failed", "needed, not installed")])
    assert not doctor.can_serve([Finding("packages", "msgspec", "ok", "1")])
