"""Engines for the whole area."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import make_engine

from engine import Engine


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with make_engine(tmp_path_factory.mktemp("model")) as engine:
        yield engine
