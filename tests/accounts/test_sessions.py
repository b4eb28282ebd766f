"""Sign-in sessions: where one is signed in, leaving, being shut out; and what admins do to accounts."""

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
from websockets.exceptions import InvalidStatus

from core.errors import Conflict, Forbidden, Problem, Unauthenticated
from core.identity import Group
from jobs.cleanup import Cleanup
from repository.accounts import sessions, users
from repository.accounts.sessions import Checked, Device, Renewal
from repository.engine.database import Database
from repository.engine.events import Event
from repository.engine.transaction import Transaction
from services.authentication import identify
from services.tokens import Tokens, new_token_id
from tests.conftest import Places
from tests.support.accounts import an_admin
from tests.support.resources import moderator, nothing_written, sql
from tests.support.service import ADMIN, PASSWORD, SECRET, Person, Service

SESSION = {"id", "user_id", "user_agent", "address", "created_at", "last_used_at"}
NO_HASH = "no hash"
SOMEWHERE = Device("a browser", "192.0.2.1")


async def status_of(person: Person, base: str = "") -> int:
    return (await person.http.get(f"{base}/auth/me")).status_code


async def listed(person: Person) -> list[dict[str, Any]]:
    answer = await person.http.get("/auth/sessions")
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()
    return found


@asynccontextmanager
async def again(service: Service, person: Person, **headers: str) -> AsyncIterator[Person]:
    """The same person, signed in somewhere else."""
    async with httpx.AsyncClient(base_url=service.url, timeout=60, headers=headers) as client:
        answer = await client.post("/auth/login", json={"username": person.name, "password": PASSWORD})
        assert answer.status_code == 200, answer.text
        token = answer.json()["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        yield Person(client, person.id, person.name, token)


async def told(service: Service, user_id: int) -> list[tuple[str, str]]:
    """The events for this user alone, as (operation, id of the session)."""
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
        assert await told(service, alice.id) == [("add", oldest["id"]), ("add", newest["id"])]
        page = await alice.http.get("/auth/sessions?offset=1&limit=1")
        assert page.json() == [oldest]
        assert page.headers["x-total-count"] == "2"
        assert set(page.links) == {"first", "prev", "last"}


async def test_a_session_is_told_as_it_is_listed(service: Service) -> None:
    async with service.person() as alice:
        (session,) = await listed(alice)
        query = f"SELECT payload FROM events WHERE topic = 'sessions' AND entity_id = '{session['id']}'"
        ((payload,),) = await sql(service, query)
        assert httpx.Response(200, content=bytes(payload)).json() == session


async def test_the_form_of_oauth_begins_a_session_too(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client:
        token = (await client.post("/token", data={"username": alice.name, "password": PASSWORD})).json()
        assert len(await listed(alice)) == 2
        client.headers["Authorization"] = f"Bearer {token['access_token']}"
        assert (await client.post("/auth/logout")).status_code == 204
        assert len(await listed(alice)) == 1


async def test_a_failed_sign_in_begins_nothing(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client, nothing_written(service):
        answer = await client.post("/auth/login", json={"username": alice.name, "password": "something else"})
        assert answer.status_code == 401


async def test_leaving_ends_this_session_and_no_other(service: Service) -> None:
    async with service.person() as alice, again(service, alice) as elsewhere:
        theirs, mine = await listed(alice)
        answer = await alice.http.post("/auth/logout")
        assert (answer.status_code, answer.content) == (204, b"")
        for method, path in (("GET", "/auth/me"), ("GET", "/movies"), ("POST", "/auth/logout")):
            refused = await alice.http.request(method, path)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert await listed(elsewhere) == [theirs]
        assert await told(service, alice.id) == [("add", mine["id"]), ("add", theirs["id"]), ("delete", mine["id"])]


async def test_leaving_twice_at_once_is_told_once(service: Service) -> None:
    async with service.person() as alice:
        answers = await asyncio.gather(*(alice.http.post("/auth/logout") for _ in range(8)))
        assert {answer.status_code for answer in answers} <= {204, 401}
        assert [operation for operation, _ in await told(service, alice.id)] == ["add", "delete"]


async def test_leaving_counts_at_once_on_every_worker(
    new_service: Callable[..., Service], new_places: Callable[[], Places]
) -> None:
    places = new_places()
    first, second = new_service(places).start(), new_service(places).start()
    for _ in range(3):
        async with first.person() as alice:
            assert await status_of(alice, second.url) == 200
            assert (await alice.http.post("/auth/logout")).status_code == 204
            assert await status_of(alice, second.url) == 401


# --- ending others


async def test_one_ends_ones_own_session_somewhere_else(service: Service) -> None:
    async with service.person() as alice, again(service, alice) as lost_phone:
        theirs, mine = await listed(alice)
        path = f"/auth/sessions/{theirs['id']}"
        assert (await alice.http.delete(path)).status_code == 204
        assert await status_of(lost_phone) == 401
        assert await listed(alice) == [mine]
        async with nothing_written(service):
            assert (await alice.http.delete(path)).status_code == 404


async def test_somebody_elses_session_is_not_there(service: Service) -> None:
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


async def test_a_changed_group_counts_from_the_next_request_on(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice, service.person() as bob:
        movie = await bob.add()
        path = f"/movies/{movie['id']}"
        assert (await alice.http.patch(path, json={"rating": 1})).status_code == 403
        answer = await admin.http.post(f"/admin/users/{alice.id}/change-group", json={"group": "moderator"})
        assert (answer.status_code, answer.json()["group"], answer.json()["version"]) == (200, "moderator", 2)
        assert answer.json() == (await alice.http.get("/auth/me")).json()
        assert (await alice.http.patch(path, json={"rating": 1})).status_code == 200
        assert (await admin.http.post(f"/admin/users/{alice.id}/change-group", json={"group": "user"})).is_success
        assert (await alice.http.patch(path, json={"rating": 2})).status_code == 403


async def test_a_deactivated_user_is_out_for_good(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice, again(service, alice) as elsewhere:
        begun = [session["id"] for session in await listed(alice)]
        answer = await admin.http.post(f"/admin/users/{alice.id}/deactivate")
        assert (answer.status_code, answer.json()["is_active"], answer.json()["version"]) == (200, False, 2)
        assert (await status_of(alice), await status_of(elsewhere)) == (401, 401)
        login = {"username": alice.name, "password": PASSWORD}
        async with service.anyone() as client, nothing_written(service):
            assert (await client.post("/auth/login", json=login)).status_code == 403
        ended = [entity_id for operation, entity_id in await told(service, alice.id) if operation == "delete"]
        assert sorted(ended) == sorted(begun)
        answer = await admin.http.post(f"/admin/users/{alice.id}/activate")
        assert (answer.status_code, answer.json()["is_active"], answer.json()["version"]) == (200, True, 3)
        assert (await status_of(alice), await status_of(elsewhere)) == (401, 401), "what ended stays ended"
        async with again(service, alice) as back:
            assert len(await listed(back)) == 1


async def test_admins_are_told_of_each_change_and_of_no_other(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice:
        mine = {"Authorization": f"Bearer {admin.token}"}
        async with service.watch("topics=users", additional_headers=mine) as watcher:
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


@pytest.mark.parametrize("action", ["change-group", "activate", "deactivate"])
async def test_only_admins_administer(service: Service, action: str) -> None:
    async with service.person() as alice, moderator(service) as mod, service.admin() as admin:
        body = {"group": "admin"} if action == "change-group" else None
        async with nothing_written(service):
            for other in (alice, mod):
                for target in (alice.id, admin.id, 10**12):
                    answer = await other.http.post(f"/admin/users/{target}/{action}", json=body)
                    assert answer.status_code == 403
            assert (await admin.http.post(f"/admin/users/{10**12}/{action}", json=body)).status_code == 404


@pytest.mark.parametrize("body", [{}, {"group": "owner"}, {"group": None}, {"group": "user", "x": 1}, []])
async def test_an_unknown_group_is_refused(service: Service, body: Any) -> None:
    async with service.admin() as admin, nothing_written(service):
        assert (await admin.http.post(f"/admin/users/{admin.id}/change-group", json=body)).status_code == 422


async def test_the_last_admin_stays(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.admin() as admin, service.person() as alice:
        demote, promote = {"group": "user"}, {"group": "admin"}
        path = f"/admin/users/{admin.id}"
        async with nothing_written(service):
            assert (await admin.http.post(f"{path}/change-group", json=demote)).status_code == 409
            assert (await admin.http.post(f"{path}/deactivate")).status_code == 409
        assert (await admin.http.post(f"/admin/users/{alice.id}/change-group", json=promote)).is_success
        assert (await admin.http.post(f"/admin/users/{alice.id}/deactivate")).is_success
        async with nothing_written(service):  # an admin who cannot sign in is none
            assert (await admin.http.post(f"{path}/deactivate")).status_code == 409
        assert (await admin.http.post(f"/admin/users/{alice.id}/activate")).is_success
        assert (await admin.http.post(f"{path}/deactivate")).is_success
        async with service.anyone() as client:
            answer = await client.post("/auth/login", json={"username": ADMIN[0], "password": ADMIN[1]})
            assert answer.status_code == 403


# --- live


async def test_everybody_watches_their_own_sessions_and_no_others(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        mine = {"Authorization": f"Bearer {alice.token}"}
        theirs = {"Authorization": f"Bearer {bob.token}"}
        query = "topics=sessions,movies"
        async with (
            service.watch(query, additional_headers=mine) as watcher,
            service.watch(query, additional_headers=theirs) as other,
        ):
            async with again(service, alice) as elsewhere:
                begun = await watcher.expect("add", "sessions")
                assert begun["data"] == (await listed(alice))[0]
                assert (await elsewhere.http.post("/auth/logout")).status_code == 204
                ended = await watcher.expect("delete", "sessions")
                assert ended["data"] == {"id": begun["data"]["id"]}
            movie = await alice.add()
            for each in (watcher, other):
                assert (await each.expect("add", "movies"))["data"] == movie
            # Resumed from before it all, the same.
            since = f"&since={other.welcome['data']['seq']}"
            async with service.watch(query + since, additional_headers=theirs) as resumed:
                assert (await resumed.expect("add", "movies"))["data"] == movie
        with pytest.raises(InvalidStatus) as refused:
            async with service.watch(query):
                pass
        assert refused.value.response.status_code == 403


# --- at once, at the database


async def person(database: Database, name: str, group: Group = Group.USER) -> int:
    async def work(tx: Transaction) -> int:
        user = await users.create(tx, {"username": name}, NO_HASH, group)
        return int(user["id"])

    return await database.write(work)


async def begin(database: Database, user_id: int, seconds: int = 900) -> dict[str, Any]:
    """A session whose refresh token is good for so long."""
    renewal = Renewal(new_token_id(), seconds)
    session = await database.write(lambda tx: sessions.begin(tx, user_id, SOMEWHERE, Checked(NO_HASH), renewal))
    assert session is not None
    return session


async def going_on(database: Database, user_id: int) -> list[str]:
    found = await sessions.newest(database, user_id, offset=0, limit=1000)
    assert found.total == len(found.rows)
    return [session["id"] for session in found.rows]


async def outcome(work: Any) -> Any:
    try:
        return await work
    except Problem as problem:
        return type(problem)


async def step_down(database: Database, admin: int) -> dict[str, Any]:
    return await database.write(lambda tx: users.change_group(tx, an_admin(admin), admin, Group.USER))


async def put_out(database: Database, admin: int, user: int) -> dict[str, Any]:
    return await database.write(lambda tx: users.deactivate(tx, an_admin(admin), user))


async def test_of_two_admins_who_leave_at_once_one_stays(database: Database) -> None:
    chief = await person(database, "chief", Group.ADMIN)
    for number in range(10):
        other = await person(database, f"other {number}", Group.ADMIN)
        if number % 2:
            leaving = [step_down(database, chief), step_down(database, other)]
            refusal: type[Problem] = Conflict
        else:
            leaving = [put_out(database, chief, other), put_out(database, other, chief)]
            refusal = Forbidden  # the slower one is no admin any more
        outcomes = await asyncio.gather(*map(outcome, leaving))
        assert [each for each in outcomes if not isinstance(each, dict)] == [refusal]
        left = [user for user in (chief, other) if await is_admin(database, user)]
        assert len(left) == 1
        chief = left[0]


async def is_admin(database: Database, user_id: int) -> bool:
    user = await users.find(database, user_id)
    return user is not None and user["group"] == "admin" and bool(user["is_active"])


async def test_nobody_slips_in_while_being_shut_out(database: Database) -> None:
    chief = await person(database, "chief", Group.ADMIN)
    seen = set()
    for number in range(15):
        user = await person(database, f"user {number}")
        others = [outcome(begin(database, user)) for _ in range(4)]
        out = outcome(put_out(database, chief, user))
        outcomes = await asyncio.gather(*others[:2], out, *others[2:])
        seen |= {each if isinstance(each, type) else "in" for each in outcomes}
        assert await going_on(database, user) == []
    assert seen == {"in", Forbidden}, "both orders happened"


async def test_nobody_slips_in_with_the_password_of_before(database: Database) -> None:
    """A sign-in that has checked the old password while another one was stored begins no session that stays."""
    seen = set()
    for number in range(15):
        user = await person(database, f"user {number}")

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


async def test_one_session_too_many_ends_the_oldest(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS_PER_USER", 3)
    alice, bob = await person(database, "alice"), await person(database, "bob")
    theirs = await begin(database, bob)
    begun = [(await begin(database, alice))["id"] for _ in range(5)]
    assert await going_on(database, alice) == begun[:1:-1]
    assert await going_on(database, bob) == [theirs["id"]]
    await asyncio.gather(*(begin(database, alice) for _ in range(5)))
    assert len(await going_on(database, alice)) == 3


async def test_a_token_is_good_for_its_own_session_only(database: Database) -> None:
    alice, bob = await person(database, "alice"), await person(database, "bob")
    tokens = Tokens([SECRET], "HS256", access_seconds=900, refresh_seconds=3600)
    mine, theirs = await begin(database, alice), await begin(database, bob)
    identity = await identify(database, tokens, tokens.issue(alice, mine["id"]))
    assert (identity.user_id, identity.session_id, identity.username) == (alice, mine["id"], "alice")
    with pytest.raises(Unauthenticated):
        await identify(database, tokens, tokens.issue(alice, theirs["id"]))


async def test_what_ran_out_is_ended_with_an_event_and_forgotten_after_it(database: Database) -> None:
    alice = await person(database, "alice")
    old = [(await begin(database, alice, seconds=-3600))["id"] for _ in range(3)]
    young = (await begin(database, alice))["id"]
    left = (await begin(database, alice))["id"]
    await database.write(lambda tx: sessions.leave(tx, alice, left))
    assert await going_on(database, alice) == [young, *reversed(old)], "a clock sends no events, so they are listed"
    told: list[Event] = []
    database.on_commit.append(told.extend)
    await Cleanup(database, "worker", retention_hours=12, retention_rows=1_000).clean()
    assert await going_on(database, alice) == [young]
    assert sorted((event.topic, event.operation, event.audience, event.entity_id) for event in told) == sorted(
        ("sessions", "delete", f"user:{alice}", session) for session in old
    )
    async with database.read() as connection:
        kept = (await connection.execute(text("SELECT id FROM sessions"))).scalars().all()
    assert sorted(kept) == sorted([*old, young, left]), "from where one signed in of late is known"
    later = datetime.now(UTC) + timedelta(days=1)
    assert await sessions.expire(database, later, max_rows=10) == 1
    assert await sessions.forget(database, later) == 0
    assert await sessions.recent_addresses(database, alice) == {SOMEWHERE.address}
    assert await sessions.forget(database, later + timedelta(days=sessions.KNOWN_ADDRESS_DAYS)) == 5
    assert await sessions.recent_addresses(database, alice) == frozenset()
