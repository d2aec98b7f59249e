"""The split of attention into items: every key of every token once, within the promised number of items and partials."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.triton_plan import Rows, Split, TableMirror, plan_work, token_slots


def rows_of(pairs: list[tuple[int, int]]) -> Rows:
    starts, counts = (np.array(part, np.int64) for part in zip(*pairs, strict=True))
    return Rows(starts, counts, np.cumsum(counts) - counts, 100 * np.arange(len(pairs)))


@settings(max_examples=150, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 70)), min_size=1, max_size=12),
    unit=st.sampled_from([1, 4, 18, 32]),
    lanes=st.sampled_from([1, 5, 66, 528]),
    window=st.sampled_from([None, 1, 100, 5000]),
)
def test_every_key_is_seen_once(pairs: list[tuple[int, int]], unit: int, lanes: int, window: int | None) -> None:
    rows, split = rows_of(pairs), Split(unit, 64, 256, lanes)
    work = plan_work(rows, split, window)

    seen: dict[int, list[tuple[int, int]]] = {}
    slots = []
    for token, tokens, position, begin, end, table, slot, _ in work.items.tolist():
        row = table // 100
        assert rows.starts[row] + token - rows.offsets[row] == position and 1 <= tokens <= unit
        assert begin % 64 == 0 and begin < end <= position + tokens
        for i in range(tokens):
            seen.setdefault(token + i, []).append((begin, end))
        slots += [slot] if slot >= 0 else []
    for row, (start, count) in enumerate(pairs):
        for i in range(count):
            spans = sorted(seen.pop(int(rows.offsets[row]) + i))
            assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
            assert spans[0][0] <= (0 if window is None else max(0, start + i + 1 - window)) and spans[-1][1] > start + i
    assert not seen

    assert sorted(slots) == list(range(len(slots))) and len(slots) <= split.max_partials
    assert len(work.merges) <= split.max_partials // 2 * unit
    lengths = work.items[:, 4] - work.items[:, 3]
    assert (np.diff(lengths) <= 0).all()
    merged = sorted(m for _, _, first, count in work.merges.tolist() for m in range(first, first + count))
    assert set(merged) == set(slots)


def test_a_lone_long_row_fills_the_device_and_a_full_batch_is_left_whole() -> None:
    split = Split(4, 64, 256, lanes=66)

    assert len(plan_work(rows_of([(32767, 1)]), split, None).items) == 64  # 512 keys each
    assert len(plan_work(rows_of([(1023, 1)] * 200), split, None).merges) == 0
    assert len(plan_work(rows_of([(255, 1)]), split, None).items) == 1


def test_slots_follow_the_tables() -> None:
    rows = Rows(*(np.array(part, np.int64) for part in ((15, 0), (3, 2), (2, 0), (0, 2))))

    assert token_slots(rows, np.array([7, 4, 9], np.int32), 16, 8).tolist() == [144, 145, 127, 64, 65, -1, -1, -1]


def test_tables_are_converted_once_and_never_trusted_blindly() -> None:
    mirror, table = TableMirror(), [3, 1, 4]

    assert mirror.flatten([table, (9,)], [2, 1]).tolist() == [3, 1, 9]
    table += [1, 5]
    assert mirror.flatten([table], [5]).tolist() == [3, 1, 4, 1, 5]
    table[1] = 8  # nobody should, but a stale page would be another request's
    assert mirror.flatten([table], [5]).tolist() == [3, 8, 4, 1, 5]
    assert mirror.flatten([table], [2]).tolist() == [3, 8]
    with pytest.raises(ValueError, match="5 pages, 6 needed"):
        mirror.flatten([table], [6])
