"""Sampling on the device without waiting for it: the meaning is `engine.kernels.sampling`'s, the work is two kernels.

The host packs the parameters of the rows that need more than their likeliest token and copies them once. Grammars' masks (made
by the host while the device computed the step), penalties and bias are applied to a copy of those rows; one program then picks
each row's token. top_k and top_p find their thresholds by searching the bits of a value, 2 bits a pass over the row, so nothing
is sorted. Rows with unusable logits are told apart by their largest raw logit, as in `sampling`. Nothing of the device's is
waited for until `collect`. The kernels have not yet run on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from engine.errors import NOT_FINITE, RequestFailed
from engine.kernels.sampling import Sample, SampledRow, allowed_ids, floored, is_masked, takes_likeliest
from engine.types import TokenLogprob

_BLOCK = 4096  # ids that a program looks at together
_ENTRIES = 256
_IN_PROMPT = tl.constexpr(1 << 30)  # bit of a count that says: somewhere in the sequence
_TOP_KEY = tl.constexpr(0x7F800000)  # bits of infinity


@triton.jit
def mask_kernel(logits_ptr, rows_ptr, bits_ptr, vocab, words, BLOCK: tl.constexpr):
    """logits[row, id] = -inf where the bit of the id is 0, for rows with `words` int32 of bits each."""
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + entry).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab
    word = tl.load(bits_ptr + entry * words + (ids >> 5), mask=inside, other=0)
    shut = ((word >> (ids & 31)) & 1) == 0
    tl.store(logits_ptr + row * vocab + ids, float("-inf"), mask=inside & shut)


@triton.jit
def bias_kernel(logits_ptr, rows_ptr, ids_ptr, bias_ptr, num_entries, vocab, BLOCK: tl.constexpr):
    """logits[row, id] += bias for entries that name no place twice."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < num_entries
    at = tl.load(rows_ptr + entry, mask=inside, other=0).to(tl.int64) * vocab
    at += tl.load(ids_ptr + entry, mask=inside, other=0)
    bias = tl.load(bias_ptr + entry, mask=inside, other=0.0)
    tl.store(logits_ptr + at, tl.load(logits_ptr + at, mask=inside, other=0.0) + bias, mask=inside)


@triton.jit
def count_kernel(counts_ptr, rows_ptr, ids_ptr, is_output_ptr, num_entries, vocab, BLOCK: tl.constexpr):
    """Count the output tokens of each row and mark all tokens of its sequence, in one int32 each."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < num_entries
    at = tl.load(rows_ptr + entry, mask=inside, other=0).to(tl.int64) * vocab
    at += tl.load(ids_ptr + entry, mask=inside, other=0)
    is_output = tl.load(is_output_ptr + entry, mask=inside, other=0)
    tl.atomic_or(counts_ptr + at, _IN_PROMPT, mask=inside)
    tl.atomic_add(counts_ptr + at, 1, mask=inside & (is_output != 0))


@triton.jit
def penalty_kernel(logits_ptr, counts_ptr, params_ptr, vocab, BLOCK: tl.constexpr):
    """Repetition over every token of the sequence, then frequency and presence over the output, in place."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab
    repetition = tl.load(params_ptr + row * 8 + 4).to(tl.float32)
    frequency = tl.load(params_ptr + row * 8 + 5).to(tl.float32)
    presence = tl.load(params_ptr + row * 8 + 6).to(tl.float32)
    counts = tl.load(counts_ptr + row * vocab + ids, mask=inside, other=0)
    x = tl.load(logits_ptr + row * vocab + ids, mask=inside, other=0.0)
    x = tl.where(counts != 0, tl.where(x > 0.0, x / repetition, x * repetition), x)
    times = counts & (_IN_PROMPT - 1)
    x = tl.where(times > 0, x - (frequency * times.to(tl.float32) + presence), x)
    tl.store(logits_ptr + row * vocab + ids, x, mask=inside & (counts != 0))


@triton.jit
def as_key(depth):
    """An int32 >= 0 that grows as `depth` (float32, 0 to infinity) shrinks."""
    return -(depth.to(tl.int32, bitcast=True) - _TOP_KEY)


@triton.jit
def as_depth(key):
    """The depth that has this key."""
    return (-(key - _TOP_KEY)).to(tl.float32, bitcast=True)


@triton.jit
def load_keys(row_ptr, ids, vocab, best, temperature):
    """Of some ids: an int32 key that orders them as their scaled logits do, and their weight exp(scaled) in [0, 1]."""
    x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))
    depth = (best - x) / temperature  # >= 0, so its bits are in its order
    return as_key(depth), tl.exp(-depth)


