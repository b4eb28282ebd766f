"""Sub-paths: everything works below ROOT_PATH, behind proxies that remove the path and behind proxies that keep it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from websockets.asyncio.client import connect

from core.errors import SettingsError
from core.settings import Settings
from main import build_app
from tests.support.backends import SQLITE_ONLY
from tests.support.pages import assert_self_contained, chromium
from tests.support.programs import output_of
from tests.support.servers.mail import fresh_name, link_in, mail_in
from tests.support.servers.nginx import NginxServer
from tests.support.servers.server import MissingServer
from tests.support.service import NO_AUTHORITIES, PASSWORD, Service, eventually

ROOT = "/marquee"
STREAM = {"Accept": "text/event-stream"}


@dataclass
class Proxied:
    """A service below the path ROOT, behind nginx. `mails` is the folder of the service's emails."""

    service: Service
    nginx: NginxServer
    mails: Path

    @property
    def origin(self) -> str:
        return self.nginx.url.removesuffix(ROOT)

    def client(self, token: str | None = None) -> httpx.AsyncClient:
        """Return a client whose paths begin at the root of the site, not of the service."""
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        return httpx.AsyncClient(base_url=self.origin, timeout=60, verify=NO_AUTHORITIES, headers=headers)

    async def token(self) -> str:
        """Register a user through nginx, and return an access token."""
        name = fresh_name()
        async with self.client() as client:
            registered = await client.post(f"{ROOT}/auth/register", json={"username": name, "password": PASSWORD})
            assert registered.status_code == 201, registered.text
            signed_in = await client.post(f"{ROOT}/token", data={"username": name, "password": PASSWORD})
            return str(signed_in.json()["access_token"])


@pytest.fixture(params=["stripped", "kept"])
def proxied(
    request: pytest.FixtureRequest, new_service: Callable[..., Service], tmp_path: Path
) -> Iterator[Callable[..., Proxied]]:
    """Return a function that starts a service behind nginx, with the given settings."""
    proxies: list[NginxServer] = []

    def make(**settings: str) -> Proxied:
        mails = tmp_path / "mails"
        service = new_service(ROOT_PATH=ROOT, TRUSTED_PROXIES="127.0.0.1", MAIL_FOLDER=str(mails), **settings)
        try:
            proxies.append(NginxServer(service.port, ROOT, strips=request.param == "stripped"))
        except MissingServer as missing:
            pytest.skip(str(missing))
        proxies[-1].start()
        # Only now is the port of nginx known.
        service.settings["PUBLIC_URL"] = proxies[-1].url.removesuffix(ROOT)
        return Proxied(service.start(), proxies[-1], mails)

    yield make
    for each in proxies:
        each.close()


@SQLITE_ONLY
async def test_requests_and_the_urls_in_responses_work_below_the_path(proxied: Callable[..., Proxied]) -> None:
    site = proxied()
    async with site.client(await site.token()) as client:
        for prefix in (ROOT, f"{ROOT}/api/v1"):
            for slash in ("", "/"):
                added = await client.post(f"{prefix}/movies{slash}", json={"title": "The Third Man"})
                assert added.status_code == 201, added.text
                assert added.headers["location"] == f"{prefix}/movies/{added.json()['id']}"
                assert (await client.get(added.headers["location"])).json() == added.json()
            job = await client.post(f"{prefix}/movies/generate/1")
            assert (await client.get(job.headers["location"])).json()["id"] == job.json()["id"]
            page = await client.get(f"{prefix}/movies?limit=1&offset=1")
            pages = re.findall(r'<([^>]+)>; rel="(\w+)"', page.headers["link"])
            assert {rel for _, rel in pages} >= {"first", "prev", "last"}
            for url, _ in pages:
                assert url.startswith(f"{prefix}/movies?")
                assert len((await client.get(url)).json()) == 1
            events = await client.get(f"{prefix}/events?limit=1&after=0&epoch={page.headers['stream-position'][:16]}")
            (following,) = re.findall(r'<([^>]+)>; rel="next"', events.headers["link"])
            assert (await client.get(following)).json()["data"]
        assert (await client.get("/movies")).status_code == 404, "nginx serves only the path"


