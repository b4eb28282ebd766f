"""Registration, sign-in, the command that creates admins, and the first admin."""

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

from commands.cli import run
from core.errors import SettingsError
from core.identity import Group, Identity
from core.settings import Settings, load_settings
from main import prepare
from resources.accounts import credentials
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, change_group, ok, sign_in, values_by_field
from tests.support.resources import locations, nothing_written, sql, watching
from tests.support.service import ADMIN, PASSWORD, ROOT, SECRET, Person, Service

_names = itertools.count(1)
USER = {
    "id", "username", "email", "name", "first_name", "last_name", "phone_number", "group", "is_active",
    "awaits_activation", "gender", "date_of_birth", "info", "avatar_url", "avatar_thumbnail_url", "has_profile",
    "version", "created_at", "updated_at",
}  # fmt: skip


def fresh(prefix: str = "holly") -> str:
    return f"{prefix}{os.getpid()}x{next(_names)}"


REGISTERS = pytest.mark.parametrize("path", ["/auth/register", "/users"])


INVALID: dict[str, list[Any]] = {
    "username": [
        *("ab", "x" * 51, "two words", "an@address", "a/path", "nul\0nul", "li\nne", "h\u200bolly", "rtl\u202eabc"),
        *("\u3164\u3164\u3164", "victim\uff20example.org", "tag\U000e0041", 12345),
    ],
    "email": ["nobody", "a@b", "x" * 250 + "@example.org"],
    "password": ["hunter2", "x" * 129, None, ["x" * 10]],
    "phone_number": ["0664123456", "+43 664 123456", "123456", "+1234567890123456", 436641234567],
    "name": [""],
    "first_name": ["x" * 101],
    "last_name": ["\0"],
    "group": ["admin"],
    "is_active": [True],
    "id": [1],
}


# --- register


@REGISTERS
async def test_registration_returns_the_account_without_the_password(service: Service, path: str) -> None:
    async with service.anyone() as client:
        name = fresh("Holly.Martins-")
        fields = {"username": name, "email": f"{name}@example.org", "phone_number": "+436641234567"}
        fields |= {"name": "Holly Martins", "first_name": "Holly", "last_name": "Märtins"}
        user = await ok(client.post(path, json={**fields, "password": PASSWORD}), 201)
        assert set(user) == USER
        assert user | fields == user
        assert (user["group"], user["is_active"], user["version"]) == ("user", True, 1)
        assert PASSWORD not in str(user)
        stored = await sql(service, f"SELECT password_hash FROM users WHERE id = {user['id']}")
        assert stored[0][0].startswith("$argon2id$")


async def test_an_email_address_is_enough_to_register_and_sign_in(service: Service) -> None:
    async with service.anyone() as client:
        address = f"{fresh()}@example.org"
        user = (await client.post("/auth/register", json={"email": address, "password": PASSWORD})).json()
        assert (user["username"], user["email"]) == (None, address)
        for login in ({"username": address}, {"email": address}, {"email": address.upper()}):
            answer = await client.post("/auth/login", json={**login, "password": PASSWORD})
            assert answer.json()["user_id"] == user["id"], login


@pytest.mark.parametrize("padding", [" ", "\t\r\n", "\u3000\u2003"], ids=repr)
async def test_spaces_around_names_and_addresses_are_stripped(service: Service, padding: str) -> None:
    async with service.person() as alice, service.anyone() as client:
        name = fresh()
        body = {"username": padding + name + padding, "email": f"{padding}{name}@example.org{padding}"}
        user = (await client.post("/auth/register", json={**body, "password": PASSWORD})).json()
        assert (user["username"], user["email"]) == (name, f"{name}@example.org")
        for login in (name, padding + name, f"{name}@example.org{padding}"):
            assert (await sign_in(client, login)).json().get("user_id") == user["id"], login
        taken = await client.post("/auth/register", json={"username": name + padding, "password": PASSWORD})
        assert taken.status_code == 409
        body = {"username": f"{padding}{alice.name}-2", "current_password": PASSWORD}
        assert (await alice.http.patch("/users/me", json=body)).json()["username"] == f"{alice.name}-2"


