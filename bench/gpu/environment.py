"""Section 1: what there is. The doctor's findings, one a row."""

from __future__ import annotations

from bench.gpu.common import Bench
from engine.doctor import examine


def run(bench: Bench) -> None:
    for finding in examine():
        bench.row(f"{finding.topic}: {finding.name}", None, "", note=f"{finding.state}: {finding.text}")