@SQLITE_ONLY
async def test_the_service_itself_takes_both_forms(new_service: Callable[..., Service]) -> None:
    service = new_service(ROOT_PATH="/sites/marquee").start()
    async with service.anyone() as client:
        for root in ("", "/sites/marquee"):
            for path in ("/", "/movies", "/api/v1/movies/", "/static/live.js", "/healthz"):
                assert (await client.get(root + path)).status_code == 200, root + path
        assert (await client.get("/sites/marquee")).status_code == 200
        for path in ("/sites/marqueemovies", "/sites", "/marquee/movies", "/sites/marquee/nowhere"):
            assert (await client.get(path)).status_code == 404, path
        location = (await client.get("/movies?limit=1&offset=1")).headers["link"]
        assert "</sites/marquee/movies?" in location


@SQLITE_ONLY
async def test_pages_and_documents_work_below_the_path(proxied: Callable[..., Proxied]) -> None:
    site = proxied()
    async with site.client() as client:
        for path in ("/", "/docs", "/docs/", "/redoc", "/docs/realtime", "/reset-password", "/api/v1/docs/realtime/"):
            await assert_self_contained(client, ROOT + path)
        assert (await client.get(f"{ROOT}/reset-password?token=x")).headers["cache-control"] == "no-store"
        document = (await client.get(f"{ROOT}/openapi.json")).json()
        assert document["servers"] == [{"url": ROOT}, {"url": f"{ROOT}/api/v1"}]
        flow = document["components"]["securitySchemes"]["password"]["flows"]["password"]
        assert flow["tokenUrl"] == f"{ROOT}/token"
        channels = (await client.get(f"{ROOT}/asyncapi.json")).json()
        assert {server["pathname"] for server in channels["servers"].values()} == {ROOT}
        assert channels["channels"]["ws"]["address"] == "/ws"


@SQLITE_ONLY
async def test_scripts_find_the_service_below_the_path(proxied: Callable[..., Proxied], tmp_path: Path) -> None:
    site = proxied()
    token = await site.token()
    async with site.client(token) as client:
        assert (await client.post(f"{ROOT}/movies", json={"title": "The Third Man"})).status_code == 201
    live, reference, swagger = await asyncio.gather(
        *(
            output_of(
                *chromium(tmp_path / name), "--virtual-time-budget=10000", "--dump-dom", f"{site.nginx.url}{path}"
            )
            for name, path in (("live", "/"), ("reference", "/docs/realtime"), ("swagger", "/docs"))
        )
    )
    assert f"curl {site.nginx.url}/movies" in live
    assert f"wscat -c ws://{urlsplit(site.nginx.url).netloc}{ROOT}/ws" in live
    assert '<section id="welcome-frame"' in reference
    assert "get_movies" in swagger
    await eventually(lambda: '/ws", "status": 101' in site.service.log(), "the live page opens its websocket")


@SQLITE_ONLY
async def test_websockets_work_below_the_path(proxied: Callable[..., Proxied]) -> None:
    site = proxied()
    token = await site.token()
    url = site.nginx.url.replace("http", "ws", 1)
    async with connect(f"{url}/ws?topics=movies", additional_headers={"Authorization": f"Bearer {token}"}) as socket:
        assert json.loads(await socket.recv())["operation"] == "welcome"
        wanted = {"id": 1, "action": "request", "method": "POST", "path": "/movies", "body": {"title": "The Third Man"}}
        await socket.send(json.dumps(wanted))
        async with asyncio.timeout(30):
            frames = [json.loads(await socket.recv()) for _ in range(2)]
        reply = next(frame for frame in frames if frame.get("reply_to") == 1)
        event = next(frame for frame in frames if "seq" in frame)
        assert event["data"] == reply["body"]
        assert reply["headers"]["location"] == f"{ROOT}/movies/{event['data']['id']}"
        following = {"id": 2, "action": "request", "method": "GET", "path": reply["headers"]["location"]}
        await socket.send(json.dumps(following))
        async with asyncio.timeout(30):
            assert json.loads(await socket.recv())["body"] == event["data"]


