"""Accounts as their owners and other users see, change and delete them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from core.errors import NotFound, Problem, Unauthenticated
from repository.accounts import edits, one_time_tokens, outbox, sessions, users
from repository.accounts.one_time_tokens import Purpose
from repository.accounts.outbox import MailType
from repository.accounts.sessions import Checked, Device, Renewal
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from tests.support.accounts import account, delete, outcome
from tests.support.backends import SQLITE_ONLY
from tests.support.resources import links, locations, moderator, nothing_written, sql
from tests.support.service import PASSWORD, Person, Service

BRIEF = {"id", "username", "name"}


def address_of(person: Person) -> str:
    return f"{person.name}@example.org"


async def whole(person: Person) -> dict[str, Any]:
    answer = await person.http.get("/users/me")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


# --- one's own account


async def test_my_account_has_a_tag_by_which_it_is_known(service: Service) -> None:
    async with service.person() as alice:
        mine = await alice.http.get("/users/me")
        assert mine.json() == (await alice.http.get("/auth/me")).json()
        tag = mine.headers["etag"]
        for path in ("/users/me", "/auth/me"):
            again = await alice.http.get(path, headers={"If-None-Match": tag})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        changed = await alice.http.patch("/users/me", json={"name": "Alice"})
        assert changed.headers["etag"] != tag
        again = await alice.http.get("/users/me", headers={"If-None-Match": tag})
        assert (again.status_code, again.headers["etag"]) == (200, changed.headers["etag"])


async def test_a_change_names_what_changes_and_a_replacement_all_of_it(service: Service) -> None:
    async with service.person() as alice:
        before = await whole(alice)
        fields = {"name": "Alice", "first_name": "Alice", "last_name": "Kingsleigh", "phone_number": "436641234567"}
        answer = await alice.http.patch("/users/me", json=fields)
        assert answer.status_code == 200
        account = answer.json()
        told = {**before, **fields, "phone_number": "+436641234567", "version": 2, "updated_at": account["updated_at"]}
        assert account == told
        assert account["updated_at"] > before["updated_at"]
        assert await whole(alice) == account
        answer = await alice.http.put("/users/me", json={"username": alice.name, "name": "Al"})
        assert answer.status_code == 200
        assert answer.json() == {**before, "name": "Al", "version": 3, "updated_at": answer.json()["updated_at"]}


async def test_a_change_that_changes_nothing_is_none(service: Service) -> None:
    async with service.person() as alice:
        account = (await alice.http.patch("/users/me", json={"name": "Alice"})).json()
        async with nothing_written(service):
            for body in ({}, {"name": "Alice"}, {"username": alice.name}, {"phone_number": None, "email": None}):
                answer = await alice.http.patch("/users/me", json=body)
                assert (answer.status_code, answer.json()) == (200, account), body


async def test_a_change_is_of_the_version_that_was_seen(service: Service) -> None:
    async with service.person() as alice:
        seen = (await alice.http.get("/users/me")).headers["etag"]
        assert (await alice.http.patch("/users/me", json={"name": "A"}, headers={"If-Match": seen})).status_code == 200
        async with nothing_written(service):
            for method, body in (("PATCH", {"name": "B"}), ("PUT", {"username": alice.name}), ("DELETE", None)):
                answer = await alice.http.request(method, "/users/me", json=body, headers={"If-Match": seen})
                assert answer.status_code == 412, method
        assert (await alice.http.patch("/users/me", json={"name": "C"}, headers={"If-Match": "*"})).status_code == 200


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"username": "ab"}, ["username"]),
        ({"email": "nobody"}, ["email"]),
        ({"name": ""}, ["name"]),
        ({"first_name": "x" * 101}, ["first_name"]),
        ({"last_name": "\0"}, ["last_name"]),
        ({"phone_number": "0664"}, ["phone_number"]),
        ({"group": "admin"}, ["group"]),
        ({"is_active": False}, ["is_active"]),
        ({"id": 1}, ["id"]),
        ({"gender": "other"}, ["gender"]),
        ({"password": PASSWORD}, ["password"]),
        ({"username": None, "email": None}, []),
        ({"current_password": 1}, ["current_password"]),
        ({"current_password": ""}, ["current_password"]),
    ],
    ids=repr,
)
@SQLITE_ONLY
async def test_a_wrong_change_is_refused(service: Service, change: dict[str, Any], where: list[str]) -> None:
    async with service.person() as alice, nothing_written(service):
        answer = await alice.http.patch("/users/me", json=change)
        assert answer.status_code == 422
        assert locations(answer) == [["body", *where]]
        answer = await alice.http.put("/users/me", json={"username": alice.name, **change})
        assert answer.status_code == 422
        assert locations(answer) == [["body", *where]]


async def test_all_that_is_wrong_is_said_at_once(service: Service) -> None:
    async with service.person() as alice, nothing_written(service):
        answer = await alice.http.patch("/users/me", json={"username": "a", "email": "b", "name": "", "phone": "c"})
        assert locations(answer) == [["body", "username"], ["body", "email"], ["body", "name"], ["body", "phone"]]


async def test_what_one_signs_in_with_changes_with_the_password_only(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client:
        name, address = f"{alice.name}.new", address_of(alice)
        proof = {"current_password": PASSWORD}
        async with nothing_written(service):
            for body in ({"username": name}, {"email": address}, {"username": name, "email": address}):
                answer = await alice.http.patch("/users/me", json=body)
                assert (answer.status_code, locations(answer)) == (403, [["body", "current_password"]])
            for body in (
                {"username": name, "current_password": PASSWORD + "x"},
                {"current_password": "not needed, wrong"},
            ):
                answer = await alice.http.patch("/users/me", json=body)
                assert (answer.status_code, locations(answer)) == (403, [["body", "current_password"]])
        answer = await alice.http.patch("/users/me", json={"username": name, "email": address, **proof})
        assert (answer.status_code, answer.json()["username"], answer.json()["email"]) == (200, name, address)
        for login, status in ((alice.name, 401), (name, 200), (address.upper(), 200)):
            answer = await client.post("/auth/login", json={"username": login, "password": PASSWORD})
            assert answer.status_code == status, login
        answer = await alice.http.put("/users/me", json={"email": address, **proof})
        assert (answer.status_code, answer.json()["username"]) == (200, None)
        async with nothing_written(service):
            answer = await alice.http.patch("/users/me", json={"email": None, **proof})
            assert (answer.status_code, locations(answer)) == (409, [["body", "email"]])
            answer = await alice.http.put("/users/me", json={"name": "Alice", **proof})
            assert (answer.status_code, locations(answer)) == (422, [["body"]])


async def test_a_name_of_somebody_else_is_taken(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        proof = {"current_password": PASSWORD}
        assert (await bob.http.patch("/users/me", json={"email": address_of(bob), **proof})).status_code == 200
        async with nothing_written(service):
            body = {"username": bob.name.upper(), "email": address_of(bob).upper(), **proof}
            for method in ("PATCH", "PUT"):
                answer = await alice.http.request(method, "/users/me", json=body)
                assert (answer.status_code, locations(answer)) == (409, [["body", "username"], ["body", "email"]])
        # One's own name in another spelling is one's own.
        answer = await alice.http.patch("/users/me", json={"username": alice.name.upper(), **proof})
        assert (answer.status_code, answer.json()["username"]) == (200, alice.name.upper())


async def test_of_two_who_take_a_name_at_once_one_gets_it(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        body = {"username": f"{alice.name}.both", "current_password": PASSWORD}
        answers = await asyncio.gather(*(each.http.patch("/users/me", json=body) for each in (alice, bob)))
        assert sorted(answer.status_code for answer in answers) == [200, 409]
        for answer in answers:
            if answer.status_code == 409:
                assert locations(answer) == [["body", "username"]]


async def test_my_account_over_a_socket(service: Service) -> None:
    async with service.person() as alice:
        mine = {"Authorization": f"Bearer {alice.token}"}
        async with service.watch("topics=account", additional_headers=mine) as watcher:

            async def ask(number: int, method: str, path: str, body: Any = None) -> tuple[int, Any]:
                message = {"id": number, "action": "request", "method": method, "path": path}
                await watcher.send(message | ({"body": body} if body is not None else {}))
                frame = await watcher.until(lambda frame: frame.get("reply_to") == number)
                return frame["status"], frame.get("body")

            assert (await ask(1, "PATCH", "/users/me", {"name": "Alice"}))[0] == 200
            assert (await ask(2, "GET", "/users/me"))[1]["name"] == "Alice"
            assert (await ask(3, "POST", "/users/me/profile", {"info": "Curious."}))[0] == 201
            assert (await ask(4, "GET", f"/users/{alice.id}/profile"))[1]["info"] == "Curious."
            assert (await ask(5, "GET", f"/users?id={alice.id}"))[1] == [
                {"id": alice.id, "username": alice.name, "name": "Alice"}
            ]
            assert (await ask(6, "GET", "/admin/audit"))[0] == 403


async def test_guesses_and_new_addresses_are_counted(new_service: Callable[..., Service]) -> None:
    service = new_service(RATE_LIMITS="on").start()
    async with service.person() as alice, service.person() as bob:
        for number in range(6):
            body = {"email": f"{alice.name}.{number}@example.org", "current_password": PASSWORD}
            answer = await alice.http.patch("/users/me", json=body)
            assert answer.status_code == (200 if number < 5 else 429), number
        assert int(answer.headers["retry-after"]) > 60
        assert (await whole(alice))["email"] == f"{alice.name}.4@example.org"
        again = {"name": "Alice", "current_password": PASSWORD}
        assert (await alice.http.patch("/users/me", json=again)).status_code == 200, "other changes are not counted"
        for number in range(11):
            body = {"username": "spare", "current_password": f"guess {number}"}
            answer = await bob.http.patch("/users/me", json=body)
            assert answer.status_code == (403 if number < 10 else 429), number
        right = {"username": "spare", "current_password": PASSWORD}
        assert (await bob.http.patch("/users/me", json=right)).status_code == 429


# --- other users


async def test_others_are_seen_in_brief_and_by_admins_in_full(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, service.admin() as admin, moderator(service) as mod:
        account = (await bob.http.patch("/users/me", json={"name": "Bob", "phone_number": "+436641234567"})).json()
        brief = {"id": bob.id, "username": bob.name, "name": "Bob"}
        for person in (alice, bob, mod):
            one = await person.http.get(f"/users/{bob.id}")
            assert (one.status_code, one.json()) == (200, brief)
            listed = await person.http.get("/users?limit=1000")
            assert brief in listed.json()
            assert all(set(user) == BRIEF for user in listed.json())
            assert int(listed.headers["x-total-count"]) >= 4
        one = await admin.http.get(f"/users/{bob.id}")
        assert one.json() == account
        assert (await admin.http.get(f"/users?id={bob.id}")).json() == [account]
        async with service.anyone() as nobody:
            assert (await nobody.get("/users")).status_code == 401
            assert (await nobody.get(f"/users/{bob.id}")).status_code == 401


async def test_the_tag_of_somebody_else_changes_with_what_is_seen_of_them(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        tag = (await alice.http.get(f"/users/{bob.id}")).headers["etag"]
        assert (await bob.http.patch("/users/me", json={"phone_number": "+436641234567"})).status_code == 200
        again = await alice.http.get(f"/users/{bob.id}", headers={"If-None-Match": tag})
        assert again.status_code == 304
        assert (await bob.http.patch("/users/me", json={"name": "Robert"})).status_code == 200
        again = await alice.http.get(f"/users/{bob.id}", headers={"If-None-Match": tag})
        assert (again.status_code, again.json()["name"]) == (200, "Robert")


async def test_who_cannot_sign_in_is_there_for_admins_only(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, service.admin() as admin:
        assert (await admin.http.post(f"/admin/users/{bob.id}/deactivate")).status_code == 200
        assert (await alice.http.get(f"/users/{bob.id}")).status_code == 404
        assert (await alice.http.get(f"/users?username={bob.name}")).json() == []
        assert (await alice.http.get(f"/users?q={bob.name}")).json() == []
        assert (await admin.http.get(f"/users/{bob.id}")).json()["is_active"] is False
        listed = (await admin.http.get(f"/users?is_active=false&username={bob.name}")).json()
        assert [user["id"] for user in listed] == [bob.id]
        assert (await admin.http.get(f"/users?is_active[ne]=false&username={bob.name}")).json() == []
        assert (await alice.http.get("/users/999999999")).status_code == 404


async def test_people_are_found_by_what_is_seen_of_them(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        secret = f"zither{bob.id}"
        fields = {"name": f"Robert {bob.id} Popescu", "first_name": secret, "last_name": secret}
        assert (await bob.http.patch("/users/me", json=fields)).status_code == 200
        proof = {"current_password": PASSWORD}
        assert (await bob.http.patch("/users/me", json={"email": f"{secret}@example.org", **proof})).status_code == 200
        for query in (f"q=popescu {bob.id}", f"q={bob.name}", f"name[prefix]=robert {bob.id}", f"username={bob.name}"):
            assert [user["id"] for user in (await alice.http.get(f"/users?{query}")).json()] == [bob.id], query
        assert (await alice.http.get(f"/users?q={secret}")).json() == [], "it would tell what is not seen"
        async with service.admin() as admin:
            for query in (
                f"q={secret}",
                f"email[contains]={secret}",
                f"first_name={secret}",
                f"or[0][last_name]={secret}",
            ):
                assert [user["id"] for user in (await admin.http.get(f"/users?{query}")).json()] == [bob.id], query


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("email[prefix]=a", "email"),
        ("phone_number=1", "phone_number"),
        ("group=admin", "group"),
        ("is_active=true", "is_active"),
        ("or[0][id]=1&or[1][first_name]=x", "first_name"),
        ("sort=-email", "email"),
        ("sort=id,created_at&last_name=x", "created_at, last_name"),
    ],
)
async def test_nobody_asks_for_what_they_may_not_see(service: Service, query: str, field: str) -> None:
    async with service.person() as alice, moderator(service) as mod, service.admin() as admin:
        for person in (alice, mod):
            answer = await person.http.get(f"/users?{query}")
            assert (answer.status_code, answer.json()["detail"]) == (403, f"Only admins can filter and sort by {field}")
        assert (await admin.http.get(f"/users?{query}")).status_code == 200


@pytest.mark.parametrize(
    ("query", "where"),
    [
        ("is_active=yes", "is_active"),
        ("is_active[gt]=true", "is_active[gt]"),
        ("password_hash=x", "password_hash"),
        ("sort=password_hash", "sort"),
        ("limit=1001", "limit"),
        ("after=-1", "after"),
    ],
)
@SQLITE_ONLY
async def test_a_wrong_question_is_refused(service: Service, query: str, where: str) -> None:
    async with service.admin() as admin:
        answer = await admin.http.get(f"/users?{query}")
        assert (answer.status_code, locations(answer)) == (422, [["query", where]])


async def test_the_list_is_sorted_and_walked_in_pages(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, service.person() as carol:
        of_three = f"id[in]={alice.id},{bob.id},{carol.id}"
        listed = await alice.http.get(f"/users?{of_three}&sort=-username&limit=2")
        names = sorted((each.name for each in (alice, bob, carol)), reverse=True)
        assert [user["username"] for user in listed.json()] == names[:2]
        assert listed.headers["x-total-count"] == "3"
        assert listed.headers["stream-position"]
        following = await alice.http.get(links(listed)["next"])
        assert [user["username"] for user in following.json()] == names[2:]
        page, walked = await alice.http.get(f"/users?{of_three}&after=0&limit=2"), []
        while True:
            walked += [user["id"] for user in page.json()]
            if "next" not in links(page):
                break
            page = await alice.http.get(links(page)["next"])
        assert walked == sorted((alice.id, bob.id, carol.id))


# --- deleting


async def test_a_deleted_account_leaves_its_movies_and_nothing_else(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, service.admin() as admin:
        proof = {"current_password": PASSWORD}
        fields = {"email": address_of(alice), "name": "Alice", "phone_number": "+436641234567"}
        assert (await alice.http.patch("/users/me", json={**fields, **proof})).status_code == 200
        assert (await alice.http.post("/users/me/profile", json={"info": "Curious.", "gender": "female"})).is_success
        movie = await alice.add(title="Wonderland")
        character = await alice.add("characters", name="The Hatter")
        assert (await alice.http.post("/movies", json={"title": "x"}, headers={"Idempotency-Key": "k"})).is_success
        job = await alice.generate("movies", 1000, "?rate=1")
        answer = await alice.http.delete("/users/me")
        assert (answer.status_code, answer.content) == (204, b"")
        for person, path in (
            (alice, "/users/me"),
            (bob, f"/users/{alice.id}"),
            (admin, f"/users/{alice.id}"),
            (admin, f"/users/{alice.id}/profile"),
            (bob, f"/users/{alice.id}/movies"),
            (bob, f"/movies/username/{alice.name}"),
            (bob, f"/characters/username/{alice.name}"),
        ):
            assert (await person.http.get(path)).status_code == (401 if person is alice else 404), path
        for person in (bob, admin):
            assert (await person.http.get(f"/users?id={alice.id}")).json() == []
        assert (await bob.http.get(f"/movies/{movie['id']}")).json() == movie
        assert (await bob.http.get(f"/characters/{character['id']}")).json() == character
        assert (await bob.http.get(f"/movies?user_id={alice.id}")).json()
        assert (await bob.http.get(f"/jobs/{job['id']}")).json()["state"] == "cancelled"
        row = (await sql(service, f"SELECT * FROM users WHERE id = {alice.id}"))[0]
        kept = {value for value in row if isinstance(value, str) and not value.startswith("20")}
        assert kept == {"deleted", "user"}, "nothing that says anything of her"
        for table in ("sessions", "idempotency_keys", "one_time_tokens", "mails"):
            assert await sql(service, f"SELECT COUNT(*) FROM {table} WHERE user_id = {alice.id}") == [(0,)], table


async def test_the_name_and_the_address_are_free_again(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client:
        address = address_of(alice)
        body = {"email": address, "current_password": PASSWORD}
        assert (await alice.http.patch("/users/me", json=body)).status_code == 200
        assert (await alice.http.delete("/users/me")).status_code == 204
        for login in ({"username": alice.name}, {"email": address}):
            for password in (PASSWORD, "deleted!"):
                answer = await client.post("/auth/login", json={**login, "password": password})
                assert answer.status_code == 401
        answer = await client.post("/users", json={"username": alice.name, "email": address, "password": PASSWORD})
        assert answer.status_code == 201
        assert answer.json()["id"] != alice.id


async def test_only_the_owner_and_admins_delete(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, moderator(service) as mod:
        async with service.anyone() as nobody, nothing_written(service):
            for person in (bob, mod):
                for user_id in (alice.id, 999_999_999):
                    assert (await person.http.delete(f"/users/{user_id}")).status_code == 403
            assert (await nobody.delete(f"/users/{alice.id}")).status_code == 401
            assert (await nobody.delete("/users/me")).status_code == 401
        assert (await alice.http.delete(f"/users/{alice.id}")).status_code == 204
        assert (await alice.http.delete(f"/users/{alice.id}")).status_code == 401


async def test_the_sockets_of_a_deleted_account_are_closed(service: Service) -> None:
    async with service.person() as alice:
        mine = {"Authorization": f"Bearer {alice.token}"}
        async with service.watch("topics=account,sessions", additional_headers=mine) as watcher:
            assert (await alice.http.delete("/users/me")).status_code == 204
            with suppress(ConnectionClosed):
                while True:
                    await watcher.next()
            assert watcher.socket.close_code == 4501


# --- at once, at the database


async def test_whoever_signs_in_while_being_deleted_is_out(database: Database) -> None:
    for number in range(10):
        user_id = await account(database, f"alice{number}")

        async def sign_in(user_id: int = user_id) -> Any:
            device, checked, renewal = Device(None, None), Checked("no hash", None), Renewal("x" * 32, 900)
            return await database.write(lambda tx: sessions.begin(tx, user_id, device, checked, renewal))

        work = [sign_in(), delete(database, user_id)]
        begun, deleted = await asyncio.gather(*map(outcome, work if number % 2 else reversed(work)))
        if not number % 2:
            begun, deleted = deleted, begun
        assert deleted is None
        assert isinstance(begun, dict) or begun in (None, Unauthenticated)
        assert (await sessions.newest(database, user_id, offset=0, limit=10)).total == 0


async def test_deleting_twice_at_once_is_once(database: Database) -> None:
    user_id = await account(database, "alice")
    told: list[tuple[str, str]] = []
    database.on_commit.append(lambda events: told.extend((event.topic, event.operation) for event in events))
    outcomes = await asyncio.gather(*(outcome(delete(database, user_id)) for _ in range(4)))
    assert sorted(map(str, outcomes)) == sorted(map(str, [None] + [NotFound] * 3))
    assert told == [("users", "delete"), ("account", "delete")]


async def test_links_and_mails_go_with_the_account(database: Database) -> None:
    user_id = await account(database, "alice")

    async def mail(tx: Transaction) -> str:
        await outbox.put(tx, user_id, MailType.PASSWORD_CHANGED, "alice@example.org")
        return await one_time_tokens.mint(tx, Purpose.RESET, user_id, "alice@example.org")

    token = await database.write(mail)
    assert await one_time_tokens.find(database, token, Purpose.RESET) is not None
    await delete(database, user_id)
    assert await one_time_tokens.find(database, token, Purpose.RESET) is None
    assert await outbox.claim(database, "a worker") is None


async def edit(database: Database, user_id: int, *, proves_addresses: bool, **fields: Any) -> dict[str, Any]:
    async def work(tx: Transaction) -> dict[str, Any]:
        return await edits.edit_own(tx, user_id, fields, None, proven_hash="no hash", proves_addresses=proves_addresses)

    return await database.write(work)


async def test_a_new_address_takes_back_the_links_to_the_old_one_and_tells_it(database: Database) -> None:
    user_id = await account(database, "alice")
    token = await database.write(lambda tx: one_time_tokens.mint(tx, Purpose.RESET, user_id, "alice@example.org"))
    after = await edit(database, user_id, proves_addresses=False, email="al@example.org")
    assert after["email"] == "al@example.org"
    assert await one_time_tokens.find(database, token, Purpose.RESET) is None
    notice = await outbox.claim(database, "a worker")
    assert notice is not None
    assert (notice.kind, notice.recipient) == (MailType.EMAIL_CHANGED, "alice@example.org")


async def test_an_address_to_be_proven_counts_later(database: Database) -> None:
    user_id = await account(database, "alice")
    after = await edit(database, user_id, proves_addresses=True, email="al@example.org", name="Al")
    assert (after["email"], after["name"], after["version"]) == ("alice@example.org", "Al", 2)
    mail = await outbox.claim(database, "a worker")
    assert mail is not None
    assert (mail.kind, mail.recipient) == (MailType.CONFIRM_EMAIL, "al@example.org")
    with pytest.raises(Problem) as refused:
        await edit(database, user_id, proves_addresses=True, email=None)
    assert refused.value.status == 409


async def test_a_password_that_was_changed_meanwhile_proves_nothing(database: Database) -> None:
    user_id = await account(database, "alice")

    async def change(tx: Transaction) -> None:
        await users.change(tx, await users.lock(tx, user_id), {"password_hash": "another"}, actor_id=user_id)

    await database.write(change)
    with pytest.raises(Problem) as refused:
        await edit(database, user_id, proves_addresses=False, email="al@example.org")
    assert refused.value.status == 409
    found = await users.find(database, user_id)
    assert found is not None
    assert (found["email"], found["version"]) == ("alice@example.org", 1), "a password that nobody sees is no edit"
