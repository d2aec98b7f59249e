"""Safetensors folders: good ones load to the very bits, and every way to be bad is refused before anything is used."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_checkpoint
from safetensors.torch import load_file, save_file

from engine.errors import InvalidCheckpoint
from engine.spec import load_spec
from engine.weights import EMBEDDING, LM_HEAD, expected_shapes, load_weights, random_weights, read_header

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return load_weights(folder, load_spec(folder), dtype)


def refused(folder: Path, *parts: str, dtype: torch.dtype = torch.float32) -> None:
    """Loading fails with a message that has all of `parts`."""
    with pytest.raises(InvalidCheckpoint) as caught:
        load(folder, dtype)
    for part in parts:
        assert part in str(caught.value), f"{part!r} not in {caught.value}"


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def split_file(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_file(file: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = split_file(file)
    change(header)
    join_file(file, header, data)


def change_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path, "qwen3")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path, "llama", tie_word_embeddings=False, max_shard_size="100KB")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


# Good folders


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_single_file_loads_bit_for_bit(tmp_path: Path, architecture: str, tied: bool) -> None:
    folder = tiny_checkpoint(tmp_path, architecture, tie_word_embeddings=tied)
    loaded, stored = load(folder), load_file(folder / FILE)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == expected_shapes(load_spec(folder))
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


def test_shards_load_bit_for_bit(sharded: Path) -> None:
    stored = {name: tensor for shard in shards(sharded) for name, tensor in load_file(shard).items()}
    loaded = load(sharded)
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("run", [torch.float32, torch.bfloat16, torch.float16])
def test_conversion_to_the_run_dtype(tmp_path: Path, stored: str, run: torch.dtype) -> None:
    folder = tiny_checkpoint(tmp_path, "llama", dtype=stored)
    assert load_spec(folder).dtype == stored
    assert torch.equal(load(folder, run)[Q_PROJ], load_file(folder / FILE)[Q_PROJ].to(run))


def test_loaded_weights_outlive_the_file(folder: Path) -> None:
    expected = load_file(folder / FILE)[Q_PROJ].clone()
    weights = load(folder)
    os.truncate(folder / FILE, 16)
    assert torch.equal(weights[Q_PROJ], expected)


def test_harmless_extras_are_left_out(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert not [name for name in load(folder) if "inv_freq" in name]


def test_a_repeated_tied_head_is_left_out(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({LM_HEAD: t[EMBEDDING].clone()}))
    assert LM_HEAD not in load(folder)


def test_links_of_the_download_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "rev", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    assert load(snapshot).keys() == expected_shapes(load_spec(snapshot)).keys()


def test_progress_counts_every_byte(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_weights(folder, load_spec(folder), torch.float32, progress=True)
    shown = capsys.readouterr()
    assert FILE in shown.err and "100%" in shown.err
    assert not shown.out
    load(folder)
    assert not capsys.readouterr().err


def test_random_weights_have_the_spec_shapes_and_follow_the_seed(folder: Path) -> None:
    spec = load_spec(folder)
    one, same, other = (random_weights(spec, torch.bfloat16, seed) for seed in (1, 1, 2))
    assert {name: tuple(tensor.shape) for name, tensor in one.items()} == expected_shapes(spec)
    assert all(tensor.dtype == torch.bfloat16 for tensor in one.values())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one[EMBEDDING], other[EMBEDDING])


# Damaged files


def test_truncated_data(folder: Path) -> None:
    os.truncate(folder / FILE, (folder / FILE).stat().st_size - 1)
    refused(folder, FILE, "truncated", "download it again")


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_truncated_header(folder: Path, size: int) -> None:
    os.truncate(folder / FILE, size)
    refused(folder, FILE, "truncated")


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63, 2**64 - 1])
def test_header_length_beyond_the_file(folder: Path, length: int) -> None:
    raw = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(struct.pack("<Q", length) + raw[8:])
    refused(folder, FILE, f"a header of {length}")


@pytest.mark.parametrize("header", [b"[]", b"{]", b"\xff\xfe", b"[" * 100_000], ids=["list", "cut", "bytes", "deep"])
def test_header_that_is_no_json_object(folder: Path, header: bytes) -> None:
    join_file(folder / FILE, header, split_file(folder / FILE)[1])
    refused(folder, FILE, "header")


def test_duplicate_tensor_in_a_header(folder: Path) -> None:
    header, data = split_file(folder / FILE)
    text = json.dumps(header)[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}'
    join_file(folder / FILE, text.encode(), data)
    refused(folder, FILE, "duplicate key", NORM)


def test_overlapping_tensors(folder: Path) -> None:
    other = "model.layers.0.input_layernorm.weight"
    change_header(folder / FILE, lambda h: h[NORM].update(data_offsets=h[other]["data_offsets"]))
    refused(folder, FILE, "overlaps", NORM)


def test_a_gap_between_tensors(folder: Path) -> None:
    change_header(folder / FILE, lambda h: h.pop("model.layers.0.input_layernorm.weight"))
    refused(folder, FILE, "leaves a gap")


def test_bytes_behind_the_last_tensor(folder: Path) -> None:
    with (folder / FILE).open("ab") as file:
        file.write(b"\0" * 10)
    refused(folder, FILE, "10 bytes that belong to no tensor")


def test_offsets_beyond_the_file(folder: Path) -> None:
    def shift(header: dict[str, Any]) -> None:
        start, end = header[NORM]["data_offsets"]
        header[NORM]["data_offsets"] = [start + 2**40, end + 2**40]

    change_header(folder / FILE, shift)
    refused(folder, FILE, "truncated")


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"dtype": "F32", "shape": [64]},
        {"dtype": "F32", "shape": [64], "data_offsets": [0, 256], "more": 1},
        {"dtype": "F32", "shape": [-64], "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [64.0], "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": [64], "data_offsets": [256, 0]},
        {"dtype": "F32", "shape": [64], "data_offsets": [0]},
        {"dtype": "F32", "shape": [64], "data_offsets": [0, 252]},
        {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 256]},
        {"dtype": ["F32"], "shape": [64], "data_offsets": [0, 256]},
    ],
)
def test_malformed_tensor_description(folder: Path, entry: Any) -> None:
    change_header(folder / FILE, lambda h: h.update({NORM: entry}))
    refused(folder, FILE, NORM)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool])
def test_quantised_dtypes(folder: Path, dtype: torch.dtype) -> None:
    change_tensors(folder, lambda t: t.update({Q_PROJ: t[Q_PROJ].to(dtype)}))
    refused(folder, FILE, Q_PROJ, "dtype")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_values_that_are_no_numbers(tmp_path: Path, stored: str, value: float) -> None:
    folder = tiny_checkpoint(tmp_path, "llama", dtype=stored)
    change_tensors(folder, lambda t: t[Q_PROJ].view(-1)[1234].fill_(value))
    refused(folder, FILE, Q_PROJ, "NaN or infinity", dtype=torch.bfloat16)


def test_values_beyond_the_run_dtype(folder: Path) -> None:
    change_tensors(folder, lambda t: t[Q_PROJ][3, 3].fill_(1e6))
    assert load(folder, torch.bfloat16)[Q_PROJ][3, 3] > 9e5
    refused(folder, FILE, Q_PROJ, "beyond the range of float16", dtype=torch.float16)


# Whole files that do not fit the config


@pytest.mark.parametrize("name", [NORM, Q_PROJ, EMBEDDING, "model.layers.2.self_attn.k_norm.weight"])
def test_missing_tensor(folder: Path, name: str) -> None:
    change_tensors(folder, lambda t: t.pop(name))
    refused(folder, str(folder), "lack", name)


@pytest.mark.parametrize(
    "name", ["model.layers.3.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias", "vision_tower.weight"]
)
def test_unexpected_tensor(folder: Path, name: str) -> None:
    change_tensors(folder, lambda t: t.update({name: torch.ones(64)}))
    refused(folder, str(folder), name, "config.json")


@pytest.mark.parametrize("change", [lambda t: t.T.contiguous(), lambda t: t[:-1].clone(), lambda t: t[None].clone()])
def test_wrong_shape(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    change_tensors(folder, lambda t: t.update({name: change(t[name])}))
    refused(folder, FILE, name, "[64, 96]")


def test_tied_head_that_differs(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({LM_HEAD: t[EMBEDDING] + 1}))
    refused(folder, "config.json", "tie_word_embeddings", LM_HEAD)


def test_missing_untied_head_hints_at_the_config(sharded: Path) -> None:
    change_index(sharded, lambda m: m.pop(LM_HEAD))
    [shard] = [shard for shard in shards(sharded) if LM_HEAD in read_header(shard)]
    tensors = load_file(shard)
    del tensors[LM_HEAD]
    save_file(tensors, shard)
    refused(sharded, LM_HEAD, "tie_word_embeddings")


# Shards and paths


def test_missing_shard(sharded: Path) -> None:
    lost = shards(sharded)[1]
    lost.unlink()
    refused(sharded, lost.name, "missing", "download")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "a/../../outside.safetensors", "/etc/x.safetensors"])
def test_shard_paths_stay_in_the_folder(sharded: Path, shard: str) -> None:
    shards(sharded)[0].rename(sharded.parent / "outside.safetensors")
    (sharded / "a").mkdir()
    change_index(sharded, lambda m: m.update({name: shard for name, file in m.items() if file.startswith("model-00001")}))
    refused(sharded, "leads out of the model folder", shard)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", FILE])
def test_links_out_of_the_folder(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "outside")
    (folder / name).symlink_to("../outside")
    refused(folder, name, "leads out of the model folder")


def test_a_linked_shard_out_of_the_folder(sharded: Path) -> None:
    shard = shards(sharded)[0]
    shard.rename(sharded.parent / "outside")
    shard.symlink_to(sharded.parent / "outside")
    refused(sharded, shard.name, "leads out of the model folder")


@pytest.mark.parametrize("kind", ["loop", "pipe", "directory", "dangling"])
def test_a_weight_file_that_is_no_file(folder: Path, kind: str) -> None:
    file = folder / FILE
    file.unlink()
    {
        "loop": lambda: file.symlink_to(FILE),
        "pipe": lambda: os.mkfifo(file),
        "directory": file.mkdir,
        "dangling": lambda: file.symlink_to("absent"),
    }[kind]()
    refused(folder, FILE)


@pytest.mark.parametrize("shard", [7, None, "pytorch_model.bin", "x" * 5000 + ".safetensors", "a\0.safetensors"])
def test_malformed_shard_names(sharded: Path, shard: Any) -> None:
    change_index(sharded, lambda m: m.update({NORM: shard}))
    refused(sharded, str(sharded))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_malformed_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, INDEX)


def test_tensor_in_two_shards(sharded: Path) -> None:
    one, two = shards(sharded)[:2]
    tensors = load_file(two) | {name: tensor for name, tensor in list(load_file(one).items())[:1]}
    save_file(tensors, two)
    refused(sharded, "is in both", one.name, two.name)


def test_index_that_disagrees_with_the_shards(sharded: Path) -> None:
    change_index(sharded, lambda m: m.update({"ghost.weight": m[NORM]}))
    refused(sharded, INDEX, "ghost.weight")
    change_index(sharded, lambda m: (m.pop("ghost.weight"), m.pop(NORM)))
    refused(sharded, INDEX, NORM)


# Other formats


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_unopened(folder: Path, name: str) -> None:
    (folder / FILE).unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    refused(folder, name, "never loaded", "convert it to safetensors")


def test_pickled_weights_beside_safetensors_are_ignored(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    assert load(folder)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / FILE).rename(folder / "adapter_model.safetensors")
    refused(folder, "adapter_model.safetensors", FILE)
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "no weights", FILE)
