"""Password guessing is slowed down, for existing and unknown names alike, and never locks an owner out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from core.errors import TooManyRequests
from repository.accounts import sessions, users
from repository.accounts.sessions import Checked, Device, Renewal
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from services.limits.limiter import Limits
from services.limits.lockout import ADDRESS_RATE, NAME_RATE, PAIR_RATE, Lockout
from services.tokens import new_token_id
from tests.conftest import Places
from tests.support.requests import ok, sign_in
from tests.support.service import PASSWORD, SECRET, Service
from tests.support.sockets import refusal

HOME = "192.0.2.1"


def stranger(number: int) -> str:
    return f"198.51.100.{number}" if number < 256 else f"203.0.113.{number - 256}"


async def person(database: Database, name: str, *addresses: str) -> int:
    """Create an account that is signed in from these addresses, and return its id."""

    async def work(tx: Transaction) -> int:
        user_id = int((await users.create(tx, {"username": name}, "no hash"))["id"])
        for address in addresses:
            renewal = Renewal(new_token_id(), 900)
            await sessions.begin(tx, user_id, Device(None, address), Checked("no hash"), renewal)
        return user_id

    return await database.write(work)


async def attempts(lockout: Lockout, name: str, user_id: int | None, addresses: Callable[[int], str]) -> int:
    """Return how many attempts were allowed before one was rejected."""
    for count in range(1_000):
        try:
            await lockout.try_to_sign_in(name, user_id, addresses(count))
        except TooManyRequests as refused:
            assert 1 <= int(refused.headers["Retry-After"]) <= NAME_RATE.seconds
            return count
    raise AssertionError("expected a rejection, got none")


async def test_a_success_resets_the_ten_attempts_of_a_name_at_an_address(database: Database) -> None:
    lockout = Lockout(database, Limits(), SECRET)
    alice = await person(database, "alice", HOME)
    assert await attempts(lockout, "alice", alice, lambda _: HOME) == PAIR_RATE.amount
    await lockout.try_to_sign_in("bob", None, HOME)
    await lockout.try_to_sign_in("alice", alice, stranger(1))
    await lockout.signed_in("alice", HOME)
    assert await attempts(lockout, "alice", alice, lambda _: HOME) == PAIR_RATE.amount


async def test_all_spellings_of_a_name_share_the_attempts(database: Database) -> None:
    lockout = Lockout(database, Limits(), SECRET)
    spellings = ("Émile", "émile", "E\u0301mile", " Émile ", "\uff25\u0301mile")
    for count in range(PAIR_RATE.amount):
        await lockout.try_to_sign_in(spellings[count % len(spellings)], None, HOME)
    for spelling in spellings:
        with pytest.raises(TooManyRequests):
            await lockout.try_to_sign_in(spelling, None, HOME)


async def test_an_address_has_a_hundred_attempts_for_all_names(database: Database) -> None:
    lockout = Lockout(database, Limits(), SECRET)
    for count in range(ADDRESS_RATE.amount):
        await lockout.try_to_sign_in(f"name {count}", None, f"2001:db8::{count:x}")
        await lockout.signed_in(f"name {count}", f"2001:db8::{count:x}")
    with pytest.raises(TooManyRequests):
        await lockout.try_to_sign_in("another", None, "2001:db8::ffff:1")
    await lockout.try_to_sign_in("another", None, "2001:db8:0:1::1")


@pytest.mark.parametrize("exists", [True, False])
async def test_distributed_guessing_locks_out_strangers_but_not_the_owner(database: Database, exists: bool) -> None:
    lockout = Lockout(database, Limits(), SECRET)
    alice = await person(database, "alice", HOME) if exists else None
    assert await attempts(lockout, "alice", alice, stranger) == NAME_RATE.amount
    with pytest.raises(TooManyRequests):
        await lockout.try_to_sign_in("alice", alice, "10.0.0.1")
    if alice is not None:
        assert await attempts(lockout, "alice", alice, lambda _: HOME) == PAIR_RATE.amount
    await lockout.try_to_sign_in("bob", None, "10.0.0.1")


async def test_addresses_of_recent_sessions_are_known_even_if_the_sessions_ended(database: Database) -> None:
    lockout = Lockout(database, Limits(), SECRET)
    alice = await person(database, "alice", HOME, "2001:db8::1")
    await person(database, "bob", "192.0.2.2")
    await database.write(lambda tx: sessions.end_all(tx, alice, actor_id=alice))
    await attempts(lockout, "alice", alice, stranger)
    for address in (HOME, "2001:db8::2"):
        await lockout.try_to_sign_in("alice", alice, address)
    with pytest.raises(TooManyRequests):
        await lockout.try_to_sign_in("alice", alice, "192.0.2.2")


async def test_checks_of_the_old_password_are_counted_separately(database: Database) -> None:
    lockout = Lockout(database, Limits(), SECRET)
    for _ in range(PAIR_RATE.amount):
        await lockout.try_old_password(1, "alice", HOME)
    with pytest.raises(TooManyRequests):
        await lockout.try_old_password(1, "alice", HOME)
    await lockout.try_old_password(1, "alice", stranger(1))
    await lockout.try_old_password(2, "alice", HOME)
    await lockout.knew_old_password(1, HOME)
    await lockout.try_old_password(1, "alice", HOME)


async def test_without_rate_limits_attempts_are_unlimited(database: Database) -> None:
    lockout = Lockout(database, Limits(is_on=False), SECRET)
    for _ in range(2 * NAME_RATE.amount):
        await lockout.try_to_sign_in("alice", None, HOME)
        await lockout.try_old_password(1, "alice", HOME)


async def test_checks_of_old_passwords_are_counted_for_all_accounts_of_an_address(database: Database) -> None:
    lockout = Lockout(database, Limits(), SECRET)
    for number in range(ADDRESS_RATE.amount):
        await lockout.try_old_password(number, None, f"2001:db8::{number:x}")
        await lockout.knew_old_password(number, f"2001:db8::{number:x}")
    with pytest.raises(TooManyRequests):
        await lockout.try_old_password(1_000, None, "2001:db8::ffff:1")
    await lockout.try_old_password(1_000, None, "2001:db8:0:1::1")


# --- over HTTP


@pytest.fixture(scope="module")
def guarded(new_places: Callable[[], Places], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that limits guesses and trusts the client addresses in `X-Forwarded-For`."""
    places = new_places()
    many = "; ".join(f"POST {path}=100000/minute" for path in ("/auth/login", "/token", "/auth/register"))
    settings = {"RATE_LIMITS": many, "TRUSTED_PROXIES": "127.0.0.1"}
    folder = tmp_path_factory.mktemp("guarded")
    with Service(places.database_url, places.broadcast_url, folder, **settings).running() as running:
        yield running


