"""How often a client may send requests: limits of groups and of routes, who a client is, and who counts together."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from core.errors import SettingsError
from core.rates import MAX_AMOUNT, Rate, RateLimits, parse_rate, parse_rate_limits
from core.settings import Settings
from routes import table
from routes.http import limit_groups
from routes.http.limit_groups import RATES, LimitGroup
from routes.http.proxies import TrustedProxies
from services.limits.limiter import network_of
from services.limits.memory import MAX_CLIENTS, STEPS, Hit, Windows
from services.limits.redis import AWAY_SECONDS
from tests.conftest import Places
from tests.support.servers import PostgresServer, RedisServer
from tests.support.service import PASSWORD, ROOT, Person, Service, eventually

OWN = (
    "POST /users=3/minute; GET /movies/count=10/min; GET /movies/{id}=2/minute; "
    "POST /users/{user_id}/movies=3/minute; GET /users/{id}/movies = 5 / minute; POST /auth/login=4/hour"
)
NOTHING = "/movies/999999999"
_addresses = (f"203.0.113.{number}" for number in itertools.count(1))


@pytest.fixture(scope="module")
def limited(new_places: Callable[[], Places], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with limits of single routes, to which each test comes from addresses of its own."""
    places = new_places()
    folder = tmp_path_factory.mktemp("limited")
    service = Service(
        places.database_url,
        places.broadcast_url,
        folder,
        RATE_LIMITS=OWN,
        TRUSTED_PROXIES="127.0.0.1, 10.0.0.0/8",
        MAX_CONNECTIONS_PER_ADDRESS="2",
    )
    with service.running():
        yield service


