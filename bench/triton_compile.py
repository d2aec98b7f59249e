"""Compile every Triton kernel ahead of time and report its shared memory, registers and spills. Needs no GPU.

    python -m bench.triton_compile                    all kernels, sm_80 sm_90 sm_100
    python -m bench.triton_compile --quick --json     one shape of each kernel, as JSON lines

Shapes are those the engine launches for common models. Registers are per thread and come from the assembled binary; "mma"
names the tensor-core instruction found in it. A row fails if it spills more than a few registers or exceeds the device's
shared memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels import triton_attend, triton_ops, triton_pages, triton_sampling, triton_write
from engine.kernels.triton_config import Launch, launches

SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one program may use
_TOLERATED_SPILL = 64  # bytes a thread; outside the loops that is noise
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_MMA = re.compile(r"\b(HGMMA|QGMMA|UTCHMMA|UTCQMMA|HMMA)\b")


@dataclass(frozen=True)
class Job:
    """One kernel with the types of its arguments ("i32:16" is a multiple of 16) and its constants."""

    name: str
    fn: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What the compiler made of a job. Bytes, except `registers`."""

    job: str
    capability: int
    warps: int
    shared: int
    registers: int
    spills: int
    mma: str

    @property
    def fits(self) -> bool:
        return self.spills <= _TOLERATED_SPILL and self.shared <= SHARED_LIMIT[self.capability]


def attention_jobs(capability: int, head_dim: int, group: int, dtype: torch.dtype, windowed: bool) -> Iterator[Job]:
    kind = _NAMES[dtype]
    block_d = max(16, triton.next_power_of_2(head_dim))
    shape = {"KV_HEADS": 8, "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": block_d}
    types = {
        **dict.fromkeys(("q_ptr", "kv_ptr", "out_ptr"), f"*{kind}:16"),
        **dict.fromkeys(("partial_ptr", "lse_ptr"), "*fp32:16"),
        **dict.fromkeys(("items_ptr", "tables_ptr", "merges_ptr"), "*i32:16"),
        "scale": "fp32",
        **dict.fromkeys(("q_token", "q_head", "page_stride", "value_offset"), "i32:16"),
        "window": "i32:16",
    }
    more = f" {kind} D={head_dim} G={group}{' window' if windowed else ''}"
    for kernel, launch in zip(("prefill", "decode"), launches(capability, block_d, dtype), strict=True):
        constants = shape | {
            "PAGE_SIZE": 16,
            "BLOCK_M": launch.block_m,
            "BLOCK_N": launch.block_n,
            "WINDOWED": windowed,
            "UNIFORM": kernel == "decode",
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
            "WIDE": False,
        }
        yield Job(f"{kernel}{more}", triton_attend.attend_kernel, types, constants, _options(launch))
    constants = shape | {"BLOCK_M": 16, "TILE": 16}
    yield Job(f"merge{more}", triton_attend.merge_kernel, types, constants, {"num_warps": 4})


def _options(launch: Launch) -> dict[str, int]:
    return {"num_warps": launch.num_warps, "num_stages": launch.num_stages}