@SQLITE_ONLY
async def test_event_streams_work_below_the_path(proxied: Callable[..., Proxied]) -> None:
    site = proxied()
    async with (
        site.client(await site.token()) as client,
        client.stream("GET", f"{ROOT}/events?topics=movies", headers=STREAM) as stream,
        asyncio.timeout(30),
    ):
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.aiter_lines()
        added = None
        async for line in lines:
            if added is None:  # the stream is open
                added = (await client.post(f"{ROOT}/movies", json={"title": "The Third Man"})).json()
            data = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            if data.get("operation") == "add":
                assert data["data"] == added
                return


@SQLITE_ONLY
async def test_emailed_urls_work_below_the_path(proxied: Callable[..., Proxied]) -> None:
    site = proxied(ACCOUNT_ACTIVATION="email")
    name = fresh_name()
    address = f"{name}@example.org"
    async with site.client() as client:
        registering = {"username": name, "email": address, "password": PASSWORD}
        assert (await client.post(f"{ROOT}/auth/register", json=registering)).status_code == 201
        url = link_in(await mail_in(site.mails, address, 1))
        assert url.startswith(f"{site.nginx.url}/auth/activate?token=")
        question = await client.get(url, headers={"Accept": "text/html"})
        assert question.status_code == 200
        assert (await client.get(httpx.URL(url).join("../static/account.css"))).status_code == 200
        (action,) = re.findall(r'<form method="post" action="([^"]+)"', question.text)
        (token,) = re.findall(r'name="token" value="([^"]+)"', question.text)
        done = await client.post(httpx.URL(url).join(action), data={"token": token}, headers={"Accept": "text/html"})
        assert done.status_code == 200, done.text
        assert (await client.post(f"{ROOT}/auth/password/forgot", json={"email": address})).status_code == 202
        url = link_in(await mail_in(site.mails, address, 2))
        assert url.startswith(f"{site.nginx.url}/reset-password?token=")
        await assert_self_contained(client, url)


def settings_of(folder: Path, **values: object) -> Settings:
    return Settings(database_url=f"sqlite:///{folder}/marquee.db", _env_file=None, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "root", "base"),
    [
        ({}, "", "http://127.0.0.1:8000"),
        ({"root_path": "/marquee"}, "/marquee", "http://127.0.0.1:8000/marquee"),
        ({"root_path": "/marquee", "public_url": "https://films.example"}, "/marquee", "https://films.example/marquee"),
        ({"public_url": "https://films.example/marquee"}, "/marquee", "https://films.example/marquee"),
        (
            {"root_path": "/marquee", "public_url": "https://films.example/marquee/"},
            "/marquee",
            "https://films.example/marquee",
        ),
        ({"root_path": "/a/b-c.d", "host": "::"}, "/a/b-c.d", "http://[::1]:8000/a/b-c.d"),
    ],
)
def test_emailed_urls_begin_with_the_path(tmp_path: Path, given: dict[str, str], root: str, base: str) -> None:
    settings = settings_of(tmp_path, **given)
    assert (settings.root, settings.base_url) == (root, base)


def test_the_path_of_the_public_url_must_be_the_root_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PUBLIC_URL: expected no path, or the same path as ROOT_PATH"):
        settings_of(tmp_path, root_path="/marquee", public_url="https://films.example/other")


@pytest.mark.parametrize("root", ["/movies", "/api", "/api/v1", "/docs/x", "/ws", "/static", "/asyncapi.json"])
def test_a_root_path_that_begins_as_a_route_is_refused(tmp_path: Path, root: str) -> None:
    with pytest.raises(SettingsError, match=r"^ROOT_PATH: expected a path that does not begin with"):
        build_app(settings_of(tmp_path, root_path=root))