@asynccontextmanager
async def somewhere(service: Service, forwarded: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """Somebody who comes from an address that nobody has come from."""
    headers = {"X-Forwarded-For": forwarded or next(_addresses)}
    async with httpx.AsyncClient(base_url=service.url, timeout=60, headers=headers) as client:
        yield client


@asynccontextmanager
async def person(service: Service, forwarded: str | None = None) -> AsyncIterator[Person]:
    async with somewhere(service, forwarded) as client:
        name = f"limited{time.time_ns()}"
        answer = await client.post("/auth/register", json={"username": name, "password": PASSWORD})
        assert answer.status_code == 201, answer.text
        yield await service._signed_in(client, name, PASSWORD)


async def statuses(client: httpx.AsyncClient, method: str, path: str, times: int, **options: Any) -> list[int]:
    return [(await client.request(method, path, **options)).status_code for _ in range(times)]


# --- what a limit does


async def test_registering_has_its_small_limit(limited: Service) -> None:
    async with somewhere(limited) as client:
        left = []
        for number in range(3):
            body = {"username": f"small{number}-{time.time_ns()}", "password": PASSWORD}
            answer = await client.post("/users", json=body)
            assert answer.status_code == 201
            assert answer.headers["RateLimit-Limit"] == "3"
            left.append(answer.headers["RateLimit-Remaining"])
        assert left == ["2", "1", "0"]
        refused = await client.post("/api/v1/users/", content=b"not looked at")
        assert refused.status_code == 429
        assert refused.json() == {"detail": "Expected at most 3 requests per minute; try again later"}
        assert 50 <= int(refused.headers["Retry-After"]) <= 60
        assert refused.headers["RateLimit-Reset"] == refused.headers["Retry-After"]
        assert refused.headers["RateLimit-Remaining"] == "0"
        other = await client.post("/auth/register", json={})
        assert (other.status_code, other.headers["RateLimit-Limit"]) == (422, str(RATES[LimitGroup.REGISTER].amount))


async def test_the_other_small_limits(limited: Service) -> None:
    async with person(limited) as alice, somewhere(limited) as reader:
        path = f"/users/{alice.id}/movies"
        assert await statuses(alice.http, "POST", path, 4, json={"title": "M"}) == [201] * 3 + [429]
        assert await statuses(reader, "GET", path, 6) == [200] * 5 + [429]
        assert await statuses(reader, "GET", "/movies/count", 11) == [200] * 10 + [429]
        assert await statuses(reader, "GET", "/movies/999999", 3) == [404, 404, 429], "also what is not there"
        assert await statuses(reader, "GET", "/movies/1000000", 1) == [429], "the route counts, not the row"


async def test_a_limit_of_a_route_counts_for_that_route_alone(limited: Service) -> None:
    async with somewhere(limited) as client:
        assert await statuses(client, "GET", NOTHING, 3) == [404, 404, 429]
        answer = await client.get("/movies")
        assert answer.status_code == 200
        assert answer.headers["RateLimit-Limit"] == str(RATES[LimitGroup.READ].amount)
        assert await statuses(client, "GET", "/characters/1", 3) == [404] * 3
        assert (await client.get(NOTHING)).status_code == 429


async def test_a_head_counts_as_a_get(limited: Service) -> None:
    async with somewhere(limited) as client:
        assert await statuses(client, "HEAD", NOTHING, 2) == [404, 404]
        assert await statuses(client, "GET", NOTHING, 1) == [429]


async def test_what_machines_ask_is_not_limited(limited: Service) -> None:
    async with somewhere(limited) as client:
        for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/"):
            answer = await client.get(path)
            assert answer.status_code == 200
            assert "RateLimit-Limit" not in answer.headers, path
        counted = (await client.get("/metrics")).text
        assert "marquee_rate_limits_unchecked_total 0.0" in counted


async def test_refusals_are_counted(limited: Service) -> None:
    async with somewhere(limited) as client:
        await statuses(client, "GET", NOTHING, 3)
        assert 'marquee_rate_limited_total{limit="GET /movies/{id}"}' in (await client.get("/metrics")).text


async def test_requests_over_a_socket_count_as_well(limited: Service) -> None:
    async with person(limited) as alice:
        headers = {"Authorization": f"Bearer {alice.token}", "X-Forwarded-For": next(_addresses)}
        async with limited.watch("topics=jobs", additional_headers=headers) as watcher:

            async def ask(number: int) -> dict[str, Any]:
                await watcher.send({"id": number, "action": "request", "method": "GET", "path": NOTHING})
                return await watcher.until(lambda frame: frame.get("reply_to") == number)

            first, second, third = [await ask(number) for number in range(3)]
        assert [each["status"] for each in (first, second, third)] == [404, 404, 429]
        assert first["headers"]["ratelimit-remaining"] == "1"
        assert third["headers"]["retry-after"] == third["headers"]["ratelimit-reset"]
        assert await statuses(alice.http, "GET", NOTHING, 1) == [429], "one client, however it asks"


# --- who a client is


async def test_users_are_clients_wherever_they_are(limited: Service) -> None:
    home, office = next(_addresses), next(_addresses)
    async with person(limited, home) as alice, person(limited, home) as bob, somewhere(limited, home) as nobody:
        assert await statuses(nobody, "GET", NOTHING, 3) == [404, 404, 429]
        assert await statuses(alice.http, "GET", NOTHING, 3) == [404, 404, 429]
        assert await statuses(bob.http, "GET", NOTHING, 2) == [404, 404]
        elsewhere = {"X-Forwarded-For": office}
        assert await statuses(alice.http, "GET", NOTHING, 1, headers=elsewhere) == [429]
        async with somewhere(limited, office) as stranger:
            assert await statuses(stranger, "GET", NOTHING, 1) == [404]


async def test_bad_tokens_count_for_the_address(limited: Service) -> None:
    async with somewhere(limited) as client:
        bad = {"Authorization": "Bearer x.y.z"}
        assert await statuses(client, "GET", NOTHING, 3, headers=bad) == [401, 401, 429]
        assert await statuses(client, "GET", NOTHING, 1) == [429]


async def test_an_account_is_no_way_round_the_limits_of_those_without_one(limited: Service) -> None:
    home = next(_addresses)
    async with person(limited, home) as alice, somewhere(limited, home) as nobody:
        assert await statuses(nobody, "POST", "/users", 3, json={}) == [422] * 3
        assert await statuses(alice.http, "POST", "/users", 1, json={}) == [429]


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_what_one_client_has_of_addresses(host: str, client: str) -> None:
    assert network_of(host) == client


# --- proxies


async def test_the_address_that_the_last_of_our_proxies_names(limited: Service) -> None:
    async with person(limited) as alice:
        for forwarded, seen in (
            ("198.51.100.7", "198.51.100.7"),
            ("6.6.6.6, 198.51.100.8", "198.51.100.8"),
            ("6.6.6.6, 198.51.100.9, 10.1.2.3, 127.0.0.1", "198.51.100.9"),
            ("198.51.100.10:4711", "198.51.100.10"),
            ("[2001:db8::1]:4711", "2001:db8::1"),
            ("2001:db8::2", "2001:db8::2"),
            ("::ffff:198.51.100.11", "198.51.100.11"),
            ("198.51.100.12, unknown, 10.9.9.9", "10.9.9.9"),
            ("<script>", "127.0.0.1"),
            ("10.0.0.1", "10.0.0.1"),
            ("", "127.0.0.1"),
        ):
            alice.http.headers["X-Forwarded-For"] = forwarded
            body = {"username": alice.name, "password": PASSWORD}
            assert (await alice.http.post("/token", json=body)).status_code == 200
            newest = (await alice.http.get("/auth/sessions?limit=1")).json()[0]
            assert newest["address"] == seen, forwarded


async def test_several_lines_of_forwarded_for_are_one(limited: Service) -> None:
    async with person(limited) as alice:
        lines = [("X-Forwarded-For", "6.6.6.6"), ("X-Forwarded-For", "198.51.100.20, 10.0.0.1")]
        async with httpx.AsyncClient(base_url=limited.url, headers=lines) as client:
            body = {"username": alice.name, "password": PASSWORD}
            token = (await client.post("/token", json=body)).json()["access_token"]
            listed = await client.get("/auth/sessions", headers={"Authorization": f"Bearer {token}"})
            assert listed.json()[0]["address"] == "198.51.100.20"


async def test_connections_are_counted_by_the_address_before_the_proxies(limited: Service) -> None:
    here, there = ({"X-Forwarded-For": next(_addresses)} for _ in range(2))
    async with (
        limited.watch(additional_headers=here),
        limited.watch(additional_headers=here),
        limited.watch(additional_headers=there),
    ):
        with pytest.raises(InvalidStatus) as refused:
            await connect(limited.ws_url, additional_headers=here)
        assert refused.value.response.status_code == 429
        assert here["X-Forwarded-For"] in refused.value.response.body.decode()


async def test_strangers_who_name_an_address_are_not_believed(service: Service) -> None:
    async with service.person() as alice:
        alice.http.headers["X-Forwarded-For"] = "198.51.100.7"
        body = {"username": alice.name, "password": PASSWORD}
        assert (await alice.http.post("/token", json=body)).status_code == 200
        addresses = {each["address"] for each in (await alice.http.get("/auth/sessions")).json()}
        assert addresses == {"127.0.0.1"}


async def test_proxies_are_trusted_under_another_server_too(new_service: Callable[..., Service]) -> None:
    service = new_service(PYTHONPATH=str(ROOT), TRUSTED_PROXIES="127.0.0.0/8", RATE_LIMITS="GET /movies/{id}=1/minute")
    port = str(service.port)
    service.command = ("-m", "uvicorn", "main:app", "--port", port, "--app-dir", str(ROOT), "--no-proxy-headers")
    with service.running():
        async with somewhere(service) as here, somewhere(service) as there:
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


# --- who counts together, and when there is no Redis


async def test_without_limits_nobody_is_told_of_any(service: Service) -> None:
    async with service.anyone() as client:
        assert "RateLimit-Limit" not in (await client.get("/movies")).headers


async def test_two_workers_count_together(postgres: PostgresServer, redis: RedisServer, tmp_path: Path) -> None:
    url = postgres.create_database()
    own = "GET /movies/{id}=6/minute; GET /movies=120/minute"
    first, second = (Service(url, redis.url, tmp_path, RATE_LIMITS=own) for _ in range(2))
    with first.running(), second.running():
        async with first.anyone() as here, second.anyone() as there:
            answers = []
            for _ in range(4):
                answers += await statuses(here, "GET", NOTHING, 1) + await statuses(there, "GET", NOTHING, 1)
            assert answers == [404] * 6 + [429] * 2
            # A worker takes a share of a larger limit and hands it out by itself; none is lost.
            found = await asyncio.gather(*(statuses(each, "GET", "/movies", 1) for each in (here, there) * 70))
            assert sorted(status for each in found for status in each) == [200] * 120 + [429] * 20


async def test_without_redis_requests_pass_and_nobody_waits(own_redis: RedisServer, tmp_path: Path) -> None:
    service = Service(f"sqlite:///{tmp_path}/marquee.db", own_redis.url, tmp_path, RATE_LIMITS="GET /movies/{id}=2/min")
    with service.running():
        async with service.anyone() as client:
            assert await statuses(client, "GET", NOTHING, 3) == [404, 404, 429]
            with own_redis.frozen():
                # A refusal is remembered for a second.
                async def passes() -> bool:
                    return await statuses(client, "GET", NOTHING, 1) == [404]

                await eventually(passes, "requests pass")
                begun = time.monotonic()
                assert await statuses(client, "GET", NOTHING, 50) == [404] * 50
                assert time.monotonic() - begun < 5, "not a quarter of a second each"
                answer = await client.get(NOTHING)
                assert answer.headers["RateLimit-Remaining"] == "2"
            lines = [line for line in service.log().splitlines() if "without rate limits" in line]
            assert len(lines) == 1

            async def counts() -> bool:
                return await statuses(client, "GET", NOTHING, 1) == [429]

            await eventually(counts, "limits count again", AWAY_SECONDS + 10)
            unchecked = [line for line in (await client.get("/metrics")).text.splitlines() if "unchecked_total" in line]
            assert float(unchecked[-1].split()[1]) >= 50


# --- windows


def test_a_window_moves() -> None:
    windows = Windows(Rate(3, 60))
    hits = [windows.hit("a", now) for now in (100.0, 110.0, 120.0)]
    assert hits == [Hit(True, 2, 60), Hit(True, 1, 50), Hit(True, 0, 40)]
    refused = windows.hit("a", 159.9)
    assert (refused.is_allowed, refused.remaining, round(refused.reset_seconds, 3)) == (False, 0, 0.1)
    assert windows.hit("a", 160.0) == Hit(True, 0, 10.0), "the first has left"
    assert windows.hit("a", 169.9).is_allowed is False
    assert windows.hit("b", 169.9).is_allowed is True
    windows.clear("a")
    assert windows.hit("a", 169.9).remaining == 2


@pytest.mark.parametrize("gap", [0.001, 0.013, 0.1, 0.7])
def test_no_window_holds_more_than_it_may_and_not_much_less(gap: float) -> None:
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


def test_clients_that_stay_away_are_forgotten() -> None:
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


def test_rates_and_limits_are_read() -> None:
    assert parse_rate("3/minute") == parse_rate(" 3 / MIN ") == parse_rate("3/minutes") == Rate(3, 60)
    assert [parse_rate(f"1/{unit}").seconds for unit in ("second", "hour", "day")] == [1, 3_600, 86_400]
    assert [str(Rate(*each)) for each in ((1, 1), (3, 60), (5, 900))] == [
        "1 request per second",
        "3 requests per minute",
        "5 requests per 900 seconds",
    ]
    assert parse_rate_limits("on") == RateLimits(True, ())
    assert parse_rate_limits("OFF") == RateLimits(False, ())
    limits = parse_rate_limits("on; post /users=3/minute; GET /users/{id}=2/minute;")
    assert limits.is_on
    assert [(each.route, each.rate.amount) for each in limits.routes] == [
        (("POST", "/users"), 3),
        (("GET", "/users/{}"), 2),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "none",
        "off; POST /users=3/minute",
        "POST /users",
        "POST /users=",
        "POST /users=3",
        "POST /users=3/fortnight",
        "POST /users=0/minute",
        f"POST /users={MAX_AMOUNT + 1}/minute",
        "POST /users=-3/minute",
        "/users=3/minute",
        "BREW /users=3/minute",
        "POST users=3/minute",
        "POST /users=3/minute, GET /users=2/minute",
        "GET /users/{id}=3/minute; GET /users/{user_id}=2/minute",
    ],
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|Expected"):
        Settings(rate_limits=text)


@pytest.mark.parametrize("path", ["GET /planets", "PATCH /movies", "GET /ws", "GET /movies/{id}/moons"])
def test_routes_that_there_are_not_are_refused(path: str) -> None:
    with pytest.raises(SettingsError, match=f"RATE_LIMITS: there is no route {path}"):
        table.limit_rules(Settings(rate_limits=f"{path}=3/minute"))


def test_a_limit_of_a_route_replaces_that_of_its_group() -> None:
    rules = table.limit_rules(Settings(rate_limits="POST /users=3/minute"))
    assert rules["POST", "/users"].rate == Rate(3, 60)
    assert rules["POST", "/auth/register"].rate == RATES[LimitGroup.REGISTER]
    assert rules["GET", "/movies/{id}"] == limit_groups.Rule("read", RATES[LimitGroup.READ], False)
    assert ("GET", "/healthz") not in rules
    assert table.limit_rules(Settings(rate_limits="off")) == {}
    unlimited = {operation.path for operation in table.OPERATIONS if not operation.is_limited}
    assert unlimited == {"/healthz", "/readyz", "/openapi.json"}


@pytest.mark.parametrize("value", ["localhost", "10.0.0.0/33", "10.0.0.1/8", "*", "10.0.0.1;10.0.0.2"])
def test_proxies_are_addresses_and_networks(value: str) -> None:
    with pytest.raises(ValueError, match="expected addresses or networks"):
        Settings(trusted_proxies=value)


def test_a_start_with_a_route_that_there_is_not_ends_with_a_sentence(tmp_path: Path) -> None:
    environment = {"RATE_LIMITS": "GET /planets=3/minute", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, str(ROOT / "main.py")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "RATE_LIMITS: there is no route GET /planets." in done.stderr
    assert "on air" not in done.stdout
