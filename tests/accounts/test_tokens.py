"""Tokens: their validity, refreshing, the reuse of refresh tokens, and the replacement of keys."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from jose import JWTError, jwt

from core.errors import CloseCode, Unauthenticated
from core.identity import CLOCK_LEEWAY_SECONDS
from services import tokens as tokens_module
from services.tokens import AUDIENCE, ISSUER, Tokens
from tests.conftest import Places
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import ok, over_socket, sign_in
from tests.support.resources import locations, nothing_written, sql
from tests.support.service import SECRET, Person, Service
from tests.support.sockets import REVOKED_SECONDS, closing, signed_in

OLD_KEY = "the key of last year which was long enough"
SESSION = str(uuid.uuid4())
WEEK_SECONDS = 7 * 24 * 3600


def tokens_of(*keys: str, algorithm: str = "HS256") -> Tokens:
    return Tokens(keys, algorithm, access_seconds=900, refresh_seconds=WEEK_SECONDS)


# --- reading tokens


def test_each_kind_of_token_carries_its_claims() -> None:
    tokens = tokens_of(SECRET)
    for kind, text, seconds in (
        ("access", tokens.issue(7, SESSION), 900),
        ("refresh", tokens.issue_refresh(7, SESSION, "an id"), WEEK_SECONDS),
    ):
        claims = jwt.get_unverified_claims(text)
        assert claims.keys() == {"iss", "aud", "sub", "sid", "iat", "exp", "jti", "typ"}
        assert (claims["iss"], claims["aud"], claims["sub"], claims["sid"]) == (ISSUER, AUDIENCE, "7", SESSION)
        assert (claims["typ"], claims["exp"] - claims["iat"]) == (kind, seconds)
        assert jwt.get_unverified_header(text).keys() == {"alg", "typ", "kid"}
    assert tokens.read(tokens.issue(7, SESSION)).session_id == SESSION
    assert tokens.read_refresh(tokens.issue_refresh(7, SESSION, "an id")).token_id == "an id"
    ids = {jwt.get_unverified_claims(tokens.issue(7, SESSION))["jti"] for _ in range(100)}
    assert len(ids) == 100


def forged(kind: str, key: str = SECRET, algorithm: str = "HS256", headers: Any = None, **changes: Any) -> str:
    """Return a token that is valid except for these changes. A claim that is None is left out."""
    now = int(time.time())
    times = {"iat": now, "exp": now + 60}
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "7",
        "sid": SESSION,
        "jti": "an id",
        "typ": kind,
        **times,
    } | changes
    return str(jwt.encode({k: v for k, v in claims.items() if v is not None}, key, algorithm, headers=headers))


def unsigned(kind: str, **header: str) -> str:
    """Return a token with valid claims and this header, but without a signature."""
    first = base64.urlsafe_b64encode(json.dumps({"typ": "JWT", **header}).encode()).decode().rstrip("=")
    return f"{first}.{forged(kind).split('.')[1]}."


def nested(kind: str) -> str:
    deep = base64.urlsafe_b64encode(b"[" * 30_000).decode().rstrip("=")
    return f"{deep}.{deep}.x"


OTHER = {"access": "refresh", "refresh": "access"}
INVALID: dict[str, Callable[[str], str]] = {
    "alg none": lambda kind: unsigned(kind, alg="none"),
    "alg None": lambda kind: unsigned(kind, alg="None"),
    "alg missing": unsigned,
    "another key": lambda kind: forged(kind, OLD_KEY),
    "an empty key": lambda kind: forged(kind, " "),
    "another algorithm": lambda kind: forged(kind, SECRET * 2, "HS512"),
    "another algorithm, same key": lambda kind: forged(kind, SECRET, "HS512"),
    "another kind": lambda kind: forged(OTHER[kind]),
    **{
        f"{claim} {value}": lambda kind, claim=claim, value=value: forged(kind, **{claim: value})  # type: ignore[misc]
        for claim, values in {
            **dict.fromkeys(("typ", "iat", "jti"), (None,)),
            **dict.fromkeys(("aud", "iss"), (None, "another service")),
            "exp": (None, 1),
            "nbf": (2**40,),
            "sub": (None, "chief", str(10**30)),
            "sid": (None, 1, "a\0b"),
        }.items()
        for value in values
    },
    "an unknown critical header": lambda kind: forged(kind, headers={"crit": ["x"], "x": 1}),
    "a known critical header": lambda kind: forged(kind, headers={"crit": ["exp"]}),
    "an unknown key id": lambda kind: forged(kind, headers={"kid": "0123456789abcdef"}),
    "no key id": lambda kind: forged(kind, headers={"kid": None}),
    "a list of key ids": lambda kind: forged(kind, headers={"kid": ["x"]}),
    "cut off": lambda kind: forged(kind)[:-4],
    "deeply nested": nested,
    **{text or "empty": lambda kind, text=text: text for text in ("", "x", "..", "a.b", "é.é.é")},  # type: ignore[misc]
}


@pytest.mark.parametrize("kind", ["access", "refresh"])
@pytest.mark.parametrize("what", INVALID)
def test_an_invalid_token_is_rejected(what: str, kind: str) -> None:
    tokens = tokens_of(SECRET)
    read = tokens.read if kind == "access" else tokens.read_refresh
    assert read(forged(kind)).user_id == 7
    with pytest.raises(Unauthenticated):
        read(INVALID[what](kind))


def test_a_verified_token_is_not_verified_again_until_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokens_of(SECRET)
    token, refresh = tokens.issue(7, SESSION), tokens.issue_refresh(7, SESSION, "an id")
    claims = tokens.read(token)
    tokens.read_refresh(refresh)

    def decode(*_: Any, **options: Any) -> Any:
        raise JWTError

    monkeypatch.setattr(jwt, "decode", decode)
    assert tokens.read(token) == claims
    for read, other in ((tokens.read, tokens.issue(7, SESSION)), (tokens.read_refresh, refresh)):
        with pytest.raises(Unauthenticated):
            read(other)
    expired = claims.expires_at + CLOCK_LEEWAY_SECONDS
    monkeypatch.setattr(time, "time", lambda: expired)
    with pytest.raises(Unauthenticated):
        tokens.read(token)


def test_few_verified_tokens_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "MAX_VERIFIED_TOKENS", 2)
    tokens = tokens_of(SECRET)
    claims = [tokens.read(tokens.issue(7, SESSION)) for _ in range(5)]
    assert list(tokens._verified.values()) == claims[-2:]


# --- replacing keys


def test_tokens_of_an_old_key_are_valid_while_the_key_is_listed() -> None:
    old, both, new = tokens_of(OLD_KEY), tokens_of(SECRET, OLD_KEY), tokens_of(SECRET)
    first, second = old.issue(7, SESSION), both.issue(7, SESSION)
    assert both.read(first).user_id == both.read(second).user_id == new.read(second).user_id == 7
    for tokens, token in ((new, first), (old, second)):
        with pytest.raises(Unauthenticated):
            tokens.read(token)


@pytest.mark.parametrize(
    "key", [f'"{SECRET}"', f'["short", "{SECRET}"]', f'{{"keys": ["short", "{SECRET}"]}}', f'{{"short": "{SECRET}"}}']
)
def test_a_key_in_the_form_of_json_is_an_ordinary_key(key: str) -> None:
    tokens = tokens_of(key)
    assert tokens.read(tokens.issue(7, SESSION)).user_id == 7
    for part in ("short", SECRET):
        with pytest.raises(Unauthenticated):
            tokens.read(forged("access", key=part))


def test_a_token_without_a_key_id_is_checked_with_the_new_key() -> None:
    both = tokens_of(SECRET, OLD_KEY)
    assert both.read(forged("access", SECRET)).user_id == 7
    with pytest.raises(Unauthenticated):
        both.read(forged("access", OLD_KEY))


def test_a_key_id_does_not_reveal_the_key() -> None:
    name = jwt.get_unverified_header(tokens_of(SECRET).issue(7, SESSION))["kid"]
    assert len(name) == 16
    assert name != jwt.get_unverified_header(tokens_of(OLD_KEY).issue(7, SESSION))["kid"]


@pytest.fixture(scope="module")
def before_and_after(
    new_places: Callable[[], Places], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, Service]]:
    """Two workers on one database. The first has the old key and hashing cost, and the second has the new ones."""
    places = new_places()
    changed = {"OLD_SECRET_KEYS": OLD_KEY, "PASSWORD_MEMORY_KIB": "1024", "PASSWORD_TIME_COST": "3"}
    folder = tmp_path_factory.mktemp("keys")
    before = Service(places.database_url, places.broadcast_url, folder, SECRET_KEY=OLD_KEY)
    after = Service(places.database_url, places.broadcast_url, folder, **changed)
    with before.running(), after.running():
        yield before, after


async def test_a_new_key_signs_no_user_out(before_and_after: tuple[Service, Service]) -> None:
    before, after = before_and_after
    async with before.person() as alice, after.anyone() as client:
        tokens = await login(client, alice)
        assert await whoami(client, alice.token) == 200
        kept = await login(before, alice)
        renewed = (await refresh(client, kept["refresh_token"])).json()
        for found in (tokens, renewed):
            assert await whoami(client, found["access_token"]) == 200
            assert await whoami(before, found["access_token"]) == 401, "the old worker does not know the new key"


async def test_a_password_is_hashed_again_when_its_owner_signs_in(before_and_after: tuple[Service, Service]) -> None:
    before, after = before_and_after
    async with before.person() as alice, after.anyone() as client:

        async def stored() -> tuple[str, int]:
            ((password_hash, version),) = await sql(
                before, f"SELECT password_hash, version FROM users WHERE id = {alice.id}"
            )
            return password_hash, version

        old_hash, version = await stored()
        assert "$m=64,t=1,p=1$" in old_hash
        assert (await sign_in(client, alice.name, "not this one")).status_code == 401
        assert await stored() == (old_hash, version)
        # The sign-ins are concurrent: if the hash has changed since a sign-in checked it, the sign-in checks again.
        found = await asyncio.gather(*(login(client, alice) for _ in range(4)))
        assert len({each["session_id"] for each in found}) == 4
        new_hash, version_now = await stored()
        assert "$m=1024,t=3,p=1$" in new_hash
        assert version_now == version, "a new hash of the same password does not change the version"
        await login(client, alice)
        assert await stored() == (new_hash, version)


# --- refreshing


async def login(client: httpx.AsyncClient | Service, person: Person) -> dict[str, Any]:
    if isinstance(client, Service):
        async with client.anyone() as http:
            return await login(http, person)
    found: dict[str, Any] = await ok(sign_in(client, person.name))
    return found


async def refresh(client: httpx.AsyncClient, token: str, **headers: str) -> httpx.Response:
    return await client.post("/auth/refresh", json={"refresh_token": token}, headers=headers)


def bearer(tokens: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {tokens['access_token']}"}


async def whoami(client: httpx.AsyncClient | Service, token: str) -> int:
    if isinstance(client, Service):
        async with client.anyone() as http:
            return await whoami(http, token)
    return (await client.get("/auth/me", headers={"Authorization": f"Bearer {token}"})).status_code


async def test_refreshing_returns_new_tokens_of_the_same_session(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client:
        first = last = await login(client, alice)
        grant = {"grant_type": "refresh_token"}
        ways: list[Callable[[dict[str, str]], Any]] = [
            lambda token: client.post("/auth/refresh", json=token),
            lambda token: client.post("/token", json=grant | token),
            lambda token: client.post("/token", data=grant | token),
        ]
        for way in ways:
            answer = await way({"refresh_token": last["refresh_token"]})
            assert answer.status_code == 200, answer.text
            assert answer.headers["cache-control"] == "no-store"
            last = answer.json()
            assert last.keys() == first.keys()
            assert (last["session_id"], last["user_id"]) == (first["session_id"], alice.id)
            assert await whoami(client, last["access_token"]) == 200
        assert await whoami(client, first["access_token"]) == 200, "the first access token is valid until it expires"
        assert len((await alice.http.get("/auth/sessions")).json()) == 2


async def test_a_refresh_causes_an_event_with_the_changed_fields(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client:
        async with service.watch("topics=sessions", **signed_in(alice)) as watcher:
            tokens = await login(client, alice)
            begun = (await watcher.expect("add", "sessions"))["data"]
            await sql(service, f"UPDATE sessions SET address = '192.0.2.1' WHERE id = '{begun['id']}'")
            await refresh(client, tokens["refresh_token"], **{"User-Agent": "somewhere else"})
            event = await watcher.expect("update", "sessions")
            assert event["changed"] == ["address", "last_used_at"]
            assert event["data"]["last_used_at"] > begun["last_used_at"]
            assert event["data"] == begun | {"last_used_at": event["data"]["last_used_at"]}
            listed = (await alice.http.get("/auth/sessions")).json()
            assert event["data"] in listed


async def test_a_session_lives_as_long_as_its_last_refresh_token(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client:
        tokens = await login(client, alice)
        old = "2020-01-01T00:00:00.000000Z"
        session = f"id = '{tokens['session_id']}'"
        await sql(service, f"UPDATE sessions SET expires_at = '{old}' WHERE {session}")
        assert (await refresh(client, tokens["refresh_token"])).status_code == 200
        ((expires_at,),) = await sql(service, f"SELECT expires_at FROM sessions WHERE {session}")
        assert str(expires_at)[:4] > "2020"


async def test_reusing_a_refresh_token_ends_only_its_session(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client:
        first = await login(client, alice)
        second = (await refresh(client, first["refresh_token"])).json()
        headers: dict[str, Any] = {"additional_headers": bearer(second)}
        async with service.watch(**headers) as stolen, service.watch(**signed_in(alice)) as mine:
            answer = await refresh(client, first["refresh_token"])
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert (await closing(stolen, REVOKED_SECONDS))[0] == CloseCode.TOKEN_EXPIRED
            assert (await mine.ask({"id": 1, "action": "ping"}))["ok"]
        async with nothing_written(service):
            for pair in (first, second):
                assert await whoami(client, pair["access_token"]) == 401
                assert (await refresh(client, pair["refresh_token"])).status_code == 401
        query = f"SELECT operation FROM events WHERE topic = 'sessions' AND entity_id = '{first['session_id']}'"
        assert await sql(service, f"{query} ORDER BY seq") == [("add",), ("update",), ("delete",)]
        assert first["refresh_token"] not in service.log()


async def test_concurrent_use_of_one_refresh_token_ends_the_session(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client:
        for _ in range(5):
            tokens = await login(client, alice)
            answers = await asyncio.gather(*(refresh(client, tokens["refresh_token"]) for _ in range(4)))
            assert sorted(answer.status_code for answer in answers) == [200, 401, 401, 401]
            (winner,) = (answer.json() for answer in answers if answer.status_code == 200)
            assert await whoami(client, winner["access_token"]) == 401, "reusing the token ended the session"


async def test_of_two_workers_that_refresh_concurrently_one_succeeds(before_and_after: tuple[Service, Service]) -> None:
    before, after = before_and_after
    async with before.person() as alice, before.anyone() as here, after.anyone() as there:
        for _ in range(5):
            tokens = await login(here, alice)
            answers = await asyncio.gather(*(refresh(client, tokens["refresh_token"]) for client in (here, there)))
            assert sorted(answer.status_code for answer in answers) == [200, 401]


async def test_refresh_tokens_of_ended_sessions_are_rejected(service: Service) -> None:
    async with service.anyone() as client, service.admin() as admin:
        ways: dict[str, Callable[[Person, dict[str, Any]], Any]] = {
            "logout": lambda _, mine: client.post("/auth/logout", headers=bearer(mine)),
            "everywhere": lambda person, _: person.http.delete("/auth/sessions"),
            "one": lambda person, mine: person.http.delete(f"/auth/sessions/{mine['session_id']}"),
            "admin": lambda person, _: admin.http.post(f"/admin/users/{person.id}/deactivate"),
        }
        for name, way in ways.items():
            async with service.person() as alice:
                tokens = await login(client, alice)
                assert (await way(alice, tokens)).is_success, name
                assert (await refresh(client, tokens["refresh_token"])).status_code == 401, name


async def test_refreshing_checks_that_the_account_is_active(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client:
        tokens = await login(client, alice)
        await sql(service, f"UPDATE users SET is_active = false WHERE id = {alice.id}")
        async with nothing_written(service):
            assert (await refresh(client, tokens["refresh_token"])).status_code == 401


async def test_each_kind_of_token_is_rejected_in_the_place_of_the_other(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client:
        tokens = await login(client, alice)
        async with nothing_written(service):
            assert (await refresh(client, alice.token)).status_code == 401
            assert await whoami(client, tokens["refresh_token"]) == 401
        async with service.watch() as watcher:
            reply = await watcher.ask({"id": 1, "action": "auth", "token": tokens["refresh_token"]})
            assert (reply["ok"], reply["error"]["code"]) == (False, "unauthenticated")


@SQLITE_ONLY
async def test_a_refresh_without_a_token_is_rejected(service: Service) -> None:
    async with service.anyone() as client:
        assert (await client.post("/auth/refresh", json=[])).status_code == 422
        for body in ({}, {"refresh_token": ""}, {"refresh_token": 1}, {"refresh_token": "x" * 5_000}):
            assert (await client.post("/auth/refresh", json=body)).status_code == 422
            assert (await client.post("/token", json={"grant_type": "refresh_token", **body})).status_code == 422
        answer = await client.post("/auth/refresh", json={"refresh_token": "x", "y": 1})
        assert locations(answer) == [["body", "y"]]


async def test_signing_out_everywhere_ends_every_session(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, service.anyone() as client:
        other = await login(client, alice)
        async with service.watch(**signed_in(alice)) as watcher:
            answer = await alice.http.delete("/auth/sessions")
            assert (answer.status_code, answer.content) == (204, b"")
            assert (await closing(watcher, REVOKED_SECONDS))[0] == CloseCode.TOKEN_EXPIRED
        assert await whoami(client, alice.token) == await whoami(client, other["access_token"]) == 401
        assert await whoami(client, bob.token) == 200
        assert (await client.delete("/auth/sessions")).status_code == 401


@SQLITE_ONLY
async def test_refreshing_works_over_a_socket(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client, service.watch(**signed_in(alice)) as watcher:
        tokens = await login(client, alice)
        reply = await over_socket(watcher, "POST", "/auth/refresh", {"refresh_token": tokens["refresh_token"]})
        assert (reply["status"], reply["body"]["session_id"]) == (200, tokens["session_id"])
