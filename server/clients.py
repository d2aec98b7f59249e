"""Who may use the server, as settings: one `Client` per key, from flags, key files and the environment.

Keys are kept as SHA-256 digests only. A clients file (`--api-keys-file`) is YAML or JSON, a list of entries:

    - name: editor                 # in logs and limits, never the key
      sha256: 9f86d0...            # of the key; or `key:` with the key itself
      tenants: [online]            # default: online and offline
      max_inflight: 8              # the rest: 0 or absent means no limit
      requests_per_minute: 600
      tokens_per_minute: 200000    # prompt and output
      max_batches: 4               # unfinished ones
      max_queued_lines: 50000      # of these, without an answer
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InvalidConfig

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_LIMITS = ("max_inflight", "requests_per_minute", "tokens_per_minute", "max_batches", "max_queued_lines")
_FIELDS = {"name", "key", "sha256", "tenants", *_LIMITS}
RESERVED = ("-", "admin")  # anybody, where there are no keys; the owner of the admin key
BOTH = frozenset({"online", "offline"})  # values of engine.types.Tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A key's owner: its name, what it may do, and how much. A limit of 0 is none."""

    name: str
    digest: bytes = b""  # SHA-256 of the key
    tenants: frozenset[str] = BOTH
    max_inflight: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_batches: int = 0
    max_queued_lines: int = 0


def digest_of(key: str) -> bytes:
    """SHA-256 of a key as a header carries it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def client_of(key: str) -> Client:
    """The client of a plain key, named by the beginning of its digest."""
    digest = digest_of(key)
    return Client(name=digest.hex()[:8], digest=digest)


def check_key(key: str, flag: str) -> str:
    """`key`, if a header can carry it. Raises InvalidConfig."""
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        raise InvalidConfig(f"{flag} must be printable ASCII, not empty, without spaces around it")
    return key


def read_keys(path: str, flag: str) -> tuple[str, ...]:
    """One key per line; empty lines and lines that begin with # are skipped. Raises InvalidConfig."""
    try:
        lines = Path(path).read_text(encoding="ascii").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{flag} {path}: {error}") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise InvalidConfig(f"{flag} {path}: it holds no key")
    return tuple(check_key(key, f"{flag} {path}: a key") for key in keys)


def read_clients(path: str) -> tuple[Client, ...]:
    """The entries of a clients file. Raises InvalidConfig, which names the entry and never shows a key."""
    import yaml

    where = f"--api-keys-file {path}"
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # the error itself quotes the file, keys and all
        raise InvalidConfig(f"{where}: not YAML" + (f", line {mark.line + 1}" if mark else "")) from None
    if not isinstance(entries, list) or not entries:
        raise InvalidConfig(f"{where}: expected a list of clients")
    clients = tuple(_client(entry, f"{where}: entry {number}") for number, entry in enumerate(entries, 1))
    _no_twins((client.name for client in clients), f"{where}: two entries have the name")
    _no_twins((client.digest.hex()[:8] for client in clients), f"{where}: two entries have the key with the digest")
    return clients


def _client(entry: Any, where: str) -> Client:
    if not isinstance(entry, Mapping):
        raise InvalidConfig(f"{where} must have a name and a key or sha256")
    if unknown := sorted(str(name) for name in entry if name not in _FIELDS):
        raise InvalidConfig(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(sorted(_FIELDS))}")
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidConfig(f"{where}: name must be 1 to 64 letters, digits or _.:-")
    if name in RESERVED:
        raise InvalidConfig(f"{where}: the name {name} is taken by the server")
    where = f"{where} ({name})"
    limits = {limit: entry.get(limit, 0) for limit in _LIMITS}
    for limit, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InvalidConfig(f"{where}: {limit} must be a whole number, 0 for none")
    return Client(name=name, digest=_digest(entry, where), tenants=_tenants(entry, where), **limits)


def _digest(entry: Mapping[str, Any], where: str) -> bytes:
    if ("key" in entry) == ("sha256" in entry):
        raise InvalidConfig(f"{where}: give either key or sha256")
    if "key" in entry:
        return digest_of(check_key(str(entry["key"]), f"{where}: key"))
    text = str(entry["sha256"])
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise InvalidConfig(f"{where}: sha256 must be 64 hexadecimal digits, in quotes")
    return bytes.fromhex(text)


def _tenants(entry: Mapping[str, Any], where: str) -> frozenset[str]:
    names = entry.get("tenants", sorted(BOTH))
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name in BOTH for name in names):
        raise InvalidConfig(f"{where}: tenants must be a list of {' and '.join(sorted(BOTH))}")
    return frozenset(names)


def _no_twins(values: Iterable[str], message: str) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise InvalidConfig(f"{message} {value}")
        seen.add(value)
