"""Rate limits for groups and for single routes, what counts as one client, and how workers count together."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.errors import SettingsError
from core.network.addresses import network_of
from core.rates import MAX_AMOUNT, Rate, RateLimits, parse_rate, parse_rate_limits
from core.settings import Settings
from routes import table
from routes.http import limit_groups
from routes.http.limit_groups import RATES, LimitGroup
from routes.http.proxies import TrustedProxies
from services.limits.lockout import PAIR_RATE
from services.limits.memory import MAX_CLIENTS, STEPS, Hit, Windows
from services.limits.redis import AWAY_SECONDS
from tests.conftest import Places
from tests.support.backends import SQLITE_ONLY
from tests.support.metrics import metric
from tests.support.servers.postgresql import PostgresServer
from tests.support.servers.redis import RedisServer
from tests.support.service import ADMIN, PASSWORD, Person, Service, eventually, several_services
from tests.support.sockets import refusal, request

OWN = (
    "POST /users=3/minute; GET /movies/count=10/min; GET /movies/{id}=2/minute; "
    "POST /users/{user_id}/movies=3/minute; GET /users/{id}/movies = 5 / minute; POST /auth/login=4/hour"
)
NOTHING = "/movies/999999999"
_addresses = (f"203.0.113.{number}" for number in itertools.count(1))


@pytest.fixture(scope="module")
def limited(new_places: Callable[[], Places], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with limits for single routes. Each test uses its own client addresses."""
    places, folder = new_places(), tmp_path_factory.mktemp("limited")
    settings = {"TRUSTED_PROXIES": "127.0.0.1, 10.0.0.0/8", "MAX_CONNECTIONS_PER_ADDRESS": "2"}
    service = Service(places.database_url, places.broadcast_url, folder, RATE_LIMITS=OWN, **settings)
    with service.running():
        yield service


def at(address: str | None = None) -> dict[str, str]:
    """Return the `X-Forwarded-For` header of a client at this address, or at an unused address."""
    return {"X-Forwarded-For": address or next(_addresses)}


async def statuses(client: httpx.AsyncClient, method: str, path: str, times: int, **options: Any) -> list[int]:
    return [(await client.request(method, path, **options)).status_code for _ in range(times)]


# --- limits of routes


async def test_the_response_tells_how_much_of_a_limit_is_left(limited: Service) -> None:
    async with limited.anyone(at()) as client:
        left = []
        for number in range(3):
            body = {"username": f"small{number}-{time.time_ns()}", "password": PASSWORD}
            answer = await client.post("/users", json=body)
            assert answer.status_code == 201
            assert answer.headers["RateLimit-Limit"] == "3"
            left.append(answer.headers["RateLimit-Remaining"])
            assert answer.headers["RateLimit-Policy"] == '"POST /users";q=3;w=60'
            reset = answer.headers["RateLimit-Reset"]
            assert answer.headers["RateLimit"] == f'"POST /users";r={left[-1]};t={reset}'
        assert left == ["2", "1", "0"]
        refused = await client.post("/api/v1/users/", content=b"not parsed")
        assert refused.status_code == 429
        assert refused.json() == {"detail": "Expected at most 3 requests per minute; try again later"}
        assert 50 <= int(refused.headers["Retry-After"]) <= 60
        assert refused.headers["RateLimit-Reset"] == refused.headers["Retry-After"]
        assert refused.headers["RateLimit-Remaining"] == "0"
        assert refused.headers["RateLimit-Policy"] == '"POST /users";q=3;w=60'
        assert refused.headers["RateLimit"] == f'"POST /users";r=0;t={refused.headers["Retry-After"]}'
        details = await client.post("/users", headers={"Accept": "application/problem+json"})
        assert (details.json()["status"], details.json()["detail"]) == (429, refused.json()["detail"])
        assert details.headers["Vary"] == refused.headers["Vary"] == "Accept, Accept-Encoding"
        other = await client.post("/auth/register", json={})
        assert (other.status_code, other.headers["RateLimit-Limit"]) == (422, str(RATES[LimitGroup.REGISTER].amount))


