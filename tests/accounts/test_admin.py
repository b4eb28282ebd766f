"""What admins do to accounts, what is kept of it, and who is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from websockets.exceptions import InvalidStatus

from core.errors import Conflict, Forbidden, Problem
from core.identity import Group
from repository.accounts import deletion, edits, one_time_tokens, users
from repository.accounts.audit import Editor
from repository.accounts.one_time_tokens import Purpose
from repository.engine.database import Database
from tests.support.accounts import account, an_admin, delete, outcome
from tests.support.backends import SQLITE_ONLY
from tests.support.resources import head, links, locations, moderator, nothing_written, sql
from tests.support.service import PASSWORD, Person, Service

ENTRY = {"id", "actor_id", "action", "user_id", "changes", "address", "created_at"}


async def trail(admin: Person, user_id: int) -> list[tuple[str, dict[str, Any]]]:
    """What is kept of what was done to this account, oldest first."""
    answer = await admin.http.get(f"/admin/audit?user_id={user_id}&sort=id")
    assert answer.status_code == 200, answer.text
    for entry in answer.json():
        assert set(entry) == ENTRY
        assert (entry["actor_id"], entry["address"]) == (admin.id, "127.0.0.1")
    return [(entry["action"], entry["changes"]) for entry in answer.json()]


# --- adding


async def test_an_admin_adds_an_account_that_is_active_at_once(service: Service) -> None:
    async with service.admin() as admin, service.anyone() as client:
        name = f"calloway{await head(service)}"
        body = {"username": name, "name": "Major Calloway", "password": PASSWORD, "group": "moderator"}
        answer = await admin.http.post("/api/v1/admin/users", json=body)
        assert answer.status_code == 201
        user = answer.json()
        assert (user["group"], user["is_active"], user["name"]) == ("moderator", True, "Major Calloway")
        assert answer.headers["location"] == f"/api/v1/users/{user['id']}"
        assert (await admin.http.get(answer.headers["location"])).headers["etag"] == answer.headers["etag"]
        assert (await client.post("/auth/login", json={"username": name, "password": PASSWORD})).status_code == 200
        assert await trail(admin, user["id"]) == [("create", {"group": [None, "moderator"]})]
        async with nothing_written(service):
            again = await admin.http.post("/admin/users", json=body)
            assert (again.status_code, locations(again)) == (409, [["body", "username"]])


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"password": "short"}, ["password"]),
        ({"password": "password1"}, ["password"]),
        ({"password": "some.body"}, ["password"]),
        ({"username": None}, []),
        ({"group": "owner"}, ["group"]),
        ({"is_active": False}, ["is_active"]),
        ({"current_password": PASSWORD}, ["current_password"]),
    ],
    ids=repr,
)
@SQLITE_ONLY
async def test_a_wrong_account_is_refused(service: Service, change: dict[str, Any], where: list[str]) -> None:
    async with service.admin() as admin, nothing_written(service):
        answer = await admin.http.post("/admin/users", json={"username": "some.body", "password": PASSWORD} | change)
        assert (answer.status_code, locations(answer)) == (422, [["body", *where]])


@pytest.mark.parametrize("body", [[], [None], "x", 1])
@SQLITE_ONLY
async def test_what_is_no_object_is_no_account(service: Service, body: Any) -> None:
    async with service.admin() as admin:
        assert (await admin.http.post("/admin/users", json=body)).status_code == 422


# --- changing


async def test_an_admins_own_name_and_address_take_the_password(service: Service) -> None:
    async with service.admin() as chief, service.person() as alice:
        path = f"/admin/users/{alice.id}/change-group"
        assert (await chief.http.post(path, json={"group": "admin"})).status_code == 200
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
        told = {**before.json(), **fields, "phone_number": "+436641234567", "version": 2}
        assert user == {**told, "updated_at": user["updated_at"]}
        again = await admin.http.get(path, headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304
        assert (await client.post("/auth/login", json={"username": name, "password": PASSWORD})).status_code == 200
        async with nothing_written(service):
            stale = await admin.http.put(path, json=fields, headers={"If-Match": before.headers["etag"]})
            assert stale.status_code == 412
            assert (await admin.http.patch(path, json=fields)).json() == user, "what changes nothing is not kept either"
            for body in (
                {"username": None, "email": None},
                {"is_active": False},
                {"group": "admin"},
                {"current_password": PASSWORD},
            ):
                assert (await admin.http.patch(path, json=body)).status_code == 422, body
            assert (await admin.http.put(path, json={"name": "x"})).status_code == 422
            taken = await admin.http.patch(path, json={"username": admin.name})
            assert (taken.status_code, locations(taken)) == (409, [["body", "username"]])
            assert (await admin.http.patch("/users/999999999", json={"name": "x"})).status_code == 404
        answer = await admin.http.put(path, json={"username": name})
        assert (answer.json()["email"], answer.json()["phone_number"]) == (None, None)
        assert await trail(admin, alice.id) == [
            ("update", {"username": [], "email": [], "phone_number": []}),
            ("update", {"email": [], "phone_number": []}),
        ]


async def test_nobody_else_administers(service: Service) -> None:
    async with service.person() as alice, moderator(service) as mod, service.anyone() as nobody:
        async with nothing_written(service):
            for person, status in ((alice.http, 403), (mod.http, 403), (nobody, 401)):
                for user_id in (alice.id, 999_999_999):
                    path = f"/users/{user_id}"
                    assert (await person.patch(path, json={"name": "x"})).status_code == status
                    assert (await person.put(path, json={"username": "xyz"})).status_code == status
                body = {"username": "somebody", "password": PASSWORD}
                assert (await person.post("/admin/users", json=body)).status_code == status
                assert (await person.get("/admin/audit")).status_code == status


async def test_each_thing_that_is_done_is_kept_and_nothing_that_is_not(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice:
        path = f"/admin/users/{alice.id}"
        for _ in range(2):
            assert (await admin.http.post(f"{path}/change-group", json={"group": "moderator"})).is_success
        for _ in range(2):
            assert (await admin.http.post(f"{path}/deactivate")).is_success
        for _ in range(2):
            assert (await admin.http.post(f"{path}/activate")).is_success
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


async def test_what_people_do_to_their_own_accounts_is_not_kept(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice:
        assert (await alice.http.patch("/users/me", json={"name": "Alice"})).is_success
        assert (await alice.http.post("/users/me/profile", json={})).is_success
        assert (await admin.http.patch("/users/me", json={"name": "Chief"})).is_success
        assert (await alice.http.delete("/users/me")).is_success
        assert await trail(admin, alice.id) == []
        first = (await admin.http.get(f"/admin/audit?user_id={admin.id}")).json()
        assert [(entry["action"], entry["actor_id"]) for entry in first] == [("create", None)], (
            "whoever runs the service"
        )


async def test_the_trail_is_listed_newest_first_and_walked_oldest_first(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice:
        for group in ("moderator", "user", "moderator"):
            path = f"/admin/users/{alice.id}/change-group"
            assert (await admin.http.post(path, json={"group": group})).is_success
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


# --- live


async def test_the_owner_and_admins_are_told_and_nobody_else(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice, service.person() as bob:

        def of(person: Person) -> dict[str, str]:
            return {"Authorization": f"Bearer {person.token}"}

        with pytest.raises(InvalidStatus) as refused:
            async with service.watch("topics=audit", additional_headers=of(bob)):
                pass
        assert refused.value.response.status_code == 403
        async with (
            service.watch("topics=account", additional_headers=of(alice)) as hers,
            service.watch("topics=account,movies", additional_headers=of(bob)) as his,
            service.watch("topics=users,audit", additional_headers=of(admin)) as theirs,
        ):
            profile = (await alice.http.post("/users/me/profile", json={"info": "Curious."})).json()
            for watcher in (hers, theirs):
                event = await watcher.expect("update", "account" if watcher is hers else "users")
                assert set(event["changed"]) == {"info", "has_profile"}
                assert event["actor_id"] == alice.id
                assert {name: event["data"][name] for name in ("info", "version")} == {
                    name: profile[name] for name in ("info", "version")
                }
            path = f"/admin/users/{alice.id}/change-group"
            user = (await admin.http.post(path, json={"group": "moderator"})).json()
            for watcher in (hers, theirs):
                event = await watcher.expect("update", "account" if watcher is hers else "users")
                assert (event["data"], event["changed"], event["actor_id"]) == (user, ["group"], admin.id)
            event = await theirs.expect("add", "audit")
            assert event["data"] == (await admin.http.get(f"/admin/audit?user_id={alice.id}")).json()[0]
            # A change of hers by an admin, and a deletion: all of it in order, for admins.
            assert (await admin.http.patch(f"/users/{alice.id}", json={"name": "Alice"})).is_success
            assert (await hers.expect("update", "account"))["changed"] == ["name"]
            assert (await theirs.expect("update", "users"))["changed"] == ["name"]
            assert (await theirs.expect("add", "audit"))["data"]["changes"] == {"name": []}
            assert (await admin.http.delete(f"/users/{alice.id}")).is_success
            assert (await theirs.expect("delete", "users"))["data"] == {"id": alice.id}
            assert (await theirs.expect("add", "audit"))["data"]["action"] == "delete"
            movie = await bob.add()
            assert (await his.expect("add", "movies"))["data"] == movie, "nothing of hers came before"


# --- the last admin


async def test_the_last_admin_is_not_deleted(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.admin() as admin, service.person() as alice:
        async with nothing_written(service):
            for path in ("/users/me", f"/users/{admin.id}"):
                answer = await admin.http.delete(path)
                assert answer.status_code == 409
                assert "last admin" in answer.json()["detail"]
        assert (await admin.http.post(f"/admin/users/{alice.id}/change-group", json={"group": "admin"})).is_success
        assert (await admin.http.delete("/users/me")).status_code == 204
        gone = (await alice.http.get(f"/admin/audit?user_id={admin.id}&action=delete")).json()
        assert [entry["actor_id"] for entry in gone] == [admin.id], "that an admin is gone is kept, whoever did it"
        assert (await alice.http.delete("/users/me")).status_code == 409


async def step_down(database: Database, admin: int) -> dict[str, Any]:
    return await database.write(lambda tx: users.change_group(tx, an_admin(admin), admin, Group.USER))


async def test_of_two_admins_who_go_at_once_one_stays(database: Database) -> None:
    chief = await account(database, "chief", Group.ADMIN)
    for number in range(9):
        other = await account(database, f"other{number}", Group.ADMIN)
        leaving: list[Any]
        refusal: type[Problem]
        if number % 3 == 0:
            leaving, refusal = [delete(database, chief), delete(database, other)], Conflict
        elif number % 3 == 1:
            leaving, refusal = [delete(database, chief, by=other), delete(database, other, by=chief)], Forbidden
        else:
            leaving, refusal = [delete(database, chief), step_down(database, other)], Conflict
        outcomes = await asyncio.gather(*map(outcome, leaving))
        assert [each for each in outcomes if isinstance(each, type)] == [refusal], number
        left = [each for each in (chief, other) if await is_admin(database, each)]
        assert len(left) == 1
        chief = left[0]


async def is_admin(database: Database, user_id: int) -> bool:
    user = await users.find(database, user_id)
    return user is not None and user["group"] == "admin" and bool(user["is_active"])


async def test_who_was_demoted_a_moment_ago_does_nothing_more(database: Database) -> None:
    chief, alice = await account(database, "chief", Group.ADMIN), await account(database, "alice")
    editor = Editor(alice, None, is_admin=True)  # as somebody who was one when the request came
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


async def test_what_was_mailed_to_somebody_who_is_shut_out_is_good_no_more(database: Database) -> None:
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
    told: list[Any] = []
    database.on_commit.append(told.append)
    await database.write(lambda tx: users.change_group(tx, an_admin(chief, "192.0.2.1"), alice, Group.MODERATOR))
    assert len(told) == 1
    (events,) = told
    assert [(event.topic, event.operation) for event in events] == [
        ("users", "update"),
        ("account", "update"),
        ("audit", "add"),
    ]
    assert orjson.loads(events[2].payload)["address"] == "192.0.2.1"
