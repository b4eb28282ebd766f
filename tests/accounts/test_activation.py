"""Account activation by email: the URL works once, and only for the address to which it was sent."""

from __future__ import annotations

import asyncio
import html
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from alembic import command
from sqlalchemy import text, update

import models
from repository.accounts import deletion, users
from repository.accounts.sessions import Checked
from repository.engine import migrations
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from routes.accounts import sign_in as sign_in_routes
from services.passwords import Verdict
from tests.conftest import Places
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, ok, over_socket, sign_in
from tests.support.resources import sql
from tests.support.servers.mail import MailServer, fresh_name, link_in, parsed, token_in
from tests.support.service import PASSWORD, Service, eventually
from tests.support.sockets import signed_in

BASE = "https://movies.example.org"
TAKEN = "Your email address already has an account"
OTHER = "the password of a stranger"
DIFFERENT = {"id", "username", "email", "created_at", "updated_at"}
ACTIVE = {"is_active": True, "awaits_activation": False}
INVALID_URL = {"detail": "The URL is invalid, was already used, or has expired"}


@dataclass
class Scene:
    """A service that activates accounts by email, and the server that receives the emails."""

    service: Service
    mails: MailServer

    async def register(self, client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
        name = fresh_name()
        body = {"username": name, "email": f"{name}@example.org", "password": PASSWORD, **more}
        user: dict[str, Any] = await ok(client.post("/auth/register", json=body), 201)
        return user

    async def token_for(self, user: dict[str, Any], number: int = 1) -> str:
        return token_in(await self.mails.mail_to(user["email"], number))

    async def registered(self, client: httpx.AsyncClient) -> tuple[dict[str, Any], str]:
        """Register a user. Return the account and the token from the activation email."""
        user = await self.register(client)
        return user, await self.token_for(user)

    async def sign_in(self, client: httpx.AsyncClient, user: dict[str, Any]) -> int:
        return (await sign_in(client, user["email"])).status_code

    async def a_minute_passes(self, user: dict[str, Any]) -> None:
        moment = "2026-01-01T00:00:00.000000Z"
        await sql(self.service, f"UPDATE mails SET created_at = '{moment}' WHERE user_id = {user['id']}")

    async def all_sent(self) -> None:
        async def is_empty() -> bool:
            return not (await sql(self.service, "SELECT count(*) FROM mails WHERE due_at IS NOT NULL"))[0][0]

        await eventually(is_empty, "an empty outbox")


async def activate(client: httpx.AsyncClient, token: str) -> httpx.Response:
    return await client.post("/auth/activate", json={"token": token})


@asynccontextmanager
async def activated(scene: Scene) -> AsyncIterator[tuple[httpx.AsyncClient, dict[str, Any]]]:
    """Register a user, activate the account, sign in, and yield the client and the account."""
    async with scene.service.anyone() as client:
        user, token = await scene.registered(client)
        await ok(activate(client, token))
        login = await ok(sign_in(client, user["email"]))
        client.headers["Authorization"] = f"Bearer {login['access_token']}"
        yield client, user


async def request_address(client: httpx.AsyncClient, address: str) -> dict[str, Any]:
    """Request a change of address without confirming it. Return the account."""
    account: dict[str, Any] = await ok(client.patch("/users/me", json={"email": address, "current_password": PASSWORD}))
    return account


@pytest.fixture(scope="module")
def scene(new_places: Callable[[], Places], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    places, folder = new_places(), tmp_path_factory.mktemp("service")
    with MailServer().running() as mails:
        settings = {"SMTP_URL": mails.url, "PUBLIC_URL": BASE + "/", "MAIL_FROM": "Marquee <marquee@example.org>"}
        service = Service(places.database_url, places.broadcast_url, folder, ACCOUNT_ACTIVATION="email", **settings)
        with service.running():
            yield Scene(service, mails)


async def test_a_new_account_signs_in_once_it_is_activated(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        user = await scene.register(client)
        assert (user["is_active"], user["awaits_activation"]) == (False, True)
        refused = await sign_in(client, user["email"])
        assert refused.status_code == 403
        assert "activat" in refused.json()["detail"]
        mail = await scene.mails.mail_to(user["email"])
        assert link_in(mail) == f"{BASE}/auth/activate?token={token_in(mail)}"
        answer = await activate(client, token_in(mail))
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
        active = answer.json()
        changed = {"is_active": True, "awaits_activation": False, "version": 2, "updated_at": active["updated_at"]}
        assert active == {**user, **changed}
        assert await scene.sign_in(client, user) == 200


async def test_admins_receive_an_event_for_an_activation(scene: Scene) -> None:
    async with scene.service.anyone() as client, scene.service.admin() as chief:
        async with scene.service.watch("topics=users", **signed_in(chief)) as watcher:
            user, token = await scene.registered(client)
            await watcher.until(lambda frame: frame.get("operation") == "add" and frame["data"]["id"] == user["id"])
            await ok(activate(client, token))
            event = await watcher.expect("update", "users")
            assert event["changed"] == ["is_active", "awaits_activation"]
            assert (event["data"]["is_active"], event["actor_id"]) == (True, user["id"])


async def test_a_browser_activates_with_the_button_of_a_page(scene: Scene) -> None:
    """Opening the URL must not activate the account, because mail scanners open URLs, too."""
    browser = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
    async with scene.service.anyone() as client:
        user = await scene.register(client, username="<i>" + fresh_name())
        token = await scene.token_for(user)
        url = "/auth/activate?token=" + token
        head = await client.head(url, headers=browser)
        assert (head.status_code, head.content) == (200, b"")
        for _ in range(2):
            asked = await client.get(url, headers=browser)
            assert asked.status_code == 200
            assert html.escape(f"registered as {user['username']} with the address {user['email']}") in asked.text
        assert await scene.sign_in(client, user) == 403, "opening the URL does not activate the account"
        assert f'<input type="hidden" name="token" value="{token}">' in asked.text
        assert '<form method="post" action="activate">' in asked.text
        page = await client.post("/auth/activate", data={"token": token}, headers=browser)
        assert page.status_code == 200
        assert "It worked" in page.text
        again = await client.post("/auth/activate", data={"token": token}, headers=browser)
        opened_again = await client.get(url, headers=browser)
        for answer in (again, opened_again):
            assert answer.status_code == 404
            assert "This link does not work" in answer.text
        for answer in (asked, page, again, opened_again):
            assert answer.headers["content-type"].startswith("text/html")
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert answer.headers["cache-control"] == "no-store"
            policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
            assert (policy["default-src"], policy["style-src"]) == ("'none'", "'self'")
            assert "<script" not in answer.text
            assert "<i>" not in answer.text
            assert token not in answer.text or answer is asked
        assert (await client.get("/static/account.css")).status_code == 200
        assert await scene.sign_in(client, user) == 200


@SQLITE_ONLY
async def test_a_browser_gets_a_page_for_an_incomplete_url(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        for query in ("", "?token=", "?token=" + "x" * 129, "?token=x&more=1"):
            page = await client.get("/auth/activate" + query, headers={"Accept": "text/html"})
            assert page.status_code == 422
            assert "This link is incomplete" in page.text
            assert page.headers["content-type"].startswith("text/html")
            assert "detail" in (await client.get("/auth/activate" + query)).json()


@pytest.mark.parametrize("accept", [None, "*/*", "application/json", "text/html;q=0, */*", "text/plain"])
async def test_opening_the_url_changes_nothing_whatever_the_client_accepts(scene: Scene, accept: str | None) -> None:
    async with scene.service.anyone() as client:
        user, token = await scene.registered(client)
        headers = {"Accept": accept} if accept is not None else {}
        for _ in range(2):
            opened = await client.get("/api/v1/auth/activate/", params={"token": token}, headers=headers)
            assert opened.status_code == 200
            assert opened.headers["cache-control"] == "no-store"
            told = {"purpose": "activate", "username": user["username"], "email": user["email"]}
            assert opened.json() == {**told, "detail": opened.json()["detail"]}
            assert "POST /auth/activate" in opened.json()["detail"]
        assert await scene.sign_in(client, user) == 403
        assert (await ok(activate(client, token)))["id"] == user["id"]


@SQLITE_ONLY
async def test_activation_works_over_a_socket(scene: Scene) -> None:
    async with scene.service.anyone() as client, scene.service.watch() as watcher:
        _, token = await scene.registered(client)
        reply = await over_socket(watcher, "POST", "/auth/activate", {"token": token})
        assert (reply["status"], reply["body"]["is_active"]) == (200, True)


# --- invalid URLs


async def test_all_invalid_tokens_get_the_same_response(scene: Scene) -> None:
    """Check tokens that are used, expired, revoked, never mailed, for another purpose, or of an unusable account."""
    async with scene.service.anyone() as client, scene.service.admin() as chief:
        _, used = await scene.registered(client)
        await ok(activate(client, used))
        late, expired = await scene.registered(client)
        await sql(scene.service, f"UPDATE one_time_tokens SET expires_at = created_at WHERE user_id = {late['id']}")
        closed, disabled = await scene.registered(client)
        await ok(chief.http.post(f"/admin/users/{closed['id']}/deactivate"))
        gone, deleted = await scene.registered(client)
        assert (await chief.http.delete(f"/users/{gone['id']}")).status_code == 204
        moved, former = await scene.registered(client)
        await sql(scene.service, f"UPDATE users SET email = 'new-{moved['email']}' WHERE id = {moved['id']}")
        forgetful, _ = await scene.registered(client)
        await client.post("/auth/password/forgot", json={"email": forgetful["email"]})
        for_a_password = await scene.token_for(forgetful, 2)
        by_admin, unneeded = await scene.registered(client)
        await ok(chief.http.post(f"/admin/users/{by_admin['id']}/activate"))
        assert await scene.sign_in(client, by_admin) == 200
        twice, superseded = await scene.registered(client)
        await scene.a_minute_passes(twice)
        assert (await client.post("/auth/activate/resend", json={"email": twice["email"].upper()})).status_code == 202
        await ok(activate(client, await scene.token_for(twice, 2)))
        assert await sql(scene.service, f"SELECT 1 FROM one_time_tokens WHERE user_id = {twice['id']}") == []
        never_mailed = ("x", "\0", "é" * 128, used[:-1])
        mailed = (used, expired, disabled, deleted, former, for_a_password, unneeded, superseded)
        for token in (*mailed, *never_mailed):
            for answer in (await activate(client, token), await client.get("/auth/activate", params={"token": token})):
                assert (answer.status_code, answer.json()) == (404, INVALID_URL), token
        for user in (late, closed):
            assert await scene.sign_in(client, user) == 403


@SQLITE_ONLY
async def test_a_malformed_token_is_a_422(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        for body in ({}, {"token": ""}, {"token": None}, {"token": 1}, {"token": "x" * 129}):
            assert_problem(await client.post("/auth/activate", json=body), 422, ["body", "token"])


async def test_only_one_of_several_concurrent_activations_succeeds(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        user, token = await scene.registered(client)
        answers = await asyncio.gather(*(activate(client, token) for _ in range(6)))
        assert sorted(answer.status_code for answer in answers) == [200] + [404] * 5
        assert (await sql(scene.service, f"SELECT version FROM users WHERE id = {user['id']}"))[0][0] == 2


# --- requesting another email


async def test_asking_for_another_email_does_not_reveal_which_accounts_exist(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        waiting, _ = await scene.registered(client)
        active, token = await scene.registered(client)
        await ok(activate(client, token))
        addresses = [waiting["email"], active["email"], f"{fresh_name()}@example.org"]
        answers = [await client.post("/auth/activate/resend", json={"email": each}) for each in addresses]
        assert {(answer.status_code, answer.text) for answer in answers} == {(202, answers[0].text)}
        assert len({tuple(sorted(set(answer.headers) - {"x-request-id"})) for answer in answers}) == 1
        await scene.all_sent()
        # The waiting account already received an email less than a minute ago.
        assert [len(scene.mails.mails_to(each)) for each in addresses] == [1, 1, 0]


# --- registering


@SQLITE_ONLY
async def test_the_address_is_required_and_reported_with_all_other_problems(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        answer = await client.post("/auth/register", json={"username": "no", "password": "short"})
        assert answer.status_code == 422
        assert {problem["loc"][1] for problem in answer.json()["detail"]} == {"username", "password", "email"}
        assert await sql(scene.service, "SELECT 1 FROM users WHERE username = 'no'") == []


async def test_the_domain_of_an_address_is_stored_in_lowercase(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        name = fresh_name()
        user = await scene.register(client, username=name, email=f"{name}@EXAMPLE.Org", first_name="  Holly \u3000")
        assert (user["email"], user["first_name"]) == (f"{name}@example.org", "Holly")
        await scene.mails.mail_to(user["email"])
        await scene.register(client, email=f"{name.upper()}@example.ORG")
        notice = await scene.mails.mail_to(user["email"], 2)
        assert notice["Subject"] == TAKEN, "addresses that differ only in case are the same"


@SQLITE_ONLY
async def test_an_address_that_cannot_receive_email_is_rejected(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        for address in ("a" * 65 + "@example.org", "holly@ab--cd.org", "holly@printer.local", "holly@xn--a.org"):
            answer = await client.post("/auth/register", json={"email": address, "password": PASSWORD})
            assert_problem(answer, 422, ["body", "email"])


async def test_a_service_that_is_killed_while_it_sends_loses_no_email(new_service: Callable[..., Service]) -> None:
    with MailServer().running() as mails:
        service = new_service(ACCOUNT_ACTIVATION="email", SMTP_URL=mails.url).start()
        scene = Scene(service, mails)
        mails.is_silent = True
        async with service.anyone() as client:
            user = await scene.register(client)
        await eventually(lambda: mails.tried == 1, "a delivery has begun")
        service.kill()
        mails.is_silent = False
        service.start()
        # Let the lease of the killed process expire.
        await sql(service, "UPDATE mails SET due_at = 0")
        async with service.anyone() as client:
            await ok(activate(client, await scene.token_for(user)))
            assert await scene.sign_in(client, user) == 200


async def test_a_rejected_registration_sends_no_email(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        user, _ = await scene.registered(client)
        body = {"username": user["username"], "email": f"{fresh_name()}@example.org", "password": PASSWORD}
        assert_problem(await client.post("/auth/register", json=body), 409, ["body", "username"])
        await scene.all_sent()
        assert scene.mails.mails_to(body["email"]) == []


# --- registering with an address that has an account


async def test_registering_does_not_tell_whether_the_address_has_an_account(scene: Scene) -> None:
    async with activated(scene) as (client, owner):
        taken, free = owner["email"], f"{fresh_name()}@example.org"
        users = [await scene.register(client, email=address, password=OTHER) for address in (taken, free)]
        constant = [{name: user[name] for name in user if name not in DIFFERENT} for user in users]
        assert constant[0] == constant[1]
        assert users[1]["id"] == users[0]["id"] + 1, "both registrations create an account"
        for user in users:
            # A stranger's next attempts must not reveal which of the two addresses was taken.
            same_name = {"username": user["username"], "email": f"{fresh_name()}@example.org", "password": OTHER}
            assert_problem(await client.post("/auth/register", json=same_name), 409, ["body", "username"])
            for login in (user["username"], user["email"]):
                refused = await sign_in(client, login, OTHER)
                assert refused.status_code == 403, login
                assert "not activated" in refused.json()["detail"]
                assert (await sign_in(client, login, "no password at all")).status_code == 401
        assert (await sign_in(client, taken)).status_code == 200, "the owner of the address can still sign in"


async def what_a_stranger_sees(scene: Scene, client: httpx.AsyncClient, address: str) -> list[Any]:
    """Register an address several times, with different passwords, and return everything that the responses show."""
    seen: list[Any] = []
    names: dict[str, str] = {}
    for password in ("the first try", "the second try", "the third try"):
        names[password] = (await scene.register(client, email=address, password=password))["username"]
        requests: list[tuple[str, dict[str, str]]] = [
            (path, {field: login, "password": each})
            for each, name in (*names.items(), ("no password at all", "nobody"))
            for field, login in (("email", address), ("username", name))
            for path in ("/auth/login", "/token")
        ]
        requests += [(path, {"email": address}) for path in ("/auth/activate/resend", "/auth/password/forgot")]
        for path, body in requests:
            answer = await client.post(path, json=body)
            shown = {path: body.get("password"), "by": "username" if "username" in body else "email"}
            seen.append((shown, answer.status_code, answer.text, sorted(set(answer.headers) - {"x-request-id"})))
    return seen


async def test_no_sign_in_tells_what_was_registered_with_an_address_before(scene: Scene) -> None:
    async with activated(scene) as (client, active), activated(scene) as (_, disabled), scene.service.admin() as chief:
        await ok(chief.http.post(f"/admin/users/{disabled['id']}/deactivate"))
        waiting, _ = await scene.registered(client)
        async with activated(scene) as (_, wanted), scene.service.anyone() as stranger:
            await scene.register(client, email=wanted["email"], password=OTHER)
            free = await what_a_stranger_sees(scene, stranger, f"{fresh_name()}@example.org")
            for user in (active, disabled, waiting, wanted):
                assert await what_a_stranger_sees(scene, stranger, user["email"]) == free
    by_address = [(next(iter(shown.items())), status) for shown, status, _, _ in free if shown["by"] == "email"]
    for path in ("/auth/login", "/token"):
        statuses = [status for (asked, password), status in by_address if asked == path and password is not None]
        # After each registration: the passwords of all registrations so far, oldest first, then a wrong password.
        assert statuses == [403, 401, 403, 403, 401, 401, 403, 403, 401], "the two newest registrations are found"


async def test_the_owner_of_an_address_can_always_sign_in_with_it(scene: Scene) -> None:
    async with activated(scene) as (client, owner):
        for password in (PASSWORD, OTHER, PASSWORD, "the second try"):
            await scene.register(client, email=owner["email"], password=password)
            for path in ("/auth/login", "/token"):
                body = {"email": owner["email"], "password": PASSWORD}
                assert (await ok(client.post(path, json=body)))["user_id"] == owner["id"]
        refused = await sign_in(client, owner["email"], OTHER)
        assert refused.status_code == 401, "newer registrations have replaced this one"
        assert (await sign_in(client, owner["email"], "the second try")).status_code == 403


async def test_an_admin_can_disable_a_registration_without_revealing_the_owner(scene: Scene) -> None:
    async with activated(scene) as (client, owner), scene.service.admin() as chief:
        answers = []
        for address in (owner["email"], f"{fresh_name()}@example.org"):
            stranger = await scene.register(client, email=address, password=OTHER)
            await ok(chief.http.post(f"/admin/users/{stranger['id']}/deactivate"))
            answers += [await sign_in(client, login, OTHER) for login in (address, stranger["username"])]
        assert {(answer.status_code, answer.text) for answer in answers} == {(403, answers[0].text)}


async def test_a_waiting_account_is_found_by_the_address_that_an_admin_gave_it(scene: Scene) -> None:
    async with scene.service.anyone() as client, scene.service.admin() as chief:
        user, _ = await scene.registered(client)
        moved = f"{fresh_name()}@example.org"
        await ok(chief.http.patch(f"/users/{user['id']}", json={"email": moved}))
        assert (await sign_in(client, user["email"])).status_code == 401
        assert (await sign_in(client, moved)).status_code == 403
        second = await scene.register(client, email=moved, password=OTHER)
        assert await scene.sign_in(client, second | {"email": moved}) == 403
        await ok(activate(client, token_in(await scene.mails.mail_to(moved))))
        assert (await sign_in(client, moved)).status_code == 200
        assert (await sign_in(client, moved, OTHER)).status_code == 403


@pytest.mark.parametrize("number", range(users.MAX_WAITING_CHECKED + 1))
@pytest.mark.parametrize("has_owner", [True, False])
async def test_a_sign_in_by_address_always_checks_the_same_number_of_passwords(number: int, has_owner: bool) -> None:
    checked: list[str | None] = []

    async def verify(password: str, password_hash: str | None) -> Verdict:
        checked.append(password_hash)
        return Verdict(password == password_hash)

    services = SimpleNamespace(activates_by_mail=True, passwords=SimpleNamespace(verify=verify))
    call: Any = SimpleNamespace(services=services)
    owner = {"id": 1, "password_hash": "owner"} if has_owner else None
    waiting = [{"id": 2 + each, "password_hash": f"waiting{each}"} for each in range(number)]
    found = users.Candidates(owner, waiting)
    for password in ("wrong", *(f"waiting{each}" for each in range(number))):
        checked.clear()
        proven = await sign_in_routes._proven(call, "holly@example.org", found, password)
        assert (proven is None) == (password == "wrong")
        assert len(checked) == 1 + users.MAX_WAITING_CHECKED
    if has_owner:
        proven = await sign_in_routes._proven(call, "holly@example.org", found, "owner")
        assert proven == (1, Checked("owner"))


async def test_without_activation_a_sign_in_checks_the_newest_accounts_that_still_wait(database: Database) -> None:
    address = "holly@example.org"

    names = [f"waiting{number}" for number in range(users.MAX_WAITING_CHECKED + 2)]

    async def register(tx: Transaction) -> None:
        for name in names:
            await users.create(tx, {"username": name, "email": address}, name, awaits_activation=True)

    await database.write(register)
    checked: list[str | None] = []

    async def verify(password: str, password_hash: str | None) -> Verdict:
        checked.append(password_hash)
        return Verdict(password == password_hash)

    services = SimpleNamespace(activates_by_mail=False, passwords=SimpleNamespace(verify=verify))
    call: Any = SimpleNamespace(services=services)
    found = await users.find_by_login(database, address)
    assert await sign_in_routes._proven(call, address, found, "wrong") is None
    assert checked == [None, *names[: -users.MAX_WAITING_CHECKED - 1 : -1]]

    async def let_days_pass(tx: Transaction) -> None:
        await tx.connection.execute(update(models.users).values(created_at="2026-01-01T00:00:00.000000Z"))

    await database.write(let_days_pass)
    await deletion.forget_waiting(database, datetime.now(UTC), max_rows=10)
    checked.clear()
    assert await sign_in_routes._proven(call, address, await users.find_by_login(database, address), "wrong") is None
    assert checked == [None]


async def test_accounts_of_earlier_versions_are_found_by_their_address(empty_places: Callable[[], Places]) -> None:
    database = Database(empty_places().database_url)
    # The keys that earlier versions stored: of an owner, and of three accounts that await activation.
    keys = {"owner": "holly@example.org", "first": "WAITING holly@example.org", "second": None, "free": "x@example.org"}
    async with database.begin() as (connection, _):
        await connection.run_sync(lambda sync: command.upgrade(migrations._config(sync), "0010"))
        for name, key in keys.items():
            email = "x@example.org" if name == "free" else "Holly@example.org"
            is_active, moment = name == "owner", "2026-01-01T00:00:00.000000Z"
            quoted = f"'{key}'" if key else "NULL"
            stored = f"'{name}', '{name}', '{email}', {quoted}, '{name}', 'user'"
            await connection.execute(
                text(
                    'INSERT INTO users (username, username_key, email, email_key, password_hash, "group", is_active, '
                    "awaits_activation, version, created_at, updated_at) "
                    f"VALUES ({stored}, {is_active}, {not is_active}, 1, '{moment}', '{moment}')"
                )
            )
        await connection.run_sync(lambda sync: command.upgrade(migrations._config(sync), "head"))
    for address, owner, waiting in (
        ("holly@example.org", "owner", ["second", "first"]),
        ("x@example.org", "", ["free"]),
    ):
        found = await users.find_by_login(database, address)
        assert (found.owner["username"] if found.owner else "") == owner
        assert [user["username"] for user in found.waiting] == waiting
    async with database.begin() as (connection, _):
        await connection.run_sync(lambda sync: command.downgrade(migrations._config(sync), "0010"))
    await database.close()


async def test_the_mail_tells_the_owner_of_the_address(scene: Scene) -> None:
    async with activated(scene) as (client, owner):
        stranger = await scene.register(client, email=owner["email"].upper().replace("EXAMPLE.ORG", "example.org"))
        notice = await scene.mails.mail_to(owner["email"], 2)
        assert notice["Subject"] == TAKEN
        assert stranger["username"] not in str(notice)
        assert f"{BASE}/reset-password" in str(notice)
        assert "token=" not in str(notice)
        for _ in range(3):
            await scene.register(client, email=owner["email"])
        await scene.all_sent()
        assert len(scene.mails.mails_to(owner["email"])) == 2, "strangers can cause at most one notice a minute"
        assert await sql(scene.service, f"SELECT 1 FROM one_time_tokens WHERE user_id = {stranger['id']}") == []


async def test_registrations_with_one_address_in_the_same_moment_all_look_alike(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        address = f"{fresh_name()}@example.org"
        users = await asyncio.gather(*(scene.register(client, email=address) for _ in range(3)))
        await ok(activate(client, token_in(await scene.mails.mail_to(address))))
        states = [await sign_in(client, user["username"]) for user in users]
        assert sorted(answer.status_code for answer in states) == [200, 403, 403]


async def test_an_admin_cannot_activate_an_account_with_the_address_of_another(scene: Scene) -> None:
    async with activated(scene) as (client, owner), scene.service.admin() as chief:
        stranger = await scene.register(client, email=owner["email"])
        assert_problem(await chief.http.post(f"/admin/users/{stranger['id']}/activate"), 409, ["body", "email"])
        assert (await chief.http.delete(f"/users/{owner['id']}")).status_code == 204
        await ok(chief.http.post(f"/admin/users/{stranger['id']}/activate"))
        async with scene.service.anyone() as other:
            assert (await sign_in(other, owner["email"])).status_code == 200


async def test_changing_to_an_address_does_not_tell_whether_it_has_an_account(scene: Scene) -> None:
    async with activated(scene) as (client, user), activated(scene) as (_, owner):
        account = await request_address(client, owner["email"])
        assert account == {**user, "version": account["version"], "updated_at": account["updated_at"]} | ACTIVE
        notice = await scene.mails.mail_to(owner["email"], 2)
        assert notice["Subject"] == TAKEN


async def test_resetting_the_password_activates_too_because_it_proves_the_address(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        user, first = await scene.registered(client)
        await client.post("/auth/password/forgot", json={"email": user["email"]})
        body = {"token": await scene.token_for(user, 2), "new_password": "prater wheel 1949"}
        assert (await client.post("/auth/password/reset", json=body)).status_code == 204
        assert (await sign_in(client, user["email"], body["new_password"])).status_code == 200
        assert (await activate(client, first)).status_code == 404


# --- changing the address


async def test_a_new_address_counts_once_it_is_confirmed(scene: Scene) -> None:
    async with activated(scene) as (client, user):
        wanted = f"{fresh_name()}@example.org"
        assert (await request_address(client, wanted))["email"] == user["email"], "the address is not confirmed yet"
        mail = await scene.mails.mail_to(wanted)
        assert mail["Subject"] == "Confirm your new email address"
        warning = await scene.mails.mail_to(user["email"], 2)
        assert warning["Subject"] == "Request to change your email address"
        assert wanted not in str(warning)
        url = f"/auth/activate?token={token_in(mail)}"
        asked = await client.get(url, headers={"Accept": "text/html"})
        assert f"the address of the account {user['username']} to {wanted}" in asked.text
        opened = await ok(client.get(url))
        assert (opened["purpose"], opened["email"], opened["username"]) == ("email", wanted, user["username"])
        assert (await ok(client.get("/auth/me")))["email"] == user["email"], "opening the URL changes nothing"
        assert (await ok(activate(client, token_in(mail))))["email"] == wanted
        assert (await scene.mails.mail_to(user["email"], 3))["Subject"] == "Your email address was changed"
        assert (await client.get(url)).status_code == 404


async def test_sending_the_current_address_cancels_a_pending_change(scene: Scene) -> None:
    async with activated(scene) as (client, user):
        wanted = f"{fresh_name()}@example.org"
        await request_address(client, wanted)
        token = token_in(await scene.mails.mail_to(wanted))
        # A form that sends all fields but changes only the name does not cancel the change of address.
        await ok(client.put("/users/me", json={"username": user["username"], "email": user["email"], "name": "Holly"}))
        page = await client.get("/auth/activate", params={"token": token}, headers={"Accept": "text/html"})
        assert page.status_code == 200
        await request_address(client, user["email"])
        followed = await activate(client, token)
        assert (followed.status_code, followed.json()) == (404, INVALID_URL)


@pytest.mark.parametrize("way", ["change", "reset"])
async def test_a_new_password_cancels_a_pending_change_of_address(scene: Scene, way: str) -> None:
    """An intruder who knew the old password may have requested a change to their own address."""
    async with activated(scene) as (client, user):
        wanted = f"{fresh_name()}@example.org"
        await request_address(client, wanted)
        token = token_in(await scene.mails.mail_to(wanted))
        body = {"new_password": "the ferris wheel"}
        if way == "change":
            body["old_password"] = PASSWORD
        else:
            await client.post("/auth/password/forgot", json={"email": user["email"]})
            body["token"] = await scene.token_for(user, 3)
        assert (await client.post(f"/auth/password/{way}", json=body)).status_code == 204
        followed = await activate(client, token)
        assert (followed.status_code, followed.json()) == (404, INVALID_URL)


async def test_a_user_is_hidden_until_the_account_is_activated(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        user, token = await scene.registered(client)
        paths = (f"/movies/username/{user['username']}", f"/users/{user['id']}/movies")
        assert [(await client.get(path)).status_code for path in paths] == [404, 404]
        await ok(activate(client, token))
        assert [await ok(client.get(path)) for path in paths] == [[], []]


async def test_a_new_address_that_was_taken_meanwhile_is_a_409(scene: Scene) -> None:
    async with activated(scene) as (client, _):
        wanted = f"{fresh_name()}@example.org"
        await request_address(client, wanted)
        token = token_in(await scene.mails.mail_to(wanted))
        other = await scene.register(client, email=wanted)
        await ok(activate(client, await scene.token_for(other, 2)))
        assert_problem(await activate(client, token), 409, ["body", "email"])
        page = await client.post("/auth/activate", data={"token": token}, headers={"Accept": "text/html"})
        assert page.status_code == 409
        assert "This address is taken" in page.text


async def test_no_mailed_token_is_stored_or_logged(scene: Scene) -> None:
    """Check the database and the log after all the tests above."""
    tokens = [token_in(parsed(content)) for _, content in scene.mails.received if b"?token=" in content]
    assert len(tokens) >= 2
    tables = ("mails", "one_time_tokens", "events", "audit")
    rows = [repr(row) for table in tables for row in await sql(scene.service, f"SELECT * FROM {table}")]
    assert len(rows) > len(tokens)
    kept = "".join(rows) + scene.service.log()
    assert not [token for token in tokens if token in kept]
