"""The scheduler benchmark on tiny sizes: it finishes what it starts and reports what it ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.scheduler import main, parser, replay_once, run_depth
from bench.traces import TraceRequest


@pytest.mark.parametrize("how", ["streamed", "queued"])
def test_every_line_of_a_job_finishes(how: str) -> None:
    args = parser().parse_args(["--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--prompt", "20", "--output", "5"])
    result = run_depth(how, 40, args)
    assert result.finished == 40
    assert 0 < result.full_steps.steps <= result.all_steps.steps
    assert result.all_steps.p50 <= result.all_steps.p99 <= result.all_steps.max


def test_a_backlog_does_not_change_what_online_requests_feel() -> None:
    trace = [TraceRequest(second / 2, 100 + second, 6) for second in range(20)]
    args = parser().parse_args(["--max-num-seqs", "8", "--prompt", "64", "--output", "8", "--kv-tokens", "512"])
    alone = replay_once("t", trace, False, args)
    beside = replay_once("t", trace, True, args)
    assert alone.finished == beside.finished == 20
    assert alone.offline_tokens == 0 < beside.offline_tokens
    layer_s = (args.step_ms / 1e3 + args.max_num_batched_tokens / args.tokens_per_second) / 4
    assert beside.ttft_p99 <= alone.ttft_p99 + 1.01 * layer_s  # the layer that ran when the request arrived
    assert beside.tpot_p99 == pytest.approx(alone.tpot_p99, rel=0.05)


def test_replay_reads_a_file_and_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, out = tmp_path / "trace.csv", tmp_path / "out.json"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,48,3\n2023-11-16 18:17:04.03,31,8\n")
    main(["replay", "--trace", str(trace), "--out", str(out)])
    assert "2 requests" in capsys.readouterr().out
    [result] = json.loads(out.read_text())["replay"]
    assert result["finished"] == 2
    assert result["ttft_p50"] > 0
