"""Splits a step's attention into equal pieces of work, on the host, with integers.

A *unit* is a run of consecutive query tokens of one row (as many as fill one tile of the launch) and the keys they see. A long
unit is cut into *items* of about equal length so that the device is full and no item runs much longer than the rest; the
partial results of a cut unit are merged token by token. Items are ordered longest first, because the device starts them in
order. Nothing here knows torch or Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int32]

ITEM_FIELDS = 8  # first token, tokens, position of the first, key begin, key end, table start, partial slot or -1, unused
MERGE_FIELDS = 4  # token, token within its unit, first partial slot, number of partials


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a step as int64 arrays of equal length: `BatchMeta` and where each row's page table starts."""

    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    tables: npt.NDArray[np.int64]

    def __getitem__(self, chosen: npt.NDArray[np.bool_]) -> Rows:
        return Rows(self.starts[chosen], self.counts[chosen], self.offsets[chosen], self.tables[chosen])


@dataclass(frozen=True, slots=True)
class Split:
    """How one kind of launch likes its work cut. Lengths in tokens."""

    unit_tokens: int  # query tokens of one tile
    tile_keys: int  # items begin at multiples of this
    min_keys: int  # no item is made shorter than this by cutting
    lanes: int  # items that run at once on the device: multiprocessors x resident programs / KV heads

    @property
    def max_partials(self) -> int:
        """Partial results a step can need: an item of a cut unit holds more than half of a lane's share."""
        return 2 * self.lanes


@dataclass(frozen=True, slots=True)
class Work:
    """items [I, ITEM_FIELDS] and merges [M, MERGE_FIELDS], int32."""

    items: Ints
    merges: Ints


def ragged(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For groups of the given sizes laid end to end: the group of each element and its index within the group."""
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)


def token_slots(rows: Rows, tables: Ints, page_size: int, num_tokens: int) -> Ints:
    """[num_tokens]: page * page_size + place of each computed token in the KV, -1 where no row computes one."""
    row, within = ragged(rows.counts)
    position = rows.starts[row] + within
    slots = np.full(num_tokens, -1, np.int32)
    page = tables[rows.tables[row] + position // page_size]
    slots[rows.offsets[row] + within] = page * page_size + position % page_size
    return slots


def plan_work(rows: Rows, split: Split, window: int | None) -> Work:
    """Cut the attention of `rows` into items. With `window`, keys before it are left out."""
    row, unit = ragged(-(-rows.counts // split.unit_tokens))
    first = unit * split.unit_tokens
    tokens = np.minimum(rows.counts[row] - first, split.unit_tokens)
    position = rows.starts[row] + first
    end = position + tokens
    begin = np.zeros_like(end) if window is None else np.maximum(position - window + 1, 0)
    begin -= begin % split.tile_keys
    length = end - begin

    pieces, keys = _cut(length, split)
    owner, piece = ragged(pieces)
    item_begin = begin[owner] + piece * keys[owner]
    item_end = np.minimum(item_begin + keys[owner], end[owner])
    cut = pieces > 1
    first_slot = np.cumsum(np.where(cut, pieces, 0)) - pieces
    slot = np.where(cut[owner], first_slot[owner] + piece, -1)
    token = rows.offsets[row] + first
    items = np.stack(
        [
            token[owner],
            tokens[owner],
            position[owner],
            item_begin,
            item_end,
            rows.tables[row][owner],
            slot,
            np.zeros_like(slot),
        ],
        axis=1,
    ).astype(np.int32)
    longest_first = np.argsort(item_begin - item_end, kind="stable")

    merged, place = ragged(np.where(cut, tokens, 0))
    merges = np.stack([token[merged] + place, place, first_slot[merged], pieces[merged]], axis=1).astype(np.int32)
    return Work(items[longest_first], merges)


def _cut(length: npt.NDArray[np.int64], split: Split) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Into how many pieces each unit of this many keys is cut, and how many keys a piece holds."""
    share = max(split.min_keys, -(-int(length.sum()) // split.lanes))
    pieces = -(-length // share)
    keys = -(-length // (pieces * split.tile_keys)) * split.tile_keys
    return -(-length // keys), keys


class TableMirror:
    """Page tables as int32 arrays, kept between steps so that only new pages are converted.

    A mirror is used only for pages that compare equal to the ones it was made from, which is far cheaper than converting.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[list[int], Ints]] = {}

    def flatten(self, tables: Sequence[Sequence[int]], needed: Sequence[int]) -> Ints:
        """The first `needed[r]` pages of each table, one table after another; forgets tables not asked for."""
        kept: dict[int, tuple[list[int], Ints]] = {}
        parts = []
        for table, count in zip(tables, needed, strict=True):
            if len(table) < count:
                raise ValueError(f"page table has {len(table)} pages, {count} needed")
            pages = list(table[:count])
            before, ids = self._known.get(id(table), ([], np.empty(0, np.int32)))
            if pages[: len(before)] == before:
                ids = np.concatenate([ids, np.array(pages[len(before) :], np.int32)]) if len(pages) > len(before) else ids
            else:
                ids = np.array(pages, np.int32)
            kept[id(table)] = (pages, ids)
            parts.append(ids)
        self._known = kept
        return np.concatenate(parts) if parts else np.empty(0, np.int32)
