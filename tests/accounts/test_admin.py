"""What admins do to accounts, the audit trail of these actions, and the events that they cause."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from core.errors import Conflict, Forbidden, Problem
from core.identity import Group
from repository.accounts import deletion, edits, one_time_tokens, users
from repository.accounts.audit import Editor
from repository.accounts.one_time_tokens import Purpose
from repository.engine.database import Database
from tests.support.accounts import account, an_admin, delete, outcome
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, change_group, ok, sign_in, values_by_field
from tests.support.resources import head, links, moderator, nothing_written, sql
from tests.support.service import ADMIN, PASSWORD, Person, Service
from tests.support.sockets import refusal, signed_in

ENTRY = {
    *("id", "actor_id", "action", "user_id", "changes", "address", "created_at"),
    *("resource", "entity_ids", "count"),
}


async def trail(admin: Person, user_id: int) -> list[tuple[str, dict[str, Any]]]:
    """Return the audit trail of an account as pairs (action, changes), oldest first."""
    entries = await ok(admin.http.get(f"/admin/audit?user_id={user_id}&sort=id"))
    for entry in entries:
        assert set(entry) == ENTRY
        assert (entry["actor_id"], entry["address"]) == (admin.id, "127.0.0.1")
        assert (entry["resource"], entry["entity_ids"], entry["count"]) == ("users", [user_id], 1)
    return [(entry["action"], entry["changes"]) for entry in entries]


# --- adding


async def test_an_account_added_by_an_admin_is_active_immediately(service: Service) -> None:
    async with service.admin() as admin, service.anyone() as client:
        name = f"calloway{await head(service)}"
        body = {"username": name, "name": "Major Calloway", "password": PASSWORD, "group": "moderator"}
        answer = await admin.http.post("/api/v1/admin/users", json=body)
        assert answer.status_code == 201
        user = answer.json()
        assert (user["group"], user["is_active"], user["name"]) == ("moderator", True, "Major Calloway")
        assert answer.headers["location"] == f"/api/v1/users/{user['id']}"
        assert (await admin.http.get(answer.headers["location"])).headers["etag"] == answer.headers["etag"]
        assert (await sign_in(client, name)).status_code == 200
        assert await trail(admin, user["id"]) == [("create", {"group": [None, "moderator"]})]
        async with nothing_written(service):
            assert_problem(await admin.http.post("/admin/users", json=body), 409, ["body", "username"])


INVALID: dict[str, list[Any]] = {
    "password": ["short", "password1", "some.body"],
    "group": ["owner"],
    "is_active": [False],
    "current_password": [PASSWORD],
}


@SQLITE_ONLY
async def test_an_invalid_account_is_rejected(service: Service) -> None:
    async with service.admin() as admin, nothing_written(service):
        for field, value in [("username", None), *values_by_field(INVALID)]:
            body = {"username": "some.body", "password": PASSWORD, field: value}
            where = [] if field == "username" else [field]
            assert_problem(await admin.http.post("/admin/users", json=body), 422, ["body", *where])
        for other in ([], [None], "x", 1):
            assert (await admin.http.post("/admin/users", json=other)).status_code == 422


# --- changing


async def test_admins_prove_their_password_to_change_their_own_name_and_address(service: Service) -> None:
    async with service.admin() as chief, service.person() as alice:
        await change_group(chief, alice, "admin")
        for fields in ({"email": "elsewhere@example.org"}, {"username": "another"}):
            assert (await alice.http.patch(f"/users/{alice.id}", json=fields)).status_code == 403
        assert (await alice.http.patch(f"/users/{alice.id}", json={"name": "The Chief"})).status_code == 200


async def test_an_admin_changes_any_account_without_its_password(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice, service.anyone() as client:
        path, name = f"/users/{alice.id}", f"{alice.name}.renamed"
        before = await admin.http.get(path)
        fields = {"username": name, "email": f"{name}@example.org", "phone_number": "436641234567"}
        answer = await admin.http.patch(path, json=fields, headers={"If-Match": before.headers["etag"]})
        assert answer.status_code == 200
        user = answer.json()
        wanted = {**before.json(), **fields, "phone_number": "+436641234567", "version": 2}
        assert user == {**wanted, "updated_at": user["updated_at"]}
        assert (await admin.http.get(path, headers={"If-None-Match": answer.headers["etag"]})).status_code == 304
        assert (await sign_in(client, name)).status_code == 200
        async with nothing_written(service):
            stale = await admin.http.put(path, json=fields, headers={"If-Match": before.headers["etag"]})
            assert stale.status_code == 412
            assert (await admin.http.patch(path, json=fields)).json() == user, "an edit without a change is not audited"
            protected: dict[str, Any] = {"is_active": False, "group": "admin", "current_password": PASSWORD}
            for body in ({"username": None, "email": None}, *({name: protected[name]} for name in protected)):
                assert (await admin.http.patch(path, json=body)).status_code == 422, body
            assert (await admin.http.put(path, json={"name": "x"})).status_code == 422
            assert_problem(await admin.http.patch(path, json={"username": admin.name}), 409, ["body", "username"])
            assert (await admin.http.patch("/users/999999999", json={"name": "x"})).status_code == 404
        answer = await admin.http.put(path, json={"username": name})
        assert (answer.json()["email"], answer.json()["phone_number"]) == (None, None)
        assert await trail(admin, alice.id) == [
            ("update", {"username": [], "email": [], "phone_number": []}),
            ("update", {"email": [], "phone_number": []}),
        ]


async def test_only_admins_administer(service: Service) -> None:
    async with service.person() as alice, moderator(service) as mod, service.anyone() as anonymous:
        async with service.admin() as admin, nothing_written(service):
            requests: list[tuple[str, str, Any]] = [
                ("POST", "/admin/users", {"username": "another", "password": PASSWORD}),
                ("GET", "/admin/audit", None),
            ]
            for user_id in (alice.id, admin.id, 10**12):
                requests += [
                    ("PATCH", f"/users/{user_id}", {"name": "x"}),
                    ("PUT", f"/users/{user_id}", {"username": "xyz"}),
                    ("POST", f"/admin/users/{user_id}/change-group", {"group": "admin"}),
                    ("POST", f"/admin/users/{user_id}/activate", None),
                    ("POST", f"/admin/users/{user_id}/deactivate", None),
                ]
            for client, status in ((alice.http, 403), (mod.http, 403), (anonymous, 401)):
                for method, path, body in requests:
                    if client is alice.http and path == f"/users/{alice.id}":
                        continue  # a user may edit their own account
                    assert (await client.request(method, path, json=body)).status_code == status, (method, path)
            for method, path, body in requests[-5:]:
                assert (await admin.http.request(method, path, json=body)).status_code == 404, (method, path)


async def test_the_audit_trail_holds_each_change_once_and_no_personal_data(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice:
        for _ in range(2):
            await change_group(admin, alice, "moderator")
        for action in ("deactivate", "deactivate", "activate", "activate"):
            await ok(admin.http.post(f"/admin/users/{alice.id}/{action}"))
        assert (await admin.http.post(f"/users/{alice.id}/profile", json={"info": "Known to us."})).is_success
        assert (await admin.http.patch(f"/users/{alice.id}/profile", json={"gender": "female"})).is_success
        assert (await admin.http.delete(f"/users/{alice.id}")).status_code == 204
        assert (await admin.http.delete(f"/users/{alice.id}")).status_code == 404
        assert await trail(admin, alice.id) == [
            ("change_group", {"group": ["user", "moderator"]}),
            ("deactivate", {"is_active": [True, False]}),
            ("activate", {"is_active": [False, True]}),
            ("create_profile", {"info": [], "has_profile": [False, True]}),
            ("update_profile", {"gender": []}),
            ("delete", {}),
        ]
    kept = await sql(service, f"SELECT changes FROM audit WHERE user_id = {alice.id}")
    assert "Known" not in str(kept)


async def test_changes_of_ones_own_account_are_not_audited(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice:
        before = await ok(admin.http.get(f"/admin/audit?user_id={admin.id}"))
        assert (await alice.http.patch("/users/me", json={"name": "Alice"})).is_success
        assert (await alice.http.post("/users/me/profile", json={})).is_success
        assert (await admin.http.patch("/users/me", json={"name": "Chief"})).is_success
        assert (await admin.http.patch(f"/users/{admin.id}", json={"name": "The chief"})).is_success
        assert (await alice.http.delete("/users/me")).is_success
        assert await trail(admin, alice.id) == []
        assert await ok(admin.http.get(f"/admin/audit?user_id={admin.id}")) == before
        first = (await admin.http.get(f"/admin/audit?user_id={admin.id}&after=0&limit=1")).json()
        assert [(entry["action"], entry["actor_id"]) for entry in first] == [("create", None)], (
            "the first admin is created at startup, without an actor"
        )


async def test_the_audit_trail_is_listed_newest_first_and_walked_oldest_first(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice:
        for group in ("moderator", "user", "moderator"):
            await change_group(admin, alice, group)
        of_alice = f"/admin/audit?user_id={alice.id}&action=change_group"
        listed = await admin.http.get(f"{of_alice}&limit=2")
        ids = [entry["id"] for entry in listed.json()]
        assert ids == sorted(ids, reverse=True)
        assert (listed.headers["x-total-count"], len(ids)) == ("3", 2)
        rest = await admin.http.get(links(listed)["next"])
        ids += [entry["id"] for entry in rest.json()]
        page = await admin.http.get(f"{of_alice}&after=0&limit=2")
        walked = [entry["id"] for entry in page.json()]
        walked += [entry["id"] for entry in (await admin.http.get(links(page)["next"])).json()]
        assert walked == sorted(ids)
        assert len(set(walked)) == 3
        for wrong in ("q=x", "sort=changes", "address=x", "actor_id=x"):
            assert (await admin.http.get(f"/admin/audit?{wrong}")).status_code == 422, wrong
        assert (await admin.http.get(f"/admin/audit?actor_id={alice.id}")).json() == []


# --- live events


async def test_changes_of_an_account_reach_only_its_owner_and_admins(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice, service.person() as bob:
        assert (await refusal(service, "?topics=audit", **signed_in(bob)))[0] == 403
        async with (
            service.watch("topics=account", **signed_in(alice)) as hers,
            service.watch("topics=account,movies", **signed_in(bob)) as his,
            service.watch("topics=users,audit", **signed_in(admin)) as theirs,
        ):
            profile = (await alice.http.post("/users/me/profile", json={"info": "Curious."})).json()
            for watcher in (hers, theirs):
                event = await watcher.expect("update", "account" if watcher is hers else "users")
                assert set(event["changed"]) == {"info", "has_profile"}
                assert event["actor_id"] == alice.id
                assert [event["data"][name] == profile[name] for name in ("info", "version")] == [True, True]
            user = await change_group(admin, alice, "moderator")
            for watcher in (hers, theirs):
                event = await watcher.expect("update", "account" if watcher is hers else "users")
                assert (event["data"], event["changed"], event["actor_id"]) == (user, ["group"], admin.id)
            event = await theirs.expect("add", "audit")
            assert event["data"] == (await admin.http.get(f"/admin/audit?user_id={alice.id}")).json()[0]
            # An admin changes and then deletes Alice's account. Other admins receive the events in this order.
            assert (await admin.http.patch(f"/users/{alice.id}", json={"name": "Alice"})).is_success
            assert (await hers.expect("update", "account"))["changed"] == ["name"]
            assert (await theirs.expect("update", "users"))["changed"] == ["name"]
            assert (await theirs.expect("add", "audit"))["data"]["changes"] == {"name": []}
            assert (await admin.http.delete(f"/users/{alice.id}")).is_success
            assert (await theirs.expect("delete", "users"))["data"] == {"id": alice.id}
            assert (await theirs.expect("add", "audit"))["data"]["action"] == "delete"
            movie = await bob.add()
            assert (await his.expect("add", "movies"))["data"] == movie, "Bob receives no event about Alice"


# --- the last admin


@SQLITE_ONLY  # the tests of concurrent transactions, below, run on both databases
async def test_the_last_admin_stays(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.admin() as chief, service.person() as alice, service.person() as bob:
        path = f"/admin/users/{chief.id}"
        async with nothing_written(service):
            assert (await chief.http.post(f"{path}/change-group", json={"group": "user"})).status_code == 409
            assert (await chief.http.post(f"{path}/deactivate")).status_code == 409
            for own in ("/users/me", f"/users/{chief.id}"):
                answer = await chief.http.delete(own)
                assert answer.status_code == 409
                assert "last admin" in answer.json()["detail"]
        await change_group(chief, alice, "admin")
        await ok(chief.http.post(f"/admin/users/{alice.id}/deactivate"))
        async with nothing_written(service):  # an admin who cannot sign in does not count
            assert (await chief.http.post(f"{path}/deactivate")).status_code == 409
        await change_group(chief, bob, "admin")
        await ok(chief.http.post(f"{path}/deactivate"))
        async with service.anyone() as client:
            assert (await sign_in(client, *ADMIN)).status_code == 403
        await ok(bob.http.post(f"{path}/activate"))
        async with service.admin() as back:
            assert (await back.http.delete("/users/me")).status_code == 204
        gone = await ok(bob.http.get(f"/admin/audit?user_id={chief.id}&action=delete"))
        assert [entry["actor_id"] for entry in gone] == [chief.id], "the deletion of an admin is always audited"
        assert (await bob.http.delete("/users/me")).status_code == 409


async def step_down(database: Database, admin: int) -> dict[str, Any]:
    return await database.write(lambda tx: users.change_group(tx, an_admin(admin), admin, Group.USER))


async def put_out(database: Database, admin: int, user: int) -> dict[str, Any]:
    return await database.write(lambda tx: users.deactivate(tx, an_admin(admin), user))


async def test_one_of_two_concurrently_leaving_admins_stays(database: Database) -> None:
    """Try all ways in which two admins may lose their rights. If they remove each other, the slower gets Forbidden."""
    chief = await account(database, "chief", Group.ADMIN)
    ways: list[tuple[Callable[[int, int], list[Any]], type[Problem]]] = [
        (lambda one, two: [delete(database, one), delete(database, two)], Conflict),
        (lambda one, two: [delete(database, one, by=two), delete(database, two, by=one)], Forbidden),
        (lambda one, two: [delete(database, one), step_down(database, two)], Conflict),
        (lambda one, two: [step_down(database, one), step_down(database, two)], Conflict),
        (lambda one, two: [put_out(database, one, two), put_out(database, two, one)], Forbidden),
    ]
    for number in range(20):
        leave, refusal = ways[number % len(ways)]
        other = await account(database, f"other{number}", Group.ADMIN)
        outcomes = await asyncio.gather(*map(outcome, leave(chief, other)))
        assert [each for each in outcomes if isinstance(each, type)] == [refusal], number
        [chief] = [each for each in (chief, other) if await is_admin(database, each)]


async def is_admin(database: Database, user_id: int) -> bool:
    user = await users.find(database, user_id)
    return user is not None and user["group"] == "admin" and bool(user["is_active"])


async def test_a_write_that_began_before_the_demotion_is_rejected(database: Database) -> None:
    chief, alice = await account(database, "chief", Group.ADMIN), await account(database, "alice")
    editor = Editor(alice, None, is_admin=True)  # Alice was an admin when the request arrived
    for work in (
        lambda tx: edits.edit_by_admin(tx, editor, chief, {"name": "x"}, None),
        lambda tx: edits.create_by_admin(tx, editor, {"username": "spare"}, "no hash", Group.ADMIN),
        lambda tx: edits.create_profile(tx, editor, chief, {}),
        lambda tx: edits.edit_profile(tx, editor, chief, {}, None),
        lambda tx: deletion.remove(tx, editor, chief, None),
    ):
        with pytest.raises(Problem) as refused:
            await database.write(work)
        assert refused.value.status == 403


async def test_deactivation_and_a_new_address_revoke_mailed_tokens(database: Database) -> None:
    chief, alice = await account(database, "chief", Group.ADMIN), await account(database, "alice")
    for work in (
        lambda tx: users.deactivate(tx, an_admin(chief), alice),
        lambda tx: edits.edit_by_admin(
            tx, Editor(chief, None, is_admin=True), alice, {"email": "new@example.org"}, None
        ),
    ):
        token = await database.write(lambda tx: one_time_tokens.mint(tx, Purpose.RESET, alice, "alice@example.org"))
        await database.write(work)
        assert await one_time_tokens.find(database, token, Purpose.RESET) is None


async def test_an_admins_change_is_one_transaction(database: Database) -> None:
    chief, alice = await account(database, "chief", Group.ADMIN), await account(database, "alice")
    committed: list[Any] = []
    database.on_commit.append(committed.append)
    await database.write(lambda tx: users.change_group(tx, an_admin(chief, "192.0.2.1"), alice, Group.MODERATOR))
    [events] = committed
    changes = [("users", "update"), ("account", "update"), ("audit", "add")]
    assert [(event.topic, event.operation) for event in events] == changes
    assert orjson.loads(events[2].payload)["address"] == "192.0.2.1"
