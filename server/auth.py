"""Who is there: the access that each route asks for, and the key that a request brings.

Deny by default: a route that says nothing wants a key, and a path without a route wants one too. Admin routes want the
admin key, which no other key stands in for. Digests are compared in constant time, all of them each time.
"""

from __future__ import annotations

import base64
import binascii
import enum
import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

from engine.openai import Answer, error_body
from server.admission import Refused
from server.clients import RESERVED, Client, client_of, digest_of
from server.config import ServerConfig, is_loopback

ANYBODY, ADMIN = (Client(name=name) for name in RESERVED)  # whoever comes where no keys are set; the admin key's owner


class Access(enum.Enum):
    """What a route asks of a client. A route that says nothing asks for a key."""

    KEY = "key"
    ADMIN = "admin"  # the admin key; without one, only this machine, and only where no keys are set at all
    PUBLIC = "public"
    MODELS = "models"  # public by --public-models
    METRICS = "metrics"  # public by --public-metrics


class Keys:
    """The keys of all clients, as digests."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._open = {Access.PUBLIC}
        self._open |= {Access.MODELS} if config.public_models else set()
        self._open |= {Access.METRICS} if config.public_metrics else set()
        self._admin = tuple(digest_of(key) for key in config.admin_api_key)
        self._clients: tuple[Client, ...] = ()
        self.load(config.clients)

    def load(self, clients: tuple[Client, ...]) -> None:
        """Take `clients` for those of the clients file, and nobody else from there."""
        self._clients = tuple(client_of(key) for key in self._config.api_key) + clients

    def check(self, access: Access, headers: Mapping[str, str]) -> Client:
        """Who sends a request with these headers. Raises Refused where the route does not let it in."""
        if access in self._open:
            return ANYBODY
        if access is Access.ADMIN:
            return self._check_admin(headers)
        if not self._clients:
            return ANYBODY
        scheme, key = _credentials(headers)
        found = self._find(key)
        if found is None or scheme != "bearer":
            raise _unauthorized("an API key", bool(key), "Bearer")
        return found

    def _find(self, key: str) -> Client | None:
        digest = digest_of(key)
        found = None
        for client in self._clients:  # all of them, whichever matches
            if hmac.compare_digest(client.digest, digest):
                found = client
        return ADMIN if self._is_admin(digest) else found

    def _is_admin(self, digest: bytes) -> bool:
        return sum([hmac.compare_digest(known, digest) for known in self._admin]) > 0

    def _check_admin(self, headers: Mapping[str, str]) -> Client:
        """A browser may bring the key as a password, and sends it along for any page: pages of others are refused."""
        _check_origin(headers)
        if not self._admin:
            if self._clients or not self._config.is_private or not is_loopback(_host_name(headers.get("Host", ""))):
                raise _forbidden("this route is for administrators: start the server with --admin-api-key-file")
            return ADMIN
        _, key = _credentials(headers)
        if self._is_admin(digest_of(key)):
            return ADMIN
        if key and self._find(key) is not None:
            raise _forbidden("this key is not the admin key")
        raise _unauthorized("the admin key", bool(key), 'Bearer, Basic realm="sluice admin, the key is the password"')


def _credentials(headers: Mapping[str, str]) -> tuple[str, str]:
    """(scheme, key) of the Authorization header. Of a name and a password, the password is the key."""
    scheme, _, rest = headers.get("Authorization", "").partition(" ")
    scheme, rest = scheme.lower(), rest.strip()
    if scheme != "basic":
        return scheme, rest
    try:
        return scheme, base64.b64decode(rest, validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return scheme, ""


def _check_origin(headers: Mapping[str, str]) -> None:
    origin = headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("Host", ""):
        raise _forbidden("this route takes no requests from other sites' pages")


def _host_name(host: str) -> str:
    """The name in a Host header: a page elsewhere that had its own name point here still sends its own name."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    return name.lower()


def _unauthorized(what: str, given: bool, challenge: str) -> Refused:
    message = "incorrect API key" if given else f"{what} is required: Authorization: Bearer KEY"
    return Refused(Answer(401, error_body(message, "authentication_error", "invalid_api_key")), WWW_Authenticate=challenge)


def _forbidden(message: str) -> Refused:
    return Refused(Answer(403, error_body(message, "permission_error", "forbidden")))