@asynccontextmanager
async def at(service: Service, address: str) -> AsyncIterator[httpx.AsyncClient]:
    async with service.anyone() as client:
        client.headers["X-Forwarded-For"] = address
        yield client


async def guess(client: httpx.AsyncClient, name: str, password: str = "a wrong guess") -> httpx.Response:
    return await sign_in(client, name, password)


async def test_concurrent_guesses_are_counted(guarded: Service) -> None:
    async with guarded.person() as alice, at(guarded, "192.0.2.10") as client:
        answers = await asyncio.gather(*(guess(client, alice.name) for _ in range(3 * PAIR_RATE.amount)))
        assert sorted(answer.status_code for answer in answers) == [401] * 10 + [429] * 20
        assert (await guess(client, alice.name, PASSWORD)).status_code == 429, "the right password is rejected, too"
        form = {"username": alice.name, "password": PASSWORD}
        assert (await client.post("/token", data=form)).status_code == 429, "the other sign-in route rejects it, too"
    async with at(guarded, "192.0.2.11") as elsewhere:
        assert (await guess(elsewhere, alice.name, PASSWORD)).status_code == 200


async def test_rate_limits_do_not_reveal_which_accounts_exist(guarded: Service) -> None:
    async with guarded.person() as alice, at(guarded, "192.0.2.20") as client:
        seen: list[list[Any]] = []
        for name in (alice.name, "nobody-at-all"):
            answers = [await guess(client, name) for _ in range(PAIR_RATE.amount + 1)]
            seen.append([(answer.status_code, answer.json()) for answer in answers])
            assert 890 <= int(answers[-1].headers["retry-after"]) <= 900
        assert seen[0] == seen[1]
        assert [status for status, _ in seen[0]] == [401] * 10 + [429]


async def test_a_successful_sign_in_resets_the_attempts(guarded: Service) -> None:
    async with guarded.person() as alice, at(guarded, "192.0.2.30") as client:
        for password, status in 3 * [*[("a wrong guess", 401)] * (PAIR_RATE.amount - 1), (PASSWORD, 200)]:
            assert (await guess(client, alice.name, password)).status_code == status


def lines_about(service: Service, request_id: str) -> list[dict[str, Any]]:
    """Return the log lines of a request, except for the line that every request has."""
    lines = [json.loads(line) for line in service.log().splitlines() if request_id in line]
    return [line for line in lines if line["event"] != "request"]


