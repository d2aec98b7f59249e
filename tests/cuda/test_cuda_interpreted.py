"""Runs the tests of the CUDA backend in a child process where Triton interprets its kernels on CPU tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already inside")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the module runs on the GPU instead")
def test_interpreted() -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "2", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-x", str(HERE / "test_cuda_runner.py")]

    child = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)

    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
