"""The decoder against transformers: the same logits, whole, chunked through pages, and stopped between layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_checkpoint

from engine.kernels.api import BatchMeta
from engine.kernels.reference import TorchAttention, TorchOps
from engine.model import Model, inverse_frequencies, rotation_tables
from engine.spec import ModelSpec, load_spec
from engine.weights import load_weights, random_weights

PAGE = 4
PAGES = 64
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": YARN,
    "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-attention-factor": YARN | {"attention_factor": 0.8, "truncate": False},
}
BIASES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"attention_bias": True},
}
WINDOWS = {
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


@pytest.fixture(autouse=True)
def _calm_torch() -> Any:
    """No gradients, and one thread: tensors this small are slower with two, much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@functools.cache
def oracle_model(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def oracle(path: Path, tokens: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits of every position by transformers, [T, vocab] float32."""
    return oracle_model(path, dtype)(torch.tensor([list(tokens)])).logits[0].float()


@dataclass
class Row:
    """A sequence with the pages it owns, in no order."""

    tokens: list[int]
    pages: list[int]
    computed: int = 0


class Bench:
    """A model on a paged cache of its own, run by hand."""

    def __init__(self, spec: ModelSpec, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
        kv = torch.full((PAGES, spec.num_layers, 2, PAGE, spec.num_kv_heads, spec.head_dim), torch.nan, dtype=dtype)
        self.attention = TorchAttention(kv)
        self.model = Model(spec, weights, TorchOps(), self.attention, dtype)
        self._free = torch.randperm(PAGES, generator=torch.Generator().manual_seed(1)).tolist()

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype = torch.float32) -> Bench:
        spec = load_spec(path)
        return cls(spec, load_weights(path, spec, dtype), dtype)

    def row(self, tokens: Sequence[int]) -> Row:
        count = -(-len(tokens) // PAGE)
        taken, self._free = self._free[:count], self._free[count:]
        return Row(list(tokens), taken)

    def start(self, work: Sequence[tuple[Row, int]]) -> Pass:
        """Begin a step that computes the next `count` tokens of each row."""
        return Pass(self, work)

    def step(self, *work: tuple[Row, int]) -> list[torch.Tensor]:
        """One whole step; logits of every computed token, per row."""
        return self.start(work).run_layers().finish()


class Pass:
    """One pass over the layers whose only state between layers is (hidden, residual)."""

    def __init__(self, bench: Bench, work: Sequence[tuple[Row, int]]) -> None:
        self.bench = bench
        self.counts = [count for _, count in work]
        spans = [(row, range(row.computed, row.computed + count)) for row, count in work]
        self.token_ids = torch.tensor([row.tokens[i] for row, span in spans for i in span])
        self.positions = torch.tensor([i for _, span in spans for i in span])
        offsets = tuple(sum(self.counts[:index]) for index in range(len(work)))
        starts = tuple(row.computed for row, _ in work)
        self.meta = BatchMeta(starts, tuple(self.counts), offsets, tuple(row.pages for row, _ in work))
        for row, count in work:
            row.computed += count
        self.hidden = bench.model.embed(self.token_ids)
        self.residual: torch.Tensor | None = None
        self.next_layer = 0

    def run_layers(self, until: int | None = None) -> Pass:
        model = self.bench.model
        rotation, handle = model.rotation(self.positions), self.bench.attention.plan(self.meta)
        for index in range(self.next_layer, model.num_layers if until is None else until):
            self.hidden, self.residual = model.layer(index, self.hidden, self.residual, rotation, handle)
            self.next_layer = index + 1
        return self

    def finish(self) -> list[torch.Tensor]:
        assert self.residual is not None
        logits = self.bench.model.logits(self.hidden, self.residual, torch.arange(len(self.token_ids)))
        return list(logits.split(self.counts))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.std() > 0.3, "an oracle of equal logits proves nothing"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def check_whole_and_chunked(path: Path, length: int = 45) -> None:
    """Logits of every position agree with transformers, in one step and in uneven chunks beside another sequence."""
    bench, tokens, other = Bench.load(path), prompt(length), prompt(30, seed=2)
    expected, expected_other = oracle(path, tokens), oracle(path, other)
    assert_close(bench.step((bench.row(tokens), length))[0], expected)
    row, beside = bench.row(tokens), bench.row(other)
    chunks, chunks_other = [], []
    for count, count_other in ((10, 1), (1, 17), (1, 1), (length - 12, 11)):
        one, two = bench.step((row, count), (beside, count_other))
        chunks.append(one)
        chunks_other.append(two)
    assert_close(torch.cat(chunks), expected)
    assert_close(torch.cat(chunks_other), expected_other)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_transformers(tmp_path: Path, architecture: str, rope: str, tied: bool) -> None:
    # A dictionary of its own: transformers writes into the one that it is given.
    path = tiny_checkpoint(tmp_path, architecture, rope_parameters=dict(ROPES[rope]), tie_word_embeddings=tied)
    check_whole_and_chunked(path)


@pytest.mark.parametrize("architecture", BIASES)
def test_optional_biases(tmp_path: Path, architecture: str) -> None:
    check_whole_and_chunked(tiny_checkpoint(tmp_path, architecture, **BIASES[architecture]))


@pytest.mark.parametrize("architecture", WINDOWS)
def test_sliding_windows(tmp_path: Path, architecture: str) -> None:
    path = tiny_checkpoint(tmp_path, architecture, **WINDOWS[architecture])
    assert any(load_spec(path).windows)
    check_whole_and_chunked(path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_wider_than_the_hidden_size(tmp_path: Path, architecture: str) -> None:
    check_whole_and_chunked(tiny_checkpoint(tmp_path, architecture, head_dim=32, num_key_value_heads=1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shards_give_the_same_model(tmp_path: Path, architecture: str) -> None:
    path = tiny_checkpoint(tmp_path, architecture, max_shard_size="100KB", tie_word_embeddings=False)
    assert len(list(path.glob("*.safetensors"))) > 2
    check_whole_and_chunked(path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pass_resumes_from_hidden_and_residual_alone(tmp_path: Path, architecture: str) -> None:
    path = tiny_checkpoint(tmp_path, architecture, **WINDOWS.get(architecture, {}))
    bench, tokens, other = Bench.load(path), prompt(33), prompt(20, seed=3)
    [whole] = bench.step((bench.row(tokens), 33))
    expected_other = oracle(path, other)
    assert_close(whole, oracle(path, tokens))
    for layer in (1, 2):
        parked = bench.start([(bench.row(tokens), 33)]).run_layers(until=layer)
        assert_close(bench.step((bench.row(other), 20))[0], expected_other)  # somebody else's pass in between
        [resumed] = parked.run_layers().finish()
        assert torch.equal(resumed, whole)


def test_a_parked_row_can_be_dropped(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "qwen3")
    bench = Bench.load(path)
    kept, lost = bench.row(prompt(21)), bench.row(prompt(13, seed=4))
    parked = bench.start([(lost, 13), (kept, 21)]).run_layers(until=2)
    assert parked.residual is not None
    resumed = bench.start([(Row(kept.tokens, kept.pages), 21)])
    resumed.hidden, resumed.residual, resumed.next_layer = parked.hidden[13:], parked.residual[13:], 2
    assert_close(resumed.run_layers().finish()[0], oracle(path, kept.tokens))


def test_logits_of_chosen_tokens_only(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "llama", dtype="float32")
    bench = Bench.load(path)
    work = bench.start([(bench.row(prompt(16)), 16)]).run_layers()
    assert work.residual is not None
    logits = bench.model.logits(work.hidden, work.residual, torch.tensor([15, 3]))
    assert logits.dtype == torch.float32
    assert_close(logits, oracle(path, prompt(16))[[15, 3]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_low_precision_is_as_exact_as_transformers(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    path = tiny_checkpoint(tmp_path, architecture)
    bench, tokens = Bench.load(path, dtype), prompt(40)
    truth = oracle(path, tokens)
    [ours] = bench.step((bench.row(tokens), 40))
    theirs = oracle(path, tokens, dtype)
    assert (ours - truth).square().mean() < 1.5 * (theirs - truth).square().mean()


@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_are_those_of_transformers_bit_for_bit(tmp_path: Path, rope: str) -> None:
    path = tiny_checkpoint(tmp_path, "llama", rope_parameters=dict(ROPES[rope]), head_dim=128)
    spec, rotary = load_spec(path), oracle_model(path, torch.float32).model.rotary_emb
    assert torch.equal(inverse_frequencies(spec.rope, spec.head_dim), rotary.inv_freq)
    assert spec.rope.attention_factor == rotary.attention_scaling
    cos, sin = rotation_tables(spec.rope, spec.head_dim, 512, torch.device("cpu"))
    their_cos, their_sin = rotary(torch.zeros(1), torch.arange(512)[None])
    torch.testing.assert_close(cos, their_cos[0, :, :64], atol=1e-6, rtol=0)
    torch.testing.assert_close(sin, their_sin[0, :, :64], atol=1e-6, rtol=0)


def test_a_position_rotates_alike_in_every_batch(tmp_path: Path) -> None:
    spec = load_spec(tiny_checkpoint(tmp_path, "llama"))
    model = Bench(spec, random_weights(spec, torch.float32)).model
    cos, sin = model.rotation(torch.arange(512))
    for positions in ([511], [3, 511, 0], list(range(100, 117))):
        alone = model.rotation(torch.tensor(positions))
        assert torch.equal(alone[0], cos[positions])
        assert torch.equal(alone[1], sin[positions])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_weights_keep_activations_finite(tmp_path: Path, architecture: str) -> None:
    spec = load_spec(tiny_checkpoint(tmp_path, architecture, tie_word_embeddings=False))
    deep = replace(spec, num_layers=24, windows=(None,) * 24)
    weights = random_weights(deep, torch.float16, seed=3)
    bench = Bench(deep, weights, torch.float16)
    assert not weights, "the model takes its weights over"
    [logits] = bench.step((bench.row(prompt(24)), 24))
    assert logits.isfinite().all()
    assert 0.01 < logits.std() < 100
