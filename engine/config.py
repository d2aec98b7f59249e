"""Every knob of the engine: one frozen dataclass, its command-line flags made from the same fields, and the environment.

The only file that reads environment variables. A field's help text is its documentation; the flag is the field's name with
dashes. Nothing here touches a device: what "auto" means is decided in `engine.build`.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from engine.errors import InvalidConfig

METRICS = ("mean-ttft", "p99-ttft", "mean-tpot", "p99-tpot")
_SECRETS = ("api_key", "admin_api_key")
_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def cache_dir() -> Path:
    """Where Sluice keeps what it can make again: $SLUICE_CACHE, else $XDG_CACHE_HOME/sluice, else ~/.cache/sluice."""
    if explicit := os.environ.get("SLUICE_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sluice"


def state_dir() -> Path:
    """Where Sluice keeps what it cannot make again: $SLUICE_STATE, else $XDG_STATE_HOME/sluice, else ~/.local/state/sluice."""
    if explicit := os.environ.get("SLUICE_STATE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "sluice"


def child_environment() -> dict[str, str]:
    """The environment for a child process that must import this very project, wherever it was imported from."""
    here = str(Path(__file__).resolve().parent.parent)
    rest = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([here, rest] if rest else [here])}


def read_environment(parser: argparse.ArgumentParser) -> None:
    """Let $SLUICE_NAME stand for every flag --name of `parser` that is not on the command line, read by the same rules.

    A switch takes true or false; a flag with several values takes them between commas. Keys are `secret`'s.
    """
    for action in parser._actions:
        name = f"SLUICE_{action.dest.upper()}"
        text = os.environ.get(name, "")
        if not text or not action.option_strings or action.dest in ("help", *_SECRETS):
            continue
        try:
            action.default = _from_text(parser, action, text)
        except argparse.ArgumentError as error:
            parser.error(f"${name}: {error.message}")
        action.required = False


def _from_text(parser: argparse.ArgumentParser, action: argparse.Action, text: str) -> Any:
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        if text.lower() not in _SWITCH:
            raise argparse.ArgumentError(action, f"must be true or false, got {text!r}")
        return _SWITCH[text.lower()]
    several = action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction)
    values = [parser._get_value(action, word.strip()) for word in (text.split(",") if several else [text])]
    for value in values:
        parser._check_value(action, value)
    return values if several else values[0]


def secret(name: str) -> str | None:
    """A key from the environment, e.g. $SLUICE_API_KEY for "api_key": other users cannot see it in the process list."""
    return os.environ.get(f"SLUICE_{name.upper()}") or None


def parse_bytes(text: str) -> int:
    """'2GiB', '512M', '1e9' or plain digits -> bytes."""
    match = re.fullmatch(r"\s*([0-9.eE+]+)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    try:
        assert match is not None
        value = int(float(match[1]) * _UNITS[match[2].lower()])
    except (AssertionError, ValueError, KeyError, OverflowError):
        raise InvalidConfig(f"cannot read {text!r} as a size; write for example 2GiB or 512MiB") from None
    return value


def knob(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    parse: Callable[[str], Any] | None = None,
    low: float | None = None,
) -> Any:
    """A documented field: default, help text and how its flag is read."""
    return field(default=default, metadata={"help": help, "choices": choices, "parse": parse, "low": low})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one engine is set up. Defaults suit the demo model on a CPU."""

    model: str = knob("demo", "folder of a safetensors checkpoint, or 'demo' for the built-in demo model")
    served_model_name: tuple[str, ...] = knob((), "names clients may use for the model (default: the folder's name)")
    offline_model: str | None = knob(
        None,
        "a second model, run in a process of its own, for the offline tenant only; the online model again, with --sharing step "
        "or auto: run by the online worker",
    )
    offline_served_model_name: str | None = knob(None, "name of the offline model (default: its folder's name)")
    device: Literal["auto", "cpu", "cuda"] = knob("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = knob(
        "auto",
        "number format of weights and KV; auto is float32 on a CPU and the checkpoint's own elsewhere",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    load_format: str = knob(
        "auto", "'dummy' fills the model with random weights instead of reading them", choices=("auto", "dummy")
    )
    max_model_len: int | None = knob(None, "longest prompt plus output in tokens (default: the model's)", low=1)
    max_num_seqs: int = knob(64, "most requests running at once", low=1)
    max_num_batched_tokens: int | None = knob(
        None, "most tokens computed in one step (default: 512 on a CPU, 2048 to 8192 on a GPU by its memory)", low=1
    )
    offline_max_batched_tokens: int | None = knob(
        None,
        "most tokens computed in one step without online rows, of which it takes as many as make it faster (default: up to "
        "2048, or as many as other steps)",
        low=1,
    )
    max_num_queued_reqs: int = knob(1024, "most online requests waiting before new ones are refused", low=1)
    max_num_queued_tokens: int = knob(
        0, "most prompt tokens of online requests without a first token before new ones are refused; 0: no limit", low=0
    )
    kv_cache_memory: int | None = knob(
        None, "KV memory in bytes, e.g. 2GiB (default: room for what can run at once, within free memory)",
        parse=parse_bytes, low=1,
    )  # fmt: skip
    host_kv_memory: int = knob(
        0, "host memory for copies of offline KV, e.g. 2GiB: who gives way is copied back instead of computed again",
        parse=parse_bytes, low=0,
    )  # fmt: skip
    gpu_memory_utilization: float = knob(0.9, "part of the GPU's memory to use for weights, work space and KV")
    enforce_eager: bool = knob(False, "decode without CUDA graphs")
    attention_backend: str = knob(
        "auto",
        "attention kernels; auto is the CPU's own, and on a GPU the faster of triton and flashinfer (where installed)",
        choices=("auto", "triton", "flashinfer", "torch"),
    )
    page_size: int = knob(16, "tokens in a KV page", low=1)
    slab_size: int = knob(2 * 2**20, "bytes of KV memory that change hands between tenants at once", parse=parse_bytes)
    enable_prefix_caching: bool = knob(True, "keep the KV of finished requests for prompts that start the same")
    online_cache_share: float = knob(0.5, "part of the KV memory whose online prefixes offline work may never evict")
    sharing: str = knob(
        "exclusive",
        "one model for both tenants: offline rows only while online is idle, or also in online steps as latency allows, or "
        "whichever of the two is worth more at the moment",
        choices=("auto", "exclusive", "step"),
    )
    ttft_slo_ms: float | None = knob(
        None,
        "time in which a first token is due: steps of offline rows stop for an arrival only if it would come too late "
        "(default: always)",
        parse=float, low=0,
    )  # fmt: skip
    tpot_slo_ms: float | None = knob(None, "shared steps: longest time for a step with online rows", parse=float, low=0)
    slo_increase: float = knob(0.05, "shared steps without --tpot-slo-ms: share by which online may get slower", low=0)
    slo_metric: str = knob(
        "mean-tpot",
        "what of online requests must keep to the target; the budget of shared steps follows it",
        choices=METRICS,
    )
    offline_order: str = knob(
        "prefix",
        "which offline request goes next: who shares the longest beginning with the one before it, or first come first served",
        choices=("prefix", "fcfs"),
    )
    gate: str = knob(
        "auto",
        "how the offline model's process is stopped: auto takes the first that demonstrably works",
        choices=("auto", "channel", "stream", "process", "layer", "none"),
    )
    cooldown_ms: float | None = knob(
        None, "stay with online this long after its last request (default: adapted to the arrivals)", parse=float, low=0
    )
    reserve: str = knob(
        "miad", "rule for the slabs online keeps free beyond its use", choices=("miad", "fixed", "none", "static")
    )
    victims: str = knob("least-lost-work", "rule for the slabs taken from offline", choices=("least-lost-work", "fifo", "lifo"))
    offline_nice: int = knob(0, "operating-system niceness of the offline model's process (0 to 19)", low=0)
    tool_call_parser: str = knob(
        "auto",
        "how the model writes calls of tools; auto is told by its chat template",
        choices=("auto", "hermes", "llama3_json", "qwen3_coder"),
    )
    threads: int | None = knob(None, "compute threads on a CPU (default: one per core)", low=1)
    seed: int = knob(0, "seed of the engine's own random choices")

    def __post_init__(self) -> None:
        for spec in fields(self):
            low, value = spec.metadata.get("low"), getattr(self, spec.name)
            if low is not None and value is not None and value < low:
                raise InvalidConfig(f"--{spec.name.replace('_', '-')} must be at least {low:g}, got {value}")
            choices = spec.metadata.get("choices")
            if choices and value not in choices:
                raise InvalidConfig(f"--{spec.name.replace('_', '-')} must be one of {', '.join(choices)}; got {value!r}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise InvalidConfig(f"--gpu-memory-utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}")
        if not 0.0 <= self.online_cache_share <= 1.0:
            raise InvalidConfig(f"--online-cache-share must be between 0 and 1, got {self.online_cache_share}")

    def with_options(self, **overrides: Any) -> EngineConfig:
        """A copy with some fields changed; an unknown name is an InvalidConfig with the nearest known one."""
        known = {spec.name for spec in fields(self)}
        for name in overrides:
            if name not in known:
                raise InvalidConfig(unknown_option(name, known))
        if isinstance(names := overrides.get("served_model_name"), str):
            overrides["served_model_name"] = (names,)
        return replace(self, **overrides)


def unknown_option(name: str, known: set[str]) -> str:
    """'unknown option x; did you mean y?'"""
    import difflib

    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def add_engine_args(parser: argparse.ArgumentParser) -> None:
    """One flag per field of EngineConfig. Defaults stay out of the namespace, so a config file can come between."""
    group = parser.add_argument_group("engine")
    for spec in fields(EngineConfig):
        flag = "--" + spec.name.replace("_", "-")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": spec.name}
        shown = "" if spec.default in (None, ()) else f" (default: {spec.default})"
        options["help"] = (spec.metadata["help"] + shown).replace("%", "%%")
        if isinstance(spec.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            continue
        if spec.name == "served_model_name":
            options["nargs"] = "+"
        options["type"] = _reader(spec.name, spec.default, spec.metadata["parse"])
        options["metavar"] = spec.name.upper()
        if spec.metadata["choices"]:
            options.update(choices=spec.metadata["choices"], metavar="{" + ",".join(spec.metadata["choices"]) + "}")
        group.add_argument(flag, **options)


def _reader(name: str, default: Any, parse: Callable[[str], Any] | None) -> Callable[[str], Any]:
    if parse is not None:

        def read(text: str) -> Any:
            try:
                return parse(text)
            except (InvalidConfig, ValueError) as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        return read
    if name in ("max_model_len", "max_num_batched_tokens", "offline_max_batched_tokens", "threads"):
        return int
    return str if default is None or isinstance(default, tuple) else type(default)


def config_from_args(args: argparse.Namespace, base: Mapping[str, Any] | None = None) -> EngineConfig:
    """The config from parsed flags over `base` (say, a config file's entries) over the defaults."""
    names = {spec.name for spec in fields(EngineConfig)}
    given = {**(base or {}), **{key: value for key, value in vars(args).items() if key in names}}
    for spec in fields(EngineConfig):
        if isinstance(value := given.get(spec.name), list):
            given[spec.name] = tuple(value)
        elif isinstance(value, str) and spec.metadata["parse"] is not None:
            given[spec.name] = spec.metadata["parse"](value)
    return EngineConfig().with_options(**given)
