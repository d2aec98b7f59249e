"""Settings of the HTTP server: one frozen dataclass and its flags. Standard library only, so that `--help` is instant."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from engine.errors import InvalidConfig


def _knob(default: Any, help: str, **options: Any) -> Any:
    return field(default=default, metadata={"help": help, "options": options})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the server listens, whom it lets in, and where it stops being patient. Times are seconds, sizes bytes."""

    host: str = _knob("127.0.0.1", "address to listen on")
    port: int = _knob(8000, "port to listen on; 0 takes a free one")
    api_key: tuple[str, ...] = _knob((), "key that clients must send; may be given several times", action="append", type=str)
    api_key_file: str | None = _knob(None, "file with one key per line, so that keys stay out of the process list")
    insecure_no_auth: bool = _knob(False, "listen beyond this machine although no key is set")
    public_models: bool = _knob(False, "answer GET /v1/models without a key (for readiness probes)")
    public_metrics: bool = _knob(False, "answer GET /metrics without a key")
    metrics_compat: str = _knob("vllm", "also export the online tenant's metrics under these names", choices=("vllm", "none"))
    shutdown_timeout: float = _knob(30.0, "after SIGTERM, wait this long for requests in flight")
    max_connections: int = _knob(1024, "most open connections; more are answered 503 and closed")
    max_inflight_per_key: int = _knob(0, "most requests in flight for one key; 0: no limit")
    max_inflight_flex: int = _knob(1024, "most `service_tier: flex` requests in flight; 0: no limit")
    max_body_size: int = _knob(32 * 2**20, "largest request body")
    header_timeout: float = _knob(10.0, "a new connection must have sent its first request's headers by then")
    body_timeout: float = _knob(60.0, "a request's body must have arrived by then")
    keep_alive_timeout: float = _knob(75.0, "an idle connection is closed after this")
    sse_keep_alive_interval: float = _knob(15.0, "a silent stream gets a comment this often; 0: never")
    sse_write_timeout: float = _knob(30.0, "a stream whose client reads nothing for so long is aborted")
    min_priority: int = _knob(0, "most urgent `priority` that a request may ask for; lower goes first")
    log_format: str = _knob("text", "form of log lines", choices=("text", "json"))
    log_level: str = _knob("info", "least severe log lines shown", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.name != "min_priority" and isinstance(value, int | float) and value < 0:
                raise InvalidConfig(f"{flag(spec.name)} must not be negative, got {value}")
            choices = spec.metadata["options"].get("choices")
            if choices and value not in choices:
                raise InvalidConfig(f"{flag(spec.name)} must be one of {', '.join(choices)}; got {value!r}")
        if not 0 <= self.port <= 65535:
            raise InvalidConfig(f"--port must be between 0 and 65535, got {self.port}")
        if any(len(key) < 1 or not key.isascii() or not key.isprintable() for key in self.api_key):
            raise InvalidConfig("--api-key must be printable ASCII and not empty")

    def check_exposure(self) -> None:
        """Raise InvalidConfig if strangers could use the engine."""
        if not (self.api_key or self.insecure_no_auth or is_loopback(self.host)):
            raise InvalidConfig(
                f"--host {self.host} can be reached from other machines and no --api-key is set; "
                "set one, listen on 127.0.0.1, or accept the risk with --insecure-no-auth"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost counts as reachable by others."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def flag(name: str) -> str:
    """The spelling of a field on the command line."""
    return "--" + name.replace("_", "-")


def add_server_args(parser: argparse.ArgumentParser) -> None:
    """One flag per field of ServerConfig. Only what is given appears in the namespace."""
    group = parser.add_argument_group("server")
    for spec in fields(ServerConfig):
        shown = "" if spec.default in (None, (), False) else f" (default: {spec.default})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": spec.metadata["help"] + shown}
        if isinstance(spec.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif "choices" not in spec.metadata["options"]:
            options |= {"type": str if spec.default is None else type(spec.default), "metavar": spec.name.upper()}
        group.add_argument(flag(spec.name), **options | spec.metadata["options"])


def server_config(given: Mapping[str, Any]) -> ServerConfig:
    """The config of parsed flags (others are ignored), with the keys of `api_key_file` read."""
    names = {spec.name for spec in fields(ServerConfig)}
    values = {name: value for name, value in given.items() if name in names}
    keys = tuple(values.get("api_key", ()))
    if path := values.get("api_key_file"):
        keys += _read_keys(Path(path))
    return ServerConfig(**values | {"api_key": keys})


def _read_keys(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="ascii").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"--api-key-file {path}: {error}") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise InvalidConfig(f"--api-key-file {path}: it holds no key")
    return keys
