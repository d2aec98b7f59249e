"""Every Triton kernel compiles for each architecture and fits it; the matrix kernels use its tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent
INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


@pytest.mark.parametrize("capability", sorted(INSTRUCTION))
def test_kernels_compile_and_fit(capability):
    """In a process of its own: interpreting and compiling exclude each other. Triton caches what it compiled."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.triton_compile", "--quick", "--json"]

    child = subprocess.run(
        [*command, "--capability", str(capability)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=600
    )

    reports = {report["job"]: report for report in map(json.loads, child.stdout.splitlines())}
    assert child.returncode == 0, [r for r in reports.values() if not r["fits"]] or child.stderr[-3000:]
    prefill, decode = (next(r for name, r in reports.items() if name.startswith(kind)) for kind in ("prefill", "decode"))
    assert prefill["mma"] == INSTRUCTION[capability]
    assert decode["mma"] == "HMMA"
