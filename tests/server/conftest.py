"""Engines for the whole area."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers import tiny_checkpoint
from serving import LONG_CONTEXT, make_engine

from engine import Engine


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with make_engine(tmp_path_factory.mktemp("model")) as engine:
        yield engine


@pytest.fixture(scope="session")
def long_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """For requests that must not end by themselves."""
    with make_engine(tmp_path_factory.mktemp("model"), context=LONG_CONTEXT) as engine:
        yield engine


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Two models; `night` is the offline one."""
    other = tiny_checkpoint(tmp_path_factory.mktemp("other"), "qwen3", seed=3)
    with make_engine(
        tmp_path_factory.mktemp("model"), offline_model=str(other), offline_served_model_name="night", kv_cache_memory=16 << 20
    ) as engine:
        yield engine
