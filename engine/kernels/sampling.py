"""From logits to tokens: penalties, filters, the draw, and log-probabilities.

Order of operations, as in vLLM: the grammar's mask and suppressed ids, logit bias, penalties (repetition over the whole
sequence; frequency and presence over the output), temperature, min_p, top_k, top_p, draw. Log-probabilities are those of the
raw logits, before all of it.

A draw spends one uniform number: the token is the inverse of the cumulative distribution over the surviving ids in
ascending order of id. Rows are treated one by one, so nothing that happens to one depends on its batch mates; only what
needs no parameters at all (the likeliest token of each row) is done for the batch at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.errors import NOT_FINITE, RequestFailed
from engine.types import Guide, SamplingParams, TokenLogprob

LOGPROB_FLOOR = -9999.0  # stands for minus infinity, which JSON has no word for
_OCTAVE_BITS = 7  # top_p sorts weights into 128 classes for each factor of two
_BLOCK = 256  # ids summed together in the first stage of a draw


class SampledRow(Protocol):
    """What sampling reads of a row; `sched.plan.PlanRow` is one."""

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def num_prompt(self) -> int: ...

    @property
    def end(self) -> int: ...

    @property
    def params(self) -> SamplingParams: ...

    @property
    def uniform(self) -> float: ...

    @property
    def suppress(self) -> tuple[int, ...]: ...

    @property
    def guide(self) -> Guide | None: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """The outcome of one row: exactly one of token and error."""

    token: int | None = None
    logprob: TokenLogprob | None = None
    error: str | None = None


class Outcomes(Protocol):
    """The outcomes of a batch, perhaps still on their way."""

    @property
    def token_ids(self) -> torch.Tensor:
        """[S] int64 where the logits are: the tokens as a next step reads them. Below 0, or any id, for a row with an error."""
        ...

    def collect(self) -> list[Sample]:
        """One outcome per row. Waits for the device."""
        ...


Sampler = Callable[[torch.Tensor, Sequence[SampledRow]], Outcomes]
"""What `sample` does: float32 logits [S, vocab] and their S rows to outcomes."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The outcomes of a batch, still on the device for rows that need nothing but their likeliest token."""

    best: torch.Tensor  # [S] float32: the largest logit; not finite where the logits are unusable
    likeliest: torch.Tensor  # [S] int64: its id, the lowest of equals
    chosen: dict[int, Sample]  # by place in the batch: the rows that asked for more

    @property
    def token_ids(self) -> torch.Tensor:
        ids = self.likeliest.clone()
        for place, outcome in self.chosen.items():
            ids[place] = -1 if outcome.token is None else outcome.token
        return ids

    def collect(self) -> list[Sample]:
        """One outcome per row. Waits for the device."""
        outcomes = zip(self.best.tolist(), self.likeliest.tolist(), strict=True)
        return [self._outcome(place, best, token) for place, (best, token) in enumerate(outcomes)]

    def _outcome(self, place: int, best: float, token: int) -> Sample:
        if not math.isfinite(best):
            return Sample(error=NOT_FINITE)
        return self.chosen.get(place) or Sample(token)


def sample(logits: torch.Tensor, rows: Sequence[SampledRow]) -> Sampled:
    """Choose the next token of each row. `logits` is float32 [S, vocab] for the S rows and is left unchanged.

    A row whose logits hold a not-a-number or plus infinity, or nothing above minus infinity, yields an error instead.
    """
    best, likeliest = logits.max(dim=-1)  # the first of equals; not-a-number wins over all numbers
    chosen = {
        place: _choose(logits[place], row)
        for place, row in enumerate(rows)
        if not takes_likeliest(row) and math.isfinite(best[place])
    }
    return Sampled(best, likeliest, chosen)


def takes_likeliest(row: SampledRow) -> bool:
    """True if all the row needs is the argmax of its raw logits."""
    params = row.params
    return params.greedy and params.logprobs is None and not _is_adjusted(row)