@triton.jit
def mass_from(row_ptr, vocab, best, temperature, least, BLOCK: tl.constexpr):
    """The weight of all ids whose key is at least `least`, float64."""
    ids = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, vocab, BLOCK):
        key, weight = load_keys(row_ptr, start + ids, vocab, best, temperature)
        acc += tl.where(key >= least, weight, 0.0)
    return tl.sum(acc.to(tl.float64), axis=0)


@triton.jit
def find_threshold(row_ptr, vocab, best, temperature, least, target, BLOCK: tl.constexpr, MASS: tl.constexpr):
    """The largest key such that the ids from it upwards number (or, with MASS, weigh) at least `target`.

    Ids whose key is under `least` do not count.
    """
    ids = tl.arange(0, BLOCK)
    found = tl.full([], 0, dtype=tl.int32)
    for step in range(16):
        shift = tl.maximum(29 - 2 * step, 0)
        digit = tl.full([], 1, dtype=tl.int32) << shift
        one = tl.zeros([BLOCK], dtype=tl.float32)
        two = tl.zeros([BLOCK], dtype=tl.float32)
        three = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, vocab, BLOCK):
            key, weight = load_keys(row_ptr, start + ids, vocab, best, temperature)
            share = tl.where(key >= least, weight, 0.0) if MASS else tl.where(key >= least, 1.0, 0.0)
            one += tl.where(key >= found + digit, share, 0.0)
            two += tl.where(key >= found + digit * 2, share, 0.0)
            three += tl.where(key >= found + digit * 3, share, 0.0)
        steps = (tl.sum(one.to(tl.float64), axis=0) >= target).to(tl.int32)
        steps += (tl.sum(two.to(tl.float64), axis=0) >= target).to(tl.int32)
        steps += (tl.sum(three.to(tl.float64), axis=0) >= target).to(tl.int32)
        found += steps * digit
    return found


@triton.jit
def draw_id(row_ptr, vocab, best, temperature, least, equals, target, BLOCK: tl.constexpr):
    """The first id, ascending, at which the running weight exceeds `target`.

    Counted are ids whose key is above `least` and the first `equals` of those whose key is it.
    """
    ids = tl.arange(0, BLOCK)
    running = tl.full([], 0.0, dtype=tl.float64)
    met = tl.full([], 0, dtype=tl.int32)
    drawn = tl.full([], -1, dtype=tl.int32)
    last = tl.full([], -1, dtype=tl.int32)
    start = tl.full([], 0, dtype=tl.int32)
    while (start < vocab) & (drawn < 0):
        key, weight = load_keys(row_ptr, start + ids, vocab, best, temperature)
        equal = (key == least).to(tl.int32)
        here = tl.sum(equal, axis=0)
        kept = key >= least
        if met + here > equals:
            kept = (key > least) | ((equal != 0) & (met + tl.cumsum(equal, axis=0) <= equals))
        met += here
        weight = tl.where(kept, weight, 0.0).to(tl.float64)
        last = tl.maximum(last, tl.max(tl.where(weight > 0.0, start + ids, -1), axis=0))
        mass = tl.sum(weight, axis=0)
        if running + mass > target:
            beyond = (running + tl.cumsum(weight, axis=0) > target) & (weight > 0.0)
            first = tl.min(tl.where(beyond, start + ids, vocab), axis=0)
            drawn = tl.where(first < vocab, first, -1)
        running += mass
        start += BLOCK
    return tl.where(drawn < 0, last, drawn)  # a target rounded up to the very end


