"""What a checkpoint folder says about its model: config.json and generation_config.json as one checked, frozen record.

Four families of dense decoders share `ModelSpec`: Llama, Mistral, Qwen2 and Qwen3. Defaults and the meaning of every
field follow transformers 5, whose own files and those of version 4 are both read. A config is data: nothing in the
folder is ever imported or run (`auto_map` and `*.py` files are not looked at), and where ignoring a field would change
the output the field is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InvalidCheckpoint

MAX_JSON_BYTES = 64 << 20
MAX_LAYERS = 1024
MAX_SIZE = 1 << 24  # of any one dimension, the vocabulary and the context


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding: `kind` says which of the other numbers count.

    "linear": factor. "llama3" (Llama 3.1): factor, original_max_position, low_freq_factor, high_freq_factor. "yarn"
    (Peng et al. 2023): factor, original_max_position, beta_fast, beta_slow, truncate, attention_factor.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # multiplies cos and sin


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder, fully described: enough to name and shape every weight and to run it."""

    architecture: str  # "llama", "mistral", "qwen2" or "qwen3"
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_eps: float
    rope: RopeSpec
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over each head of q and k before rotation
    windows: tuple[int | None, ...]  # per layer: a token sees itself and the window - 1 tokens before it; None: all
    dtype: str  # of the checkpoint: "float32", "bfloat16" or "float16"
    bos_id: int | None
    eos_ids: tuple[int, ...]


def load_spec(path: Path) -> ModelSpec:
    """Read the model folder `path`. Raises InvalidCheckpoint that names the file, the field and the remedy."""
    if not path.is_dir():
        raise InvalidCheckpoint(f"{path} is not a folder; give a local folder with config.json and *.safetensors")
    config = _Fields(checkpoint_file(path, "config.json"))
    architecture = _architecture(config)
    _refuse_unsupported(config)
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"must divide num_attention_heads ({heads}), got {kv_heads}")
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    vocab_size = config.integer("vocab_size")
    declared = config.integer("max_position_embeddings")
    rope = _rope(config, declared)
    attention_bias = architecture in ("llama", "qwen3") and config.boolean("attention_bias", False)
    has_special_ids = architecture in ("llama", "mistral")
    generation = _generation_config(path)
    return ModelSpec(
        architecture=architecture,
        num_layers=layers,
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_head_dim(config, architecture, heads),
        vocab_size=vocab_size,
        max_position=_max_position(rope, declared),
        rms_eps=config.number("rms_norm_eps", 1e-6),
        rope=rope,
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        qkv_bias=attention_bias or architecture == "qwen2",
        o_bias=attention_bias,
        mlp_bias=architecture == "llama" and config.boolean("mlp_bias", False),
        qk_norm=architecture == "qwen3",
        windows=_windows(config, architecture, layers),
        dtype=_dtype(config),
        bos_id=next(iter(config.token_ids("bos_token_id", vocab_size, 1 if has_special_ids else None)), None),
        eos_ids=_eos_ids(config, generation, vocab_size, 2 if has_special_ids else None),
    )


def checkpoint_file(folder: Path, name: str) -> Path:
    """The regular file `name` inside `folder`. Raises InvalidCheckpoint if it is missing or lies outside.

    A symbolic link may not lead out of the folder, with one exception: the download cache of huggingface_hub, where
    snapshots/<revision>/* are links into blobs/ beside it.
    """
    root = folder.resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    try:
        target = (root / name).resolve()
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not inside or not any(target.is_relative_to(allowed) for allowed in roots):
            raise InvalidCheckpoint(f"{folder}: {name!r} leads out of the model folder; keep all files inside it")
        if not target.is_file():
            raise InvalidCheckpoint(f"{folder}: {name} is missing or not a regular file; complete the download")
    except (OSError, ValueError, RuntimeError) as exc:  # too long a name, a NUL byte, a loop of links
        raise InvalidCheckpoint(f"{folder}: {name[:200]!r} cannot be opened ({exc})") from exc
    return target


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object from bytes of a checkpoint; refuses duplicate keys, NaN and anything that is not an object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"duplicate key {next(n for n in names if names.count(n) > 1)!r}")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as exc:
        raise InvalidCheckpoint(f"{what} is not valid JSON ({exc}); download it again") from exc
    if not isinstance(found, dict):
        raise InvalidCheckpoint(f"{what} must hold a JSON object, got {type(found).__name__}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InvalidCheckpoint(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB; that is no config")
        return parse_json(path.read_bytes(), str(path))
    except OSError as exc:
        raise InvalidCheckpoint(f"{path} cannot be read ({exc})") from exc


