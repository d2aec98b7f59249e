"""The grammars of the tiny model."""

from __future__ import annotations

import pytest
from helpers import tiny_checkpoint

from engine.grammar import Grammars
from engine.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def grammars(tmp_path_factory):
    tokenizer = Tokenizer.load(tiny_checkpoint(tmp_path_factory.mktemp("model")))
    made = Grammars(lambda: tokenizer, 264, (258,))  # <|im_end|>
    yield made
    made.close()