async def test_the_users_of_one_network_share_a_multiple_of_a_limit(limited: Service) -> None:
    """A user may read a movie twice a minute, so all users of one network together may do so twenty times."""
    async with AsyncExitStack() as stack:
        # Sign-ins are counted by client address, so each user signs in from a different one.
        people = [await stack.enter_async_context(limited.person(headers=at())) for _ in range(11)]
        shared = [at(f"2001:db8:0:1::{number:x}") for number in range(1, 12)]
        for person, headers in zip(people[:10], shared[:10], strict=True):
            assert await statuses(person.http, "GET", NOTHING, 2, headers=headers) == [404] * 2
        refused = await people[10].http.get(NOTHING, headers=shared[10])
        assert refused.status_code == 429
        expected = "Expected at most 20 requests per minute from all users of 2001:db8:0:1::/64; try again later"
        assert refused.json() == {"detail": expected}
        assert refused.headers["RateLimit-Limit"] == "20"
        assert refused.headers["Retry-After"] == refused.headers["RateLimit-Reset"]
        own, joint = '"GET /movies/{id}"', '"GET /movies/{id} by all users of an address"'
        assert refused.headers["RateLimit-Policy"] == f"{own};q=2;w=60, {joint};q=20;w=60"
        assert refused.headers["RateLimit"] == f"{joint};r=0;t={refused.headers['Retry-After']}"
        assert (await people[10].http.get(NOTHING, headers=at())).status_code == 404, (
            "the user may send requests from other networks"
        )


async def test_routes_have_limits_of_their_own(limited: Service) -> None:
    async with limited.person(headers=at()) as alice, limited.anyone(at()) as reader:
        path = f"/users/{alice.id}/movies"
        assert await statuses(alice.http, "POST", path, 4, json={"title": "M"}) == [201] * 3 + [429]
        assert await statuses(reader, "GET", path, 6) == [200] * 5 + [429]
        assert await statuses(reader, "GET", "/movies/count", 11) == [200] * 10 + [429]
        assert await statuses(reader, "GET", "/movies/999999", 3) == [404, 404, 429]
        assert await statuses(reader, "GET", "/movies/1000000", 1) == [429], "the limit is per route, not per row"


async def test_a_limit_of_a_route_counts_only_that_route(limited: Service) -> None:
    async with limited.anyone(at()) as client:
        assert await statuses(client, "GET", NOTHING, 3) == [404, 404, 429]
        answer = await client.get("/movies")
        assert answer.status_code == 200
        assert answer.headers["RateLimit-Limit"] == str(RATES[LimitGroup.READ].amount)
        assert await statuses(client, "GET", "/characters/1", 3) == [404] * 3
        assert (await client.get(NOTHING)).status_code == 429
    assert await metric(limited, "marquee_rate_limited_total", limit="GET /movies/{id}") >= 2


@SQLITE_ONLY
async def test_a_head_counts_as_a_get(limited: Service) -> None:
    async with limited.anyone(at()) as client:
        assert await statuses(client, "HEAD", NOTHING, 2) == [404, 404]
        assert await statuses(client, "GET", NOTHING, 1) == [429]


@SQLITE_ONLY
async def test_pages_and_probes_are_not_limited(limited: Service) -> None:
    async with limited.anyone(at()) as client:
        for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/"):
            answer = await client.get(path)
            assert answer.status_code == 200
            assert not any(name.startswith("ratelimit") for name in answer.headers), path
    assert await metric(limited, "marquee_rate_limits_not_shared_total") == 0


async def test_requests_over_a_socket_count_with_those_over_http(limited: Service) -> None:
    async with limited.person(headers=at()) as alice:
        async with limited.watch("topics=jobs", additional_headers=alice.bearer | at()) as watcher:
            first, second, third = [await request(watcher, "GET", NOTHING) for _ in range(3)]
        assert [each["status"] for each in (first, second, third)] == [404, 404, 429]
        assert first["headers"]["ratelimit-remaining"] == "1"
        assert third["headers"]["retry-after"] == third["headers"]["ratelimit-reset"]
        assert third["headers"]["ratelimit"] == f'"GET /movies/{{id}}";r=0;t={third["headers"]["retry-after"]}'
        assert third["headers"]["ratelimit-policy"].startswith('"GET /movies/{id}";q=2;w=60, ')
        assert await statuses(alice.http, "GET", NOTHING, 1) == [429]