def other_jobs() -> Iterator[Job]:
    model = {name: "*bf16:16" for name in ("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "sum_ptr", "q_ptr", "k_ptr")}
    model |= {name: "*bf16:16" for name in ("v_ptr", "q_weight_ptr", "k_weight_ptr", "kv_ptr")}
    model |= {"cos_ptr": "*fp32:16", "sin_ptr": "*fp32:16", "slots_ptr": "*i32:16", "eps": "fp32"}
    model |= {name: "i32" for name in ("num_rows", "heads", "num_entries", "vocab")}
    strides = ("x_token", "x_head", "residual_row", "x_row", "q_token", "q_head", "k_token", "k_head", "v_token", "v_head")
    model |= dict.fromkeys((*strides, "table_row", "page_stride", "value_offset"), "i32:16")
    norm = {"WIDTH": 4096, "BLOCK": 4096, "ROWS": 1}
    yield Job("add_rms_norm 4096", triton_ops.rms_norm_kernel, model, norm | {"ADD": True}, {"num_warps": 8})
    heads = {"WIDTH": 128, "BLOCK": 128, "ROWS": 16, "ADD": False}
    yield Job("rms_norm heads", triton_ops.rms_norm_kernel, model, heads, {"num_warps": 4})
    yield Job("silu_mul", triton_ops.silu_mul_kernel, model, {"WIDTH": 14336, "BLOCK": 1024}, {"num_warps": 4})
    shape = {"Q_HEADS": 32, "HEAD_DIM": 128, "HALF": 64}
    rotary = shape | {"K_HEADS": 8, "HEADS": 16}
    yield Job("rotary", triton_ops.rotary_kernel, model, rotary, {"num_warps": 2})
    write = shape | {"KV_HEADS": 8, "HEADS": 8, "PAGE_SIZE": 16}
    plain = write | {"Q_BLOCKS": 0, "ROTATE": False, "NORM": False}
    fused = write | {"Q_BLOCKS": 4, "ROTATE": True, "NORM": True}
    yield Job("write", triton_write.write_kernel, model, plain, {"num_warps": 2})
    yield Job("norm rotary write", triton_write.write_kernel, model, fused, {"num_warps": 2})
    words = {"window_ptr": "*i32:16", "packed_ptr": "*i32:16", "pages_ptr": "*i64:16", "page_stride": "i32:16"}
    for gather in (True, False):
        constants = {"WORDS": 524288, "BLOCK": 4096, "GATHER": gather}
        name = "gather pages" if gather else "scatter pages"
        yield Job(name, triton_pages.copy_pages_kernel, words, constants, {"num_warps": 4})
    sampling = model | {"logits_ptr": "*fp32:16", "params_ptr": "*fp64:16", "token_ptr": "*i64:16", "counts_ptr": "*i32:16"}
    sampling |= {"rows_ptr": "*i32:16", "ids_ptr": "*i32", "is_output_ptr": "*i32", "bias_ptr": "*fp32:16"}
    sampling |= {"bits_ptr": "*i32:16"}
    yield Job("mask", triton_sampling.mask_kernel, sampling | {"words": "i32:16"}, {"BLOCK": 4096})
    yield Job("bias", triton_sampling.bias_kernel, sampling, {"BLOCK": 256})
    yield Job("count", triton_sampling.count_kernel, sampling, {"BLOCK": 256})
    yield Job("penalty", triton_sampling.penalty_kernel, sampling, {"BLOCK": 4096})
    yield Job("pick", triton_sampling.pick_kernel, sampling, {"BLOCK": 4096}, {"num_warps": 16})


def jobs(capability: int, quick: bool) -> Iterator[Job]:
    yield from attention_jobs(capability, 128, 4, torch.bfloat16, windowed=False)
    yield from other_jobs()
    if quick:
        return
    yield from attention_jobs(capability, 128, 4, torch.bfloat16, windowed=True)
    yield from attention_jobs(capability, 128, 7, torch.bfloat16, windowed=False)
    yield from attention_jobs(capability, 64, 8, torch.bfloat16, windowed=False)
    yield from attention_jobs(capability, 64, 1, torch.float16, windowed=True)
    yield from attention_jobs(capability, 80, 1, torch.bfloat16, windowed=False)
    yield from attention_jobs(capability, 96, 1, torch.float16, windowed=False)
    yield from attention_jobs(capability, 256, 2, torch.bfloat16, windowed=False)
    yield from attention_jobs(capability, 128, 4, torch.float32, windowed=False)


def compile_job(job: Job, capability: int) -> Report:
    names = job.fn.arg_names
    signature = {name: job.types[name].split(":")[0] if name in job.types else "constexpr" for name in names}
    signature |= dict.fromkeys(job.constants, "constexpr")
    aligned = [i for i, name in enumerate(names) if job.types.get(name, "").endswith(":16")]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=job.fn, signature=signature, constexprs=job.constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=job.options)
    usage, sass = _inspect(compiled.asm["cubin"])
    registers, spills = (int(re.search(pattern, usage)[1]) for pattern in (r"REG:(\d+)", r"(?:LOCAL|STACK):(\d+)"))
    found = _MMA.search(sass)
    metadata = compiled.metadata
    mma = found[1] if found else ""
    return Report(job.name, capability, metadata.num_warps, metadata.shared, registers, spills, mma)


def _inspect(cubin: bytes) -> tuple[str, str]:
    """The resource line and the disassembly of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(flag: str) -> str:
            command = [str(_TOOLS / "cuobjdump"), flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        return dump("--dump-resource-usage"), dump("--dump-sass")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape of each kernel")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--capability", type=int, action="append", help="80, 89, 90, 100; may be repeated")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    arguments = parser.parse_args()
    failed = 0
    for capability in arguments.capability or (80, 90, 100):
        for job in jobs(capability, arguments.quick):
            if arguments.only not in job.name:
                continue
            report = compile_job(job, capability)
            failed += not report.fits
            if arguments.json:
                print(json.dumps(vars(report) | {"fits": report.fits}), flush=True)
            else:
                verdict = "" if report.fits else "  DOES NOT FIT"
                print(
                    f"sm_{capability:<4}{job.name:<32}{report.warps:>3} warps {report.shared:>7} B shared "
                    f"{report.registers:>4} registers {report.spills:>5} B spilled  {report.mma}{verdict}",
                    flush=True,
                )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