class _Fields:
    """Typed access to the fields of one JSON object; every complaint names the file and the field."""

    def __init__(self, path: Path, values: Mapping[str, Any] | None = None, prefix: str = "") -> None:
        self.path = path
        self.prefix = prefix
        self.values = read_json(path) if values is None else values

    def error(self, field: str, message: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"{self.path}: {self.prefix}{field} {message}")

    def get(self, field: str) -> Any:
        """The raw value; null counts as absent."""
        return self.values.get(field)

    def integer(self, field: str, default: int | None = None, *, low: int = 1, high: int = MAX_SIZE) -> int:
        value = self.get(field)
        if value is None:
            if default is None:
                raise self.error(field, "is missing; this is not the complete config of a decoder")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(field, f"must be an integer from {low} to {high}, got {value!r:.80}")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.get(field)
        if value is None:
            if default is None:
                raise self.error(field, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.error(field, f"must be a positive finite number, got {value!r:.80}")
        return float(value)

    def boolean(self, field: str, default: bool) -> bool:
        value = self.get(field)
        if value is not None and not isinstance(value, bool):
            raise self.error(field, f"must be true or false, got {value!r:.80}")
        return default if value is None else value

    def text(self, field: str, default: str) -> str:
        value = self.get(field)
        if value is not None and not isinstance(value, str):
            raise self.error(field, f"must be a string, got {value!r:.80}")
        return default if value is None else value

    def token_ids(self, field: str, vocab_size: int, default: int | None = None) -> tuple[int, ...]:
        """One id or a list of ids. The default stands for a field that is absent; null means none."""
        value = self.values.get(field, default)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                raise self.error(field, f"must hold token ids below vocab_size ({vocab_size}), got {token!r:.80}")
        return tuple(ids)

    def section(self, field: str) -> _Fields | None:
        value = self.get(field)
        if value is not None and not isinstance(value, dict):
            raise self.error(field, f"must be an object, got {value!r:.80}")
        return _Fields(self.path, value, f"{field}.") if value else None


_CLASSES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def _architecture(config: _Fields) -> str:
    known = f"Sluice runs {', '.join(_CLASSES)}"
    names = config.get("architectures")
    model_type = config.text("model_type", "")
    if names is None:
        if model_type not in _CLASSES.values():
            raise config.error("model_type", f"{model_type!r:.80} is not supported; {known}")
        return model_type
    if names not in [[name] for name in _CLASSES]:
        raise config.error("architectures", f"{names!r:.200} is not supported; {known}")
    architecture = _CLASSES[names[0]]
    if model_type not in ("", architecture):
        raise config.error("model_type", f"{model_type!r:.80} contradicts architectures {names!r}")
    return architecture


def _refuse_unsupported(config: _Fields) -> None:
    if config.get("quantization_config") is not None:
        raise config.error("quantization_config", "is set; quantised weights are not supported, use a dense checkpoint")
    if config.text("hidden_act", "silu") not in ("silu", "swish"):
        raise config.error("hidden_act", f"{config.get('hidden_act')!r:.80} is not supported, only 'silu'")
    if config.number("partial_rotary_factor", 1.0) != 1.0:
        raise config.error("partial_rotary_factor", "other than 1 is not supported")


def _head_dim(config: _Fields, architecture: str, heads: int) -> int:
    hidden = config.integer("hidden_size")
    default = 128 if architecture == "qwen3" and "head_dim" not in config.values else hidden // heads
    if config.get("head_dim") is None and architecture != "qwen3" and hidden % heads:
        raise config.error("hidden_size", f"must be a multiple of num_attention_heads ({heads}), got {hidden}")
    head_dim = config.integer("head_dim", default)
    if head_dim % 2:
        raise config.error("head_dim", f"must be even for rotary embedding, got {head_dim}")
    return head_dim


def _dtype(config: _Fields) -> str:
    name = config.text("dtype", config.text("torch_dtype", "float32")).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise config.error("dtype", f"{name!r:.80} is not supported; use float32, bfloat16 or float16")
    return name


def _windows(config: _Fields, architecture: str, layers: int) -> tuple[int | None, ...]:
    """The window of each layer: all of Mistral's, and those of a Qwen that layer_types or max_window_layers name."""
    stated = _layer_types(config, layers)
    is_qwen = architecture in ("qwen2", "qwen3")
    off = architecture == "llama" or (is_qwen and not config.boolean("use_sliding_window", False))
    absent = "sliding_window" in config.values and config.get("sliding_window") is None
    size = None if off or absent else config.integer("sliding_window", 4096)
    first = config.integer("max_window_layers", 28, low=0) if is_qwen else 0
    implied = [size is not None and index >= first for index in range(layers)]
    slides = stated if stated is not None and is_qwen else implied
    if stated not in (None, slides) or (any(slides) and size is None):
        raise config.error("layer_types", "contradicts sliding_window (and use_sliding_window); make them agree")
    return tuple(size if slide else None for slide in slides)


def _layer_types(config: _Fields, layers: int) -> list[bool] | None:
    """Which layers slide by `layer_types`, or None without that field."""
    types = config.get("layer_types")
    if types is None:
        return None
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(kind not in kinds for kind in types):
        raise config.error("layer_types", f"must name one of {kinds} for each of {layers} layers, got {types!r:.200}")
    return [kind == "sliding_attention" for kind in types]


def _rope(config: _Fields, max_position: int) -> RopeSpec:
    """Both spellings: rope_theta beside rope_scaling (transformers 4) and all in rope_parameters (transformers 5)."""
    fields = config.section("rope_scaling") or config.section("rope_parameters") or _Fields(config.path, {})
    if any(isinstance(value, dict) for value in fields.values.values()):
        raise fields.error("*", "per kind of layer is not supported; one rotary embedding for all layers is")
    theta = fields.number("rope_theta", config.number("rope_theta", 10_000.0))
    if theta <= 1.0:
        raise fields.error("rope_theta", f"must be greater than 1, got {theta}")
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error("partial_rotary_factor", "other than 1 is not supported")
    kind = fields.text("rope_type", fields.text("type", "default"))
    if kind == "default":
        return RopeSpec(theta)
    if kind == "linear":
        return RopeSpec(theta, kind, fields.number("factor"))
    if kind not in ("llama3", "yarn"):
        raise fields.error("rope_type", f"{kind!r:.80} is not supported; Sluice runs default, linear, llama3 and yarn")
    original = config.integer(
        "original_max_position_embeddings", fields.integer("original_max_position_embeddings", max_position)
    )
    return _llama3(fields, theta, original) if kind == "llama3" else _yarn(fields, theta, original, max_position)


def _llama3(fields: _Fields, theta: float, original: int) -> RopeSpec:
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if high <= low:
        raise fields.error("high_freq_factor", f"must be greater than low_freq_factor ({low}), got {high}")
    return RopeSpec(theta, "llama3", fields.number("factor"), original, low, high)


def _yarn(fields: _Fields, theta: float, original: int, max_position: int) -> RopeSpec:
    factor = fields.number("factor", max_position / original)

    def temperature(scale: float, mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(scale) + 1.0 if scale > 1 else 1.0

    if fields.get("mscale") and fields.get("mscale_all_dim"):
        inferred = temperature(factor, fields.number("mscale")) / temperature(factor, fields.number("mscale_all_dim"))
    else:
        inferred = temperature(factor)
    return RopeSpec(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        truncate=fields.boolean("truncate", True),
        attention_factor=fields.number("attention_factor", inferred),
    )


def _max_position(rope: RopeSpec, declared: int) -> int:
    """YaRN configs give the context before or after stretching; original * factor is what the model was made for."""
    stretched = int(rope.original_max_position * rope.factor) if rope.kind == "yarn" else 0
    return min(MAX_SIZE, max(declared, stretched))


def _generation_config(folder: Path) -> _Fields | None:
    name = "generation_config.json"
    present = (folder / name).exists() or (folder / name).is_symlink()
    return _Fields(checkpoint_file(folder, name)) if present else None


def _eos_ids(config: _Fields, generation: _Fields | None, vocab_size: int, default: int | None) -> tuple[int, ...]:
    """Every id that either file calls the end of a sequence; the architecture's default only where neither does."""
    found = config.token_ids("eos_token_id", vocab_size)
    if generation is not None:
        found += generation.token_ids("eos_token_id", vocab_size)
    if not found and "eos_token_id" not in config.values:
        found = config.token_ids("eos_token_id", vocab_size, default)
    return tuple(dict.fromkeys(found))