# --- what counts as one client


async def test_a_user_is_one_client_at_every_address(limited: Service) -> None:
    home, office = next(_addresses), next(_addresses)
    async with limited.person(headers=at(home)) as alice, limited.anyone(at(home)) as anonymous:
        assert await statuses(anonymous, "GET", NOTHING, 3) == [404, 404, 429]
        assert await statuses(alice.http, "GET", NOTHING, 3) == [404, 404, 429]
        async with limited.person(headers=at(home)) as bob:
            assert await statuses(bob.http, "GET", NOTHING, 2) == [404, 404]
        assert await statuses(alice.http, "GET", NOTHING, 1, headers=at(office)) == [429]
        async with limited.anyone(at(office)) as stranger:
            assert await statuses(stranger, "GET", NOTHING, 1) == [404]


async def test_requests_with_an_invalid_token_count_for_the_address(limited: Service) -> None:
    async with limited.anyone(at()) as client:
        bad = {"Authorization": "Bearer x.y.z"}
        assert await statuses(client, "GET", NOTHING, 3, headers=bad) == [401, 401, 429]
        assert await statuses(client, "GET", NOTHING, 1) == [429]


async def test_anonymous_limits_also_hold_with_an_account(limited: Service) -> None:
    home = next(_addresses)
    async with limited.person(headers=at(home)) as alice, limited.anyone(at(home)) as anonymous:
        assert await statuses(anonymous, "POST", "/users", 3, json={}) == [422] * 3
        assert await statuses(alice.http, "POST", "/users", 1, json={}) == [429]


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("192.0.2.1", "192.0.2.1"), ("::ffff:192.0.2.1", "192.0.2.1"), ("fe80::1%eth0", "fe80::/64"), ("", ""),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"), ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("[2001:db8:1:2::9]:4711", "2001:db8:1:2::/64"), ("192.0.2.1:80", "192.0.2.1"),
        ("[::ffff:192.0.2.1]", "192.0.2.1"),
        ("2001:db8:1:2::9%" + "x" * 1_000, "2001:db8:1:2::/64"), ("/run/socket", "/run/socket"), ("[", "["),
    ],
)  # fmt: skip
def test_a_client_has_one_ipv4_address_or_an_ipv6_network(host: str, client: str) -> None:
    assert network_of(host) == client


# --- proxies


FORWARDED = {
    "198.51.100.7": "198.51.100.7", "6.6.6.6, 198.51.100.8": "198.51.100.8",
    "6.6.6.6, 198.51.100.9, 10.1.2.3, 127.0.0.1": "198.51.100.9", "198.51.100.10:4711": "198.51.100.10",
    "[2001:db8::1]:4711": "2001:db8::1", "2001:db8::2": "2001:db8::2", "::ffff:198.51.100.11": "198.51.100.11",
    "198.51.100.12, unknown, 10.9.9.9": "10.9.9.9", "10.0.0.1": "10.0.0.1", "<script>": "127.0.0.1", "": "127.0.0.1",
    "2001:db8::3%eth0": "2001:db8::3", "[2001:db8::4%25eth0]:1": "2001:db8::4", '"[2001:db8::5]:1"': "2001:db8::5",
    "2001:db8::6%" + "z" * 1_000: "2001:db8::6", "[": "127.0.0.1", "[]": "127.0.0.1",
    "[::1": "::1", "1.2.3.4:5:6": "127.0.0.1", ":": "127.0.0.1", "%": "127.0.0.1", "1.2.3": "127.0.0.1",
    "::ffff:198.51.100.13%1": "198.51.100.13", "[198.51.100.14]:80": "198.51.100.14", "1" * 5_000: "127.0.0.1",
}  # fmt: skip


