"""Runs the Triton test modules in a child process where Triton interprets its kernels on CPU tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
MODULES = sorted(path.name for path in HERE.glob("test_triton_*.py") if "\nfrom triton_device" in path.read_text())


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already inside")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the modules run on the GPU instead")
@pytest.mark.parametrize("module", MODULES)
def test_interpreted(module):
    root = HERE.parent.parent
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "2"}
    env["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests"), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-x", str(HERE / module)]

    child = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=300)

    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
