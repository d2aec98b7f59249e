"""The decoder of all four families, as steps of one pass that may stop between any two layers.

Owns the order of operations and the packed weights; the operations themselves belong to `kernels` (`Ops`, `Attention`). A
pass is `embed`, every `layer` in turn, `logits`. What goes from one layer to the next is exactly (hidden, residual), where
the stream so far is hidden + residual: a layer's output is added by the norm that reads it, the next layer's or the final
one. Whoever keeps those two tensors can go on later; nothing else is remembered here between calls.

Shapes: T tokens of the step over all rows, H query heads, K KV heads, D head size, S rows that want logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from engine.kernels.api import Attention, BatchMeta, Ops, QKNorm, RotaryAttention
from engine.spec import ModelSpec, RopeSpec
from engine.weights import EMBEDDING, LM_HEAD

Rotation = tuple[torch.Tensor, torch.Tensor]  # cos, sin: [T, D / 2] float32


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's weights; the linears as `Ops.pack_linear` made them."""

    input_norm: torch.Tensor
    qkv: Any  # [(H + 2K) * D, hidden]
    qk_norm: QKNorm | None
    o: Any
    post_norm: torch.Tensor
    gate_up: Any  # [2 * intermediate, hidden]
    down: Any
    window: int | None


class Model:
    """A decoder with its weights on one device. Not thread-safe; holds no state of any request."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: dict[str, torch.Tensor],
        ops: Ops,
        attention: Attention,
        dtype: torch.dtype,
        *,
        device: torch.device | str = "cpu",
        max_len: int | None = None,
    ) -> None:
        """Takes over `weights` and empties it while packing, so host and device never hold the model twice.

        `max_len` bounds the positions that will be asked for (default: all that the spec allows); rotations are tabulated
        up to it, 4 * D bytes a position.
        """
        self.launching: Callable[[], AbstractContextManager[None]] = nullcontext  # entered to launch a layer
        self.spec = spec
        self.dtype = dtype
        self.device = torch.device(device)
        self._ops = ops
        self._attention = attention
        self._rotary_attention = attention if isinstance(attention, RotaryAttention) else None
        self._embedding = self._take(weights, EMBEDDING)
        self._layers = [self._pack_layer(weights, index) for index in range(spec.num_layers)]
        self._final_norm = self._take(weights, "model.norm.weight")
        self._head = ops.pack_linear(self._embedding if spec.tie_embeddings else self._take(weights, LM_HEAD), None)
        self._cos, self._sin = rotation_tables(spec.rope, spec.head_dim, max_len or spec.max_position, self.device)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 -> hidden [T, hidden]."""
        return F.embedding(token_ids, self._embedding)

    def rotation(self, positions: torch.Tensor) -> Rotation:
        """[T] int64 -> cos, sin of each position, the same for all layers of a step."""
        return self._cos[positions], self._sin[positions]

    def plan(self, meta: BatchMeta) -> Any:
        """The attention's handle for one step, see `Attention.plan`."""
        return self._attention.plan(meta)

    def layer(
        self, index: int, hidden: torch.Tensor, residual: torch.Tensor | None, rotation: Rotation, attn_handle: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer: (hidden, residual), both [T, hidden], to the next pair. `residual` is None before layer 0 only.

        Writes the KV of the step's tokens into the pages of this layer; `attn_handle` is `Attention.plan`'s.
        """
        with self.launching():
            return self._layer(index, hidden, residual, rotation, attn_handle)

    def _layer(
        self, index: int, hidden: torch.Tensor, residual: torch.Tensor | None, rotation: Rotation, attn_handle: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer, ops, eps = self._layers[index], self._ops, self.spec.rms_eps
        if residual is None:
            residual, hidden = hidden, ops.rms_norm(hidden, layer.input_norm, eps)
        else:
            hidden, residual = ops.add_rms_norm(hidden, residual, layer.input_norm, eps)
        hidden = ops.linear(self._attend(index, hidden, rotation, attn_handle), layer.o)
        hidden, residual = ops.add_rms_norm(hidden, residual, layer.post_norm, eps)
        hidden = ops.linear(ops.silu_mul(ops.linear(hidden, layer.gate_up)), layer.down)
        return hidden, residual

    def _attend(self, index: int, hidden: torch.Tensor, rotation: Rotation, attn_handle: Any) -> torch.Tensor:
        layer, ops, spec = self._layers[index], self._ops, self.spec
        heads = ops.linear(hidden, layer.qkv).view(-1, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        q, k, v = torch.tensor_split(heads, (spec.num_heads, spec.num_heads + spec.num_kv_heads), dim=1)
        if self._rotary_attention is not None:
            return self._rotary_attention.run_rotary(attn_handle, index, q, k, v, rotation, layer.window, layer.qk_norm)
        if layer.qk_norm is not None:
            q = ops.rms_norm(q, layer.qk_norm.q_weight, spec.rms_eps)
            k = ops.rms_norm(k, layer.qk_norm.k_weight, spec.rms_eps)
        q, k = ops.rotary(q, k, *rotation)
        return self._attention.run(attn_handle, index, q, k, v, layer.window)

    def logits(self, hidden: torch.Tensor, residual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The last layer's pair and the indices [S] int64 of the tokens wanted -> float32 [S, vocab].

        Norm and vocabulary projection run for those tokens alone.
        """
        normed, _ = self._ops.add_rms_norm(hidden[rows], residual[rows], self._final_norm, self.spec.rms_eps)
        return self._ops.linear(normed, self._head).float()

    def _take(self, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        return weights.pop(name).to(self.device, self.dtype)

    def _pack_layer(self, weights: dict[str, torch.Tensor], index: int) -> Layer:
        prefix, spec = f"model.layers.{index}", self.spec

        def norm(name: str) -> torch.Tensor:
            return self._take(weights, f"{prefix}.{name}.weight")

        def linear(*names: str, bias: bool) -> Any:
            """One packed linear of several that read the same input."""

            def stacked(kind: str) -> torch.Tensor:
                parts = [self._take(weights, f"{prefix}.{name}.{kind}") for name in names]
                return parts[0] if len(parts) == 1 else torch.cat(parts)

            return self._ops.pack_linear(stacked("weight"), stacked("bias") if bias else None)

        return Layer(
            input_norm=norm("input_layernorm"),
            qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", bias=spec.qkv_bias),
            qk_norm=QKNorm(norm("self_attn.q_norm"), norm("self_attn.k_norm"), spec.rms_eps) if spec.qk_norm else None,
            o=linear("self_attn.o_proj", bias=spec.o_bias),
            post_norm=norm("post_attention_layernorm"),
            gate_up=linear("mlp.gate_proj", "mlp.up_proj", bias=spec.mlp_bias),
            down=linear("mlp.down_proj", bias=spec.mlp_bias),
            window=spec.windows[index],
        )


def rotation_tables(rope: RopeSpec, head_dim: int, length: int, device: torch.device) -> Rotation:
    """cos and sin, each [length, D / 2] float32, of positions 0 .. length - 1.

    One table for the whole life of a model, made on the host: a position gets the same bits in every batch, after every
    preemption and on every device, which computing them per step would not promise.
    """
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse_frequencies(rope, head_dim)
    return (angles.cos() * rope.attention_factor).to(device), (angles.sin() * rope.attention_factor).to(device)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """[D / 2] float32, radians per position of each pair; float32 in the order of transformers, to give its bits."""
    wavelengths = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        return 1.0 / wavelengths / rope.factor
    if rope.kind == "llama3":
        return _llama3_frequencies(rope, 1.0 / wavelengths)
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, wavelengths, head_dim)
    return 1.0 / wavelengths


def _llama3_frequencies(rope: RopeSpec, freq: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: slow pairs are stretched by `factor`, fast ones kept, those between blended."""
    turns = rope.original_max_position / (2 * math.pi / freq)  # over the original context
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - share) * freq / rope.factor + share * freq
    kept = torch.where(turns > rope.high_freq_factor, freq, blended)
    return torch.where(turns < rope.low_freq_factor, freq / rope.factor, kept)


def _yarn_frequencies(rope: RopeSpec, wavelengths: torch.Tensor, head_dim: int) -> torch.Tensor:
    """YaRN (Peng et al. 2023, section 3.2): blend by how often a pair turns within the original context."""

    def pair_of(turns: float) -> float:
        """Index (in dimensions) of the pair that turns this often."""
        longest = rope.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(longest) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high != low else 0.001
    kept = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
