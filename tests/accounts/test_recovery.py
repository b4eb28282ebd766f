"""New passwords: changing and resetting them.

A change needs the old password and ends the other sessions. A reset needs an emailed URL and ends all sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, ok, over_socket, sign_in, values_by_field
from tests.support.resources import sql
from tests.support.servers.mail import fresh_name, link_in, mail_in, mails_in, token_in
from tests.support.service import PASSWORD, Service, eventually

NEW = "prater wheel 1949"
INVALID_URL = {"detail": "The URL is invalid, was already used, or has expired"}


@dataclass
class Owner:
    """A signed-in user whose account has an email address."""

    service: Service
    client: httpx.AsyncClient
    id: int
    username: str
    email: str

    async def signs_in(self, password: str) -> int:
        async with self.service.anyone() as other:
            return (await sign_in(other, self.username, password)).status_code

    async def another_session(self) -> dict[str, str]:
        """Sign in again, and return the `Authorization` header of the new session."""
        async with self.service.anyone() as other:
            token = (await ok(sign_in(other, self.username)))["access_token"]
            return {"Authorization": f"Bearer {token}"}

    async def is_signed_in(self, headers: dict[str, str] | None = None) -> bool:
        return (await self.client.get("/auth/me", headers=headers)).status_code == 200

    async def change(self, new: str = NEW, old: str = PASSWORD) -> httpx.Response:
        body = {"old_password": old, "new_password": new}
        return await self.client.post("/auth/password/change", json=body)

    async def mail(self, number: int = 1, subject: str = "") -> Any:
        return await mail_in(self.service.folder / "mail", self.email, number, subject)

    async def forgot(self, number: int = 1) -> str:
        """Request a password reset, and return the token in the `number`-th reset email, counted from 1."""
        async with self.service.anyone() as client:
            await ok(client.post("/auth/password/forgot", json={"email": self.email}), 202)
        return token_in(await self.mail(number, "Reset your password"))

    async def a_minute_passes(self) -> None:
        moment = "2026-01-01T00:00:00.000000Z"
        await sql(self.service, f"UPDATE mails SET created_at = '{moment}' WHERE user_id = {self.id}")


@asynccontextmanager
async def owner(service: Service) -> AsyncIterator[Owner]:
    name = fresh_name()
    async with service.anyone() as client:
        email = f"{name}@example.org"
        body = {"username": name, "email": email, "password": PASSWORD}
        user = await ok(client.post("/auth/register", json=body), 201)
        client.headers["Authorization"] = f"Bearer {(await ok(sign_in(client, name)))['access_token']}"
        yield Owner(service, client, user["id"], name, email)


async def reset(service: Service, token: str, password: str = NEW, **headers: str) -> httpx.Response:
    async with service.anyone() as client:
        body = {"token": token, "new_password": password}
        return await client.post("/auth/password/reset", json=body, headers=headers)


# --- changing the password


async def test_changing_the_password_ends_the_other_sessions_and_sends_a_notice(service: Service) -> None:
    async with owner(service) as holly:
        elsewhere = await holly.another_session()
        answer = await holly.change()
        assert (answer.status_code, answer.content) == (204, b"")
        assert (await holly.is_signed_in(), await holly.is_signed_in(elsewhere)) == (True, False)
        assert [await holly.signs_in(PASSWORD), await holly.signs_in(NEW)] == [401, 200]
        mail = await holly.mail(subject="Your password was changed")
        assert link_in(mail) == f"{service.url}/reset-password"


async def test_sockets_of_the_other_sessions_are_closed(service: Service) -> None:
    async with owner(service) as holly:
        async with service.watch(additional_headers=await holly.another_session()) as watcher:
            await holly.change()
            await asyncio.wait_for(watcher.socket.wait_closed(), 10)
            assert watcher.socket.close_code == 4501


async def test_the_new_password_must_differ_from_the_old_one(service: Service) -> None:
    async with owner(service) as holly:
        answer = await holly.change(PASSWORD)
        assert_problem(answer, 422, ["body", "new_password"])
        assert answer.json()["detail"][0]["type"] == "password_is_old"


@pytest.mark.parametrize("way", ["change", "reset"])
async def test_every_broken_rule_is_reported_at_once(service: Service, way: str) -> None:
    async with owner(service) as holly:
        await sql(service, f"UPDATE users SET username = 'trustno1' WHERE id = {holly.id}")
        try:
            if way == "change":
                answer = await holly.change("trustno1")
            else:
                answer = await reset(service, await holly.forgot(), "trustno1")
        finally:
            await sql(service, f"UPDATE users SET username = '{holly.username}' WHERE id = {holly.id}")
        assert answer.status_code == 422
        kinds = [problem["type"] for problem in answer.json()["detail"]]
        assert kinds == ["password_is_name", "password_is_common"]


async def test_a_wrong_old_password_is_reported_with_all_other_problems(service: Service) -> None:
    async with owner(service) as holly:
        answer = await holly.change(holly.username, old="not the password")
        assert_problem(answer, 403, ["body", "old_password"], ["body", "new_password"])
        assert answer.json()["detail"][0]["type"] == "wrong_password"
        assert await holly.signs_in(PASSWORD) == 200


INVALID: dict[str, list[Any]] = {
    "old_password": [None, "", "x" * 129],
    "new_password": ["short", "password1", "x" * 129, 12345678],
    "newPassword": [NEW],
}


@SQLITE_ONLY
async def test_an_invalid_change_is_rejected(service: Service) -> None:
    async with service.person() as alice:
        for field, value in values_by_field(INVALID):
            body = {"old_password": PASSWORD, "new_password": NEW, field: value}
            assert_problem(await alice.http.post("/auth/password/change", json=body), 422, ["body", field])


async def test_only_one_of_several_concurrent_changes_succeeds(service: Service) -> None:
    async with owner(service) as holly:
        answers = await asyncio.gather(*(holly.change(f"{NEW} {number}") for number in range(3)))
        statuses = [answer.status_code for answer in answers]
        assert statuses.count(204) == 1, statuses
        assert set(statuses) <= {204, 403, 409}
        assert await holly.signs_in(f"{NEW} {statuses.index(204)}") == 200


@SQLITE_ONLY
async def test_passwords_are_changed_and_reset_over_a_socket(service: Service) -> None:
    async with owner(service) as holly:
        headers = {"Authorization": holly.client.headers["Authorization"]}
        async with service.watch(additional_headers=headers) as watcher:
            body = {"old_password": PASSWORD, "new_password": NEW}
            assert (await over_socket(watcher, "POST", "/auth/password/change", body))["status"] == 204
        assert await holly.signs_in(NEW) == 200
        async with service.watch() as watcher:
            body = {"token": await holly.forgot(), "new_password": f"{NEW} again"}
            assert (await over_socket(watcher, "POST", "/auth/password/reset", body))["status"] == 204
        assert await holly.signs_in(f"{NEW} again") == 200


# --- forgotten passwords


async def test_a_reset_sets_the_password_once_and_ends_all_sessions(service: Service) -> None:
    async with owner(service) as holly:
        token = await holly.forgot()
        assert link_in(await holly.mail()) == f"{service.url}/reset-password?token={token}"
        assert await holly.is_signed_in(), "requesting a reset changes nothing"
        answer = await reset(service, token, Authorization="Bearer a stale token does no harm")
        assert (answer.status_code, answer.content) == (204, b"")
        assert not await holly.is_signed_in()
        assert [await holly.signs_in(PASSWORD), await holly.signs_in(NEW)] == [401, 200]
        await holly.mail(subject="Your password was changed")
        again = await reset(service, token, "another one 1949")
        assert (again.status_code, again.json()) == (404, INVALID_URL)
        assert await holly.signs_in(NEW) == 200


async def test_only_one_of_several_concurrent_resets_succeeds(service: Service) -> None:
    async with owner(service) as holly:
        token = await holly.forgot()
        answers = await asyncio.gather(*(reset(service, token, f"{NEW} {number}") for number in range(4)))
        statuses = [answer.status_code for answer in answers]
        assert sorted(statuses) == [204, 404, 404, 404]
        assert await holly.signs_in(f"{NEW} {statuses.index(204)}") == 200


async def test_an_invalid_password_does_not_use_up_the_token(service: Service) -> None:
    async with owner(service) as holly:
        token = await holly.forgot()
        for password in ("short", "password1", holly.username, holly.email):
            assert_problem(await reset(service, token, password), 422, ["body", "new_password"])
        assert (await reset(service, token)).status_code == 204


async def test_all_invalid_tokens_get_the_same_response(service: Service) -> None:
    """Check tokens that are expired, superseded, revoked, of a former address, or of a disabled or deleted account."""
    async with AsyncExitStack() as stack:
        names = ("late", "moved", "former", "disabled", "gone", "twice", "changed")
        owners = {name: await stack.enter_async_context(owner(service)) for name in names}
        tokens = [await each.forgot() for each in owners.values()]
        late, moved, former, disabled, gone, twice, changed = owners.values()
        await sql(service, f"UPDATE one_time_tokens SET expires_at = created_at WHERE user_id = {late.id}")
        body = {"email": f"{fresh_name()}@example.org", "current_password": PASSWORD}
        await ok(moved.client.patch("/users/me", json=body))
        # Changing the address in the database does not revoke the token, but the token must be invalid anyway.
        await sql(service, f"UPDATE users SET email = 'new-{former.email}' WHERE id = {former.id}")
        chief = await stack.enter_async_context(service.admin())
        await ok(chief.http.post(f"/admin/users/{disabled.id}/deactivate"))
        assert (await chief.http.delete(f"/users/{gone.id}")).status_code == 204
        await twice.a_minute_passes()
        assert (await reset(service, await twice.forgot(2))).status_code == 204
        assert (await changed.change()).status_code == 204
        for token in (*tokens, "never mailed"):
            answer = await reset(service, token, "another person's 1")
            assert (answer.status_code, answer.json()) == (404, INVALID_URL)
        assert [await late.signs_in(PASSWORD), await changed.signs_in(NEW)] == [200, 200]


async def test_asking_for_a_reset_does_not_reveal_which_accounts_exist(service: Service) -> None:
    async with owner(service) as holly, owner(service) as disabled, service.anyone() as client:
        async with service.admin() as chief:
            await chief.http.post(f"/admin/users/{disabled.id}/deactivate")
        stranger = f"{fresh_name()}@example.org"
        addresses = [holly.email, holly.email, disabled.email, stranger]
        answers = [await client.post("/auth/password/forgot", json={"email": each}) for each in addresses]
        assert {(answer.status_code, answer.text) for answer in answers} == {(202, answers[0].text)}
        assert len({tuple(sorted(set(answer.headers) - {"x-request-id"})) for answer in answers}) == 1
        await holly.mail()

        async def is_done() -> bool:
            return not (await sql(service, "SELECT count(*) FROM mails WHERE due_at IS NOT NULL"))[0][0]

        await eventually(is_done, "an empty outbox")
        mailed = [each["To"] for each in mails_in(service.folder / "mail")]
        assert [mailed.count(each) for each in (holly.email, disabled.email, stranger)] == [1, 0, 0]


# --- the page for a new password


@SQLITE_ONLY
async def test_the_page_loads_only_own_files_and_sends_no_referrer(service: Service) -> None:
    async with service.anyone() as client:
        page = await client.get("/reset-password?token=secret")
        assert page.status_code == 200
        policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
        assert (policy["default-src"], policy["script-src"]) == ("'none'", "'self'")
        assert page.headers["referrer-policy"] == "no-referrer"
        assert page.headers["cache-control"] == "no-store"
        assert "secret" not in page.text
        for path in ("/static/account.css", "/static/reset-password.js"):
            assert path.lstrip("/") in page.text
            assert (await client.get(path)).status_code == 200


@SQLITE_ONLY
def test_the_log_says_that_emails_are_written_to_a_folder(service: Service) -> None:
    assert "folder mail (SMTP_URL is not set)" in service.log()
