"""Section 7: two 8B models with random weights on one device, one online and one offline, by `bench.colocation`: interference,
harvest and bounds, from real servers that all share the device and take turns. One short round; what was measured when the time
is up is kept.
"""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench import colocation
from bench.colocate.arms import ALONE, NO_GATE, OFFLINE_ALONE, SLUICE
from bench.gpu.common import Bench, Skip
from bench.gpu.shapes import config_of, folder_of

ONLINE, OFFLINE = "llama-3.1-8b", "qwen3-8b"
CLOSING_SECONDS = 25.0  # of the section's limit, for servers to end


def run(bench: Bench) -> None:
    with ExitStack() as stack:
        online, offline = (stack.enter_context(model(name, bench)) for name in (ONLINE, OFFLINE))
        args = colocation.parser().parse_args([
            "--online-model", str(online), "--offline-model", str(offline), *shlex.split(options(bench)),
            "--server-flags", server_flags(bench), "--out", str(bench.folder / "colocation"),
        ])  # fmt: skip
        logs = bench.folder / "colocation"
        logs.mkdir(parents=True, exist_ok=True)
        session = colocation.make_session(args, logs)
        ended = "in time"
        try:
            asyncio.run(asyncio.wait_for(colocation.run(session), max(10.0, bench.limit - CLOSING_SECONDS)))
        except TimeoutError:
            ended = "the time was up: what follows was measured until then"
        bench.row("colocation", float(len(session.runs)), "windows", note=ended)
        for arm, probe in session.probes.items():
            bench.row(f"gate of {arm!r}", None, "", note=str(probe))
        if not session.runs:
            raise Skip("no window was measured: see the servers' logs in colocation/")
        for line in session.save(args.out).splitlines():
            bench.text(line)


def options(bench: Bench) -> str:
    traffic = "--rounds 1 --retries 0 --patience 0 --tables interference harvest bounds --arms " + " ".join(
        shlex.quote(arm) for arm in ((ALONE, SLUICE) if bench.dry else (ALONE, SLUICE, OFFLINE_ALONE, NO_GATE))
    )
    if bench.dry:
        sizes = "--minutes 0.02 --warm 0.2 --kv-memory 8MiB --backlog 2 --prompt-tokens 12 --output-tokens 4"
        return f"{traffic} --scale-rate 5 {sizes}"
    return (
        f"{traffic} --minutes 0.2 --warm 3 --kv-memory 8GiB --backlog 64 --prompt-tokens 512 --output-tokens 96 "
        "--offline-prompt-tokens 256 --offline-output-tokens 128"
    )


def server_flags(bench: Bench) -> str:
    """The sizes of `shapes.engine_config`, for a server."""
    common = "--load-format dummy --max-model-len"
    if bench.dry:
        return f"{common} 512 --device cpu --threads 1 --max-num-seqs 8"
    return f"{common} 4096 --device cuda --max-num-batched-tokens 8192 --max-num-seqs 64"


@contextmanager
def model(name: str, bench: Bench) -> Iterator[Path]:
    """A checkpoint folder without weights, and with a tokenizer in which every token has a text of its own."""
    with folder_of(name, bench) as path:
        write_tokenizer(path, config_of(name, bench)["vocab_size"])
        yield path


def write_tokenizer(path: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(alphabet)}
    vocab |= {f"t{index}": index for index in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 4096}), encoding="utf-8")
