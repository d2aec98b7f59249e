"""Trace files of each public format, read by column name from small samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.traces import PREFIX_BLOCK, PromptMaker, TraceError, TraceRequest, facts, generate_trace, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:03.9799600,4808,10
2023-11-17 00:00:00.0000000,110,27
"""
BURST_1 = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,0,1087,Conversation log
118,ChatGPT,417,276,693,API log
"""
BURST_3 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5270400.5,7,3.2,ChatGPT,472,18,490,Conversation log
"""
MOONCAKE = """{"timestamp": 27000, "input_length": 1030, "output_length": 52, "hash_ids": [46, 47, 2]}

{"timestamp": 30500, "input_length": 600, "output_length": 26, "hash_ids": [46, 9]}
"""
VIDUR = """num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio
3772,54,3826,69.85
2015,156,2171,12.9
"""


def read(tmp_path: Path, text: str, limit: int | None = None) -> list[TraceRequest]:
    path = tmp_path / "trace"
    path.write_text(text, encoding="utf-8")
    return read_trace(path, limit)


def test_azure_is_sorted_and_starts_at_zero(tmp_path: Path) -> None:
    requests = read(tmp_path, AZURE)
    assert [r.prompt_tokens for r in requests] == [4808, 3180, 110]
    assert [r.output_tokens for r in requests] == [10, 8, 27]
    assert [r.arrival_s for r in requests] == pytest.approx([0.0, 0.052, 20576.02004], abs=1e-4)


def test_columns_are_found_by_name_not_by_position_or_case(tmp_path: Path) -> None:
    rows = [line.split(",")[::-1] for line in AZURE.splitlines()]
    swapped = "\n".join(",".join(row) for row in rows).replace("ContextTokens", " context_tokens ")
    assert read(tmp_path, swapped) == read(tmp_path, AZURE)


def test_a_byte_order_mark_and_windows_lines_are_no_hindrance(tmp_path: Path) -> None:
    assert read(tmp_path, "\ufeff" + AZURE.replace("\n", "\r\n")) == read(tmp_path, AZURE)


def test_burstgpt_leaves_out_failed_calls(tmp_path: Path) -> None:
    assert read(tmp_path, BURST_1) == [TraceRequest(0.0, 472, 18), TraceRequest(113.0, 417, 276)]


def test_burstgpt_3_has_columns_in_between_and_starts_late(tmp_path: Path) -> None:
    assert read(tmp_path, BURST_3) == [TraceRequest(0.0, 472, 18)]


def test_mooncake_has_milliseconds_and_prefix_ids(tmp_path: Path) -> None:
    assert read(tmp_path, MOONCAKE) == [TraceRequest(0.0, 1030, 52, (46, 47, 2)), TraceRequest(3.5, 600, 26, (46, 9))]


def test_vidur_has_lengths_only(tmp_path: Path) -> None:
    assert read(tmp_path, VIDUR) == [TraceRequest(0.0, 3772, 54), TraceRequest(0.0, 2015, 156)]


def test_limit_counts_rows_of_the_file(tmp_path: Path) -> None:
    assert len(read(tmp_path, BURST_1, limit=2)) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "prompt tokens.*found: a, b"),
        ("", "found: none"),
        ("timestamp,input_tokens,output_tokens\n1,12,x\n", "line 2"),
        ("timestamp,input_tokens,output_tokens\n1,12,3\nnan,12,3\n", "line 3.*not a time"),
        ("timestamp,input_tokens,output_tokens\nyesterday,12,3\n", "line 2"),
        ("timestamp,input_tokens,output_tokens\n1,-12,3\n", "line 2.*tokens"),
        ("timestamp,input_tokens,output_tokens\n1,12\n", "line 2"),
        ("timestamp,input_tokens,output_tokens\n1,12,0\n", "no request"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1}\n{"timestamp": ', "line 2: not JSON"),
        ('{"timestamp": 1, "output_length": 1}\n', "line 1: no column for prompt tokens"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1}\n[]\n', "line 2: not a JSON object"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": 3}\n', "line 1"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(TraceError, match=says) as caught:
        read(tmp_path, text)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_file_is_a_trace_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="nowhere"):
        read_trace(tmp_path / "nowhere")


def test_generated_traces_are_seeded_and_as_bursty_as_asked() -> None:
    smooth = generate_trace(rate=3.0, seconds=2000.0, seed=1)
    bursty = generate_trace(rate=3.0, seconds=2000.0, burstiness=4.0, seed=1)
    assert smooth == generate_trace(rate=3.0, seconds=2000.0, seed=1)
    assert smooth != generate_trace(rate=3.0, seconds=2000.0, seed=2)
    assert facts(smooth).rate == pytest.approx(3.0, rel=0.1)
    assert facts(smooth).dispersion == pytest.approx(1.0, abs=0.3)
    assert facts(bursty).dispersion > 3.0


def test_prompts_share_exactly_what_their_prefix_ids_share() -> None:
    maker = PromptMaker(50_000)
    first = maker.prompt(TraceRequest(0.0, 2 * PREFIX_BLOCK + 100, 1, (1, 2, 3)))
    second = maker.prompt(TraceRequest(0.0, 2 * PREFIX_BLOCK + 50, 1, (1, 2, 3)))
    other = maker.prompt(TraceRequest(0.0, 2 * PREFIX_BLOCK, 1, (1, 5)))
    assert len(first) == 2 * PREFIX_BLOCK + 100
    assert first[: len(second)] == second
    assert other[:PREFIX_BLOCK] == first[:PREFIX_BLOCK]
    assert other[PREFIX_BLOCK:] != first[PREFIX_BLOCK : 2 * PREFIX_BLOCK]


def test_prompts_without_prefix_ids_differ_and_have_any_length() -> None:
    maker = PromptMaker(1000, pool=256)
    prompts = [maker.prompt(TraceRequest(0.0, 700, 1)) for _ in range(3)]
    assert [len(prompt) for prompt in prompts] == [700] * 3
    assert len(set(prompts)) == 3
    assert all(0 <= token < 1000 for token in prompts[0])
