"""Sign-in sessions: listing and ending them, and the effect of deactivation and of a new group."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from core.errors import Forbidden, Unauthenticated
from core.identity import Group
from jobs.cleanup import Cleanup, Retention
from repository.accounts import sessions, users
from repository.accounts.sessions import Checked, Device, Renewal
from repository.engine.database import Database
from repository.engine.events import Event
from repository.engine.transaction import Transaction
from services.authentication import identify
from services.tokens import Tokens, new_token_id
from tests.conftest import Places
from tests.support.accounts import account, an_admin, outcome
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import change_group, ok, sign_in
from tests.support.resources import nothing_written, sql
from tests.support.service import PASSWORD, SECRET, Person, Service
from tests.support.sockets import refusal, signed_in

SESSION = {"id", "user_id", "user_agent", "address", "created_at", "last_used_at"}
NO_HASH = "no hash"
SOMEWHERE = Device("a browser", "192.0.2.1")


async def status_of(person: Person, base: str = "") -> int:
    return (await person.http.get(f"{base}/auth/me")).status_code


async def listed(person: Person) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await ok(person.http.get("/auth/sessions"))
    return found


@asynccontextmanager
async def again(service: Service, person: Person, **headers: str) -> AsyncIterator[Person]:
    """Sign in as the same person with another client."""
    async with service.anyone() as client:
        client.headers.update(headers)
        token = (await ok(sign_in(client, person.name)))["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        yield Person(client, person.id, person.name, token)


async def private_events(service: Service, user_id: int) -> list[tuple[str, str]]:
    """Return the session events that only this user may see, as pairs (operation, session id)."""
    query = f"SELECT operation, entity_id FROM events WHERE topic = 'sessions' AND audience = 'user:{user_id}'"
    return [(row[0], row[1]) for row in await sql(service, f"{query} ORDER BY seq")]


# --- signing in and out


async def test_each_sign_in_is_listed_newest_first(service: Service) -> None:
    async with service.person() as alice, again(service, alice, **{"User-Agent": "a phone " + "x" * 300}) as phone:
        newest, oldest = await listed(alice)
        assert await listed(phone) == [newest, oldest]
        assert set(newest) == SESSION
        assert newest["user_agent"] == ("a phone " + "x" * 300)[:255]
        assert oldest["user_agent"].startswith("python-httpx/")
        assert {newest["address"], oldest["address"]} == {"127.0.0.1"}
        assert {newest["user_id"], oldest["user_id"]} == {alice.id}
        assert await private_events(service, alice.id) == [("add", oldest["id"]), ("add", newest["id"])]
        page = await alice.http.get("/auth/sessions?offset=1&limit=1")
        assert page.json() == [oldest]
        assert page.headers["x-total-count"] == "2"
        assert set(page.links) == {"first", "prev", "last"}


async def test_the_event_of_a_session_holds_the_session_as_it_is_listed(service: Service) -> None:
    async with service.person() as alice:
        (session,) = await listed(alice)
        query = f"SELECT payload FROM events WHERE topic = 'sessions' AND entity_id = '{session['id']}'"
        ((payload,),) = await sql(service, query)
        assert httpx.Response(200, content=bytes(payload)).json() == session


async def test_the_oauth_token_form_starts_a_session(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client:
        token = (await client.post("/token", data={"username": alice.name, "password": PASSWORD})).json()
        assert len(await listed(alice)) == 2
        client.headers["Authorization"] = f"Bearer {token['access_token']}"
        assert (await client.post("/auth/logout")).status_code == 204
        assert len(await listed(alice)) == 1


async def test_a_failed_sign_in_starts_no_session(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client, nothing_written(service):
        assert (await sign_in(client, alice.name, "something else")).status_code == 401


async def test_logout_ends_only_this_session(service: Service) -> None:
    async with service.person() as alice, again(service, alice) as elsewhere:
        theirs, mine = await listed(alice)
        answer = await alice.http.post("/auth/logout")
        assert (answer.status_code, answer.content) == (204, b"")
        for method, path in (("GET", "/auth/me"), ("GET", "/movies"), ("POST", "/auth/logout")):
            refused = await alice.http.request(method, path)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert await listed(elsewhere) == [theirs]
        events = [("add", mine["id"]), ("add", theirs["id"]), ("delete", mine["id"])]
        assert await private_events(service, alice.id) == events


async def test_concurrent_logouts_cause_one_event(service: Service) -> None:
    async with service.person() as alice:
        answers = await asyncio.gather(*(alice.http.post("/auth/logout") for _ in range(8)))
        assert {answer.status_code for answer in answers} <= {204, 401}
        assert [operation for operation, _ in await private_events(service, alice.id)] == ["add", "delete"]


async def test_logout_takes_effect_at_once_on_every_worker(
    new_service: Callable[..., Service], new_places: Callable[[], Places]
) -> None:
    places = new_places()
    first, second = new_service(places).start(), new_service(places).start()
    for _ in range(3):
        async with first.person() as alice:
            assert await status_of(alice, second.url) == 200
            assert (await alice.http.post("/auth/logout")).status_code == 204
            assert await status_of(alice, second.url) == 401


# --- ending other sessions


async def test_a_user_ends_another_session_of_their_own(service: Service) -> None:
    async with service.person() as alice, again(service, alice) as lost_phone:
        theirs, mine = await listed(alice)
        path = f"/auth/sessions/{theirs['id']}"
        assert (await alice.http.delete(path)).status_code == 204
        assert await status_of(lost_phone) == 401
        assert await listed(alice) == [mine]
        async with nothing_written(service):
            assert (await alice.http.delete(path)).status_code == 404


async def test_sessions_of_other_users_are_not_found(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, service.admin() as admin:
        (session,) = await listed(alice)
        async with nothing_written(service):
            for other in (bob, admin):
                assert session not in await listed(other)
                assert (await other.http.delete(f"/auth/sessions/{session['id']}")).status_code == 404
            assert (await alice.http.delete(f"/auth/sessions/{uuid.uuid4()}")).status_code == 404
            for wrong in ("1", session["id"].upper(), "x" * 36):
                assert (await alice.http.delete(f"/auth/sessions/{wrong}")).status_code == 422, wrong
        assert await status_of(alice) == 200


# --- what admins do


async def test_a_new_group_takes_effect_with_the_next_request(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice, service.person() as bob:
        movie = await bob.add()
        path = f"/movies/{movie['id']}"
        assert (await alice.http.patch(path, json={"rating": 1})).status_code == 403
        changed = await change_group(admin, alice, "moderator")
        assert (changed["group"], changed["version"]) == ("moderator", 2)
        assert changed == (await alice.http.get("/auth/me")).json()
        assert (await alice.http.patch(path, json={"rating": 1})).status_code == 200
        await change_group(admin, alice, "user")
        assert (await alice.http.patch(path, json={"rating": 2})).status_code == 403


async def test_deactivation_ends_all_sessions_for_good(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice, again(service, alice) as elsewhere:
        begun = [session["id"] for session in await listed(alice)]
        user = await ok(admin.http.post(f"/admin/users/{alice.id}/deactivate"))
        assert (user["is_active"], user["version"]) == (False, 2)
        assert (await status_of(alice), await status_of(elsewhere)) == (401, 401)
        async with service.anyone() as client, nothing_written(service):
            assert (await sign_in(client, alice.name)).status_code == 403
        ended = [entity_id for operation, entity_id in await private_events(service, alice.id) if operation == "delete"]
        assert sorted(ended) == sorted(begun)
        user = await ok(admin.http.post(f"/admin/users/{alice.id}/activate"))
        assert (user["is_active"], user["version"]) == (True, 3)
        assert (await status_of(alice), await status_of(elsewhere)) == (401, 401), "an ended session stays ended"
        async with again(service, alice) as back:
            assert len(await listed(back)) == 1


async def test_admins_receive_one_event_for_each_real_change(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice:
        async with service.watch("topics=users", **signed_in(admin)) as watcher:
            for action, body, changed in (
                ("change-group", {"group": "moderator"}, ["group"]),
                ("deactivate", None, ["is_active"]),
                ("activate", None, ["is_active"]),
                ("change-group", {"group": "user"}, ["group"]),
            ):
                path = f"/admin/users/{alice.id}/{action}"
                user = (await admin.http.post(path, json=body)).json()
                event = await watcher.expect("update", "users")
                assert (event["data"], event["changed"], event["actor_id"]) == (user, changed, admin.id)
                async with nothing_written(service):
                    assert (await admin.http.post(path, json=body)).json() == user


@SQLITE_ONLY
async def test_an_unknown_group_is_rejected(service: Service) -> None:
    async with service.admin() as admin, nothing_written(service):
        bodies: list[Any] = [{}, {"group": "owner"}, {"group": None}, {"group": "user", "x": 1}, []]
        for body in bodies:
            assert (await admin.http.post(f"/admin/users/{admin.id}/change-group", json=body)).status_code == 422, body


# --- live events


async def test_users_watch_only_their_own_sessions(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        query = "topics=sessions,movies"
        async with service.watch(query, **signed_in(alice)) as watcher, service.watch(query, **signed_in(bob)) as other:
            async with again(service, alice) as elsewhere:
                begun = await watcher.expect("add", "sessions")
                assert begun["data"] == (await listed(alice))[0]
                assert (await elsewhere.http.post("/auth/logout")).status_code == 204
                ended = await watcher.expect("delete", "sessions")
                assert ended["data"] == {"id": begun["data"]["id"]}
            movie = await alice.add()
            for each in (watcher, other):
                assert (await each.expect("add", "movies"))["data"] == movie
            # A resumed stream contains no event of Alice's sessions either.
            since = f"&since={await service.position(other.welcome['data']['seq'])}"
            async with service.watch(query + since, **signed_in(bob)) as resumed:
                assert (await resumed.expect("add", "movies"))["data"] == movie
        assert (await refusal(service, f"?{query}"))[0] == 403


# --- concurrency, without a service


async def begin(database: Database, user_id: int, seconds: int = 900) -> dict[str, Any]:
    """Start a session whose refresh token expires after `seconds`, and return it."""
    renewal = Renewal(new_token_id(), seconds)
    session = await database.write(lambda tx: sessions.begin(tx, user_id, SOMEWHERE, Checked(NO_HASH), renewal))
    assert session is not None
    return session


async def going_on(database: Database, user_id: int) -> list[str]:
    found = await sessions.newest(database, user_id, offset=0, limit=1000)
    assert found.total == len(found.rows)
    return [session["id"] for session in found.rows]


async def put_out(database: Database, admin: int, user: int) -> dict[str, Any]:
    return await database.write(lambda tx: users.deactivate(tx, an_admin(admin), user))


async def test_no_session_survives_a_concurrent_deactivation(database: Database) -> None:
    chief = await account(database, "chief", Group.ADMIN)
    seen = set()
    for number in range(15):
        user = await account(database, f"user{number}")
        others = [outcome(begin(database, user)) for _ in range(4)]
        out = outcome(put_out(database, chief, user))
        outcomes = await asyncio.gather(*others[:2], out, *others[2:])
        seen |= {each if isinstance(each, type) else "in" for each in outcomes}
        assert await going_on(database, user) == []
    assert seen == {"in", Forbidden}, "both orders happened"


async def test_no_session_survives_that_was_started_with_the_old_password(database: Database) -> None:
    """If the password changes after a sign-in has checked the old one, the sign-in leaves no session."""
    seen = set()
    for number in range(15):
        user = await account(database, f"user{number}")

        async def change(user: int = user) -> str:
            async def work(tx: Transaction) -> None:
                before = await users.lock(tx, user)
                await users.change(tx, before, {"password_hash": "another hash"}, actor_id=user)
                await sessions.end_others(tx, user, None, actor_id=user)

            await database.write(work)
            return "changed"

        async def sign_in(user: int = user) -> bool:
            renewal = Renewal(new_token_id(), 900)
            begun = await database.write(lambda tx: sessions.begin(tx, user, SOMEWHERE, Checked(NO_HASH), renewal))
            return begun is not None

        outcomes = await asyncio.gather(sign_in(), sign_in(), change(), sign_in(), sign_in())
        seen |= set(outcomes)
        assert await going_on(database, user) == []
    assert seen == {"changed", True, False}, "both orders happened"


async def test_the_oldest_session_ends_at_the_limit(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS_PER_USER", 3)
    alice, bob = await account(database, "alice"), await account(database, "bob")
    theirs = await begin(database, bob)
    begun = [(await begin(database, alice))["id"] for _ in range(5)]
    assert await going_on(database, alice) == begun[:1:-1]
    assert await going_on(database, bob) == [theirs["id"]]
    await asyncio.gather(*(begin(database, alice) for _ in range(5)))
    assert len(await going_on(database, alice)) == 3


async def test_a_token_is_valid_only_for_its_own_session(database: Database) -> None:
    alice, bob = await account(database, "alice"), await account(database, "bob")
    tokens = Tokens([SECRET], "HS256", access_seconds=900, refresh_seconds=3600)
    mine, theirs = await begin(database, alice), await begin(database, bob)
    identity = await identify(database, tokens, tokens.issue(alice, mine["id"]), None)
    assert (identity.user_id, identity.session_id, identity.username) == (alice, mine["id"], "alice")
    with pytest.raises(Unauthenticated):
        await identify(database, tokens, tokens.issue(alice, theirs["id"]), None)


async def test_expired_sessions_end_with_an_event_and_are_deleted_later(database: Database) -> None:
    alice = await account(database, "alice")
    old = [(await begin(database, alice, seconds=-3600))["id"] for _ in range(3)]
    young = (await begin(database, alice))["id"]
    left = (await begin(database, alice))["id"]
    await database.write(lambda tx: sessions.leave(tx, alice, left))
    assert await going_on(database, alice) == [young, *reversed(old)], (
        "expired sessions are listed until the clean-up ends them"
    )
    events: list[Event] = []
    database.on_commit.append(events.extend)
    await Cleanup(database, "worker", Retention(hours=12, rows=1_000, bytes=10**9)).clean()
    assert await going_on(database, alice) == [young]
    found = sorted((event.topic, event.operation, event.audience, event.entity_id) for event in events)
    assert found == sorted(("sessions", "delete", f"user:{alice}", session) for session in old)
    async with database.read() as connection:
        kept = (await connection.execute(text("SELECT id FROM sessions"))).scalars().all()
    assert sorted(kept) == sorted([*old, young, left]), "the rows are kept for the addresses of recent sign-ins"
    later = datetime.now(UTC) + timedelta(days=1)
    assert await sessions.expire(database, later, max_rows=10) == 1
    assert await sessions.forget(database, later) == 0
    assert await sessions.recent_addresses(database, alice) == {SOMEWHERE.address}
    assert await sessions.forget(database, later + timedelta(days=sessions.KNOWN_ADDRESS_DAYS)) == 5
    assert await sessions.recent_addresses(database, alice) == frozenset()
