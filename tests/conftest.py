"""Fixtures for the whole suite."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from engine.demo import resolve_model

# No test, and no server that one starts, touches the jobs of whoever runs the tests.
os.environ["SLUICE_STATE"] = tempfile.mkdtemp(prefix="sluice-state-")
atexit.register(shutil.rmtree, os.environ["SLUICE_STATE"], ignore_errors=True)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's folder; the first use on a machine downloads 93 MB."""
    return resolve_model("demo", progress=False)
