"""Registering, signing in, and what an account may see."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter, ValidationError

from core.errors import SettingsError
from core.identity import Group, Identity
from core.settings import Settings
from main import prepare
from resources.accounts import credentials
from tests.support.backends import SQLITE_ONLY
from tests.support.resources import locations, nothing_written, sql, watching
from tests.support.service import ADMIN, PASSWORD, ROOT, Service

_names = itertools.count(1)
USER = {
    "id",
    "username",
    "email",
    "name",
    "first_name",
    "last_name",
    "phone_number",
    "group",
    "is_active",
    "awaits_activation",
    "gender",
    "date_of_birth",
    "info",
    "avatar_url",
    "avatar_thumbnail_url",
    "has_profile",
    "version",
    "created_at",
    "updated_at",
}


def fresh(prefix: str = "holly") -> str:
    return f"{prefix}{os.getpid()}x{next(_names)}"


REGISTERS = pytest.mark.parametrize("path", ["/auth/register", "/users"])


# --- register


@REGISTERS
async def test_a_new_user_is_answered_without_the_password(service: Service, path: str) -> None:
    async with service.anyone() as client:
        name = fresh("Holly.Martins-")
        body = {
            "username": name,
            "email": f"{name}@example.org",
            "password": PASSWORD,
            "name": "Holly Martins",
            "first_name": "Holly",
            "last_name": "Märtins",
            "phone_number": "+436641234567",
        }
        answer = await client.post(path, json=body)
        assert answer.status_code == 201
        user = answer.json()
        assert set(user) == USER
        del body["password"]
        assert user | body == user
        assert (user["group"], user["is_active"], user["version"]) == ("user", True, 1)
        assert PASSWORD not in answer.text
        stored = await sql(service, f"SELECT password_hash FROM users WHERE id = {user['id']}")
        assert stored[0][0].startswith("$argon2id$")


async def test_an_address_alone_is_enough(service: Service) -> None:
    async with service.anyone() as client:
        address = f"{fresh()}@example.org"
        user = (await client.post("/auth/register", json={"email": address, "password": PASSWORD})).json()
        assert (user["username"], user["email"]) == (None, address)
        for login in ({"username": address}, {"email": address}, {"email": address.upper()}):
            answer = await client.post("/auth/login", json={**login, "password": PASSWORD})
            assert answer.json()["user_id"] == user["id"], login


@pytest.mark.parametrize("padding", [" ", "\t\r\n", "\u3000\u2003"], ids=repr)
async def test_blanks_around_names_and_addresses_are_taken_off(service: Service, padding: str) -> None:
    async with service.person() as alice, service.anyone() as client:
        name = fresh()
        body = {"username": padding + name + padding, "email": f"{padding}{name}@example.org{padding}"}
        user = (await client.post("/auth/register", json={**body, "password": PASSWORD})).json()
        assert (user["username"], user["email"]) == (name, f"{name}@example.org")
        for login in (name, padding + name, f"{name}@example.org{padding}"):
            answer = await client.post("/auth/login", json={"username": login, "password": PASSWORD})
            assert answer.json().get("user_id") == user["id"], login
        taken = await client.post("/auth/register", json={"username": name + padding, "password": PASSWORD})
        assert taken.status_code == 409
        renamed = await alice.http.patch(
            "/users/me", json={"username": f"{padding}{alice.name}-2", "current_password": PASSWORD}
        )
        assert renamed.json()["username"] == f"{alice.name}-2"


@pytest.mark.parametrize(
    "name",
    ["two\nlines", "a\x1b[31mred", "a\x9b31mred", "\u200eleft", "over\u202eride", "bell\a", "\u2066\u2069"],
    ids=repr,
)
@pytest.mark.parametrize("field", ["name", "first_name", "last_name"])
@SQLITE_ONLY
async def test_what_disturbs_the_text_around_it_is_no_name(service: Service, field: str, name: str) -> None:
    async with service.anyone() as client:
        answer = await client.post("/users", json={"username": fresh(), "password": PASSWORD, field: name})
        assert (answer.status_code, locations(answer)) == (422, [["body", field]])


async def test_hashed_password_is_another_name_for_password(service: Service) -> None:
    async with service.anyone() as client:
        name = fresh()
        answer = await client.post("/users", json={"username": name, "hashedPassword": PASSWORD})
        assert answer.status_code == 201
        assert "hashedPassword" not in answer.json()
        answer = await client.post("/auth/login", json={"username": name, "password": PASSWORD})
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("given", "stored"),
    [("+436641234567", "+436641234567"), ("436641234567", "+436641234567"), ("+1234567", "+1234567"), (None, None)],
)
async def test_phone_numbers_are_stored_with_their_plus(service: Service, given: str, stored: str) -> None:
    async with service.anyone() as client:
        body = {"username": fresh(), "password": PASSWORD, "phone_number": given}
        assert (await client.post("/users", json=body)).json()["phone_number"] == stored


@REGISTERS
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"username": "ab"}, ["username"]),
        ({"username": "x" * 51}, ["username"]),
        ({"username": "two words"}, ["username"]),
        ({"username": "an@address"}, ["username"]),
        ({"username": "a/path"}, ["username"]),
        ({"username": "nul\0nul"}, ["username"]),
        ({"username": "li\nne"}, ["username"]),
        ({"username": "h\u200bolly"}, ["username"]),
        ({"username": "rtl\u202eabc"}, ["username"]),
        ({"username": "\u3164\u3164\u3164"}, ["username"]),
        ({"username": "victim\uff20example.org"}, ["username"]),
        ({"username": "tag\U000e0041"}, ["username"]),
        ({"username": 12345}, ["username"]),
        ({"email": "nobody"}, ["email"]),
        ({"email": "a@b"}, ["email"]),
        ({"email": "x" * 250 + "@example.org"}, ["email"]),
        ({"password": "hunter2"}, ["password"]),
        ({"password": "x" * 129}, ["password"]),
        ({"password": None}, ["password"]),
        ({"password": ["x" * 10]}, ["password"]),
        ({"phone_number": "0664123456"}, ["phone_number"]),
        ({"phone_number": "+43 664 123456"}, ["phone_number"]),
        ({"phone_number": "123456"}, ["phone_number"]),
        ({"phone_number": "+1234567890123456"}, ["phone_number"]),
        ({"phone_number": 436641234567}, ["phone_number"]),
        ({"name": ""}, ["name"]),
        ({"first_name": "x" * 101}, ["first_name"]),
        ({"last_name": "\0"}, ["last_name"]),
        ({"group": "admin"}, ["group"]),
        ({"is_active": True}, ["is_active"]),
        ({"id": 1}, ["id"]),
    ],
    ids=repr,
)
@SQLITE_ONLY
async def test_a_wrong_registration_is_refused(
    service: Service, path: str, change: dict[str, Any], field: list[str]
) -> None:
    async with service.anyone() as client, nothing_written(service):
        answer = await client.post(path, json={"username": fresh(), "password": PASSWORD} | change)
        assert answer.status_code == 422
        assert locations(answer) == [["body", *field]]
        assert "hunter2" not in answer.text  # what was typed is not repeated


@pytest.mark.parametrize("body", [{}, {"username": "holly"}, {"password": PASSWORD}, {"name": "x"}])
@SQLITE_ONLY
async def test_a_registration_needs_a_name_and_a_password(service: Service, body: dict[str, str]) -> None:
    async with service.anyone() as client, nothing_written(service):
        answer = await client.post("/users", json=body)
        assert answer.status_code == 422
        assert locations(answer) == [["body"]]


async def test_a_name_is_taken_however_it_is_spelt(service: Service) -> None:
    async with service.anyone() as client:
        name = fresh("Émile")
        address = f"{fresh()}@example.org"
        first = {"username": name, "email": address, "password": PASSWORD}
        assert (await client.post("/users", json=first)).status_code == 201
        wide = "".join(chr(ord(c) + 0xFEE0) if c.isascii() else c for c in name)
        decomposed = name.replace("É", "E\u0301")
        async with nothing_written(service):
            for username in (name, name.upper(), name.lower(), wide, decomposed):
                answer = await client.post("/users", json={"username": username, "password": PASSWORD})
                assert answer.status_code == 409, username
                assert locations(answer) == [["body", "username"]]
            for email in (address, address.upper().replace("EXAMPLE.ORG", "Example.org")):
                answer = await client.post("/users", json={"email": email, "password": PASSWORD})
                assert answer.status_code == 409
                assert locations(answer) == [["body", "email"]]
            answer = await client.post("/users", json=first)
            assert locations(answer) == [["body", "username"], ["body", "email"]]


async def test_of_registrations_at_once_one_wins(service: Service) -> None:
    async with service.anyone() as client:
        body = {"username": fresh(), "email": f"{fresh()}@example.org", "password": PASSWORD}
        answers = await asyncio.gather(*(client.post("/users", json=body) for _ in range(8)))
        assert sorted(answer.status_code for answer in answers) == [201] + [409] * 7
        for answer in answers:
            if answer.status_code == 409:
                # Of two that reach the database at the same moment, it names the one that it looked at first.
                taken = {tuple(where) for where in locations(answer)}
                assert taken
                assert taken <= {("body", "username"), ("body", "email")}
        assert await sql(service, f"SELECT COUNT(*) FROM users WHERE username = '{body['username']}'") == [(1,)]


async def test_names_that_grow_when_normalised_are_names(service: Service) -> None:
    async with service.anyone() as client:
        # Eighteen characters each in their normalised form.
        for n in (49, 50):
            name = "\ufdfa" * n
            assert (await client.post("/users", json={"username": name, "password": PASSWORD})).status_code == 201
            assert (await client.post("/users", json={"username": name, "password": PASSWORD})).status_code == 409
            answer = await client.post("/auth/login", json={"username": name, "password": PASSWORD})
            assert answer.status_code == 200
            assert (await client.get(f"/movies/username/{name}")).status_code == 200


# --- sign in


async def test_signing_in_answers_a_token(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client:
        for answer in (
            await client.post("/auth/login", json={"username": alice.name, "password": PASSWORD}),
            await client.post("/auth/login", json={"username": alice.name.upper(), "password": PASSWORD}),
            await client.post("/token", json={"username": alice.name, "password": PASSWORD}),
            await client.post("/token", data={"username": alice.name, "password": PASSWORD}),
            await client.post(
                "/token",
                data={"grant_type": "password", "username": alice.name, "password": PASSWORD, "scope": "", "x": "y"},
            ),
        ):
            assert answer.status_code == 200, answer.text
            assert answer.headers["cache-control"] == "no-store"
            token = answer.json()
            assert token == {
                "access_token": token["access_token"],
                "refresh_token": token["refresh_token"],
                "token_type": "bearer",
                "expires_in": 900,
                "refresh_expires_in": 7 * 24 * 3600,
                "user_id": alice.id,
                "session_id": token["session_id"],
            }
            headers = {"Authorization": f"bearer {token['access_token']}"}
            assert (await client.get("/auth/me", headers=headers)).json()["id"] == alice.id


async def test_a_refusal_does_not_say_who_exists(service: Service) -> None:
    async with (
        service.person() as alice,
        service.person() as gone,
        service.person() as waiting,
        service.anyone() as client,
    ):
        await sql(service, f"UPDATE users SET is_active = false WHERE id = {gone.id}")
        await sql(service, f"UPDATE users SET is_active = false, awaits_activation = true WHERE id = {waiting.id}")

        def told(answer: httpx.Response) -> tuple[Any, ...]:
            headers = {name: value for name, value in answer.headers.items() if name not in ("date", "x-request-id")}
            return answer.status_code, answer.json(), headers

        for path in ("/auth/login", "/token"):
            seen = [
                told(await client.post(path, json={"username": name, "password": password}))
                for name, password in (
                    (alice.name, "wrong password"),
                    ("nobody-at-all", "wrong password"),
                    ("nobody@example.org", "wrong password"),
                    (gone.name, "wrong password"),
                    (waiting.name, "wrong password"),
                )
            ]
            assert seen[0][0] == 401
            assert seen[0][2]["www-authenticate"] == "Bearer"
            assert all(each == seen[0] for each in seen), seen


async def test_whoever_knows_the_password_is_told_why_the_account_is_shut(service: Service) -> None:
    async with service.person() as gone, service.person() as waiting, service.anyone() as client:
        await sql(service, f"UPDATE users SET is_active = false WHERE id = {gone.id}")
        await sql(service, f"UPDATE users SET is_active = false, awaits_activation = true WHERE id = {waiting.id}")
        async with nothing_written(service):
            for person, reason in ((gone, "disabled"), (waiting, "POST /auth/activate/resend")):
                for path in ("/auth/login", "/token"):
                    answer = await client.post(path, json={"username": person.name, "password": PASSWORD})
                    assert answer.status_code == 403
                    assert reason in answer.json()["detail"]


async def test_an_old_token_does_not_keep_anybody_from_signing_in(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client:
        client.headers["Authorization"] = "Bearer nonsense"
        answer = await client.post("/auth/login", json={"username": alice.name, "password": PASSWORD})
        assert answer.status_code == 200
        refresh_token = answer.json()["refresh_token"]
        assert (await client.post("/auth/refresh", json={"refresh_token": refresh_token})).status_code == 200


@pytest.mark.parametrize("login", ["nul\0nul", "x" * 320, "\ufdfa" * 320, "@", "'; --", " ", "a@b\0"], ids=ascii)
async def test_strange_names_are_nobody(service: Service, login: str) -> None:
    async with service.anyone() as client, nothing_written(service):
        for answer in (
            await client.post("/auth/login", json={"username": login, "password": PASSWORD}),
            await client.post("/auth/login", json={"email": login, "password": PASSWORD}),
            await client.post("/token", data={"username": login, "password": PASSWORD}),
        ):
            assert answer.status_code in ((401, 422) if "\0" in login else (401,)), answer.text


async def test_strange_passwords_are_passwords(service: Service) -> None:
    async with service.anyone() as client:
        for password in ("nul \0 inside", "😀" * 128, "e\u0301" * 8):
            name = fresh()
            assert (await client.post("/users", json={"username": name, "password": password})).status_code == 201
            answer = await client.post("/auth/login", json={"username": name, "password": password})
            assert answer.status_code == 200
            answer = await client.post("/auth/login", json={"username": name, "password": password[:-1] + "x"})
            assert answer.status_code == 401


@pytest.mark.parametrize(
    "body",
    [{}, {"username": "x"}, {"password": "x"}, {"username": "", "password": "x"}, {"username": "x", "password": ""}],
)
async def test_a_sign_in_that_lacks_something_is_named(service: Service, body: dict[str, str]) -> None:
    async with service.anyone() as client:
        assert (await client.post("/auth/login", json=body)).status_code == 422
        assert (await client.post("/token", json=body)).status_code == 422
        assert (await client.post("/token", data=body)).status_code == (422 if body else 415)
        assert (await client.post("/auth/login", data=body)).status_code == 415


@REGISTERS
async def test_every_rule_that_a_new_password_breaks_is_named_with_all_else_that_is_wrong(
    service: Service, path: str
) -> None:
    async with service.anyone() as client, nothing_written(service):
        body = {"username": "password", "password": "Password", "hashedPassword": "short", "phone_number": "1"}
        answer = await client.post(path, json=body)
        assert answer.status_code == 422
        assert sorted((each["loc"], each["type"]) for each in answer.json()["detail"]) == [
            (["body", "hashedPassword"], "string_too_short"),
            (["body", "password"], "password_is_common"),
            (["body", "password"], "password_is_name"),
            (["body", "phone_number"], "string_pattern_mismatch"),
        ]


async def test_another_grant_is_refused(service: Service) -> None:
    async with service.anyone() as client:
        form = {"grant_type": "client_credentials", "username": "x", "password": "x"}
        answer = await client.post("/token", data=form)
        assert locations(answer) == [["body", "grant_type"]]
        form_headers = {"Content-Type": "application/x-www-form-urlencoded"}
        for raw in (b"username=%ff&password=x", b"\xff", b"&" * 100, b"a=b&" * 100, b"username=" + b"x" * 100_000):
            assert (await client.post("/token", content=raw, headers=form_headers)).status_code in (401, 422)


# --- who am I, and who is there


async def test_me_is_the_account(service: Service) -> None:
    async with service.person() as alice, service.anyone() as nobody:
        me = (await alice.http.get("/auth/me")).json()
        assert set(me) == USER
        assert (me["id"], me["username"]) == (alice.id, alice.name)
        answer = await nobody.get("/auth/me")
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"


async def test_only_admins_list_the_users_that_are_not_admins(service: Service) -> None:
    async with service.person() as alice, service.admin() as admin, service.anyone() as nobody:
        assert (await nobody.get("/users/nonAdmin")).status_code == 401
        assert (await alice.http.get("/users/nonAdmin")).status_code == 403
        answer = await admin.http.get("/users/nonAdmin?limit=1000")
        users = answer.json()
        assert all(set(user) == USER for user in users)
        assert alice.id in [user["id"] for user in users]
        assert admin.id not in [user["id"] for user in users]
        assert int(answer.headers["x-total-count"]) == len(users)
        page = await admin.http.get("/users/nonAdmin?offset=1&limit=1")
        assert page.json() == users[1:2]
        assert (await admin.http.get("/users/nonAdmin?limit=-1")).status_code == 422


async def test_moderators_do_not_list_users(service: Service) -> None:
    async with service.person() as person:
        await sql(service, f"UPDATE users SET \"group\" = 'moderator' WHERE id = {person.id}")
        assert (await person.http.get("/users/nonAdmin")).status_code == 403


async def test_watchers_are_not_told_of_new_users(service: Service) -> None:
    async with watching(service) as watcher, service.person() as alice:
        await alice.add()
        event = await watcher.expect("add", "movies")
        # The registration took two numbers, for admins and for alice, and the session one.
        assert event["seq"] == watcher.welcome["data"]["seq"] + 4


@pytest.mark.parametrize(
    ("group", "owner", "may"),
    [
        (Group.USER, 7, True),
        (Group.USER, 8, False),
        (Group.USER, None, False),
        (Group.MODERATOR, 8, True),
        (Group.MODERATOR, None, True),
        (Group.ADMIN, 8, True),
    ],
)
def test_owners_and_staff_may_change(group: Group, owner: int | None, may: bool) -> None:
    assert Identity(7, group, 0.0, "a session", "holly").may_change(owner) is may


# --- the command line


def cli(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in service.settings}
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *arguments],
        env=environment | service.settings,
        cwd=service.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_create_admin_makes_an_admin_beside_a_running_service(service: Service) -> None:
    name = fresh("chief")
    arguments = ("create-admin", "--username", name, "--email", f"{name}@example.org", "--password", PASSWORD)
    done = await asyncio.to_thread(cli, service, *arguments)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout
    async with service.anyone() as client:
        token = (await client.post("/token", data={"username": name, "password": PASSWORD})).json()["access_token"]
        headers = {"Authorization": f"Bearer {token}"}
        assert (await client.get("/auth/me", headers=headers)).json()["group"] == "admin"
        assert (await client.get("/users/nonAdmin", headers=headers)).status_code == 200
        kept = (await client.get("/admin/audit?action=create&limit=1", headers=headers)).json()[0]
        assert (kept["changes"], kept["actor_id"]) == ({"group": [None, "admin"]}, None)
        assert kept["user_id"] == (await client.get("/auth/me", headers=headers)).json()["id"]
    again = await asyncio.to_thread(cli, service, *arguments)
    assert again.returncode == 1
    assert "taken" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--username", "ab", "--password", PASSWORD),
        ("--username", "chieftain", "--password", "hunter2"),
        ("--username", "chieftain", "--password", "Chieftain"),
        ("--username", "chieftain", "--password", "iloveyou"),
        ("--email", "nobody", "--password", PASSWORD),
        ("--password", PASSWORD),
        ("--nonsense",),
    ],
)
@SQLITE_ONLY  # it does not come as far as a database
async def test_create_admin_refuses_in_a_sentence(service: Service, arguments: tuple[str, ...]) -> None:
    async with nothing_written(service):
        done = await asyncio.to_thread(cli, service, "create-admin", *arguments)
        assert done.returncode == 2
        assert "Error: " in done.stderr
        assert "Traceback" not in done.stderr
        assert "hunter2" not in done.stderr


@pytest.mark.parametrize(
    ("password", "mix", "reason"),
    [
        ("short", "off", "string should have at least 8 characters"),
        ("iloveyou", "off", "the password is too common"),
        ("chieftain", "off", "the password must differ from the user name"),
        ("third man 1949", "on", "the password needs an uppercase letter"),
    ],
)
async def test_a_first_admin_needs_a_good_password(tmp_path: Path, password: str, mix: str, reason: str) -> None:
    url = f"sqlite:///{tmp_path}/marquee.db"
    settings = Settings(
        database_url=url,
        mail_folder=str(tmp_path / "mail"),
        storage_url=f"file://{tmp_path}/storage",
        first_admin_username="Chieftain",
        first_admin_password=password,
        password_mix=mix,
        _env_file=None,
    )
    with pytest.raises(SettingsError, match=f"^FIRST_ADMIN_PASSWORD: {reason}"):
        await prepare(settings)


async def test_the_first_admin_comes_from_the_settings(service: Service) -> None:
    async with service.admin() as admin:
        me = (await admin.http.get("/auth/me")).json()
        assert (me["username"], me["group"]) == (ADMIN[0], "admin")


@pytest.mark.parametrize("fate", ["renamed", "deleted"])
async def test_a_first_admin_that_went_does_not_come_back(new_service: Callable[..., Service], fate: str) -> None:
    """With the password that everybody who set the service up knows."""
    service = new_service().start()
    async with service.admin() as admin, service.person() as alice:
        path = f"/admin/users/{alice.id}/change-group"
        assert (await admin.http.post(path, json={"group": "admin"})).is_success
        if fate == "renamed":
            body = {"username": "retired", "current_password": ADMIN[1]}
            assert (await admin.http.patch("/users/me", json=body)).is_success
        else:
            assert (await admin.http.delete("/users/me")).is_success
        assert service.stop() == 0
        service.start()
        found = (await alice.http.get("/users?group=admin&sort=id")).json()
        assert [user["id"] for user in found] == ([admin.id, alice.id] if fate == "renamed" else [alice.id])
    async with service.anyone() as client:
        login = {"username": ADMIN[0], "password": ADMIN[1]}
        assert (await client.post("/auth/login", json=login)).status_code == 401


async def test_a_first_admin_whose_name_is_somebody_elses_is_told_of(new_service: Callable[..., Service]) -> None:
    service = new_service(FIRST_ADMIN_USERNAME="", FIRST_ADMIN_PASSWORD="").start()
    async with service.person(ADMIN[0]):
        pass
    assert service.stop() == 0
    service.settings |= {"FIRST_ADMIN_USERNAME": ADMIN[0], "FIRST_ADMIN_PASSWORD": ADMIN[1]}
    service.start()
    assert "first admin not created" in service.log()


def test_names_hold_nothing_that_cannot_be_seen() -> None:
    """Of all that Unicode has; what it calls unassigned may become anything."""
    names = TypeAdapter(credentials.Username)
    unseen = {"Cc", "Cf", "Co", "Zl", "Zp", "Zs"}
    for character in map(chr, range(0x110000)):
        if unicodedata.category(character) in unseen:
            with pytest.raises(ValidationError):
                names.validate_python(f"ho{character}lly")
