"""Who may come in, as what, and how much: keys, the admin key, the clients file, rates."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
from pathlib import Path
from typing import Any

import pytest
from serving import ENDLESS, MESSAGES, Server, serving

from engine import Engine
from engine.errors import InvalidConfig
from engine.types import Tenant
from server import auth
from server.admission import InFlight, Rate, Refused
from server.auth import Access
from server.clients import Client, client_of, digest_of, read_clients
from server.config import ServerConfig, server_config

CHAT = "/v1/chat/completions"
SHORT = {"messages": MESSAGES, "max_tokens": 2, "ignore_eos": True}
FLEX = SHORT | {"service_tier": "flex"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def drain(server: Server, **headers: str) -> tuple[int, Any]:
    return await server.post("/admin/drain", {}, headers=headers)


async def test_admin_routes_want_the_admin_key(engine: Engine) -> None:
    async with serving(engine, api_key=("user",), admin_api_key=("root",)) as server:
        status, body = await drain(server)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert (await drain(server, **bearer("wrong")))[0] == 401
        status, body = await drain(server, **bearer("user"))
        assert (status, body["error"]["type"]) == (403, "permission_error")
        assert (await server.get("/ready"))[0] == 200
        assert (await server.post(CHAT, SHORT, headers=bearer("root")))[0] == 200, "the admin key opens everything"
        assert await drain(server, **bearer("root")) == (202, {"status": "draining", "in_flight": 0})
        assert (await server.get("/ready"))[0] == 503


async def test_a_browser_sends_the_admin_key_as_a_password_but_not_for_other_sites(engine: Engine) -> None:
    basic = {"Authorization": "Basic " + base64.b64encode(b"anybody:root").decode()}
    async with serving(engine, api_key=("user",), admin_api_key=("root",)) as server:
        assert (await drain(server, **basic, Origin="http://evil.example"))[0] == 403
        assert (await drain(server, Authorization="Basic !"))[0] == 401
        assert (await server.post(CHAT, SHORT, headers=basic))[0] == 401, "other routes take Bearer alone"
        assert (await drain(server, **basic, Origin=server.url))[0] == 202


async def test_without_an_admin_key_only_this_machine_is_admin_and_only_where_no_keys_are(engine: Engine) -> None:
    async with serving(engine, api_key=("user",)) as server:
        assert (await drain(server, **bearer("user")))[0] == 403
    async with serving(engine) as server:
        # A page elsewhere whose name was made to point here (DNS rebinding) sends its own name, or its origin.
        assert (await drain(server, Host="evil.example"))[0] == 403
        assert (await drain(server, Origin="http://evil.example"))[0] == 403
        assert (await server.get("/ready"))[0] == 200
        assert (await drain(server))[0] == 202
    open_keys = auth.Keys(ServerConfig(host="0.0.0.0", insecure_no_auth=True))
    with pytest.raises(Refused):
        open_keys.check(Access.ADMIN, {"Host": "127.0.0.1"})


def test_every_key_is_compared_in_constant_time_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    real = hmac.compare_digest

    def spy(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return real(a, b)

    monkeypatch.setattr("server.auth.hmac.compare_digest", spy)
    keys = auth.Keys(ServerConfig(api_key=("one", "two"), admin_api_key=("root",), clients=(client_of("three"),)))
    everyone = sorted(map(digest_of, ("one", "two", "three", "root")))
    for key in ("one", "three", "root", "nobody", ""):
        compared.clear()
        try:
            keys.check(Access.KEY, bearer(key))
        except Refused:
            assert key in ("nobody", "")
        assert sorted(compared) == everyone, "the first match must not end the search"


CLIENTS = """
- name: editor
  sha256: "{digest}"
  tenants: [online]
  requests_per_minute: 600
- name: nightly
  key: batch-key
  tenants: [offline]
  max_inflight: 1
