"""Backlog: online requests without a first token yet, and the bounds on how many there may be and how much they bring."""

from __future__ import annotations

import threading
from collections.abc import Callable

from engine.config import EngineConfig
from engine.errors import Overloaded


class Backlog:
    """Thread-safe. A request is known by its key from `add` to `gone`; `begun` says that it has its first token.

    `num_running` tells how many online sequences run now: the others of those added wait.
    """

    def __init__(self, config: EngineConfig, num_running: Callable[[], int]) -> None:
        self._most_waiting = config.max_num_queued_reqs
        self._most_tokens = config.max_num_queued_tokens
        self._num_running = num_running
        self._lock = threading.Lock()
        self._sequences: dict[str, int] = {}
        self._num_sequences = 0
        self._prompts: dict[str, int] = {}  # tokens, of those without a first token
        self.tokens = 0  # the sum of these

    def check(self) -> None:
        """Raise Overloaded if one more request could not even wait."""
        if self._num_sequences - self._num_running() >= self._most_waiting:
            raise Overloaded(f"{self._most_waiting} requests are waiting already; try again later")

    def check_prompt(self, tokens: int) -> None:
        """Raise Overloaded if a prompt of so many tokens is more than may wait. Where nothing waits it may be any length."""
        if self._most_tokens and self.tokens and self.tokens + tokens > self._most_tokens:
            raise Overloaded(
                f"prompts of {self.tokens} tokens wait already, {tokens} more would exceed {self._most_tokens}; try again later"
            )

    def add(self, key: str, sequences: int, tokens: int) -> None:
        with self._lock:
            self._sequences[key] = sequences
            self._num_sequences += sequences
            self._prompts[key] = tokens
            self.tokens += tokens

    def begun(self, key: str) -> None:
        """It has a first token. Costs nothing after the first time."""
        if key in self._prompts:
            with self._lock:
                self.tokens -= self._prompts.pop(key, 0)

    def gone(self, key: str) -> None:
        """It ended. Nothing where it is not known (any more)."""
        self.begun(key)
        with self._lock:
            self._num_sequences -= self._sequences.pop(key, 0)