@SQLITE_ONLY
async def test_the_client_address_is_the_one_before_the_trusted_proxies(limited: Service) -> None:
    async with limited.person(headers=at()) as alice:
        for forwarded, seen in FORWARDED.items():
            alice.http.headers["X-Forwarded-For"] = forwarded
            assert await address_of_a_new_session(alice, alice.http) == seen, forwarded


async def address_of_a_new_session(person: Person, client: httpx.AsyncClient) -> str:
    """Sign in with this client, and return the address that the service saw."""
    answer = await client.post("/token", json={"username": person.name, "password": PASSWORD})
    assert answer.status_code == 200
    sessions = await client.get("/auth/sessions?limit=1", headers=person.bearer)
    return str(sessions.json()[0]["address"])


@SQLITE_ONLY
async def test_several_lines_of_forwarded_for_are_joined(limited: Service) -> None:
    async with limited.person(headers=at()) as alice:
        lines = [("X-Forwarded-For", "6.6.6.6"), ("X-Forwarded-For", "198.51.100.20, 10.0.0.1")]
        async with limited.anyone(lines) as client:
            assert await address_of_a_new_session(alice, client) == "198.51.100.20"


@SQLITE_ONLY
async def test_connections_are_counted_by_the_address_before_the_proxies(limited: Service) -> None:
    here, there = at(), at()
    async with (
        limited.watch(additional_headers=here),
        limited.watch(additional_headers=here),
        limited.watch(additional_headers=there),
    ):
        status, body = await refusal(limited, additional_headers=here)
        assert status == 429
        assert here["X-Forwarded-For"] in str(body)


@SQLITE_ONLY
async def test_an_ipv6_network_is_one_client_in_every_limit(limited: Service) -> None:
    def of(network: int, number: int) -> dict[str, str]:
        return {"X-Forwarded-For": f"[2001:db8:9:{network:x}::{number:x}%eth{number}]:{4000 + number}"}

    async with (
        limited.watch(additional_headers=of(1, 1)),
        limited.watch(additional_headers=of(1, 2)),
        limited.watch(additional_headers=of(2, 3)),
    ):
        status, body = await refusal(limited, additional_headers=of(1, 3))
        assert (status, "2001:db8:9:1::/64" in str(body)) == (429, True)
        async with limited.anyone(of(1, 4)) as client:
            answer = await client.get("/events", headers={"Accept": "text/event-stream"})
            assert answer.status_code == 429
    async with limited.anyone(of(3, 1)) as one, limited.anyone(of(3, 2)) as other:
        assert await statuses(one, "POST", "/users", 3, json={}) == [422] * 3
        assert await statuses(other, "POST", "/users", 1, json={}) == [429]


@SQLITE_ONLY
async def test_forwarded_addresses_of_untrusted_clients_are_ignored(service: Service) -> None:
    async with service.person() as alice:
        alice.http.headers["X-Forwarded-For"] = "198.51.100.7"
        assert await address_of_a_new_session(alice, alice.http) == "127.0.0.1"


@SQLITE_ONLY
async def test_proxies_are_also_trusted_under_plain_uvicorn(new_service: Callable[..., Service]) -> None:
    service = new_service(TRUSTED_PROXIES="127.0.0.0/8", RATE_LIMITS="GET /movies/{id}=1/minute")
    with service.under_uvicorn("--no-proxy-headers").running():
        async with service.anyone(at()) as here, service.anyone(at()) as there:
            assert await statuses(here, "GET", NOTHING, 2) == [404, 429]
            assert await statuses(there, "GET", NOTHING, 1) == [404]


async def test_the_scheme_is_that_of_the_client() -> None:
    from_us, from_others = ("10.0.0.1", 1), ("198.51.100.1", 1)
    for kind, client, proto, expected in (
        ("http", from_us, b"https", "https"),
        ("http", from_us, b"http, https", "https"),
        ("websocket", from_us, b"https", "wss"),
        ("websocket", from_us, b"http", "ws"),
        ("http", from_us, b"gopher", "as it was"),
        ("http", from_others, b"https", "as it was"),
    ):
        seen: list[str] = []

        async def app(scope: Any, receive: Any, send: Any, seen: list[str] = seen) -> None:
            seen.append(scope["scheme"])

        scope = {"type": kind, "client": client, "scheme": "as it was", "headers": [(b"x-forwarded-proto", proto)]}
        await TrustedProxies(app, ["10.0.0.0/8"])(scope, None, None)  # type: ignore[arg-type]
        assert seen == [expected], (kind, client, proto)


