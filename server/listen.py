"""The socket that the server listens on: an address or a unix socket, with TLS or without."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import stat

from engine.errors import InvalidConfig
from server.config import ServerConfig

_UNSENT = 128 * 1024  # bytes


def bind(config: ServerConfig) -> socket.socket:
    """A bound socket, not yet listening. Raises OSError."""
    return _bind_path(config.uds, config.uds_mode) if config.uds is not None else _bind_port(config.host, config.port)


def address(listener: socket.socket, config: ServerConfig) -> str:
    """Where clients find it, as a URL where there is one."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{config.uds}"
    host, port = listener.getsockname()[:2]
    scheme = "http" if config.ssl_certfile is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def unbind(listener: socket.socket, config: ServerConfig) -> None:
    """Close it, and take a unix socket's name away."""
    listener.close()
    if config.uds is not None:
        with contextlib.suppress(OSError):
            os.unlink(config.uds)


def _bind_port(host: str, port: int) -> socket.socket:
    """Connections inherit the bound on what the system takes and cannot send yet.

    By default that grows to megabytes for each client that does not read, and all of it counts as written, so that the write
    deadline of a stream begins late or never. What is on its way is not bounded: long lines are as fast as before.
    """
    family, kind, proto, _, where = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
        listener.bind(where)
    except OSError:
        listener.close()
        raise
    return listener


def _bind_path(path: str, mode: int) -> socket.socket:
    """The socket that a killed server left is replaced; that of a living one, or any other file, is not."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        _remove_stale(path)
        before = os.umask(0o777)  # nobody connects between `bind` and `chmod`
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        os.chmod(path, mode)
    except OSError:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return  # `bind` says that it is taken
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)


def tls(config: ServerConfig) -> ssl.SSLContext | None:
    """What `--ssl-certfile` asks for, TLS 1.2 or newer. Raises InvalidConfig."""
    if config.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificates(context, config)
    if config.ssl_ca_certs is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def load_certificates(context: ssl.SSLContext, config: ServerConfig) -> None:
    """Read the files (again); connections made from now on see them. Raises InvalidConfig and changes nothing."""
    assert config.ssl_certfile is not None
    try:
        # Into a context of their own first: a certificate and a key that do not belong together must not be half loaded.
        for each in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), context):
            each.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=_no_password)
            if config.ssl_ca_certs is not None:
                each.load_verify_locations(config.ssl_ca_certs)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise InvalidConfig(f"--ssl-certfile, --ssl-keyfile, --ssl-ca-certs: {error}") from None


def _no_password() -> str:
    raise ValueError("the private key is encrypted; the server has nobody to ask for its password")