@triton.jit
def pick_kernel(logits_ptr, params_ptr, token_ptr, vocab, BLOCK: tl.constexpr):
    """The token of one row of adjusted logits [N, vocab]; -1 if every id is at minus infinity."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * vocab
    params_ptr += row * 8
    temperature = tl.load(params_ptr).to(tl.float32)
    ids = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    place = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(row_ptr + start + ids, mask=start + ids < vocab, other=float("-inf"))
        place = tl.where(x > highest, start + ids, place)
        highest = tl.maximum(highest, x)
    best = tl.max(highest, axis=0)
    token = tl.min(tl.where(highest == best, place, vocab), axis=0)
    if (temperature > 0.0) & (best > float("-inf")):
        top_k = tl.load(params_ptr + 1)
        top_p = tl.load(params_ptr + 2)
        least = as_key(tl.load(params_ptr + 3).to(tl.float32))  # min_p
        equals = vocab
        if top_k > 0.0:
            kth = find_threshold(row_ptr, vocab, best, temperature, 0, top_k, BLOCK, False)
            least = tl.maximum(least, kth)
        mass = mass_from(row_ptr, vocab, best, temperature, least, BLOCK)
        if top_p < 1.0:
            wanted = top_p * mass
            least = find_threshold(row_ptr, vocab, best, temperature, least, wanted, BLOCK, True)
            above = mass_from(row_ptr, vocab, best, temperature, least + 1, BLOCK)
            weight = tl.exp(-as_depth(least)).to(tl.float64)
            missing = (wanted - above) / weight
            equals = tl.maximum(missing.to(tl.int32) + (missing > missing.to(tl.int32)).to(tl.int32), 1)
            mass = above + weight * equals
        target = tl.load(params_ptr + 7) * mass
        token = draw_id(row_ptr, vocab, best, temperature, least, equals, target, BLOCK)
    tl.store(token_ptr + row, tl.where(best == float("-inf"), -1, token).to(tl.int64))


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of some rows; `value` and `rank` [N], `top_ids` and `top_values` [N, largest top]."""

    places: tuple[int, ...]  # which rows of the batch
    tops: tuple[int, ...]
    value: torch.Tensor
    rank: torch.Tensor
    top_ids: torch.Tensor
    top_values: torch.Tensor

    def entries(self, tokens: Sequence[int]) -> dict[int, TokenLogprob]:
        """By place in the batch, given the token of each place."""
        lists = (x.tolist() for x in (self.value, self.rank, self.top_ids, self.top_values))
        found = {}
        for place, top, value, rank, ids, values in zip(self.places, self.tops, *lists, strict=True):
            pairs = zip(ids[:top], values[:top], strict=True)
            found[place] = TokenLogprob(tokens[place], floored(value), rank, tuple((i, floored(v)) for i, v in pairs))
        return found


@dataclass(frozen=True, slots=True)
class DeviceSampled:
    """The outcomes of a batch, on their way to the host."""

    best: torch.Tensor  # [S] largest raw logit: not finite where the logits are unusable
    tokens: torch.Tensor  # [S] int64; -1: every id suppressed
    token_ids: torch.Tensor  # the same on the device
    logprobs: Logprobs | None
    done: Any  # CUDA event after the copies, or None
    errors: dict[int, str]  # by place in the batch: rows whose grammar came to no end

    def collect(self) -> list[Sample]:
        """One outcome per row. Waits for the device."""
        if self.done is not None:
            self.done.synchronize()
        best, tokens = self.best.tolist(), self.tokens.tolist()
        entries = self.logprobs.entries(tokens) if self.logprobs else {}
        outcomes = enumerate(zip(best, tokens, strict=True))
        return [_outcome(*pair, entries.get(place), self.errors.get(place)) for place, pair in outcomes]


def _outcome(best: float, token: int, logprob: TokenLogprob | None, error: str | None) -> Sample:
    if not math.isfinite(best):
        return Sample(error=NOT_FINITE)
    if error is not None:
        return Sample(error=error)
    if token < 0:
        return Sample(error="no token may be sampled: all are suppressed")
    return Sample(token, logprob)


def sample(logits: torch.Tensor, rows: Sequence[SampledRow]) -> DeviceSampled:
    """Choose the next token of each row, as `sampling.sample` does. `logits` is float32 [S, vocab] and left unchanged."""
    best, tokens = logits.max(dim=-1)
    places = [place for place, row in enumerate(rows) if not takes_likeliest(row)]
    errors: dict[int, str] = {}
    if places:
        where = _send(np.array(places, np.int64), logits.device)
        chosen = logits.index_select(0, where)
        errors = {places[index]: text for index, text in _mask(chosen, [rows[place] for place in places]).items()}
        tokens[where] = _pick(chosen, [rows[place] for place in places])
    logprobs = _logprobs(logits, tokens, rows)
    best, fetched, logprobs = _fetch(best), _fetch(tokens), logprobs and _fetch_logprobs(logprobs)
    done = None
    if logits.is_cuda:
        done = torch.cuda.Event()
        done.record()
    return DeviceSampled(best, fetched, tokens, logprobs, done, errors)


def _mask(logits: torch.Tensor, rows: Sequence[SampledRow]) -> dict[int, str]:
    """Shut out in `logits` [N, vocab] what the rows' grammars do not allow. The errors of grammars, by row."""
    vocab = logits.shape[1]
    masks: dict[int, npt.NDArray[np.uint8]] = {}
    errors: dict[int, str] = {}
    for index, row in enumerate(rows):
        if is_masked(row):
            try:
                masks[index] = allowed_ids(row, vocab)
            except RequestFailed as error:
                errors[index] = str(error)
    if masks:
        bits = _send(np.stack(list(masks.values())).view(np.int32), logits.device)
        places = _send(np.array(list(masks), np.int32), logits.device)
        block = min(_BLOCK, triton.next_power_of_2(vocab))
        mask_kernel[(len(masks), triton.cdiv(vocab, block))](logits, places, bits, vocab, bits.shape[1], BLOCK=block)
    return errors


