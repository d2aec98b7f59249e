"""`python -m engine.doctor [--json]`: what works on this machine, and for what does not: why, and what to do.

Looks and tries, changes nothing, and reports a failing check as a finding. Exit status 0 if a model can be served here, else 1.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.config import cache_dir

_PACKAGES = ("torch", "triton", "flashinfer-python", "cuda-python", "numba", "transformers", "tokenizers", "msgspec", "aiohttp")
_NEEDED = ("torch", "tokenizers", "msgspec", "aiohttp")
_MARKS = {"ok": "+", "missing": "-", "failed": "!"}
_TOPICS = ("python", "packages", "cpu", "gpu", "driver", "kernels", "gates", "memory", "colocation", "files")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `state`: ok, missing (works without, or on other machines only) or failed (should work)."""

    topic: str
    name: str
    state: str
    text: str


def examine() -> list[Finding]:
    """All findings, by topic. Never raises: a check that does is a finding itself."""
    findings: list[Finding] = []
    for topic in _TOPICS:
        try:
            for finding in _CHECKS[topic]():
                findings.append(finding)
        except Exception as error:  # whatever is broken here is what the doctor was called for
            findings.append(Finding(topic, topic, "failed", f"{type(error).__name__}: {_first_line(error)}"))
    return findings


def can_serve(findings: list[Finding]) -> bool:
    """Whether a model can be served: everything that is needed is there, and kernels for some device."""
    needed = all(f.state == "ok" for f in findings if f.name in _NEEDED or f.topic == "python")
    return needed and any(f.topic == "kernels" and f.state == "ok" for f in findings)


def _python() -> Iterator[Finding]:
    state = "ok" if sys.version_info >= (3, 11) else "failed"
    yield Finding("python", "python", state, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    for name in _PACKAGES:
        try:
            yield Finding("packages", name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            state, text = ("failed", "needed, not installed") if name in _NEEDED else ("missing", "optional, not installed")
            yield Finding("packages", name, state, text)


def _cpu() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0))
    kind = torch.backends.cpu.get_cpu_capability()
    yield Finding("cpu", "cores", "ok", f"{cores} of {os.cpu_count()} usable, {torch.get_num_threads()} threads, {kind}")


def _gpu() -> Iterator[Finding]:
    from engine.kernels import cuda

    if reason := cuda.unavailable():
        yield Finding("gpu", "cuda", "missing", reason)
        return
    gpu = cuda.facts()
    total, used = gpu.memory.total / 2**30, gpu.memory.used / 2**30
    yield Finding(
        "gpu", "cuda", "ok",
        f"{gpu.name}, compute capability {gpu.capability}, {gpu.multiprocessors} multiprocessors, {total:.1f} GiB "
        f"({used:.1f} in use), CUDA {gpu.cuda_runtime}",
    )  # fmt: skip


def _driver() -> Iterator[Finding]:
    from nvdriver.abi import branch_of
    from nvdriver.device import LinuxHost, release_of
    from nvdriver.errors import NvDriverError

    text = LinuxHost().version_text()
    if not text:
        yield Finding("driver", "nvidia", "missing", "no NVIDIA kernel driver is loaded")
        return
    release = release_of(text)
    kind = "open kernel module" if re.search(r"\bopen\b", text, re.IGNORECASE) else "proprietary kernel module"
    try:
        branch_of(release)
        yield Finding("driver", "nvidia", "ok", f"{release} ({kind}), a branch whose structures are known to nvdriver")
    except NvDriverError as error:
        yield Finding("driver", "nvidia", "missing", f"{release} ({kind}): {error}")


def _kernels() -> Iterator[Finding]:
    from engine.kernels import cuda
    from engine.kernels.select import load_backend

    backend = load_backend("cpu")
    if backend.name == "cpu":
        yield Finding("kernels", "cpu", "ok", "compiled (numba, on torch's OpenMP threads)")
    else:
        yield Finding(
            "kernels", "cpu", "ok",
            "plain torch, several times slower: install numba beside a torch with oneDNN whose OpenMP library it can share",
        )  # fmt: skip
    if reason := cuda.unavailable():
        yield Finding("kernels", "triton", "missing", f"not tried: {reason}")
    else:
        cuda.smoke_test()
        yield Finding("kernels", "triton", "ok", "a kernel was compiled, run and compared with torch")
    if importlib.util.find_spec("flashinfer") is None:
        yield Finding("kernels", "flashinfer", "missing", "not installed: pip install 'sluice[cuda]'; attention is Triton's")
    else:
        yield Finding("kernels", "flashinfer", "ok", "installed; used on a GPU for kinds of steps where it is the faster")


