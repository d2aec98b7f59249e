"""What the sections share: the device (a GPU, or the CPU in a dry run), timing, and the rows of a result.

Times are medians of device events after a warm-up, on random data. In a dry run everything has toy sizes and the times mean
nothing; what is checked is that the code runs.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

COPY_BYTES = 4 * 2**30
GEMM_SIZE = 8192


class Skip(Exception):
    """This part cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Row:
    """One number. `share` is of the ceiling that the section names, `aim` what the share should be at least."""

    name: str
    value: float | None
    unit: str
    share: float | None = None
    aim: float | None = None
    note: str = ""


@dataclass
class Bench:
    """A section under way."""

    section: str
    dry: bool
    folder: Path = Path("bench/results")
    limit: float = 600.0  # seconds until the script ends the section
    rows: list[Row] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def size(self, real: int, toy: int) -> int:
        return toy if self.dry else real

    def row(self, name: str, value: float | None, unit: str, **more: Any) -> None:
        self.rows.append(Row(name, value, unit, **more))
        print(line(self.rows[-1]), flush=True)

    def text(self, line: str) -> None:
        """A line of a table that others made."""
        self.rows.append(Row(line, None, ""))
        print(line, flush=True)

    def attempt(self, name: str, work: Callable[[], None]) -> None:
        """Run a part of the section; what goes wrong becomes a row, and the next part runs."""
        try:
            work()
        except Skip as reason:
            self.row(name, None, "", note=f"skipped: {reason}")
        except Exception as error:
            traceback.print_exc()
            self.row(name, None, "", note=f"failed: {type(error).__name__}: {first_line(error)}")
        if not self.dry:
            torch.cuda.empty_cache()

    def save(self, folder: Path, seconds: float) -> None:
        result = {"section": self.section, "dry_run": self.dry, "seconds": round(seconds, 1)}
        result["rows"] = [asdict(row) for row in self.rows]
        (folder / f"gpu_{self.section}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def first_line(error: BaseException) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0][:200]


def line(row: Row) -> str:
    """A row for people."""
    value = "" if row.value is None else f"{row.value:,.4g} {row.unit}"
    share = "" if row.share is None else f"{100 * row.share:.0f} %"
    if row.share is not None and row.aim is not None:
        share += f" (aim {100 * row.aim:.0f} %{'' if row.share >= row.aim else ', missed'})"
    return f"{row.name:<52} {value:>20}  {share:<24} {row.note}".rstrip()


def seconds_of(bench: Bench, work: Callable[[], object], budget: float = 0.3) -> float:
    """Median time of one call, of as many as fit in about `budget` seconds, at least 5."""
    if bench.dry:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    repeats = max(5, min(200, int(budget / max(1e-6, time.perf_counter() - start))))
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in marks:
        before.record()
        work()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in marks) / 1e3


def graphed(bench: Bench, work: Callable[[], object]) -> Callable[[], object]:
    """`work` as one graph launch, for work so short that launching it is what would be measured."""
    if bench.dry:
        return work
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@functools.cache
def _ceilings(dry: bool) -> tuple[float, float]:
    bench = Bench("ceilings", dry)
    n = bench.size(COPY_BYTES, 1 << 20)
    source = torch.empty(n, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    copy = 2 * n / seconds_of(bench, lambda: target.copy_(source))
    size = bench.size(GEMM_SIZE, 64)
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    return copy, 2 * size**3 / seconds_of(bench, lambda: a @ b, 1.0)


def copy_ceiling(bench: Bench) -> float:
    """Bytes per second of a large copy, read and written bytes both counted."""
    return _ceilings(bench.dry)[0]


def matmul_ceiling(bench: Bench) -> float:
    """Operations per second of a large bf16 product."""
    return _ceilings(bench.dry)[1]


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """|out - expected| / |expected|; NaN if any element of `out` is."""
    expected = expected.double()
    return float((out.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def check(name: str, error: float, bound: float, bench: Bench) -> None:
    """A row that says whether an error is within its bound."""
    verdict = "right" if error <= bound else f"WRONG: more than {bound:g}"
    bench.row(name, error, "relative error", note=verdict)