def _is_adjusted(row: SampledRow) -> bool:
    params = row.params
    penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
    return bool(row.suppress or params.logit_bias) or penalties != (1.0, 0.0, 0.0) or is_masked(row)


def _choose(logits: torch.Tensor, row: SampledRow) -> Sample:
    """The outcome of one row; `logits` is [vocab]."""
    try:
        token = _token(adjusted(logits, row) if _is_adjusted(row) else logits, row)
    except RequestFailed as error:  # its grammar
        return Sample(error=str(error))
    if token is None:
        return Sample(error="no token may be sampled: all are suppressed")
    if row.params.logprobs is None:
        return Sample(token)
    return Sample(token, token_logprobs(logits[None], [token], row.params.logprobs)[0])


def _token(logits: torch.Tensor, row: SampledRow) -> int | None:
    best, token = logits.max(dim=-1)
    if not math.isfinite(best):
        return None
    if row.params.greedy:
        return int(token)
    # Subtracting the largest first keeps every temperature, however small, from overflowing.
    ids, scaled = survivors((logits - best) / row.params.temperature, row.params)
    place = draw(scaled, row.uniform)
    return place if ids is None else int(ids[place])


def is_masked(row: SampledRow) -> bool:
    """Whether only some ids may come at all."""
    return row.guide is not None or row.params.allowed_token_ids is not None


