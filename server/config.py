"""Settings of the HTTP server: one frozen dataclass and its flags. Standard library only, so that `--help` is instant."""

from __future__ import annotations

import argparse
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from engine.config import secret
from engine.errors import InvalidConfig
from server.clients import Client, check_key, read_clients, read_keys


def _knob(default: Any, help: str, **options: Any) -> Any:
    return field(default=default, metadata={"help": help, "options": options})


def _mode(text: str) -> int:
    mode = int(text, 8)
    if not 0 <= mode <= 0o777 or mode & 0o600 != 0o600:  # YAML reads 0660 as 432, and that is caught here too
        raise argparse.ArgumentTypeError(f"{text!r} is not a mode such as 660 with which the owner can read and write")
    return mode


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the server listens, whom it lets in, and where it stops being patient. Times are seconds, sizes bytes."""

    host: str = _knob("127.0.0.1", "address to listen on")
    port: int = _knob(8000, "port to listen on; 0 takes a free one")
    uds: str | None = _knob(None, "listen on a unix socket at this path instead of an address")
    uds_mode: int = _knob(0o600, "who may connect to the unix socket, as for chmod", type=_mode)
    ssl_certfile: str | None = _knob(None, "certificate chain: serve HTTPS. Read again on SIGHUP")
    ssl_keyfile: str | None = _knob(None, "its private key, if it is not in the same file")
    ssl_ca_certs: str | None = _knob(None, "let in only clients with a certificate from these authorities")
    api_key: tuple[str, ...] = _knob((), "key that clients must send; may be given several times", action="append", type=str)
    api_key_file: str | None = _knob(None, "file with one key per line, so that keys stay out of the process list")
    api_keys_file: str | None = _knob(
        None, "YAML file of clients: name, sha256 of the key, tenants, limits. Read again on SIGHUP"
    )
    admin_api_key: tuple[str, ...] = _knob((), "key for admin routes (dashboard, pause, drain)", action="append", type=str)
    admin_api_key_file: str | None = _knob(None, "file with one admin key per line")
    allowed_origins: tuple[str, ...] = _knob(
        (), "let pages from here call the API, e.g. https://a.example", nargs="+", type=str
    )
    insecure_no_auth: bool = _knob(False, "listen beyond this machine although no key is set")
    public_models: bool = _knob(False, "answer GET /v1/models without a key (for readiness probes)")
    public_metrics: bool = _knob(False, "answer GET /metrics without a key")
    metrics_compat: str = _knob("vllm", "also export the online tenant's metrics under these names", choices=("vllm", "none"))
    shutdown_timeout: float = _knob(30.0, "after SIGTERM, wait this long for requests in flight")
    max_connections: int = _knob(1024, "most open connections; more are answered 503 and closed")
    max_inflight_per_key: int = _knob(0, "most requests in flight for one key; 0: no limit")
    max_inflight_flex: int = _knob(1024, "most `service_tier: flex` requests in flight; 0: no limit")
    max_queue_time: float = _knob(
        0.0, "an online request whose turn does not come within this is answered 503; 0: it waits as long as its client does"
    )
    max_body_size: int = _knob(32 * 2**20, "largest request body")
    max_body_memory: int = _knob(256 * 2**20, "most bytes of request bodies being read at once; more are answered 503")
    header_timeout: float = _knob(10.0, "a new connection must have sent its first request's headers by then")
    body_timeout: float = _knob(60.0, "a request's body must have arrived by then")
    keep_alive_timeout: float = _knob(75.0, "an idle connection is closed after this")
    sse_keep_alive_interval: float = _knob(15.0, "a silent stream gets a comment this often; 0: never")
    sse_write_timeout: float = _knob(30.0, "a stream whose client reads nothing for so long is aborted")
    min_priority: int = _knob(0, "most urgent `priority` that a request may ask for; lower goes first")
    # The engine's flag of the same name: what it keeps to is shown and counted here.
    ttft_slo_ms: float = _knob(0.0, "first-token time that online requests should not exceed, shown and counted; 0: none")
    stuck_step_timeout: float = _knob(60.0, "a step that runs for longer is reported, and /health answers 503; 0: never")
    health_generate_timeout: float = _knob(20.0, "GET /health_generate answers 503 if no token comes by then; 0: it waits")
    status_interval: float = _knob(10.0, "while there is work, log a line per tenant this often; 0: never")
    enable_log_requests: bool = _knob(False, "log a line for every answered request")
    data_dir: str | None = _knob(
        None, "folder for files and batches, or 'none' for neither (default: sluice in the user's state folder)"
    )
    data_quota: int = _knob(0, "most bytes of stored files; 0: no limit")
    min_free_disk: int = _knob(64 * 2**20, "uploads are refused where they would leave less of the disk free than this")
    max_files: int = _knob(100_000, "most stored files; 0: no limit")
    max_file_size: int = _knob(200 * 2**20, "largest file taken")
    max_batches: int = _knob(1000, "most unfinished batches")
    max_batches_per_key: int = _knob(0, "most unfinished batches of one key; 0: no limit")
    max_queued_lines_per_key: int = _knob(0, "most lines without an answer in one key's unfinished batches; 0: no limit")
    max_batch_lines: int = _knob(100_000, "most lines of a batch")
    max_line_bytes: int = _knob(2**20, "longest line of a batch")
    max_inflight: int = _knob(0, "most lines of all batches in flight; 0: twice --max-num-seqs")
    log_format: str = _knob("text", "form of log lines", choices=("text", "json"))
    log_level: str = _knob("info", "least severe log lines shown", choices=("debug", "info", "warning", "error"))
    clients: tuple[Client, ...] = field(default=(), metadata={"file": "api_keys_file"})  # those of the clients file

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.name != "min_priority" and isinstance(value, int | float) and value < 0:
                raise InvalidConfig(f"{flag(spec.name)} must not be negative, got {value}")
            choices = spec.metadata.get("options", {}).get("choices")
            if choices and value not in choices:
                raise InvalidConfig(f"{flag(spec.name)} must be one of {', '.join(choices)}; got {value!r}")
        if not 0 <= self.port <= 65535:
            raise InvalidConfig(f"--port must be between 0 and 65535, got {self.port}")
        for name in ("api_key", "admin_api_key"):
            for key in getattr(self, name):
                check_key(key, flag(name))
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise InvalidConfig("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile")
        if self.max_body_memory < self.max_body_size:
            raise InvalidConfig("--max-body-memory must hold at least one body of --max-body-size")
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise InvalidConfig(f"--allowed-origins: {origin!r} is not of the form https://name or https://name:port")

    @property
    def is_private(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.uds is not None or is_loopback(self.host)

    def check_exposure(self) -> None:
        """Raise InvalidConfig if strangers could use the engine."""
        if not (self.api_key or self.clients or self.ssl_ca_certs or self.insecure_no_auth or self.is_private):
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
        if "help" not in spec.metadata:
            continue  # made from other fields
        if flag(spec.name) in parser._option_string_actions:
            continue  # the engine's too, and the same value
        default = f"{spec.default:o}" if spec.name == "uds_mode" else spec.default
        shown = "" if spec.default in (None, (), False) else f" (default: {default})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": spec.metadata["help"] + shown}
        if isinstance(spec.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif "choices" not in spec.metadata["options"]:
            options |= {"type": str if spec.default is None else type(spec.default), "metavar": spec.name.upper()}
        group.add_argument(flag(spec.name), **options | spec.metadata["options"])


def server_config(given: Mapping[str, Any]) -> ServerConfig:
    """The config of parsed flags (others are ignored), with keys from files and from the environment added to theirs."""
    names = {spec.name for spec in fields(ServerConfig) if "help" in spec.metadata}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if name in names
    }
    for name in ("api_key", "admin_api_key"):
        keys = values.get(name, ())
        if path := values.get(name + "_file"):
            keys += read_keys(path, flag(name + "_file"))
        values[name] = keys + tuple(filter(None, [secret(name)]))
    if path := values.get("api_keys_file"):
        values["clients"] = read_clients(path)
    return ServerConfig(**values)
