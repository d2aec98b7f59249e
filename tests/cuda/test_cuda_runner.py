"""The whole runner on the CUDA backend's classes against the same runner on the CPU: same tokens, with graphs and without."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from triton_device import DEVICE, REASON

if DEVICE is None:
    pytest.skip(REASON, allow_module_level=True)

import torch
from cuda_cases import ROWS, SPEC, make_cuda_runner, run_again
from runner_cases import GREEDY, generate, make_row, make_runner, run, stops_at

from engine.kernels.cuda_graphs import padded_sizes
from engine.sched.plan import StepPlan
from engine.types import SamplingParams

DRAWN = SamplingParams(temperature=0.8, top_p=0.9, top_k=30, presence_penalty=0.4, logprobs=2)
PROMPTS = ([5, 9, 33, 2, 71], [88], list(range(40, 59)))
QWEN3 = replace(SPEC, architecture="qwen3", qk_norm=True, windows=(None, 9))


def decode(runner, steps, params=(GREEDY,) * 3):
    """Tokens of three requests that share every step: their prompts in one, then one token each a step."""
    tokens = [list(prompt) for prompt in PROMPTS]
    computed = [0, 0, 0]
    for step in range(steps):
        rows = [
            make_row(
                str(i), tokens[i], start=computed[i], count=len(tokens[i]) - computed[i], pages=(3 * i + 1, 3 * i), sample=True,
                num_prompt=len(PROMPTS[i]), params=params[i], uniform=(0.37 * step + 0.21 * i) % 1,
            )
            for i in range(3)
        ]  # fmt: skip
        computed = [len(row) for row in tokens]
        results = run(runner, *rows)
        for i in range(3):
            assert results[str(i)].error is None
            tokens[i].append(results[str(i)].token)
    return tokens


@pytest.mark.parametrize("spec", [SPEC, QWEN3], ids=["llama", "qwen3-windows"])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_same_tokens_as_the_cpu(spec, graphs):
    params = (SamplingParams(temperature=0.0), DRAWN, SamplingParams(temperature=0.0, repetition_penalty=1.3))

    assert decode(make_cuda_runner(spec, graphs=graphs), 3, params) == decode(make_runner(spec), 3, params)


def test_chunks_do_not_matter():
    prompt = list(range(30))
    expected = generate(make_runner(SPEC), prompt, 2, (4, 2, 0))
    assert generate(make_cuda_runner(), prompt, 2, (4, 2, 0), chunk=11) == expected


def test_graphs_write_only_what_is_theirs():
    eager, graphed = make_cuda_runner(), make_cuda_runner(graphs=True)
    graphed.window.tensor.zero_()  # what recording wrote
    assert decode(eager, 2) == decode(graphed, 2)
    kv = [runner.window.tensor.view(torch.float32) for runner in (eager, graphed)]
    torch.testing.assert_close(kv[1], kv[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(kv[1] != 0, kv[0] != 0)


def test_parking_between_groups_changes_nothing():
    runner = make_cuda_runner(graphs=True)
    expected = decode(runner, 2)
    tokens = [row[:-1] for row in expected]
    rows = tuple(
        make_row(str(i), tokens[i], start=len(tokens[i]) - 1, pages=(3 * i + 1, 3 * i), sample=True) for i in range(3)
    )
    stops = stops_at(1)
    parked = runner.collect(runner.launch(StepPlan(0, rows, preemptible=True), next(stops)))
    assert parked.checkpoint is not None and parked.checkpoint.layer == 1
    decode(runner, 1)  # another step goes through the graphs' buffers meanwhile; it computes the same KV
    done = runner.collect(runner.resume(parked.checkpoint, frozenset({"1"}), next(stops)))

    assert [row.token for row in done.rows] == [expected[0][-1], expected[2][-1]]


def test_moved_buffers_are_recorded_anew():
    recorded = []

    def capture(work):
        recorded.append(work)
        return run_again(work)

    runner = make_cuda_runner(num_slabs=1, graphs=True, capture=capture, group=2)
    runner.window.tensor.zero_()  # what recording wrote
    before = len(recorded)
    tokens = list(range(64))
    # More pages in one step than the window has: rows that share them.
    rows = [make_row(str(i), tokens, start=63, pages=(0, 1, 2, 3), sample=True) for i in range(ROWS)]
    shared = run(runner, *rows)
    assert len(recorded) == before + 1
    alone = run(make_cuda_runner(), make_row("0", tokens, start=63, pages=(0, 1, 2, 3), sample=True))
    assert {result.token for result in shared.values()} == {alone["0"].token}


def test_serving_goes_on_without_graphs_when_recording_fails(caplog):
    def capture(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    with caplog.at_level(logging.WARNING):
        runner = make_cuda_runner(graphs=True, capture=capture)

    assert caplog.text.count("no CUDA graphs") == 1 and "not permitted" in caplog.text
    assert decode(runner, 2) == decode(make_runner(SPEC), 2)


def test_padded_sizes():
    assert padded_sizes(1) == (1,)
    assert padded_sizes(6) == (1, 2, 4, 6)
    assert padded_sizes(64)[-2:] == (56, 64)
    assert padded_sizes(1000)[-1] == 128
