"""Engines for the whole area."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
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
