"""Hosts and origins: requests after DNS rebinding are rejected, and each rejection names the setting to change."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin

from core.network.hosts import AllowedHosts, host_of
from core.settings import Settings
from routes.table import OPERATIONS
from server.serving import banner
from tests.support.backends import SQLITE_ONLY
from tests.support.service import Service, eventually


@pytest.mark.parametrize(
    ("header", "host"),
    [
        ("localhost", "localhost"),
        ("LocalHost:8000", "localhost"),
        ("example.org.:443", "example.org"),
        ("127.0.0.1:8000", "127.0.0.1"),
        ("[::1]:8000", "::1"),
        ("[0:0::1]", "::1"),
        ("[::ffff:127.0.0.1]", "127.0.0.1"),
        ("films_app:80", "films_app"),
        *((each, None) for each in ("", ":80", "a b", "[::1", "::1", "[x]", "a/b", "a@b", "a:port", "a,b", "é")),
        ("a" * 300, None),
    ],
)
def test_the_host_of_a_header(header: str, host: str | None) -> None:
    assert host_of(header) == host


@pytest.mark.parametrize(
    "host", ["localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", "films.example", "b.example.org"]
)
def test_loopback_names_and_the_listed_hosts_are_allowed(host: str) -> None:
    assert AllowedHosts(frozenset({"films.example", "*.example.org"}), allows_addresses=False).allow(host)


@pytest.mark.parametrize(
    "host", ["evil.example", "example.org", "xfilms.example", "a.films.example", "localhost.evil.example", "10.0.0.1"]
)
def test_other_hosts_are_not(host: str) -> None:
    assert not AllowedHosts(frozenset({"films.example", "*.example.org"}), allows_addresses=False).allow(host)


def settings_of(folder: Path, **values: object) -> Settings:
    return Settings(database_url=f"sqlite:///{folder}/marquee.db", _env_file=None, **values)  # type: ignore[arg-type]


def test_the_bind_address_and_the_public_host_are_known(tmp_path: Path) -> None:
    hosts = settings_of(tmp_path, host="192.0.2.7", public_url="https://films.example:8443/marquee").hosts
    assert hosts.allow("192.0.2.7")
    assert hosts.allow("films.example")
    assert not hosts.allow("192.0.2.8")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_listening_on_every_address_allows_every_address_but_no_name(tmp_path: Path, host: str) -> None:
    settings = settings_of(tmp_path, host=host)
    assert settings.hosts.allow("192.0.2.8")
    assert settings.hosts.allow("2001:db8::1")
    assert not settings.hosts.allow("films.example")
    assert "list them in ALLOWED_HOSTS" in banner(settings, 8000)
    assert "ALLOWED_HOSTS" not in banner(settings_of(tmp_path, host=host, allowed_hosts=("*",)), 8000)
    assert "ALLOWED_HOSTS" not in banner(settings_of(tmp_path), 8000)


def test_a_star_lifts_the_check(tmp_path: Path) -> None:
    assert settings_of(tmp_path, allowed_hosts=("*",)).hosts.allow("evil.example")


async def raw(service: Service, *lines: str) -> str:
    """Send these lines and `Connection: close` as a request head, and return the response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    try:
        writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode())
        async with asyncio.timeout(10):
            return (await reader.read()).decode()
    finally:
        writer.close()


@SQLITE_ONLY
async def test_a_rebound_name_is_refused_on_every_route_and_logged_once(service: Service) -> None:
    paths = {operation.path for operation in OPERATIONS if "{" not in operation.path} | {
        "/",
        "/docs",
        "/static/live.js",
    }
    async with service.anyone({"Host": "rebound.example"}) as stranger:
        for path in paths - {"/healthz", "/readyz"}:
            answer = await stranger.get(path)
            assert answer.status_code == 421, path
            assert "add rebound.example to the ALLOWED_HOSTS setting" in answer.json()["detail"]
            assert answer.headers["x-request-id"]
        assert (await stranger.post("/movies", json={"title": "M"})).status_code == 421
    logged = [line for line in service.log().splitlines() if "host rejected" in line]
    assert sum("rebound.example" in line for line in logged) == 1


@SQLITE_ONLY
async def test_a_rebound_name_gets_no_websocket(service: Service) -> None:
    name = f"rebound.example:{service.port}"
    with pytest.raises(InvalidStatus) as refused:
        async with connect(f"ws://{name}/ws", host="127.0.0.1", origin=Origin(f"http://{name}")):
            pass
    assert refused.value.response.status_code == 421


@SQLITE_ONLY
async def test_probes_may_use_any_host(service: Service) -> None:
    async with service.anyone({"Host": "10.1.2.3:8000"}) as kubelet:
        for path in ("/healthz", "/readyz", "/metrics", "/api/v1/healthz"):
            assert (await kubelet.get(path)).status_code == 200
    assert (await raw(service, "GET /healthz HTTP/1.0")).startswith("HTTP/1.1 200")


@pytest.mark.parametrize(
    "hosts",
    [(), ("", ), ("localhost", "localhost"), ("localhost", "evil.example"), ("a b",), ("local/host",)],
)  # fmt: skip
@SQLITE_ONLY
async def test_a_request_names_exactly_one_host(service: Service, hosts: Sequence[str]) -> None:
    headers = [f"Host: {host}" for host in hosts]
    for path in ("/movies", "/healthz"):
        answer = await raw(service, f"GET {path} HTTP/1.1", *headers)
        assert answer.startswith("HTTP/1.1 400"), (path, answer[:200])
        assert "nosniff" in answer
    upgrade = (
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {'A' * 22}==",
    )
    assert (await raw(service, "GET /ws HTTP/1.1", *headers, *upgrade)).startswith("HTTP/1.1 400")


@SQLITE_ONLY
async def test_every_response_forbids_sniffing(service: Service) -> None:
    async with service.anyone() as client:
        paths = ["/", "/movies", "/movies/x", "/nothing", "/docs", "/redoc", "/docs/files/start.js", "/static/base.css"]
        paths += ["/openapi.json", "/asyncapi.json", "/metrics", "/healthz", "/ws", "/static/none.js", "/auth/me"]
        for path, method in itertools.product(paths, ("GET", "PUT", "OPTIONS")):
            answer = await client.request(method, path)
            assert answer.headers.get_list("x-content-type-options") == ["nosniff"], (method, path)


async def test_a_refused_origin_is_logged_once_with_what_to_set(new_service: Callable[..., Service]) -> None:
    service = new_service(PUBLIC_URL="https://films.example/marquee").start()
    address = f"ws://127.0.0.1:{service.port}/ws"
    preflight = {"Origin": "https://other.example", "Access-Control-Request-Method": "POST"}
    async with service.anyone() as client:
        for _ in range(3):
            with pytest.raises(InvalidStatus) as refused:
                async with connect(address, origin=Origin("https://app.example")):
                    pass
            assert refused.value.response.status_code == 403
            assert b"https://app.example is not allowed" in refused.value.response.body
            assert b"ALLOWED_ORIGINS" in refused.value.response.body
            answer = await client.options("/movies", headers=preflight)
            assert answer.status_code == 403
            assert "add it to the setting ALLOWED_ORIGINS" in answer.json()["detail"]
    async with connect(address, origin=Origin("https://films.example")):
        pass  # accepted: the origin of the service's own page, behind a proxy that replaces Host

    def lines() -> list[str]:
        return [line for line in service.log().splitlines() if "origin rejected" in line]

    await eventually(lambda: len(lines()) == 2, "each origin is logged", 5)
    assert all("ALLOWED_ORIGINS" in line for line in lines())
