"""Weights of a checkpoint folder: found, checked, read. Safetensors only: other formats can run code when they are opened.

Owns the way from files to a dictionary of tensors under their Hugging Face names, on the host, in the run's dtype. Nothing
is read from a file before its header has been checked against the file (lengths, offsets, dtypes, duplicates) and all
headers together against the spec (every tensor present, none unknown, exact shapes), so a bad folder fails at once and
whole. Values are checked as they are read: a NaN or an infinity is found at load, not in the first answer.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from engine.errors import InvalidCheckpoint
from engine.spec import ModelSpec, checkpoint_file, parse_json, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_UNUSED = (".rotary_emb.inv_freq",)  # written by old transformers; we compute our own
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its file's header describes it; bytes start .. end lie behind the header."""

    file: Path
    shape: tuple[int, ...]
    start: int
    end: int


def load_weights(path: Path, spec: ModelSpec, dtype: torch.dtype, progress: bool = False) -> dict[str, torch.Tensor]:
    """All weights of the model folder `path` as `dtype`, names as in `expected_shapes`, copied out of the files.

    `progress` shows a bar of bytes per file on stderr. Raises InvalidCheckpoint that names the file and the tensor.
    """
    tensors = _check_names(path, spec, _find_tensors(path))
    weights: dict[str, torch.Tensor] = {}
    for file in sorted({info.file for info in tensors.values()}):
        names = sorted((name for name in tensors if tensors[name].file == file), key=lambda name: tensors[name].start)
        total = sum(tensors[name].end - tensors[name].start for name in names)
        try:
            with (
                safe_open(file, framework="pt", device="cpu") as opened,
                tqdm(total=total, desc=file.name, unit="B", unit_scale=True, disable=not progress) as bar,
            ):
                for name in names:
                    weights[name] = _convert(opened.get_tensor(name), dtype, f"{file}: tensor {name}")
                    bar.update(tensors[name].end - tensors[name].start)
        except (OSError, SafetensorError) as exc:
            raise InvalidCheckpoint(f"{file} cannot be read ({exc}); download it again") from exc
    return _settle_head(path, spec, weights)