def _gates() -> Iterator[Finding]:
    """What stops the offline model's process. Whether a rung really stops it is probed when that process starts."""
    yield _channel_gate()
    yield _stream_gate()
    try:
        os.close(os.pidfd_open(os.getpid()))
        yield Finding("gates", "process", "ok", "SIGSTOP through a pidfd; for workers on a CPU")
    except (AttributeError, OSError) as error:
        yield Finding("gates", "process", "failed", f"no pidfd_open(2) here: {error}; the rung `layer` is used")
    yield Finding("gates", "layer", "ok", "a word of shared memory, polled between layers; on any device")


@functools.cache
def _channel_gate() -> Finding:
    from nvdriver.api import open_gate
    from nvdriver.errors import NvDriverError

    try:
        with open_gate() as gate:
            text = f"this process's GPU channels were found (route {gate.route.value}); nothing was stopped"
            return Finding("gates", "channel", "ok", text)
    except NvDriverError as error:
        return Finding("gates", "channel", "missing", f"{type(error).__name__}: {_first_line(error)}")


@functools.cache
def _stream_gate() -> Finding:
    from engine.kernels import cuda

    if reason := cuda.unavailable():
        return Finding("gates", "stream", "missing", f"not tried: {reason}")
    from engine.colocate.cuda_gate import try_barrier
    from engine.errors import InvalidConfig

    try:
        if try_barrier():
            return Finding("gates", "stream", "ok", "a kernel queued behind a closed barrier waited for it to open")
        return Finding("gates", "stream", "failed", "a kernel queued behind a closed barrier ran all the same")
    except InvalidConfig as error:
        return Finding("gates", "stream", "missing", _first_line(error))


def _colocation() -> Iterator[Finding]:
    """What --offline-model would use here, and why nothing better."""
    from engine.colocate.gate import rungs
    from engine.kernels.select import resolve_device

    device = resolve_device("auto")
    known = {finding.name: finding for finding in _gates()}
    better: list[str] = []
    for rung in rungs("auto", device):
        finding = known.get(rung)
        if finding is None or finding.state == "ok":
            break
        better.append(f"not {rung} ({finding.text})")
    text = "; ".join([f"--offline-model on {device} would try the gate {rung} first", *better])
    yield Finding("colocation", "gate", "ok" if rung != "none" else "failed", text)
    if device == "cpu":
        yield Finding("colocation", "slabs", "ok", "host memory: taken from a process that stands still by punching holes")
        return
    from engine.errors import InvalidConfig
    from engine.memory.cuda_vmm import CudaVmm

    try:
        granule = CudaVmm().granularity() >> 20
        yield Finding("colocation", "slabs", "ok", f"GPU memory by CUDA's virtual memory calls, in multiples of {granule} MiB")
    except InvalidConfig as error:
        yield Finding("colocation", "slabs", "failed", f"two models cannot share this GPU: {_first_line(error)}")


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    yield Finding("memory", "host", "ok", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} available")
    fd = os.memfd_create("sluice-doctor")
    os.close(fd)
    yield Finding("memory", "memfd", "ok", "memory files for KV windows can be made")


def _files() -> Iterator[Finding]:
    from engine.demo import demo_folder

    cache = cache_dir()
    nearest = next((path for path in (cache, *cache.parents) if path.exists()), Path("/"))
    writable = os.access(nearest, os.W_OK)
    free = shutil.disk_usage(nearest).free / 2**30
    yield Finding(
        "files", "cache", "ok" if writable else "failed",
        f"{cache}, {free:.1f} GiB free" if writable else f"{cache} cannot be written; set SLUICE_CACHE to a folder that can",
    )  # fmt: skip
    there = demo_folder(cache).is_dir()
    yield Finding("files", "demo", "ok" if there else "missing", "ready" if there else "made on first use (93 MB to download)")


_CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "python": _python,
    "packages": _packages,
    "cpu": _cpu,
    "gpu": _gpu,
    "driver": _driver,
    "kernels": _kernels,
    "gates": _gates,
    "memory": _memory,
    "colocation": _colocation,
    "files": _files,
}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]


def render(findings: list[Finding]) -> str:
    """The report for people: one block a topic, + works, - not here, ! should work and does not."""
    lines: list[str] = []
    for topic in _TOPICS:
        lines.append(f"{topic}")
        for finding in (f for f in findings if f.topic == topic):
            lines.append(f"  {_MARKS[finding.state]} {finding.name}: {finding.text}")
    verdict = "models can be served here" if can_serve(findings) else "no model can be served here: see the lines marked !"
    return "\n".join([*lines, "", verdict])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.doctor", description="What works on this machine, and why not.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    findings = examine()
    serves = can_serve(findings)
    with suppress(BrokenPipeError):
        if args.json:
            print(json.dumps({"can_serve": serves, "findings": [asdict(finding) for finding in findings]}, indent=2))
        else:
            print(render(findings))
    return 0 if serves else 1


if __name__ == "__main__":
    sys.exit(main())
