"""The GPU script without a GPU: sections run in toy sizes, and what cannot run says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(section: str, folder: Path, *flags: str, **env: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "bench.gpu", section, "--out", str(folder), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=os.environ | env)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads((folder / f"gpu_{section}.json").read_text())["rows"]
    return rows


def test_kernels_are_right_when_interpreted(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    rows = run("kernels", tmp_path, "--dry-run", TRITON_INTERPRET="1", OMP_NUM_THREADS="2")
    assert [row["name"] for row in rows if row["note"].startswith(("failed", "WRONG"))] == []
    assert sum(row["note"] == "right" for row in rows) == 3
    assert {"decode attention, 2 x 40", "prefill attention, 24 after 0", "rotary"} <= {row["name"] for row in rows}


def test_the_gate_and_its_experiments_on_a_fake_machine(tmp_path: Path) -> None:
    rows = run("gate", tmp_path, "--dry-run")
    assert [row for row in rows if "failed" in row["note"] or "WRONG" in row["note"] or "NO:" in row["note"]] == []
    notes = {row["name"]: row["note"] for row in rows}
    assert notes["probe"].startswith("the gate stops a running kernel") and notes["E7 hold"] == "the context lives"
    assert {"E6 freeze, busy, beside VMM calls p99", "E5 unmap and map the sink, while frozen, p99"} <= set(notes)


def test_memory_calls_and_reclaims_on_a_fake_driver(tmp_path: Path) -> None:
    rows = run("vmm", tmp_path, "--dry-run")
    assert [row for row in rows if "failed" in row["note"] or "WRONG" in row["note"]] == []
    assert {"128 MiB: set access", "reclaim of 10 GiB: victim lets go"} <= {row["name"] for row in rows}


@pytest.mark.slow
def test_colocation_with_toy_models(tmp_path: Path) -> None:
    rows = run("colocation", tmp_path, "--dry-run", OMP_NUM_THREADS="1")
    assert rows[0]["name"] == "colocation" and rows[0]["value"] == 2.0 and rows[0]["note"] == "in time"
    assert any("## Interference" in row["name"] for row in rows) and (tmp_path / "colocation" / "colocation.json").is_file()


def test_without_a_gpu_a_real_run_is_refused_in_words(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (row,) = run("ceilings", tmp_path)
    assert row["note"].startswith("skipped: torch") and row["value"] is None


def test_the_script_reports_what_it_had_no_time_for(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    env = os.environ | {"PYTHON": sys.executable, "LIMIT_S": "5"}
    command = ["bash", "bench/gpu_check.sh", "--dry-run", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 0, done.stderr
    assert "== throughput: left out, no time" in done.stdout
    table = (folder / "gpu_check.txt").read_text()
    assert "== gate: no result" in table and table in done.stdout