def random_weights(
    spec: ModelSpec, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Weights of the spec's shapes without a checkpoint: for benchmarks and tests of everything but the answers.

    Made on the device, which may draw other numbers than another device does.

    Norms are 1 and biases 0; the rest is normal with a deviation that keeps activations near 1 at any width and depth.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(spec).items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape, dtype=dtype, device=device)
        elif name.endswith(".bias"):
            weights[name] = torch.zeros(shape, dtype=dtype, device=device)
        else:
            deviation = 1.0 if name == EMBEDDING and not spec.tie_embeddings else shape[1] ** -0.5
            weights[name] = torch.empty(shape, device=device).normal_(0.0, deviation, generator=generator).to(dtype)
    return weights


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the model. Tied embeddings have no `lm_head.weight`."""
    hidden, wide = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not spec.tie_embeddings:
        shapes[LM_HEAD] = (spec.vocab_size, hidden)
    linears = {
        "self_attn.q_proj": (q, hidden, spec.qkv_bias),
        "self_attn.k_proj": (kv, hidden, spec.qkv_bias),
        "self_attn.v_proj": (kv, hidden, spec.qkv_bias),
        "self_attn.o_proj": (hidden, q, spec.o_bias),
        "mlp.gate_proj": (wide, hidden, spec.mlp_bias),
        "mlp.up_proj": (wide, hidden, spec.mlp_bias),
        "mlp.down_proj": (hidden, wide, spec.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if spec.qk_norm:
        norms |= {"self_attn.q_norm": spec.head_dim, "self_attn.k_norm": spec.head_dim}
    for prefix in (f"model.layers.{index}" for index in range(spec.num_layers)):
        for name, (rows, columns, has_bias) in linears.items():
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{prefix}.{name}.bias"] = (rows,)
        shapes |= {f"{prefix}.{name}.weight": (size,) for name, size in norms.items()}
    return shapes


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, checked against the file's length. Reads the header, no data.

    The format: 8 bytes of header length, the header (JSON), then data that the tensors tile without gap or overlap.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            prefix = opened.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise InvalidCheckpoint(
                    f"{file} is truncated or no safetensors file: {size} bytes with a header of {length}; download it again"
                )
            header = parse_json(opened.read(length), f"{file}: header")
    except OSError as exc:
        raise InvalidCheckpoint(f"{file} cannot be read ({exc})") from exc
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(file, name, entry) for name, entry in header.items()}
    _check_tiling(file, tensors, size - 8 - length)
    return tensors


def _tensor_info(file: Path, name: str, entry: Any) -> TensorInfo:
    what = f"{file}: tensor {name:.200}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidCheckpoint(f"{what} must be described by dtype, shape and data_offsets; download the file again")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        known = ", ".join(_ITEM_BYTES)
        raise InvalidCheckpoint(f"{what} has dtype {dtype!r:.40}; only {known} are supported, use a dense checkpoint")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise InvalidCheckpoint(f"{what} has a malformed shape or data_offsets; download the file again")
    start, end = offsets
    if end - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise InvalidCheckpoint(
            f"{what} spans {end - start} bytes, which is not what {dtype} {shape} takes; download the file again"
        )
    return TensorInfo(file, tuple(shape), start, end)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_tiling(file: Path, tensors: dict[str, TensorInfo], data_bytes: int) -> None:
    end, last = 0, "the header"
    furthest = max((info.end for info in tensors.values()), default=0)
    if furthest > data_bytes:
        raise InvalidCheckpoint(
            f"{file} is truncated: its tensors need {furthest} bytes of data, it has {data_bytes}; download it again"
        )
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            fault = "overlaps" if info.start < end else "leaves a gap behind"
            raise InvalidCheckpoint(f"{file}: tensor {name:.200} {fault} {last:.200}; download the file again")
        end, last = info.end, name
    if end != data_bytes:
        raise InvalidCheckpoint(f"{file} has {data_bytes - end} bytes that belong to no tensor; download it again")


def _find_tensors(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the folder's one file, or of all shards that its index names."""
    if (path / SINGLE).exists() or (path / SINGLE).is_symlink():
        return read_header(checkpoint_file(path, SINGLE))
    if not (path / INDEX).exists():
        raise _no_weights(path)
    index = path / INDEX
    weight_map = read_json(checkpoint_file(path, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpoint(f"{index}: weight_map is missing or empty; download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise InvalidCheckpoint(f"{index}: weight_map names {shard!r:.200} for {name:.200}, no *.safetensors file")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        for name, info in read_header(checkpoint_file(path, shard)).items():
            if name in tensors:
                raise InvalidCheckpoint(f"{path}: tensor {name:.200} is in both {tensors[name].file.name} and {shard}")
            if weight_map.get(name) != shard and not name.endswith(_UNUSED):
                raise InvalidCheckpoint(f"{index}: tensor {name:.200} lies in {shard}, where weight_map has it not")
            tensors[name] = info
    if absent := _some(weight_map.keys() - tensors.keys()):
        raise InvalidCheckpoint(f"{index}: weight_map names tensors that no shard holds: {absent}")
    return tensors


def _no_weights(path: Path) -> InvalidCheckpoint:
    names = sorted(entry.name for entry in path.iterdir())
    pickled = [name for name in names if name.endswith(_PICKLED)]
    remedy = f"add {SINGLE}, or {INDEX} and its shards"
    if pickled:
        return InvalidCheckpoint(
            f"{path} has weights only as {pickled[0]}, a pickle that can run code when it is opened and is never loaded; "
            "convert it to safetensors (load it with transformers where you trust it, then save_pretrained)"
        )
    if others := [name for name in names if name.endswith((".gguf", ".safetensors"))]:
        return InvalidCheckpoint(f"{path} has no {SINGLE}; {others[0]} is not used in its place: {remedy}")
    return InvalidCheckpoint(f"{path} has no weights: {remedy}")


def _check_names(path: Path, spec: ModelSpec, found: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors to read: exactly those of the spec, and an lm_head beside tied embeddings, to be compared with them."""
    shapes = expected_shapes(spec)
    if missing := _some(shapes.keys() - found.keys()):
        hint = "; tie_word_embeddings in config.json may be wrong" if LM_HEAD in missing else ""
        raise InvalidCheckpoint(f"{path}: the weights lack {missing}{hint}; complete the download")
    if LM_HEAD in found:
        shapes[LM_HEAD] = (spec.vocab_size, spec.hidden_size)
    if unknown := _some(name for name in found.keys() - shapes.keys() if not name.endswith(_UNUSED)):
        raise InvalidCheckpoint(f"{path}: a {spec.architecture} model of this config has no {unknown}; check config.json")
    for name, shape in shapes.items():
        info = found[name]
        if info.shape != shape:
            raise InvalidCheckpoint(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, config.json asks for {list(shape)}"
            )
    return {name: found[name] for name in shapes}


def _some(names: Iterable[str]) -> str:
    """The first names and how many more there are; "" for none."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(name[:200] for name in ordered[:3]) + more


def _convert(tensor: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """A copy as `dtype`. A copy even if the dtype is right: a mapped file that shrinks later would kill the process."""
    converted = tensor.to(dtype, copy=True)
    # One pass without a temporary, ~5 % of the copy's time; NaN comes through both ends.
    low, high = torch.aminmax(converted)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        short = str(dtype).removeprefix("torch.")
        if bool(torch.isfinite(tensor).all()):
            raise InvalidCheckpoint(f"{what} has values beyond the range of {short}; run it as bfloat16 or float32")
        raise InvalidCheckpoint(f"{what} holds NaN or infinity; the checkpoint is damaged")
    return converted


def _settle_head(path: Path, spec: ModelSpec, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop an lm_head that repeats the tied embedding; one that differs means the config is wrong."""
    if spec.tie_embeddings and LM_HEAD in weights and not torch.equal(weights.pop(LM_HEAD), weights[EMBEDDING]):
        raise InvalidCheckpoint(
            f"{path / 'config.json'}: tie_word_embeddings is true, but {LM_HEAD} differs from {EMBEDDING}; set it to false"
        )
    return weights