"""


def clients_file(folder: Path, text: str) -> str:
    file = folder / "clients.yaml"
    file.write_text(text.replace("{digest}", hashlib.sha256(b"edit-key").hexdigest()))
    return str(file)


async def test_the_tenants_of_a_client(engine: Engine, tmp_path: Path) -> None:
    config = server_config({"api_keys_file": clients_file(tmp_path, CLIENTS)})
    async with serving(engine, clients=config.clients) as server:
        assert (await server.post(CHAT, SHORT))[0] == 401
        assert (await server.post(CHAT, SHORT, headers=bearer("edit-key")))[0] == 200
        assert (await server.post(CHAT, FLEX, headers=bearer("batch-key")))[0] == 200
        for key, body in (("edit-key", FLEX), ("batch-key", SHORT)):
            status, reply = await server.post(CHAT, body, headers=bearer(key))
            assert (status, reply["error"]["code"]) == (403, "tenant_not_allowed")


async def test_a_clients_own_share(long_engine: Engine, tmp_path: Path) -> None:
    config = server_config({"api_keys_file": clients_file(tmp_path, CLIENTS)})
    async with serving(long_engine, clients=config.clients) as server:
        endless = ENDLESS | {"service_tier": "flex"}
        running = asyncio.create_task(server.post(CHAT, endless, headers=bearer("batch-key")))
        while not server.service.in_flight.total:
            await asyncio.sleep(0.005)
        status, body = await server.post(CHAT, FLEX, headers=bearer("batch-key"))
        assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
        assert (await server.post(CHAT, SHORT, headers=bearer("edit-key")))[0] == 200, "others have their own"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await server.idle()


def test_requests_a_minute() -> None:
    now = [0.0]
    places = InFlight(ServerConfig(), lambda: now[0])
    client = Client(name="a", requests_per_minute=2)
    for _ in range(2):
        with places.hold(client, Tenant.ONLINE):
            pass
    with pytest.raises(Refused) as refused, places.hold(client, Tenant.ONLINE):
        pass
    answer = refused.value.answer
    assert (answer.status, answer.body["error"]["code"], answer.retry_after) == (429, "rate_limit_exceeded", 30.0)
    with places.hold(Client(name="b", requests_per_minute=2), Tenant.ONLINE):
        pass
    now[0] = 30.0
    with places.hold(client, Tenant.ONLINE):
        pass


def test_tokens_a_minute_are_paid_afterwards() -> None:
    now = [0.0]
    places = InFlight(ServerConfig(), lambda: now[0])
    client = Client(name="a", tokens_per_minute=600)
    with places.hold(client, Tenant.ONLINE) as place:
        place.tokens = 1200
    with pytest.raises(Refused) as refused, places.hold(client, Tenant.ONLINE):
        pass
    assert refused.value.answer.retry_after == pytest.approx(60.1)
    now[0] = 61.0
    with places.hold(client, Tenant.ONLINE):
        pass


@pytest.mark.parametrize("stream", [False, True])
async def test_the_tokens_of_a_request_count(engine: Engine, stream: bool) -> None:
    """Prompt and output together are far more than one token a minute, so the next request has to wait."""
    client = Client(name="a", digest=digest_of("k"), tokens_per_minute=1)
    async with serving(engine, clients=(client,)) as server:
        async with server.client.post(server.url + CHAT, json=SHORT | {"stream": stream}, headers=bearer("k")) as response:
            assert response.status == 200
            await response.read()
        await server.idle()
        async with server.client.post(server.url + CHAT, json=SHORT, headers=bearer("k")) as response:
            assert response.status == 429
            prompt = len(engine.tokenizer().render_chat(MESSAGES))
            assert int(response.headers["Retry-After"]) > 60 * prompt


def test_a_rate_never_holds_more_than_a_minutes_worth() -> None:
    rate = Rate(60, 0.0)
    assert rate.wait(60.0, 1e6) == 0
    rate.take(60)
    assert rate.wait(1.0, 1e6) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "a list of clients"),
        ("a: b", "a list of clients"),
        ("- [", "not YAML, line"),
        ("- x", "entry 1 must have"),
        ("- {name: a, key: k, limit: 3}", "entry 1: unknown field 'limit'"),
        ("- {name: 'a b', key: k}", "name must be"),
        ("- {name: admin, key: k}", "taken by the server"),
        ("- {name: a}", "either key or sha256"),
        ("- {name: a, key: k, sha256: '00'}", "either key or sha256"),
        ("- {name: a, sha256: '00'}", "64 hexadecimal"),
        ("- {name: a, key: ''}", "printable"),
        ("- {name: a, key: k, tenants: []}", "tenants must be"),
        ("- {name: a, key: k, tenants: [both]}", "tenants must be"),
        ("- {name: a, key: k, max_inflight: -1}", "max_inflight must be"),
        ("- {name: a, key: k, tokens_per_minute: true}", "tokens_per_minute must be"),
        ("- {name: a, key: k}\n- {name: a, key: l}", "the name a"),
        ("- {name: a, key: same-secret}\n- {name: b, key: same-secret}", "the key with the digest"),
    ],
)
def test_bad_clients_files_are_told_and_show_no_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidConfig) as error:
        read_clients(clients_file(tmp_path, text))
    assert message in str(error.value)
    assert "same-secret" not in str(error.value)


def test_keys_from_the_environment_and_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_API_KEY", "from-env")
    monkeypatch.setenv("SLUICE_ADMIN_API_KEY", "admin-env")
    (tmp_path / "admin").write_text("admin-file\n")
    config = server_config({"api_key": ["flag"], "admin_api_key_file": str(tmp_path / "admin")})
    assert config.api_key == ("flag", "from-env")
    assert config.admin_api_key == ("admin-file", "admin-env")
    monkeypatch.delenv("SLUICE_API_KEY")
    assert server_config({}).api_key == ()
    assert os.environ["SLUICE_ADMIN_API_KEY"] == "admin-env"


async def test_pages_of_other_sites(engine: Engine) -> None:
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    async with serving(engine, api_key=("k",)) as server, server.client.options(server.url + CHAT, headers=ask) as response:
        assert response.status in (401, 405), "off unless asked for"
        assert "Access-Control-Allow-Origin" not in response.headers
    async with serving(engine, api_key=("k",), allowed_origins=("https://a.example",)) as server:
        async with server.client.options(server.url + CHAT, headers=ask) as response:
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (204, "https://a.example")
            assert "authorization" in response.headers["Access-Control-Allow-Headers"]
            assert "Access-Control-Allow-Credentials" not in response.headers
        async with server.client.options(server.url + CHAT, headers=ask | {"Origin": "https://b.example"}) as response:
            assert "Access-Control-Allow-Origin" not in response.headers
        headers = bearer("k") | {"Origin": "https://a.example", "Content-Type": "application/json"}
        async with server.client.post(server.url + CHAT, json=SHORT | {"stream": True}, headers=headers) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "https://a.example"
            assert response.headers["Vary"] == "Origin"
        async with server.client.get(server.url + "/v1/models", headers={"Origin": "https://a.example"}) as response:
            assert response.status == 401, "an origin is no key"
            assert response.headers["Access-Control-Allow-Origin"] == "https://a.example", "so that the page can read why"
    with pytest.raises(InvalidConfig, match="--allowed-origins"):
        ServerConfig(allowed_origins=("a.example/",))
