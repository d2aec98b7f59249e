"""Fixtures for the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.demo import resolve_model


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's folder; the first use on a machine downloads 93 MB."""
    return resolve_model("demo", progress=False)