def _pick(logits: torch.Tensor, rows: Sequence[SampledRow]) -> torch.Tensor:
    """[N] int64 tokens for rows of logits [N, vocab] that may be overwritten."""
    params = _send(np.array([_parameters(row, logits.shape[1]) for row in rows], np.float64), logits.device)
    _add_bias(logits, rows)
    _penalise(logits, rows, params)
    vocab = logits.shape[1]
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    pick_kernel[(len(rows),)](logits, params, tokens, vocab, BLOCK=block, num_warps=16)
    return tokens


def _parameters(row: SampledRow, vocab: int) -> tuple[float, ...]:
    p = row.params
    """What the kernels read of a row, in this order."""
    depth = abs(math.log(p.min_p)) if p.min_p > 0.0 else math.inf  # abs: minus zero has other bits
    return (
        p.temperature,
        p.top_k if 0 < p.top_k < vocab else 0,
        p.top_p,
        depth,
        p.repetition_penalty,
        p.frequency_penalty,
        p.presence_penalty,
        row.uniform,
    )


def _add_bias(logits: torch.Tensor, rows: Sequence[SampledRow]) -> None:
    """Logit bias, and minus infinity for suppressed ids."""
    added: dict[tuple[int, int], float] = {}
    for index, row in enumerate(rows):
        for token, bias in row.params.logit_bias:
            added[index, token] = added.get((index, token), 0.0) + bias
        for token in () if is_masked(row) else row.suppress:
            added[index, token] = -math.inf
    if added:
        places = _send(np.array(list(added), np.int32).T.copy(), logits.device)
        amounts = _send(np.array(list(added.values()), np.float32), logits.device)
        bias_kernel[(triton.cdiv(len(added), _ENTRIES),)](
            logits, places[0], places[1], amounts, len(added), logits.shape[1], BLOCK=_ENTRIES
        )


def _penalise(logits: torch.Tensor, rows: Sequence[SampledRow], params: torch.Tensor) -> None:
    """Repetition, frequency and presence penalties."""
    parts: list[npt.NDArray[np.int32]] = []
    for index, row in enumerate(rows):
        p = row.params
        whole, outputs = p.repetition_penalty != 1.0, (p.frequency_penalty, p.presence_penalty) != (0.0, 0.0)
        if whole or outputs:
            first = 0 if whole else min(row.num_prompt, row.end)
            ids = np.array(row.tokens[first : row.end], np.int32)
            is_output = np.arange(first, first + len(ids), dtype=np.int64) >= row.num_prompt
            parts.append(np.stack([np.full(len(ids), index, np.int32), ids, is_output.astype(np.int32)]))
    entries = np.concatenate(parts, axis=1) if parts else np.empty((3, 0), np.int32)
    if not entries.shape[1]:
        return
    counts = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    sent = _send(entries, logits.device)
    vocab = logits.shape[1]
    count_kernel[(triton.cdiv(entries.shape[1], _ENTRIES),)](
        counts, sent[0], sent[1], sent[2], entries.shape[1], vocab, BLOCK=_ENTRIES
    )
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    penalty_kernel[(len(rows), triton.cdiv(vocab, block))](logits, counts, params, vocab, BLOCK=block)


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor, rows: Sequence[SampledRow]) -> Logprobs | None:
    asked = [(place, row.params.logprobs) for place, row in enumerate(rows) if row.params.logprobs is not None]
    if not asked:
        return None
    places, tops = zip(*asked, strict=True)
    where = _send(np.array(places, np.int64), logits.device)
    logprobs = logits.index_select(0, where).log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens.index_select(0, where).clamp_min(0)[:, None])
    rank = (logprobs > chosen).sum(dim=-1) + 1
    values, ids = logprobs.topk(min(max(tops), logits.shape[1]), dim=-1)
    return Logprobs(places, tops, chosen[:, 0], rank, ids, values)


def _fetch_logprobs(x: Logprobs) -> Logprobs:
    return Logprobs(x.places, x.tops, _fetch(x.value), _fetch(x.rank), _fetch(x.top_ids), _fetch(x.top_values))


def _send(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy on the device; pinned first, so that nothing waits."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _fetch(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host that is complete once an event recorded after this call is."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
