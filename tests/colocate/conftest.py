"""A control page, and real children around it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from processes import Children

from engine.colocate.control import ControlPage

SLABS = 5


@pytest.fixture
def control() -> Iterator[ControlPage]:
    page = ControlPage(SLABS)
    yield page
    page.close()


@pytest.fixture
def children(control: ControlPage) -> Iterator[Children]:
    family = Children(control)
    yield family
    family.close()
