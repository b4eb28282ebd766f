"""New passwords: changed by who knows the old one, or by a link in a mail; each ends the other sessions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.support.backends import SQLITE_ONLY
from tests.support.mail_server import fresh_name, link_in, mail_in, mails_in, token_in
from tests.support.resources import sql
from tests.support.service import PASSWORD, Service, eventually

NEW = "prater wheel 1949"
BAD_LINK = {"detail": "The URL is invalid, was already used, or has expired"}


@dataclass
class Owner:
    """Of an account with an address, signed in."""

    service: Service
    client: httpx.AsyncClient
    id: int
    username: str
    email: str

    async def signs_in(self, password: str) -> int:
        async with self.service.anyone() as other:
            answer = await sign_in(other, self.username, password)
            return answer.status_code

    async def another_session(self) -> dict[str, str]:
        """The header of somebody who is signed in to the account elsewhere."""
        async with self.service.anyone() as other:
            answer = await sign_in(other, self.username)
            return {"Authorization": f"Bearer {answer.json()['access_token']}"}

    async def is_good(self, headers: dict[str, str] | None = None) -> bool:
        return (await self.client.get("/auth/me", headers=headers)).status_code == 200

    async def change(self, **body: Any) -> httpx.Response:
        return await self.client.post("/auth/password/change", json=body)

    async def mail(self, number: int = 1, subject: str = "") -> Any:
        return await mail_in(self.service.folder / "mail", self.email, number, subject)

    async def forgot(self, number: int = 1) -> str:
        """The token of the `number`-th link."""
        async with self.service.anyone() as client:
            assert (await client.post("/auth/password/forgot", json={"email": self.email})).status_code == 202
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
        answer = await client.post("/auth/register", json=body)
        assert answer.status_code == 201, answer.text
        token = (await sign_in(client, name)).json()
        client.headers["Authorization"] = f"Bearer {token['access_token']}"
        yield Owner(service, client, answer.json()["id"], name, email)


async def reset(service: Service, token: str, password: str = NEW, **headers: str) -> httpx.Response:
    async with service.anyone() as client:
        body = {"token": token, "new_password": password}
        return await client.post("/auth/password/reset", json=body, headers=headers)


# --- changing


async def test_changing_the_password_ends_the_other_sessions_and_is_told_by_mail(service: Service) -> None:
    async with owner(service) as holly:
        elsewhere = await holly.another_session()
        answer = await holly.change(old_password=PASSWORD, new_password=NEW)
        assert (answer.status_code, answer.content) == (204, b"")
        assert await holly.is_good()
        assert not await holly.is_good(elsewhere)
        assert [await holly.signs_in(PASSWORD), await holly.signs_in(NEW)] == [401, 200]
        mail = await holly.mail(subject="Your password was changed")
        assert link_in(mail) == f"{service.url}/reset-password"


async def test_sockets_of_the_other_sessions_are_closed(service: Service) -> None:
    async with owner(service) as holly:
        async with service.watch(additional_headers=await holly.another_session()) as watcher:
            await holly.change(old_password=PASSWORD, new_password=NEW)
            await asyncio.wait_for(watcher.socket.wait_closed(), 10)
            assert watcher.socket.close_code == 4501


async def test_a_new_password_is_another_one(service: Service) -> None:
    async with owner(service) as holly:
        answer = await holly.change(old_password=PASSWORD, new_password=PASSWORD)
        assert answer.status_code == 422
        problems = [(problem["loc"], problem["type"]) for problem in answer.json()["detail"]]
        assert problems == [(["body", "new_password"], "password_is_old")]


@pytest.mark.parametrize("way", ["change", "reset"])
async def test_every_broken_rule_is_named_at_once_those_of_the_account_too(service: Service, way: str) -> None:
    async with owner(service) as holly:
        await sql(service, f"UPDATE users SET username = 'trustno1' WHERE id = {holly.id}")
        try:
            if way == "change":
                answer = await holly.change(old_password=PASSWORD, new_password="trustno1")
            else:
                answer = await reset(service, await holly.forgot(), "trustno1")
        finally:
            await sql(service, f"UPDATE users SET username = '{holly.username}' WHERE id = {holly.id}")
        assert answer.status_code == 422
        kinds = [problem["type"] for problem in answer.json()["detail"]]
        assert kinds == ["password_is_name", "password_is_common"]


async def test_a_wrong_old_password_is_named_with_what_else_is_wrong(service: Service) -> None:
    async with owner(service) as holly:
        answer = await holly.change(old_password="not the password", new_password=holly.username)
        assert answer.status_code == 422
        assert [problem["loc"] for problem in answer.json()["detail"]] == [
            ["body", "old_password"],
            ["body", "new_password"],
        ]
        assert await holly.signs_in(PASSWORD) == 200


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"old_password": None}, "old_password"),
        ({"old_password": ""}, "old_password"),
        ({"old_password": "x" * 129}, "old_password"),
        ({"new_password": "short"}, "new_password"),
        ({"new_password": "password1"}, "new_password"),
        ({"new_password": "x" * 129}, "new_password"),
        ({"new_password": 12345678}, "new_password"),
        ({"newPassword": NEW}, "newPassword"),
    ],
    ids=repr,
)
@SQLITE_ONLY
async def test_a_change_that_is_wrong_names_its_field(service: Service, change: dict[str, Any], field: str) -> None:
    async with service.person() as alice:
        body = {"old_password": PASSWORD, "new_password": NEW, **change}
        answer = await alice.http.post("/auth/password/change", json=body)
        assert answer.status_code == 422
        assert {tuple(problem["loc"]) for problem in answer.json()["detail"]} == {("body", field)}


async def test_only_who_is_signed_in_changes_a_password(service: Service) -> None:
    async with service.anyone() as anonymous:
        answer = await anonymous.post("/auth/password/change", json={"old_password": PASSWORD, "new_password": NEW})
        assert answer.status_code == 401


async def test_of_two_changes_at_once_one_counts(service: Service) -> None:
    async with owner(service) as holly:
        answers = await asyncio.gather(
            *(holly.change(old_password=PASSWORD, new_password=f"{NEW} {number}") for number in range(3))
        )
        statuses = [answer.status_code for answer in answers]
        assert statuses.count(204) == 1, statuses
        assert set(statuses) <= {204, 409, 422}
        assert await holly.signs_in(f"{NEW} {statuses.index(204)}") == 200


async def test_a_change_takes_links_for_a_new_password_back(service: Service) -> None:
    async with owner(service) as holly:
        token = await holly.forgot()
        await holly.change(old_password=PASSWORD, new_password=NEW)
        assert (await reset(service, token, "somebody else's 1")).status_code == 404
        assert await holly.signs_in(NEW) == 200


async def test_a_password_is_changed_over_a_socket_too(service: Service) -> None:
    async with owner(service) as holly:
        headers = {"Authorization": holly.client.headers["Authorization"]}
        async with service.watch(additional_headers=headers) as watcher:
            body = {"old_password": PASSWORD, "new_password": NEW}
            path = "/auth/password/change"
            await watcher.send({"action": "request", "id": 1, "method": "POST", "path": path, "body": body})
            assert (await watcher.until(lambda frame: frame.get("reply_to") == 1))["status"] == 204
        assert await holly.signs_in(NEW) == 200


# --- a password that was forgotten


async def test_the_link_sets_a_new_password_once_and_ends_all_sessions(service: Service) -> None:
    async with owner(service) as holly:
        token = await holly.forgot()
        assert link_in(await holly.mail()) == f"{service.url}/reset-password?token={token}"
        assert await holly.is_good(), "asking changes nothing"
        answer = await reset(service, token)
        assert (answer.status_code, answer.content) == (204, b"")
        assert not await holly.is_good()
        assert [await holly.signs_in(PASSWORD), await holly.signs_in(NEW)] == [401, 200]
        await holly.mail(subject="Your password was changed")
        again = await reset(service, token, "another one 1949")
        assert (again.status_code, again.json()) == (404, BAD_LINK)
        assert await holly.signs_in(NEW) == 200


async def test_an_old_access_token_beside_the_link_does_no_harm(service: Service) -> None:
    async with owner(service) as holly:
        token = await holly.forgot()
        assert (await reset(service, token, Authorization="Bearer old")).status_code == 204


async def test_the_first_link_that_is_used_takes_the_others_back(service: Service) -> None:
    async with owner(service) as holly:
        first = await holly.forgot()
        await holly.a_minute_passes()
        second = await holly.forgot(2)
        assert (await reset(service, second)).status_code == 204
        assert (await reset(service, first)).status_code == 404


async def test_of_two_who_use_a_link_at_once_one_gets_through(service: Service) -> None:
    async with owner(service) as holly:
        token = await holly.forgot()
        answers = await asyncio.gather(*(reset(service, token, f"{NEW} {number}") for number in range(4)))
        statuses = [answer.status_code for answer in answers]
        assert sorted(statuses) == [204, 404, 404, 404]
        assert await holly.signs_in(f"{NEW} {statuses.index(204)}") == 200


async def test_a_password_that_breaks_a_rule_does_not_use_the_link_up(service: Service) -> None:
    async with owner(service) as holly:
        token = await holly.forgot()
        for password in ("short", "password1", holly.username, holly.email):
            answer = await reset(service, token, password)
            assert answer.status_code == 422, password
            assert answer.json()["detail"][0]["loc"] == ["body", "new_password"]
        assert (await reset(service, token)).status_code == 204


async def test_links_that_are_no_good_are_answered_alike(service: Service) -> None:
    async with owner(service) as late, owner(service) as moved, owner(service) as shut, owner(service) as gone:
        tokens = [await each.forgot() for each in (late, moved, shut, gone)]
        await sql(service, f"UPDATE one_time_tokens SET expires_at = created_at WHERE user_id = {late.id}")
        body = {"email": f"{fresh_name()}@example.org", "current_password": PASSWORD}
        assert (await moved.client.patch("/users/me", json=body)).status_code == 200
        async with service.admin() as chief:
            assert (await chief.http.post(f"/admin/users/{shut.id}/deactivate")).status_code == 200
            assert (await chief.http.delete(f"/users/{gone.id}")).status_code == 204
        for token in (*tokens, "never mailed"):
            answer = await reset(service, token)
            assert (answer.status_code, answer.json()) == (404, BAD_LINK)
        assert await late.signs_in(PASSWORD) == 200


async def test_the_link_of_a_former_address_is_good_no_more_when_nobody_took_it_back(service: Service) -> None:
    async with owner(service) as holly:
        token = await holly.forgot()
        await sql(service, f"UPDATE users SET email = 'new-{holly.email}' WHERE id = {holly.id}")
        assert (await reset(service, token)).status_code == 404


async def test_asking_is_answered_alike_whether_there_is_an_account_or_not(service: Service) -> None:
    async with owner(service) as holly, owner(service) as shut, service.anyone() as client:
        async with service.admin() as chief:
            await chief.http.post(f"/admin/users/{shut.id}/deactivate")
        stranger = f"{fresh_name()}@example.org"
        addresses = [holly.email, holly.email, shut.email, stranger]
        answers = [await client.post("/auth/password/forgot", json={"email": each}) for each in addresses]
        assert {(answer.status_code, answer.text) for answer in answers} == {(202, answers[0].text)}
        assert len({tuple(sorted(set(answer.headers) - {"x-request-id"})) for answer in answers}) == 1
        await holly.mail()

        async def is_done() -> bool:
            return not (await sql(service, "SELECT count(*) FROM mails WHERE due_at IS NOT NULL"))[0][0]

        await eventually(is_done, "an outbox in which nothing waits")
        mailed = [each["To"] for each in mails_in(service.folder / "mail")]
        assert [mailed.count(each) for each in (holly.email, shut.email, stranger)] == [1, 0, 0]


async def test_a_password_is_reset_over_a_socket_too(service: Service) -> None:
    async with owner(service) as holly, service.watch() as watcher:
        body = {"token": await holly.forgot(), "new_password": NEW}
        await watcher.send(
            {"action": "request", "id": 1, "method": "POST", "path": "/auth/password/reset", "body": body}
        )
        assert (await watcher.until(lambda frame: frame.get("reply_to") == 1))["status"] == 204
        assert await holly.signs_in(NEW) == 200


# --- the page


async def test_the_page_loads_nothing_from_elsewhere_and_keeps_its_address_to_itself(service: Service) -> None:
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


def test_mails_of_a_service_without_a_server_are_announced_in_its_log(service: Service) -> None:
    assert "SMTP_URL is not set: emails are written to the folder mail" in service.log()