# --- several workers, and Redis


@SQLITE_ONLY
async def test_without_limits_there_are_no_headers(service: Service) -> None:
    async with service.anyone() as client:
        assert "RateLimit-Limit" not in (await client.get("/movies")).headers


async def test_two_workers_count_together(postgres: PostgresServer, redis: RedisServer, tmp_path: Path) -> None:
    own = "GET /movies/{id}=6/minute; GET /movies=120/minute"
    with several_services(2, postgres.create_database(), redis.url, tmp_path, RATE_LIMITS=own) as (first, second):
        async with first.anyone() as here, second.anyone() as there:
            answers = []
            for _ in range(4):
                answers += await statuses(here, "GET", NOTHING, 1) + await statuses(there, "GET", NOTHING, 1)
            assert answers == [404] * 6 + [429] * 2
            # Workers lease parts of a larger limit, and no part is lost.
            found = await asyncio.gather(*(statuses(each, "GET", "/movies", 1) for each in (here, there) * 70))
            assert sorted(status for each in found for status in each) == [200] * 120 + [429] * 20


async def test_without_redis_each_worker_counts_in_memory_without_delay(own_redis: RedisServer, tmp_path: Path) -> None:
    service = Service(f"sqlite:///{tmp_path}/marquee.db", own_redis.url, tmp_path, RATE_LIMITS="GET /movies/{id}=2/min")
    with service.running():
        async with service.anyone() as client:
            assert await statuses(client, "GET", NOTHING, 3) == [404, 404, 429]
            with own_redis.frozen():
                # A rejection is cached for a second, so the first 404 may come late.
                await eventually(partial(is_answered, client, 404), "the worker counts in memory")
                begun = time.monotonic()
                assert await statuses(client, "GET", NOTHING, 50) == [404] + [429] * 49
                assert time.monotonic() - begun < 5, "requests do not wait a quarter of a second each"
                guess = {"username": ADMIN[0], "password": "a wrong guess"}
                guesses = await statuses(client, "POST", "/auth/login", PAIR_RATE.amount + 2, json=guess)
                assert guesses == [401] * PAIR_RATE.amount + [429] * 2, "passwords stay protected"
            lines = [line for line in service.log().splitlines() if "counted by each worker" in line]
            assert len(lines) == 1

            async def is_shared_again() -> bool:
                return await statuses(client, "POST", "/auth/login", 1, json=guess) == [401]

            await eventually(is_shared_again, "Redis counts again, from zero", AWAY_SECONDS + 10)
            assert await metric(service, "marquee_rate_limits_not_shared_total") >= 50


async def is_answered(client: httpx.AsyncClient, status: int) -> bool:
    return (await client.get(NOTHING)).status_code == status


# --- windows


def test_a_window_slides() -> None:
    windows = Windows(Rate(3, 60))
    hits = [windows.hit("a", now) for now in (100.0, 110.0, 120.0)]
    assert hits == [Hit(True, 2, 60), Hit(True, 1, 50), Hit(True, 0, 40)]
    refused = windows.hit("a", 159.9)
    assert (refused.is_allowed, refused.remaining, round(refused.reset_seconds, 3)) == (False, 0, 0.1)
    assert windows.hit("a", 160.0) == Hit(True, 0, 10.0), "the first hit has left the window"
    assert windows.hit("a", 169.9).is_allowed is False
    assert windows.hit("b", 169.9).is_allowed is True
    windows.clear("a")
    assert windows.hit("a", 169.9).remaining == 2


