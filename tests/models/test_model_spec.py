"""config.json to ModelSpec: what is accepted, what it means, and that a bad field is refused by its name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import InvalidCheckpoint
from engine.spec import ModelSpec, RopeSpec, load_spec

MINIMAL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def spec_of(folder: Path, generation: dict[str, Any] | None = None, **fields: Any) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(MINIMAL | fields))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_spec(folder)


def family(architecture: str) -> dict[str, Any]:
    return {"architectures": [f"{CLASSES[architecture]}ForCausalLM"], "model_type": architecture}


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    assert (spec.num_kv_heads, spec.head_dim, spec.rms_eps, spec.dtype) == (4, 16, 1e-6, "float32")
    assert (spec.bos_id, spec.eos_ids, spec.tie_embeddings) == (1, (2,), False)
    assert spec.rope == RopeSpec(theta=10_000.0)
    assert spec.windows == (None, None, None)
    qwen3 = spec_of(tmp_path, **family("qwen3"))
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.bos_id, qwen3.eos_ids) == (128, True, None, ())


@pytest.mark.parametrize("architecture", CLASSES)
def test_biases_follow_the_architecture(tmp_path: Path, architecture: str) -> None:
    plain = spec_of(tmp_path, **family(architecture))
    assert (plain.qkv_bias, plain.o_bias, plain.mlp_bias) == (architecture == "qwen2", False, False)
    asked = spec_of(tmp_path, **family(architecture), attention_bias=True, mlp_bias=True)
    assert (asked.qkv_bias, asked.o_bias, asked.mlp_bias) == {
        "llama": (True, True, True),
        "mistral": (False, False, False),
        "qwen2": (True, False, False),
        "qwen3": (True, True, False),
    }[architecture]


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "type": "ignored", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    ],
)
def test_both_spellings_of_rope(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert spec_of(tmp_path, **fields).rope == RopeSpec(theta=5e5, kind="linear", factor=2.0)


def test_llama3_and_yarn_fields(tmp_path: Path) -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert spec_of(tmp_path, rope_scaling=llama3).rope.original_max_position == 512
    assert spec_of(tmp_path, rope_scaling=llama3).max_position == 512
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    spec = spec_of(tmp_path, rope_scaling=yarn)
    assert (spec.rope.kind, spec.rope.beta_fast, spec.rope.beta_slow) == ("yarn", 32.0, 1.0)
    assert spec.rope.attention_factor == pytest.approx(1.1386294361119891)
    assert spec.max_position == 1024, "the stretched context, though max_position_embeddings gives the original one"
    assert spec_of(tmp_path, rope_scaling=yarn | {"attention_factor": 0.5}).rope.attention_factor == 0.5
    no_factor = {"type": "yarn", "original_max_position_embeddings": 128}
    assert spec_of(tmp_path, rope_scaling=no_factor).rope.factor == 4.0


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        (family("llama") | {"sliding_window": 8}, (None, None, None)),
        (family("mistral") | {"sliding_window": 8}, (8, 8, 8)),
        (family("mistral") | {"sliding_window": None}, (None, None, None)),
        (family("mistral"), (4096, 4096, 4096)),
        (family("qwen2") | {"sliding_window": 8, "max_window_layers": 1}, (None, None, None)),
        (family("qwen2") | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (None, 8, 8)),
        (family("qwen2") | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, (8, 8, 8)),
        (family("qwen3") | {"use_sliding_window": True, "sliding_window": None}, (None, None, None)),
        (
            family("qwen3")
            | {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (8, None, 8),
        ),
    ],
)
def test_windows(tmp_path: Path, fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert spec_of(tmp_path, **fields).windows == windows


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 7], None, (2, 7)),
        (2, {"eos_token_id": [7, 2, 9]}, (2, 7, 9)),
        (None, {"eos_token_id": 7}, (7,)),
        (None, {}, ()),
    ],
)
def test_end_ids_of_both_files(tmp_path: Path, in_config: Any, in_generation: Any, expected: tuple[int, ...]) -> None:
    assert spec_of(tmp_path, in_generation, eos_token_id=in_config).eos_ids == expected


@pytest.mark.parametrize(
    "fields", [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"dtype": "torch.bfloat16", "torch_dtype": "float16"}]
)
def test_dtype_under_both_names(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert spec_of(tmp_path, **fields).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": None, "model_type": "mamba"}, "model_type"),
        ({"model_type": "mistral"}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 2**63}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"dtype": "float8_e4m3fn"}, "dtype"),
        ({"torch_dtype": 16}, "torch_dtype"),
        ({"eos_token_id": 1000}, "eos_token_id"),
        ({"eos_token_id": [2, -1]}, "eos_token_id"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"bos_token_id": 1.5}, "bos_token_id"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4}},
            "rope_scaling.high_freq_factor",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": "32"}}, "rope_scaling.beta_fast"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        (family("mistral") | {"sliding_window": 0}, "sliding_window"),
        (family("mistral") | {"layer_types": ["full_attention"] * 3}, "layer_types"),
        (family("qwen2") | {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        (family("qwen2") | {"layer_types": ["full_attention"] * 2}, "layer_types"),
        (family("qwen2") | {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
    ],
)
def test_a_bad_field_is_refused_by_name(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidCheckpoint) as caught:
        spec_of(tmp_path, **fields)
    assert f"config.json: {named}" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"hidden_size": NaN}',
        '{"hidden_size": 1, "hidden_size": 2}',
        '{"hidden_size": ' + "1" * 5000 + "}",
        "[" * 200_000,
        '{"a": "\\ud800"}\x00',
    ],
    ids=["empty", "list", "cut", "nan", "twice", "digits", "deep", "nul"],
)
def test_a_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidCheckpoint, match=r"config\.json"):
        load_spec(tmp_path)


def test_missing_folder_and_missing_config(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="nowhere is not a folder"):
        load_spec(tmp_path / "nowhere")
    with pytest.raises(InvalidCheckpoint, match=r"config\.json is missing"):
        load_spec(tmp_path)


def test_a_bad_generation_config_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"generation_config\.json: eos_token_id"):
        spec_of(tmp_path, {"eos_token_id": [5000]})


def test_code_in_the_folder_is_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    for name in ("configuration_evil.py", "modeling_evil.py", "__init__.py", "conftest.py"):
        (tmp_path / name).write_text(f"open({str(canary)!r}, 'w')\n")
    auto_map = {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    spec_of(tmp_path, auto_map=auto_map, tokenizer_class="modeling_evil.Tokenizer")
    assert not canary.exists()
    assert not [name for name in sys.modules if "evil" in name]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_FIELDS = [*MINIMAL, "head_dim", "num_key_value_heads", "rope_scaling", "rope_parameters", "rope_theta", "dtype"]
_FIELDS += ["eos_token_id", "bos_token_id", "sliding_window", "layer_types", "max_window_layers", "rms_norm_eps"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(base=st.sampled_from(list(CLASSES)), fields=st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=3))
def test_any_config_gives_a_spec_or_a_named_error(tmp_path: Path, base: str, fields: dict[str, Any]) -> None:
    try:
        spec = spec_of(tmp_path, **(family(base) | fields))
    except InvalidCheckpoint as exc:
        assert "config.json" in str(exc)
    else:
        assert spec.num_heads % spec.num_kv_heads == 0
        assert len(spec.windows) == spec.num_layers
