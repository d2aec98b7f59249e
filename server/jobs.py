"""The jobs of the offline tenant as this server knows them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JobView:
    """One job at one moment: what `GET /v1/batches`, the metrics and the dashboard tell of it.

    `state` is the batch's status in OpenAI's words, or "paused"; `reason` says why. `done` counts lines that have a record,
    `failed` those of them in the error file. Seconds are None while nothing is known about the rate.
    """

    id: str
    state: str
    done: int
    failed: int
    total: int
    priority: int  # lower goes first
    tokens_s: float  # prompt and output tokens of its finished lines, lately
    eta_s: float | None
    slack_s: float | None  # until the deadline once it is done; negative: it will miss its window
    reason: str | None = None  # why it stands still: by_request, disk_full, …
    input_tokens: int = 0
    output_tokens: int = 0
    created_at: int = 0  # Unix seconds
    expires_at: int = 0

    @property
    def progress(self) -> float:
        """0 to 1."""
        return self.done / self.total if self.total else 0.0