@pytest.mark.parametrize("gap", [0.001, 0.013, 0.1, 0.7])
def test_every_window_allows_the_limit_and_hardly_less(gap: float) -> None:
    rate = Rate(500, 60)
    windows = Windows(rate)
    allowed: list[float] = []
    for number in range(int(200 / gap)):
        now = 1_000 + number * gap
        if windows.hit("a", now).is_allowed:
            allowed.append(now)
        assert len(windows._clients["a"].steps) <= 2 * STEPS + 1
    for early, late in zip(allowed, allowed[rate.amount :], strict=False):
        assert late - early >= rate.seconds
    per_window = min(rate.amount, rate.seconds / gap)
    assert len(allowed) >= 200 / rate.seconds * per_window * (1 - 2 / STEPS)


def test_inactive_clients_are_forgotten() -> None:
    windows = Windows(Rate(3, 60))
    for number in range(1_000):
        windows.hit(f"early {number}", 0.0)
    for number in range(1_000):
        windows.hit(f"late {number}", 100.0)
    assert len(windows) == 1_000
    for number in range(MAX_CLIENTS + 10):
        windows.hit(f"crowd {number}", 101.0)
    assert len(windows) == MAX_CLIENTS


# --- the setting


def test_rates_and_limits_are_parsed() -> None:
    assert parse_rate("3/minute") == parse_rate(" 3 / MIN ") == parse_rate("3/minutes") == Rate(3, 60)
    assert [parse_rate(f"1/{unit}").seconds for unit in ("second", "hour", "day")] == [1, 3_600, 86_400]
    texts = ["1 request per second", "3 requests per minute", "5 requests per 900 seconds"]
    assert [str(Rate(*each)) for each in ((1, 1), (3, 60), (5, 900))] == texts
    assert parse_rate_limits("on") == RateLimits(True, ())
    assert parse_rate_limits("OFF") == RateLimits(False, ())
    limits = parse_rate_limits("on; post /users=3/minute; GET /users/{id}=2/minute;")
    assert limits.is_on
    amounts = {each.route: each.rate.amount for each in limits.routes}
    assert amounts == {("POST", "/users"): 3, ("GET", "/users/{}"): 2}


@pytest.mark.parametrize(
    "text",
    [
        *("none", "off; POST /users=3/minute", "/users=3/minute", "BREW /users=3/minute", "POST users=3/minute"),
        *(f"POST /users{rate}" for rate in ("", "=", "=3", "=3/fortnight", "=0/minute", "=-3/minute")),
        f"POST /users={MAX_AMOUNT + 1}/minute",
        "POST /users=3/minute, GET /users=2/minute",
        "GET /users/{id}=3/minute; GET /users/{user_id}=2/minute",
    ],
)
def test_an_invalid_limit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|Expected"):
        Settings(rate_limits=text)


@pytest.mark.parametrize("path", ["GET /planets", "PATCH /movies", "GET /ws", "GET /movies/{id}/moons"])
def test_a_limit_of_an_unknown_route_is_refused(path: str) -> None:
    with pytest.raises(SettingsError, match=f"RATE_LIMITS: there is no route {path}"):
        table.limit_rules(Settings(rate_limits=f"{path}=3/minute"))


def test_a_limit_of_a_route_replaces_the_limit_of_its_group() -> None:
    rules = table.limit_rules(Settings(rate_limits="POST /users=3/minute"))
    assert rules["POST", "/users"].rate == Rate(3, 60)
    assert rules["POST", "/auth/register"].rate == RATES[LimitGroup.REGISTER]
    assert rules["GET", "/movies/{id}"] == limit_groups.Rule(
        "read", RATES[LimitGroup.READ], False, Rate(10 * RATES[LimitGroup.READ].amount, 60)
    )
    assert rules["POST", "/users"].address_rate is None, "the route is counted by address anyway"
    assert ("GET", "/healthz") not in rules
    assert table.limit_rules(Settings(rate_limits="off")) == {}
    unlimited = {operation.path for operation in table.OPERATIONS if not operation.is_limited}
    assert unlimited == {"/healthz", "/readyz", "/openapi.json"}


@pytest.mark.parametrize("value", ["localhost", "10.0.0.0/33", "10.0.0.1/8", "*", "10.0.0.1;10.0.0.2"])
def test_proxies_are_addresses_and_networks(value: str) -> None:
    with pytest.raises(ValueError, match="expected addresses or networks"):
        Settings(trusted_proxies=value)