@pytest.mark.parametrize("field", ["name", "first_name", "last_name"])
@SQLITE_ONLY
async def test_control_and_direction_characters_are_rejected_in_names(service: Service, field: str) -> None:
    async with service.anyone() as client:
        for unseen in ("\n", "\x1b[31m", "\x9b31m", "\u200e", "\u202e", "\a", "\u2066\u2069"):
            body = {"username": fresh(), "password": PASSWORD, field: f"a{unseen}b"}
            assert_problem(await client.post("/users", json=body), 422, ["body", field])


async def test_hashed_password_is_an_alias_of_password(service: Service) -> None:
    async with service.anyone() as client:
        name = fresh()
        user = await ok(client.post("/users", json={"username": name, "hashedPassword": PASSWORD}), 201)
        assert "hashedPassword" not in user
        assert (await sign_in(client, name)).status_code == 200


async def test_phone_numbers_are_stored_with_a_leading_plus(service: Service) -> None:
    async with service.anyone() as client:
        plus = "+436641234567"
        for given, stored in ((plus, plus), (plus[1:], plus), ("+1234567", "+1234567"), (None, None)):
            body = {"username": fresh(), "password": PASSWORD, "phone_number": given}
            assert (await client.post("/users", json=body)).json()["phone_number"] == stored


@REGISTERS
@pytest.mark.parametrize(("field", "value"), values_by_field(INVALID), ids=repr)
@SQLITE_ONLY
async def test_an_invalid_registration_is_rejected(service: Service, path: str, field: str, value: Any) -> None:
    async with service.anyone() as client, nothing_written(service):
        answer = await client.post(path, json={"username": fresh(), "password": PASSWORD} | {field: value})
        assert_problem(answer, 422, ["body", field])
        assert "hunter2" not in answer.text  # the response does not repeat the input


@pytest.mark.parametrize("body", [{}, {"username": "holly"}, {"password": PASSWORD}, {"name": "x"}])
@SQLITE_ONLY
async def test_a_registration_needs_a_name_and_a_password(service: Service, body: dict[str, str]) -> None:
    async with service.anyone() as client, nothing_written(service):
        missing = ("username" not in body) + ("password" not in body)
        assert_problem(await client.post("/users", json=body), 422, *[["body"]] * missing)


async def test_a_name_is_taken_in_every_spelling(service: Service) -> None:
    async with service.anyone() as client:
        name, address = fresh("Émile"), f"{fresh()}@example.org"
        first = {"username": name, "email": address, "password": PASSWORD}
        assert (await client.post("/users", json=first)).status_code == 201
        wide = "".join(chr(ord(c) + 0xFEE0) if c.isascii() else c for c in name)
        names = (name, name.upper(), name.lower(), wide, name.replace("É", "E\u0301"))
        addresses = (address, address.upper().replace("EXAMPLE.ORG", "Example.org"))
        async with nothing_written(service):
            for field, spellings in (("username", names), ("email", addresses)):
                for each in spellings:
                    answer = await client.post("/users", json={field: each, "password": PASSWORD})
                    assert_problem(answer, 409, ["body", field])
            assert_problem(await client.post("/users", json=first), 409, ["body", "username"], ["body", "email"])


async def test_only_one_of_several_concurrent_registrations_succeeds(service: Service) -> None:
    async with service.anyone() as client:
        body = {"username": fresh(), "email": f"{fresh()}@example.org", "password": PASSWORD}
        answers = await asyncio.gather(*(client.post("/users", json=body) for _ in range(8)))
        assert sorted(answer.status_code for answer in answers) == [201] + [409] * 7
        for answer in answers:
            if answer.status_code == 409:
                # If requests reach the database simultaneously, the error names the constraint that is checked first.
                taken = {tuple(where) for where in locations(answer)}
                assert taken
                assert taken <= {("body", "username"), ("body", "email")}
        assert await sql(service, f"SELECT COUNT(*) FROM users WHERE username = '{body['username']}'") == [(1,)]


