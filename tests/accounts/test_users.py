"""Accounts as their owners and other users see, change and delete them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from core.errors import CloseCode, NotFound, Problem, Unauthenticated
from repository.accounts import edits, one_time_tokens, outbox, sessions, users
from repository.accounts.one_time_tokens import Purpose
from repository.accounts.outbox import MailType
from repository.accounts.sessions import Checked, Device, Renewal
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from tests.support.accounts import account, delete, outcome
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, ok, over_socket, sign_in, values_by_field
from tests.support.resources import links, locations, moderator, nothing_written, sql
from tests.support.service import PASSWORD, Person, Service
from tests.support.sockets import closing, signed_in

BRIEF = {"id", "username", "name"}


def address_of(person: Person) -> str:
    return f"{person.name}@example.org"


async def me(person: Person) -> dict[str, Any]:
    account: dict[str, Any] = await ok(person.http.get("/users/me"))
    return account


# --- the caller's own account


async def test_an_account_has_an_entity_tag(service: Service) -> None:
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


async def test_patch_changes_the_named_fields_and_put_all_of_them(service: Service) -> None:
    async with service.person() as alice:
        before = await me(alice)
        fields = {"name": "Alice", "first_name": "Alice", "last_name": "Kingsleigh", "phone_number": "436641234567"}
        account = await ok(alice.http.patch("/users/me", json=fields))
        fields |= {"phone_number": "+436641234567", "updated_at": account["updated_at"]}
        assert account == {**before, **fields, "version": 2}
        assert account["updated_at"] > before["updated_at"]
        assert await me(alice) == account
        account = await ok(alice.http.put("/users/me", json={"username": alice.name, "name": "Al"}))
        assert account == {**before, "name": "Al", "version": 3, "updated_at": account["updated_at"]}


async def test_an_edit_that_changes_nothing_writes_nothing(service: Service) -> None:
    async with service.person() as alice:
        account = (await alice.http.patch("/users/me", json={"name": "Alice"})).json()
        async with nothing_written(service):
            for body in ({}, {"name": "Alice"}, {"username": alice.name}, {"phone_number": None, "email": None}):
                answer = await alice.http.patch("/users/me", json=body)
                assert (answer.status_code, answer.json()) == (200, account), body


async def test_if_match_rejects_a_stale_edit(service: Service) -> None:
    async with service.person() as alice:
        seen = (await alice.http.get("/users/me")).headers["etag"]
        assert (await alice.http.patch("/users/me", json={"name": "A"}, headers={"If-Match": seen})).status_code == 200
        async with nothing_written(service):
            for method, body in (("PATCH", {"name": "B"}), ("PUT", {"username": alice.name}), ("DELETE", None)):
                answer = await alice.http.request(method, "/users/me", json=body, headers={"If-Match": seen})
                assert answer.status_code == 412, method
        assert (await alice.http.patch("/users/me", json={"name": "C"}, headers={"If-Match": "*"})).status_code == 200


INVALID: dict[str, list[Any]] = {
    "username": ["ab"],
    "email": ["nobody"],
    "phone_number": ["0664"],
    "gender": ["other"],
    "name": [""],
    "first_name": ["x" * 101],
    "last_name": ["\0"],
    "group": ["admin"],
    "is_active": [False],
    "id": [1],
    "password": [1, ""],
    "current_password": [1, ""],
}


@SQLITE_ONLY
async def test_an_invalid_edit_is_rejected(service: Service) -> None:
    async with service.person() as alice, nothing_written(service):
        faults: list[tuple[dict[str, Any], list[str]]] = [({"username": None, "email": None}, [])]
        faults += [({field: value}, [field]) for field, value in values_by_field(INVALID)]
        for change, where in faults:
            assert_problem(await alice.http.patch("/users/me", json=change), 422, ["body", *where])
            everything = {"username": alice.name, **change}
            assert_problem(await alice.http.put("/users/me", json=everything), 422, ["body", *where])


async def test_password_is_another_name_of_current_password(service: Service) -> None:
    async with service.person() as alice:
        for method in ("PUT", "PATCH"):
            name = f"{alice.name}.{method.lower()}"
            wrong = await alice.http.request(method, "/users/me", json={"username": name, "password": "not mine"})
            assert_problem(wrong, 403, ["body", "password"])
            assert wrong.json()["detail"][0]["type"] == "wrong_password"
            both = {"username": name, "password": PASSWORD, "current_password": "not mine"}
            assert_problem(await alice.http.request(method, "/users/me", json=both), 403, ["body", "current_password"])
            right = await alice.http.request(method, "/users/me", json={"username": name, "password": PASSWORD})
            assert (right.status_code, right.json()["username"]) == (200, name)


async def test_every_problem_of_an_edit_is_reported_at_once(service: Service) -> None:
    async with service.person() as alice, nothing_written(service):
        answer = await alice.http.patch("/users/me", json={"username": "a", "email": "b", "name": "", "phone": "c"})
        assert_problem(answer, 422, *(["body", field] for field in ("username", "email", "name", "phone")))


async def test_a_new_name_or_address_requires_the_current_password(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client:
        name, address = f"{alice.name}.new", address_of(alice)
        proof = {"current_password": PASSWORD}
        async with nothing_written(service):
            wrong = {"username": name, "current_password": PASSWORD + "x"}, {"current_password": "not needed, wrong"}
            for body in ({"username": name}, {"email": address}, {"username": name, "email": address}, *wrong):
                assert_problem(await alice.http.patch("/users/me", json=body), 403, ["body", "current_password"])
        answer = await alice.http.patch("/users/me", json={"username": name, "email": address, **proof})
        assert (answer.status_code, answer.json()["username"], answer.json()["email"]) == (200, name, address)
        for login, status in ((alice.name, 401), (name, 200), (address.upper(), 200)):
            assert (await sign_in(client, login)).status_code == status, login
        answer = await alice.http.put("/users/me", json={"email": address, **proof})
        assert (answer.status_code, answer.json()["username"]) == (200, None)
        async with nothing_written(service):
            assert_problem(await alice.http.patch("/users/me", json={"email": None, **proof}), 409, ["body", "email"])
            assert_problem(await alice.http.put("/users/me", json={"name": "Alice", **proof}), 422, ["body"])


async def test_the_name_of_another_user_is_taken(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        proof = {"current_password": PASSWORD}
        assert (await bob.http.patch("/users/me", json={"email": address_of(bob), **proof})).status_code == 200
        async with nothing_written(service):
            body = {"username": bob.name.upper(), "email": address_of(bob).upper(), **proof}
            for method in ("PATCH", "PUT"):
                answer = await alice.http.request(method, "/users/me", json=body)
                assert (answer.status_code, locations(answer)) == (409, [["body", "username"], ["body", "email"]])
        # A user may change the case of their own name.
        answer = await alice.http.patch("/users/me", json={"username": alice.name.upper(), **proof})
        assert (answer.status_code, answer.json()["username"]) == (200, alice.name.upper())


async def test_only_one_of_two_concurrent_users_gets_a_name(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        body = {"username": f"{alice.name}.both", "current_password": PASSWORD}
        answers = await asyncio.gather(*(each.http.patch("/users/me", json=body) for each in (alice, bob)))
        assert sorted(answer.status_code for answer in answers) == [200, 409]
        for answer in answers:
            if answer.status_code == 409:
                assert locations(answer) == [["body", "username"]]


@SQLITE_ONLY
async def test_account_routes_work_over_a_socket(service: Service) -> None:
    async with service.person() as alice:
        async with service.watch("topics=account", **signed_in(alice)) as watcher:
            for method, path, body, status, found in (
                ("PATCH", "/users/me", {"name": "Alice"}, 200, {"name": "Alice"}),
                ("GET", "/users/me", None, 200, {"name": "Alice"}),
                ("POST", "/users/me/profile", {"info": "Curious."}, 201, {}),
                ("GET", f"/users/{alice.id}/profile", None, 200, {"info": "Curious."}),
                ("GET", "/admin/audit", None, 403, {}),
            ):
                reply = await over_socket(watcher, method, path, body)
                assert (reply["status"], reply["body"] | found) == (status, reply["body"]), path
            listed = (await over_socket(watcher, "GET", f"/users?id={alice.id}"))["body"]
            assert listed == [{"id": alice.id, "username": alice.name, "name": "Alice"}]


async def test_password_guesses_and_new_addresses_are_rate_limited(new_service: Callable[..., Service]) -> None:
    service = new_service(RATE_LIMITS="on").start()
    async with service.person() as alice, service.person() as bob:
        for number in range(6):
            body = {"email": f"{alice.name}.{number}@example.org", "current_password": PASSWORD}
            answer = await alice.http.patch("/users/me", json=body)
            assert answer.status_code == (200 if number < 5 else 429), number
        assert int(answer.headers["retry-after"]) > 60
        assert (await me(alice))["email"] == f"{alice.name}.4@example.org"
        again = {"name": "Alice", "current_password": PASSWORD}
        assert (await alice.http.patch("/users/me", json=again)).status_code == 200, "other edits are not rate-limited"
        for number in range(11):
            body = {"username": "spare", "current_password": f"guess {number}"}
            assert (await bob.http.patch("/users/me", json=body)).status_code == (403 if number < 10 else 429), number
        right = {"username": "spare", "current_password": PASSWORD}
        assert (await bob.http.patch("/users/me", json=right)).status_code == 429


async def test_the_users_of_one_network_share_a_multiple_of_the_changes_of_address(
    new_service: Callable[..., Service],
) -> None:
    settings = {"TRUSTED_PROXIES": "127.0.0.1", "USERS_PER_ADDRESS": "1"}
    service = new_service(RATE_LIMITS="on", **settings).start()
    here, elsewhere = ({"X-Forwarded-For": f"2001:db8:0:{network}::{network}"} for network in (1, 2))
    async with service.person(headers=here) as alice, service.person(headers=here) as bob:

        async def change(person: Person, number: int, headers: dict[str, str]) -> httpx.Response:
            body = {"email": f"{person.name}.{number}@example.org", "current_password": PASSWORD}
            return await person.http.patch("/users/me", json=body, headers=headers)

        statuses = [(await change(person, number, here)).status_code for number in range(3) for person in (alice, bob)]
        assert statuses == [200] * 5 + [429], "all users of a network share five changes"
        assert (await change(bob, 3, elsewhere)).status_code == 200, "the user may send requests from other networks"


# --- other users


async def test_other_users_are_shown_in_brief_and_to_admins_in_full(service: Service) -> None:
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
        assert (await admin.http.get(f"/users/{bob.id}")).json() == account
        assert (await admin.http.get(f"/users?id={bob.id}")).json() == [account]
        async with service.anyone() as anonymous:
            assert (await anonymous.get("/users")).status_code == 401
            assert (await anonymous.get(f"/users/{bob.id}")).status_code == 401


async def test_the_entity_tag_of_another_user_covers_only_the_visible_fields(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        tag = (await alice.http.get(f"/users/{bob.id}")).headers["etag"]
        assert (await bob.http.patch("/users/me", json={"phone_number": "+436641234567"})).status_code == 200
        assert (await alice.http.get(f"/users/{bob.id}", headers={"If-None-Match": tag})).status_code == 304
        assert (await bob.http.patch("/users/me", json={"name": "Robert"})).status_code == 200
        again = await alice.http.get(f"/users/{bob.id}", headers={"If-None-Match": tag})
        assert (again.status_code, again.json()["name"]) == (200, "Robert")


async def test_disabled_users_are_visible_to_admins_only(service: Service) -> None:
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


async def test_users_are_found_only_by_visible_fields(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        secret = f"zither{bob.id}"
        fields = {"name": f"Robert {bob.id} Popescu", "first_name": secret, "last_name": secret}
        assert (await bob.http.patch("/users/me", json=fields)).status_code == 200
        proof = {"current_password": PASSWORD}
        assert (await bob.http.patch("/users/me", json={"email": f"{secret}@example.org", **proof})).status_code == 200
        for query in (f"q=popescu {bob.id}", f"q={bob.name}", f"name[prefix]=robert {bob.id}", f"username={bob.name}"):
            assert [user["id"] for user in (await alice.http.get(f"/users?{query}")).json()] == [bob.id], query
        assert (await alice.http.get(f"/users?q={secret}")).json() == [], "a search must not match hidden fields"
        async with service.admin() as admin:
            for query in (f"{key}={secret}" for key in ("q", "email[contains]", "first_name", "or[0][last_name]")):
                assert [user["id"] for user in (await admin.http.get(f"/users?{query}")).json()] == [bob.id], query


HIDDEN = {
    "email[prefix]=a": "email",
    "phone_number=1": "phone_number",
    "group=admin": "group",
    "is_active=true": "is_active",
    "or[0][id]=1&or[1][first_name]=x": "first_name",
    "sort=-email": "email",
    "sort=id,created_at&last_name=x": "created_at, last_name",
}


async def test_only_admins_filter_and_sort_by_hidden_fields(service: Service) -> None:
    async with service.person() as alice, moderator(service) as mod, service.admin() as admin:
        for query, field in HIDDEN.items():
            for person in (alice, mod):
                answer = await person.http.get(f"/users?{query}")
                assert (answer.status_code, answer.json()["detail"]) == (
                    403,
                    f"Only admins can filter and sort by {field}",
                )
            assert (await admin.http.get(f"/users?{query}")).status_code == 200


@SQLITE_ONLY
async def test_an_invalid_query_is_rejected(service: Service) -> None:
    async with service.admin() as admin:
        for query in ("is_active=yes", "is_active[gt]=true", "password_hash=x", "sort=password_hash", "limit=1001"):
            assert_problem(await admin.http.get(f"/users?{query}"), 422, ["query", query.partition("=")[0]])
        assert_problem(await admin.http.get("/users?after=-1"), 422, ["query", "after"])


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
        assert [(await each.http.get(f"/users?id={alice.id}")).json() for each in (bob, admin)] == [[], []]
        assert (await bob.http.get(f"/movies/{movie['id']}")).json() == movie
        assert (await bob.http.get(f"/characters/{character['id']}")).json() == character
        assert (await bob.http.get(f"/movies?user_id={alice.id}")).json()
        assert (await bob.http.get(f"/jobs/{job['id']}")).json()["state"] == "cancelled"
        row = (await sql(service, f"SELECT * FROM users WHERE id = {alice.id}"))[0]
        kept = {value for value in row if isinstance(value, str) and not value.startswith("20")}
        assert kept == {"deleted", "user"}, "a deleted account keeps no personal data"
        for table in ("sessions", "idempotency_keys", "one_time_tokens", "mails"):
            assert await sql(service, f"SELECT COUNT(*) FROM {table} WHERE user_id = {alice.id}") == [(0,)], table


async def test_the_name_and_address_of_a_deleted_account_are_free(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client:
        address = address_of(alice)
        body = {"email": address, "current_password": PASSWORD}
        assert (await alice.http.patch("/users/me", json=body)).status_code == 200
        assert (await alice.http.delete("/users/me")).status_code == 204
        for login in (alice.name, address):
            for password in (PASSWORD, "deleted!"):
                assert (await sign_in(client, login, password)).status_code == 401
        body = {"username": alice.name, "email": address, "password": PASSWORD}
        assert (await ok(client.post("/users", json=body), 201))["id"] != alice.id


async def test_only_the_owner_and_admins_delete_an_account(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, moderator(service) as mod:
        async with nothing_written(service):
            for person in (bob, mod):
                for user_id in (alice.id, 999_999_999):
                    assert (await person.http.delete(f"/users/{user_id}")).status_code == 403
        assert [(await alice.http.delete(f"/users/{alice.id}")).status_code for _ in range(2)] == [204, 401]


async def test_the_sockets_of_a_deleted_account_are_closed(service: Service) -> None:
    async with service.person() as alice:
        async with service.watch("topics=account,sessions", **signed_in(alice)) as watcher:
            assert (await alice.http.delete("/users/me")).status_code == 204
            assert (await closing(watcher))[0] == CloseCode.TOKEN_EXPIRED


# --- concurrency, without a service


async def test_no_session_survives_a_concurrent_deletion(database: Database) -> None:
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


async def test_concurrent_deletions_delete_once(database: Database) -> None:
    user_id = await account(database, "alice")
    committed: list[tuple[str, str]] = []
    database.on_commit.append(lambda events: committed.extend((event.topic, event.operation) for event in events))
    outcomes = await asyncio.gather(*(outcome(delete(database, user_id)) for _ in range(4)))
    assert sorted(map(str, outcomes)) == sorted(map(str, [None] + [NotFound] * 3))
    assert committed == [("users", "delete"), ("account", "delete")]


async def test_tokens_and_waiting_emails_are_deleted_with_the_account(database: Database) -> None:
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


async def test_a_new_address_revokes_the_tokens_of_the_old_one_and_notifies_it(database: Database) -> None:
    user_id = await account(database, "alice")
    token = await database.write(lambda tx: one_time_tokens.mint(tx, Purpose.RESET, user_id, "alice@example.org"))
    after = await edit(database, user_id, proves_addresses=False, email="al@example.org")
    assert after["email"] == "al@example.org"
    assert await one_time_tokens.find(database, token, Purpose.RESET) is None
    notice = await outbox.claim(database, "a worker")
    assert notice is not None
    assert (notice.kind, notice.recipient) == (MailType.EMAIL_CHANGED, "alice@example.org")


async def test_an_unconfirmed_address_is_not_stored_yet(database: Database) -> None:
    user_id = await account(database, "alice")
    after = await edit(database, user_id, proves_addresses=True, email="al@example.org", name="Al")
    assert (after["email"], after["name"], after["version"]) == ("alice@example.org", "Al", 2)
    mail = await outbox.claim(database, "a worker")
    assert mail is not None
    assert (mail.kind, mail.recipient) == (MailType.CONFIRM_EMAIL, "al@example.org")
    with pytest.raises(Problem) as refused:
        await edit(database, user_id, proves_addresses=True, email=None)
    assert refused.value.status == 409


async def test_a_password_that_was_changed_meanwhile_is_no_proof(database: Database) -> None:
    user_id = await account(database, "alice")

    async def change(tx: Transaction) -> None:
        await users.change(tx, await users.lock(tx, user_id), {"password_hash": "another"}, actor_id=user_id)

    await database.write(change)
    with pytest.raises(Problem) as refused:
        await edit(database, user_id, proves_addresses=False, email="al@example.org")
    assert refused.value.status == 409
    found = await users.find(database, user_id)
    assert found is not None
    assert (found["email"], found["version"]) == ("alice@example.org", 1), "a new password does not change the version"