def allowed_ids(row: SampledRow, vocab: int) -> npt.NDArray[np.uint8]:
    """What a masked row's grammar and list of ids allow, a bit an id, lowest first, in whole 32-bit words; without what is
    suppressed now.

    Where that leaves nothing but suppressed ids they come all the same: a grammar that is complete ends its output, and
    min_tokens cannot have it go on. Raises RequestFailed.
    """
    bits = np.zeros(-(-vocab // 32) * 4, np.uint8)
    if row.params.allowed_token_ids is not None:
        ids = np.array(row.params.allowed_token_ids)
        np.bitwise_or.at(bits, ids >> 3, (1 << (ids & 7)).astype(np.uint8))
    else:
        bits[:] = 0xFF
    if row.guide is not None:
        given = np.frombuffer(row.guide.allowed(), np.uint8)
        size = min(len(given), len(bits))
        bits[:size] &= given[:size]
        bits[size:] = 0
    if row.suppress:
        rest = bits.copy()
        ids = np.array(row.suppress)
        np.bitwise_and.at(rest, ids >> 3, ~(1 << (ids & 7)).astype(np.uint8))
        bits = rest if np.unpackbits(rest, bitorder="little", count=vocab).any() else bits
    return bits


def adjusted(logits: torch.Tensor, row: SampledRow) -> torch.Tensor:
    """A copy of one row's logits [vocab] with its grammar, suppressed ids, bias and penalties applied. Raises RequestFailed."""
    device, params = logits.device, row.params
    if is_masked(row):
        bits = np.unpackbits(allowed_ids(row, logits.shape[0]), bitorder="little", count=logits.shape[0])
        logits = logits.masked_fill(torch.from_numpy(bits == 0).to(device), -torch.inf)
    else:
        logits = logits.clone()
    if row.suppress and not is_masked(row):
        logits[torch.tensor(row.suppress, device=device)] = -torch.inf
    if params.logit_bias:
        ids, bias = zip(*params.logit_bias, strict=True)
        logits.index_add_(0, torch.tensor(ids, device=device), torch.tensor(bias, device=device))
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(row.tokens[: row.end], device=device)  # an id that repeats gets the same value each time
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        output = torch.tensor(row.tokens[row.num_prompt : row.end], dtype=torch.int64, device=device)
        times = output.bincount(minlength=logits.shape[0])
        logits -= params.frequency_penalty * times + params.presence_penalty * (times > 0)
    return logits


def survivors(scaled: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The ids that min_p, top_k and top_p leave, ascending, with their logits; None stands for the whole vocabulary.

    `scaled` is [vocab] with the largest value 0, already divided by the temperature. top_k keeps ties of the k-th value.
    """
    floor = math.log(params.min_p) if params.min_p > 0.0 else -math.inf
    if 0 < params.top_k < scaled.shape[0]:
        floor = max(floor, float(scaled.topk(params.top_k).values[-1]))
    ids = None
    if floor > -math.inf:
        ids = (scaled >= floor).nonzero().squeeze(-1)
        scaled = scaled[ids]
    if params.top_p < 1.0:
        places = nucleus(scaled.exp(), params.top_p)
        ids = places if ids is None else ids[places]
        scaled = scaled[places]
    return ids, scaled


def nucleus(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """Places, ascending, of the fewest largest weights whose sum reaches top_p of the total; the lower of equals first.

    Weights that could all be missing without the rest falling short are dropped at once. Weights are >= 0, so their bits are in
    their order: the highest bits put the rest into classes, and only the class in which the sum is reached is sorted, however
    flat the distribution.
    """
    wanted = top_p * float(weights.sum(dtype=torch.float64))
    spare = (1.0 - top_p) / 2 * float(weights.max())  # at most half of what may be missing
    places = (weights >= spare / weights.shape[0]).nonzero().squeeze(-1)
    weights = weights[places]
    classes = (weights.view(torch.int32) >> (23 - _OCTAVE_BITS)).long()
    depths = classes.max() - classes
    sums = torch.bincount(depths, weights=weights.double()).cumsum(0)
    depth = int(torch.searchsorted(sums, wanted))
    members = (depths == depth).nonzero().squeeze(-1)
    largest = weights[members].sort(descending=True, stable=True)
    running = largest.values.cumsum(0, dtype=torch.float64) + (sums[depth - 1] if depth else 0.0)
    count = 1 + int((running[:-1] < wanted).sum())
    kept = depths < depth
    kept[members[largest.indices[:count]]] = True
    return places[kept]


def draw(scaled: torch.Tensor, uniform: float) -> int:
    """The place whose share of the distribution softmax(scaled) holds `uniform`; a place of no probability never comes.

    In two stages, blocks of ids and then the ids of one block, because a running sum over a vocabulary is slow.
    """
    weights = scaled.exp()
    size = weights.shape[0]
    whole = size - size % _BLOCK
    sums = torch.cat((weights[:whole].view(-1, _BLOCK).sum(-1, dtype=torch.float64), weights[whole:].sum(0, True).double()))
    block, rest = _place(sums, uniform * float(sums.sum()))
    place, _ = _place(weights[block * _BLOCK : (block + 1) * _BLOCK].double(), rest)
    return block * _BLOCK + place


def _place(weights: torch.Tensor, target: float) -> tuple[int, float]:
    """The first place whose running sum exceeds `target` and what of the target is left at its start."""
    sums = weights.cumsum(0)
    # A target rounded up to the very end belongs to the last place that has weight.
    place = min(int(torch.searchsorted(sums, target, right=True)), int(weights.nonzero()[-1]))
    return place, target - (float(sums[place - 1]) if place else 0.0)


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Raw log-probabilities of `tokens` under float32 logits [N, vocab], each with its rank and `top` alternatives.

    The rank is 1 plus the number of likelier tokens. Minus infinity becomes LOGPROB_FLOOR.
    """
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    values, ids = logprobs.topk(top, dim=-1)
    return [
        TokenLogprob(token, floored(value), rank, tuple((i, floored(v)) for i, v in zip(*alternatives, strict=True)))
        for token, value, rank, *alternatives in zip(
            tokens, chosen[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), strict=True
        )
    ]


def floored(logprob: float) -> float:
    """A log-probability that JSON can carry."""
    return logprob if logprob > LOGPROB_FLOOR else LOGPROB_FLOOR  # not-a-number compares false, so it becomes the floor
