"""Which attention serves which kind of step: chosen from times, and each step sent to the one that was chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.errors import InvalidConfig
from engine.kernels.api import AttentionShape, BatchMeta
from engine.kernels.phases import PhasedAttention, choose, trial
from engine.kernels.reference import TorchAttention
from engine.kernels.select import load_backend

PROMPTS = trial(rows=1, start=0, count=64, page_size=16, num_pages=100)
SINGLES = trial(rows=8, start=64, count=1, page_size=16, num_pages=100)


class Named:
    """An attention that says who it is."""

    generation = 3

    def __init__(self, name: str) -> None:
        self.name = name
        self.plans: list[tuple[BatchMeta, int | None]] = []

    def plan(self, meta: BatchMeta, fixed_rows: int | None = None) -> str:
        self.plans.append((meta, fixed_rows))
        return f"plan of {self.name}"

    def run(self, handle: str, layer: int, *rest: Any) -> tuple[str, str, int]:
        return self.name, handle, layer

    run_rotary = run


def chosen(prompts: dict[str, float], singles: dict[str, float]) -> tuple[str, str]:
    choice = choose(tuple(prompts), lambda name, meta: (prompts if meta is PROMPTS else singles)[name], PROMPTS, SINGLES)
    assert choice.seconds == {"prompts": prompts, "singles": singles} and "us" in str(choice)
    return choice.prompts, choice.singles


def test_each_phase_takes_the_faster_one() -> None:
    assert chosen({"ours": 2.0, "other": 1.0}, {"ours": 1.0, "other": 2.0}) == ("other", "ours")
    assert chosen({"ours": 1.0, "other": 2.0}, {"ours": 2.0, "other": 1.0}) == ("ours", "other")


def test_a_difference_that_may_be_chance_changes_nothing() -> None:
    assert chosen({"ours": 1.0, "other": 0.98}, {"ours": 1.0, "other": 0.96}) == ("ours", "other")


def test_steps_go_to_the_attention_of_their_kind() -> None:
    prompts, singles = Named("prompts"), Named("singles")
    both = PhasedAttention(prompts, singles)
    assert both.generation == 3

    for meta, wanted in ((PROMPTS, prompts), (SINGLES, singles)):
        handle = both.plan(meta)
        assert both.run(handle, 5, *[None] * 4) == both.run_rotary(handle, 5, *[None] * 5) == (
            wanted.name, f"plan of {wanted.name}", 5
        )  # fmt: skip
    both.plan(SINGLES, fixed_rows=16)
    assert prompts.plans == [(PROMPTS, None)] and singles.plans == [(SINGLES, None), (SINGLES, 16)]


def test_a_trial_stays_within_the_pages_there_are() -> None:
    for rows, start, count, pages in ((1, 0, 64, 4), (32, 2047, 1, 100), (32, 2047, 1, 100_000), (1, 0, 2, 1)):
        meta = trial(rows=rows, start=start, count=count, page_size=16, num_pages=pages)
        assert all(0 <= page < pages for table in meta.tables for page in table)
        assert all(len(table) * 16 >= start + count for table in meta.tables)
        if pages >= rows * len(meta.tables[0]):
            assert len({page for table in meta.tables for page in table}) == rows * len(meta.tables[0])


@pytest.mark.parametrize("attention", ["triton", "flashinfer"])
def test_kernels_of_a_gpu_are_refused_on_a_cpu(attention: str) -> None:
    with pytest.raises(InvalidConfig, match=f"--attention-backend {attention} needs a GPU"):
        load_backend("cpu", attention)


def test_plain_torch_can_be_asked_for() -> None:
    kv = torch.zeros(1, 1, 2, 16, 2, 8)
    assert isinstance(load_backend("cpu", "torch").attention(kv, AttentionShape(2, 8, 8)), TorchAttention)