async def test_failed_and_refused_sign_ins_and_lock_outs_are_logged(guarded: Service) -> None:
    address = "192.0.2.40"
    async with guarded.person() as alice, guarded.admin() as chief, at(guarded, address) as client:

        async def line_of(name: str, password: str, request_id: str) -> dict[str, Any]:
            client.headers["X-Request-ID"] = request_id
            await sign_in(client, name, password)
            (line,) = lines_about(guarded, request_id)
            assert (line["address"], line["request_id"]) == (address, request_id)
            return line

        failed = await line_of(alice.name, "a wrong guess", "log-1")
        same_name = await line_of(f" {alice.name.upper()} ", "a wrong guess", "log-2")
        other_name = await line_of("nobody-at-all", "a wrong guess", "log-3")
        assert [each["event"] for each in (failed, same_name, other_name)] == ["sign-in failed"] * 3
        assert failed["name"] == same_name["name"] != other_name["name"]
        assert failed["name"] == Lockout(Database(guarded.database_url), Limits(), SECRET).digest(alice.name)
        assert failed["name"] != Lockout(Database(guarded.database_url), Limits(), SECRET + "x").digest(alice.name)
        client.headers["X-Request-ID"] = "log-4"
        wrong = {"old_password": "a wrong guess", "new_password": "the fourth man 1950"}
        await client.post("/auth/password/change", json=wrong, headers=alice.bearer)
        (line,) = lines_about(guarded, "log-4")
        assert (line["event"], line["user_id"]) == ("password check failed", alice.id)
        assert (line["name"], line["address"]) == (failed["name"], address)
        await ok(chief.http.post(f"/admin/users/{alice.id}/deactivate"))
        refused = await line_of(alice.name, PASSWORD, "log-5")
        assert (refused["event"], refused["reason"]) == ("sign-in rejected", "This account is disabled")
        for _ in range(PAIR_RATE.amount):
            client.headers["X-Request-ID"] = "log-6"
            await guess(client, alice.name)
        locked = await line_of(alice.name, PASSWORD, "log-7")
        assert (locked["event"], locked["name"], locked["level"]) == (
            "password attempts locked out",
            failed["name"],
            "warning",
        )
        assert 0 < locked["seconds"] <= PAIR_RATE.seconds
        assert not any(alice.name in json.dumps(line) for line in lines_about(guarded, "log-"))


async def test_every_door_logs_a_refusal_with_the_address(guarded: Service) -> None:
    address = "192.0.2.50"
    wrong = {"password": "a wrong guess"}
    doors: list[tuple[str, str, dict[str, Any], str]] = [
        ("POST", "/auth/login", {"json": {"email": "nobody@example.org", **wrong}}, "sign-in failed"),
        ("POST", "/token", {"data": {"username": "nobody-at-all", **wrong}}, "sign-in failed"),
        ("POST", "/token", {"json": {"username": "nobody-at-all", **wrong}}, "sign-in failed"),
        ("POST", "/token", {"data": {"grant_type": "refresh_token", "refresh_token": "x"}}, "refresh token rejected"),
        ("POST", "/auth/refresh", {"json": {"refresh_token": "x"}}, "refresh token rejected"),
        ("GET", "/auth/activate?token=x", {}, "emailed token rejected"),
        ("POST", "/auth/activate", {"json": {"token": "x"}}, "emailed token rejected"),
        ("POST", "/auth/password/reset", {"json": {"token": "x", "new_password": PASSWORD}}, "emailed token rejected"),
        ("GET", "/auth/me", {"headers": {"Authorization": "Bearer x"}}, "access token rejected"),
    ]
    async with at(guarded, address) as client:
        for number, (method, path, options, event) in enumerate(doors):
            client.headers["X-Request-ID"] = f"door-{number}-{guarded.port}"
            assert (await client.request(method, path, **options)).is_client_error
            (line,) = lines_about(guarded, client.headers["X-Request-ID"])
            assert (line["event"], line["address"]) == (event, address), path
            assert ("name" in line) == (event == "sign-in failed")


async def test_sockets_log_rejected_tokens_with_the_user(guarded: Service) -> None:
    address, request_id = "192.0.2.60", f"socket-{guarded.port}"
    headers = {"X-Forwarded-For": address, "X-Request-ID": request_id}
    async with guarded.person() as alice:
        ended = alice.token
        await ok(alice.http.get("/auth/me"))
        assert (await alice.http.post("/auth/logout")).status_code == 204
        async with guarded.watch("topics=genres", additional_headers=headers) as watcher:
            assert not (await watcher.ask({"id": 1, "action": "auth", "token": ended}))["ok"]
        (line,) = lines_about(guarded, request_id)
        assert (line["event"], line["address"], line["user_id"]) == ("access token rejected", address, alice.id)
        rejected = headers | {"X-Request-ID": request_id + "-2"} | alice.bearer
        assert (await refusal(guarded, "?topics=genres", additional_headers=rejected))[0] == 401
        (line,) = lines_about(guarded, request_id + "-2")
        assert (line["event"], line["address"], line["user_id"]) == ("access token rejected", address, alice.id)