async def test_names_that_grow_when_normalised_are_accepted(service: Service) -> None:
    async with service.anyone() as client:
        # Each character becomes eighteen characters when it is normalised.
        for n in (49, 50):
            name = "\ufdfa" * n
            for status in (201, 409):
                answer = await client.post("/users", json={"username": name, "password": PASSWORD})
                assert answer.status_code == status
            assert (await sign_in(client, name)).status_code == 200
            assert (await client.get(f"/movies/username/{name}")).status_code == 200


# --- sign in


async def test_signing_in_returns_tokens(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client:
        login = {"username": alice.name, "password": PASSWORD}
        for answer in (
            await client.post("/auth/login", json=login),
            await client.post("/auth/login", json=login | {"username": alice.name.upper()}),
            await client.post("/token", json=login),
            await client.post("/token", data=login),
            await client.post("/token", data={"grant_type": "password", **login, "scope": "", "x": "y"}),
        ):
            assert answer.status_code == 200, answer.text
            assert answer.headers["cache-control"] == "no-store"
            token = answer.json()
            assert token == {
                **{name: token[name] for name in ("access_token", "refresh_token", "session_id")},
                "token_type": "bearer",
                "expires_in": 900,
                "refresh_expires_in": 7 * 24 * 3600,
                "user_id": alice.id,
            }
            headers = {"Authorization": f"bearer {token['access_token']}"}
            assert (await client.get("/auth/me", headers=headers)).json()["id"] == alice.id


@SQLITE_ONLY
async def test_both_doors_take_every_name_of_the_login_and_the_password(service: Service) -> None:
    name = fresh()
    address = f"{name}@example.org"
    async with service.anyone() as client:
        body = {"username": name, "email": address, "hashedPassword": PASSWORD}
        assert (await client.post("/auth/register", json=body)).status_code == 201
        for login in ({"username": name}, {"username": address}, {"email": address}, {"email": name}):
            for password in ({"password": PASSWORD}, {"hashedPassword": PASSWORD}):
                for answer in (
                    await client.post("/auth/login", json=login | password),
                    await client.post("/token", json=login | password),
                    await client.post("/token", data=login | password),
                    await client.post("/token", data={"grant_type": "password", **login, **password}),
                ):
                    assert answer.status_code == 200, answer.text
        for path in ("/auth/login", "/token"):
            both = {"username": name, "password": PASSWORD, "email": "other@example.org", "hashedPassword": "other"}
            assert (await client.post(path, json=both)).status_code == 200, "`username` and `password` take precedence"
            wrong = {"email": address, "hashedPassword": "not the password"}
            assert (await client.post(path, json=wrong)).status_code == 401


async def shut_out(service: Service, disabled: Person, waiting: Person) -> None:
    """Disable one account, and make the other one await its activation."""
    await sql(service, f"UPDATE users SET is_active = false WHERE id IN ({disabled.id}, {waiting.id})")
    await sql(service, f"UPDATE users SET awaits_activation = true WHERE id = {waiting.id}")


async def test_a_failed_sign_in_does_not_reveal_which_accounts_exist(service: Service) -> None:
    people = service.person(), service.person(), service.person()
    async with people[0] as alice, people[1] as disabled, people[2] as waiting, service.anyone() as client:
        await shut_out(service, disabled, waiting)

        def seen(answer: httpx.Response) -> tuple[Any, ...]:
            headers = {name: value for name, value in answer.headers.items() if name not in ("date", "x-request-id")}
            return answer.status_code, answer.json(), headers

        names = (alice.name, "nobody-at-all", "nobody@example.org", disabled.name, waiting.name)
        for path in ("/auth/login", "/token"):
            bodies = [{"username": name, "password": "wrong password"} for name in names]
            first, *others = [seen(await client.post(path, json=body)) for body in bodies]
            assert (first[0], first[2]["www-authenticate"]) == (401, "Bearer")
            assert others == [first] * 4


async def test_with_the_right_password_the_response_says_why_the_account_is_closed(service: Service) -> None:
    async with service.person() as disabled, service.person() as waiting, service.anyone() as client:
        await shut_out(service, disabled, waiting)
        async with nothing_written(service):
            for person, reason in ((disabled, "disabled"), (waiting, "POST /auth/activate/resend")):
                for path in ("/auth/login", "/token"):
                    answer = await client.post(path, json={"username": person.name, "password": PASSWORD})
                    assert answer.status_code == 403
                    assert reason in answer.json()["detail"]


@SQLITE_ONLY
async def test_an_invalid_token_does_not_prevent_signing_in(service: Service) -> None:
    async with service.person() as alice, service.anyone() as client:
        client.headers["Authorization"] = "Bearer nonsense"
        token = await ok(sign_in(client, alice.name))
        assert (await client.post("/auth/refresh", json={"refresh_token": token["refresh_token"]})).status_code == 200


@pytest.mark.parametrize("login", ["nul\0nul", "x" * 320, "\ufdfa" * 320, "@", "'; --", " ", "a@b\0"], ids=ascii)
async def test_unusual_login_names_are_rejected_like_unknown_ones(service: Service, login: str) -> None:
    async with service.anyone() as client, nothing_written(service):
        for answer in (
            await sign_in(client, login),
            await client.post("/auth/login", json={"email": login, "password": PASSWORD}),
            await client.post("/token", data={"username": login, "password": PASSWORD}),
        ):
            assert answer.status_code in ((401, 422) if "\0" in login else (401,)), answer.text


async def test_passwords_may_hold_any_character(service: Service) -> None:
    async with service.anyone() as client:
        for password in ("nul \0 inside", "😀" * 128, "e\u0301" * 8):
            name = fresh()
            assert (await client.post("/users", json={"username": name, "password": password})).status_code == 201
            assert (await sign_in(client, name, password)).status_code == 200
            assert (await sign_in(client, name, password[:-1] + "x")).status_code == 401


@pytest.mark.parametrize(
    "body",
    [
        *(
            {},
            {"username": "x"},
            {"password": "x"},
            {"username": "", "password": "x"},
            {"username": "x", "password": ""},
        ),
        *({"email": "x"}, {"hashedPassword": "x"}, {"email": "x", "hashedPassword": ""}),
    ],
)
@SQLITE_ONLY
async def test_an_incomplete_sign_in_is_rejected(service: Service, body: dict[str, str]) -> None:
    async with service.anyone() as client:
        assert (await client.post("/auth/login", json=body)).status_code == 422
        assert (await client.post("/token", json=body)).status_code == 422
        assert (await client.post("/token", data=body)).status_code == (422 if body else 415)
        assert (await client.post("/auth/login", data=body)).status_code == 415


@REGISTERS
@SQLITE_ONLY
async def test_a_registration_reports_every_broken_rule_at_once(service: Service, path: str) -> None:
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


@SQLITE_ONLY
async def test_other_grants_and_broken_forms_are_rejected(service: Service) -> None:
    async with service.anyone() as client:
        form = {"grant_type": "client_credentials", "username": "x", "password": "x"}
        assert_problem(await client.post("/token", data=form), 422, ["body", "grant_type"])
        form_headers = {"Content-Type": "application/x-www-form-urlencoded"}
        for raw in (b"username=%ff&password=x", b"\xff", b"&" * 100, b"a=b&" * 100, b"username=" + b"x" * 100_000):
            assert (await client.post("/token", content=raw, headers=form_headers)).status_code in (401, 422)


# --- reading accounts


async def test_admins_list_the_users_that_are_not_admins(service: Service) -> None:
    async with service.person() as alice, service.admin() as admin:
        answer = await admin.http.get("/users/nonAdmin?limit=1000")
        users = answer.json()
        assert all(set(user) == USER for user in users)
        ids = [user["id"] for user in users]
        assert (alice.id in ids, admin.id in ids) == (True, False)
        assert int(answer.headers["x-total-count"]) == len(users)
        assert (await admin.http.get("/users/nonAdmin?offset=1&limit=1")).json() == users[1:2]
        assert (await admin.http.get("/users/nonAdmin?limit=-1")).status_code == 422


async def test_the_list_of_users_that_are_not_admins_is_a_list_like_the_others(service: Service) -> None:
    path = "/users/nonAdmin"
    async with service.person() as alice, service.person() as bob, service.admin() as admin:
        family = fresh("Lime")
        for person in (alice, bob, admin):
            await ok(admin.http.patch(f"/users/{person.id}", json={"last_name": family}))
        await ok(admin.http.patch(f"/users/{bob.id}", json={"first_name": "Harry"}))

        async def ids(query: str) -> list[int]:
            return [user["id"] for user in await ok(admin.http.get(f"{path}?{query}"))]

        assert await ids(f"q={family}&sort=-id") == [bob.id, alice.id]
        assert await ids(f"last_name={family}&first_name=Harry") == [bob.id]
        assert await ids(f"last_name={family}&group=admin") == []
        first = await admin.http.get(f"{path}?last_name={family}&sort=-id&limit=1")
        assert (first.headers["x-total-count"], 'rel="next"' in first.headers["link"]) == ("2", True)
        after = await admin.http.get(f"{path}?last_name={family}&limit=1&after={alice.id}")
        assert [user["id"] for user in after.json()] == [bob.id]
        for invalid in ("sort=password_hash", "password_hash=x", "after=x"):
            assert (await admin.http.get(f"{path}?{invalid}")).status_code == 422
        assert (await alice.http.get(f"{path}?q={family}")).status_code == 403


async def test_public_watchers_receive_no_events_of_new_users(service: Service) -> None:
    async with watching(service) as watcher, service.person() as alice:
        await alice.add()
        event = await watcher.expect("add", "movies")
        # The registration wrote two events, one for admins and one for Alice. The sign-in wrote the third.
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
def test_owners_moderators_and_admins_may_change_a_row(group: Group, owner: int | None, may: bool) -> None:
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


async def test_create_admin_adds_an_admin_beside_a_running_service(service: Service) -> None:
    name = fresh("chief")
    arguments = ("create-admin", "--username", name, "--email", f"{name}@example.org", "--password", PASSWORD)
    names = ("--first-name", "Anna", "--last-name", "Schmidt")
    done = await asyncio.to_thread(cli, service, *arguments, *names)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout
    async with service.anyone() as client:
        token = (await client.post("/token", data={"username": name, "password": PASSWORD})).json()["access_token"]
        headers = {"Authorization": f"Bearer {token}"}
        me = (await client.get("/auth/me", headers=headers)).json()
        assert (me["group"], me["first_name"], me["last_name"]) == ("admin", "Anna", "Schmidt")
        assert (await client.get("/users/nonAdmin", headers=headers)).status_code == 200
        kept = (await client.get("/admin/audit?action=create&limit=1", headers=headers)).json()[0]
        assert (kept["changes"], kept["actor_id"]) == ({"group": [None, "admin"]}, None)
        assert kept["user_id"] == (await client.get("/auth/me", headers=headers)).json()["id"]
    again = await asyncio.to_thread(cli, service, *arguments)
    assert (again.returncode, "taken" in again.stderr, "Traceback" in again.stderr) == (1, True, False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--username", "ab", "--password", PASSWORD),
        *(("--username", "chieftain", "--password", password) for password in ("hunter2", "Chieftain", "iloveyou")),
        ("--email", "nobody", "--password", PASSWORD),
        ("--password", PASSWORD),
        ("--nonsense",),
    ],
)
def test_create_admin_rejects_invalid_arguments(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/marquee.db")
    monkeypatch.setenv("SECRET_KEY", SECRET)
    monkeypatch.setattr("commands.accounts.configured", load_settings)  # the command must not reconfigure the logging
    monkeypatch.setattr(sys, "argv", ["marquee", "create-admin", *arguments])
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    written = capsys.readouterr().err
    assert [word in written for word in ("Error: ", "Traceback", "hunter2")] == [True, False, False]
    assert list(tmp_path.iterdir()) == [], "the command fails before it creates a database"


@pytest.mark.parametrize(
    ("password", "mix", "reason"),
    [
        ("short", "off", "string should have at least 8 characters"),
        ("iloveyou", "off", "the password is too common"),
        ("chieftain", "off", "the password must differ from the user name"),
        ("third man 1949", "on", "the password needs an uppercase letter"),
    ],
)
async def test_the_first_admin_needs_a_valid_password(tmp_path: Path, password: str, mix: str, reason: str) -> None:
    places: dict[str, Any] = {"mail_folder": str(tmp_path / "mail"), "storage_url": f"file://{tmp_path}/storage"}
    admin = {"first_admin_username": "Chieftain", "first_admin_password": password, "password_mix": mix}
    settings = Settings(database_url=f"sqlite:///{tmp_path}/marquee.db", _env_file=None, **places | admin)
    with pytest.raises(SettingsError, match=f"^FIRST_ADMIN_PASSWORD: {reason}"):
        await prepare(settings)


@SQLITE_ONLY
async def test_the_first_admin_may_have_first_and_last_names(new_service: Callable[..., Service]) -> None:
    names = {"first_name": "Anna", "last_name": "Schmidt"}
    service = new_service(**{f"FIRST_ADMIN_{name.upper()}": f" {value} " for name, value in names.items()}).start()
    async with service.admin() as admin:
        me = await ok(admin.http.get("/users/me"))
    assert {name: me[name] for name in names} == names
    assert "Schmidt" not in service.log()


@pytest.mark.parametrize("name", ["first_name", "last_name"])
async def test_an_invalid_name_of_the_first_admin_is_one_sentence(tmp_path: Path, name: str) -> None:
    places: dict[str, Any] = {"mail_folder": str(tmp_path / "mail"), "storage_url": f"file://{tmp_path}/storage"}
    admin = {"first_admin_username": "chief", "first_admin_password": PASSWORD, f"first_admin_{name}": "\u200b"}
    settings = Settings(database_url=f"sqlite:///{tmp_path}/marquee.db", _env_file=None, **places | admin)
    with pytest.raises(SettingsError, match=rf"^FIRST_ADMIN_{name.upper()}: [^\n]*\.$"):
        await prepare(settings)


@pytest.mark.parametrize("fate", ["renamed", "deleted"])
@SQLITE_ONLY
async def test_a_renamed_or_deleted_first_admin_is_not_created_again(
    new_service: Callable[..., Service], fate: str
) -> None:
    """The first admin is not created again: other people may know the password from the settings."""
    service = new_service().start()
    async with service.admin() as admin, service.person() as alice:
        await change_group(admin, alice, "admin")
        if fate == "renamed":
            await ok(admin.http.patch("/users/me", json={"username": "retired", "current_password": ADMIN[1]}))
        else:
            assert (await admin.http.delete("/users/me")).is_success
        assert service.stop() == 0
        service.start()
        found = (await alice.http.get("/users?group=admin&sort=id")).json()
        assert [user["id"] for user in found] == ([admin.id, alice.id] if fate == "renamed" else [alice.id])
    async with service.anyone() as client:
        assert (await sign_in(client, *ADMIN)).status_code == 401


@SQLITE_ONLY
async def test_the_log_says_when_the_name_of_the_first_admin_is_taken(new_service: Callable[..., Service]) -> None:
    service = new_service(FIRST_ADMIN_USERNAME="", FIRST_ADMIN_PASSWORD="").start()
    async with service.person(ADMIN[0]):
        pass
    assert service.stop() == 0
    service.settings |= {"FIRST_ADMIN_USERNAME": ADMIN[0], "FIRST_ADMIN_PASSWORD": ADMIN[1]}
    service.start()
    assert "first admin not created" in service.log()


def test_user_names_hold_no_invisible_characters() -> None:
    """Check every code point in the categories of invisible characters. Unassigned code points are not checked."""
    names = TypeAdapter(credentials.Username)
    unseen = {"Cc", "Cf", "Co", "Zl", "Zp", "Zs"}
    for character in map(chr, range(0x110000)):
        if unicodedata.category(character) in unseen:
            with pytest.raises(ValidationError):
                names.validate_python(f"ho{character}lly")
