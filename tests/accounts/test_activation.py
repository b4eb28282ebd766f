"""Accounts that wait for the link in a mail: the link works once, for whom it was mailed to, and nothing else does."""

from __future__ import annotations

import asyncio
import html
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.conftest import Places
from tests.support.mail_server import MailServer, fresh_name, link_in, parsed, token_in
from tests.support.resources import sql
from tests.support.service import PASSWORD, Service, Watcher, eventually

BASE = "https://movies.example.org"
BAD_LINK = {"detail": "The URL is invalid, was already used, or has expired"}


@dataclass
class Scene:
    """A service that activates by mail, and the server that it hands its mails to."""

    service: Service
    mails: MailServer

    async def register(self, client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
        name = fresh_name()
        body = {"username": name, "email": f"{name}@example.org", "password": PASSWORD, **more}
        answer = await client.post("/auth/register", json=body)
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    async def token_for(self, user: dict[str, Any], number: int = 1) -> str:
        return token_in(await self.mails.mail_to(user["email"], number))

    async def sign_in(self, client: httpx.AsyncClient, user: dict[str, Any]) -> httpx.Response:
        return await client.post("/auth/login", json={"email": user["email"], "password": PASSWORD})


@asynccontextmanager
async def signed_in(scene: Scene) -> AsyncIterator[tuple[httpx.AsyncClient, dict[str, Any]]]:
    """Somebody who has followed the link."""
    async with scene.service.anyone() as client:
        user = await scene.register(client)
        await client.post("/auth/activate", json={"token": await scene.token_for(user)})
        token = (await scene.sign_in(client, user)).json()["access_token"]
        client.headers["Authorization"] = f"Bearer {token}"
        yield client, user


@pytest.fixture(scope="module")
def scene(new_places: Callable[[], Places], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    places = new_places()
    with MailServer().running() as mails:
        service = Service(
            places.database_url,
            places.broadcast_url,
            tmp_path_factory.mktemp("service"),
            ACCOUNT_ACTIVATION="email",
            SMTP_URL=mails.url,
            PUBLIC_URL=BASE + "/",
            MAIL_FROM="Marquee <marquee@example.org>",
        )
        with service.running():
            yield Scene(service, mails)


async def test_a_new_account_waits_for_the_link_and_then_signs_in(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        user = await scene.register(client)
        assert (user["is_active"], user["awaits_activation"]) == (False, True)
        refused = await scene.sign_in(client, user)
        assert refused.status_code == 403
        assert "activat" in refused.json()["detail"]
        mail = await scene.mails.mail_to(user["email"])
        assert link_in(mail) == f"{BASE}/auth/activate?token={token_in(mail)}"
        answer = await client.post("/auth/activate", json={"token": token_in(mail)})
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-store"
        active = answer.json()
        assert active == {
            **user,
            "is_active": True,
            "awaits_activation": False,
            "version": 2,
            "updated_at": active["updated_at"],
        }
        assert (await scene.sign_in(client, user)).status_code == 200


async def test_a_wrong_password_does_not_say_that_an_account_waits(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        user = await scene.register(client)
        answer = await client.post("/auth/login", json={"email": user["email"], "password": "not the password"})
        assert answer.status_code == 401


async def test_activating_is_told_to_admins(scene: Scene) -> None:
    async with scene.service.anyone() as client, scene.service.admin() as chief:
        async with scene.service.watch(
            "topics=users", additional_headers={"Authorization": f"Bearer {chief.token}"}
        ) as watcher:
            user = await scene.register(client)
            await watcher.until(lambda frame: frame.get("operation") == "add" and frame["data"]["id"] == user["id"])
            await client.post("/auth/activate", json={"token": await scene.token_for(user)})
            event = await watcher.expect("update", "users")
            assert event["changed"] == ["is_active", "awaits_activation"]
            assert (event["data"]["is_active"], event["actor_id"]) == (True, user["id"])


async def test_a_browser_that_follows_the_link_gets_a_page(scene: Scene) -> None:
    """And does it with the button there: programs that look for dangerous mails visit links, too."""
    browser = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
    async with scene.service.anyone() as client:
        user = await scene.register(client, username="<i>" + fresh_name())
        token = await scene.token_for(user)
        link = "/auth/activate?token=" + token
        head = await client.head(link, headers=browser)
        assert (head.status_code, head.content) == (200, b"")
        for _ in range(2):
            asked = await client.get(link, headers=browser)
            assert asked.status_code == 200
            assert html.escape(f"registered as {user['username']} with the address {user['email']}") in asked.text
        assert (await scene.sign_in(client, user)).status_code == 403, "looking at a link does not use it up"
        assert f'<input type="hidden" name="token" value="{token}">' in asked.text
        assert '<form method="post" action="activate">' in asked.text
        page = await client.post("/auth/activate", data={"token": token}, headers=browser)
        assert page.status_code == 200
        assert "It worked" in page.text
        again = await client.post("/auth/activate", data={"token": token}, headers=browser)
        looked_again = await client.get(link, headers=browser)
        for answer in (again, looked_again):
            assert answer.status_code == 404
            assert "This link does not work" in answer.text
        for answer in (asked, page, again, looked_again):
            assert answer.headers["content-type"].startswith("text/html")
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert answer.headers["cache-control"] == "no-store"
            policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
            assert (policy["default-src"], policy["style-src"]) == ("'none'", "'self'")
            assert "<script" not in answer.text
            assert "<i>" not in answer.text
            assert token not in answer.text or answer is asked
        assert (await client.get("/static/account.css")).status_code == 200
        assert (await scene.sign_in(client, user)).status_code == 200


async def test_a_browser_is_told_on_a_page_what_is_wrong(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        for query in ("", "?token=", "?token=" + "x" * 129, "?token=x&more=1"):
            page = await client.get("/auth/activate" + query, headers={"Accept": "text/html"})
            assert page.status_code == 422
            assert "This link is incomplete" in page.text
            assert page.headers["content-type"].startswith("text/html")
            assert "detail" in (await client.get("/auth/activate" + query)).json()


async def test_a_program_that_follows_the_link_gets_the_account(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        user = await scene.register(client)
        answer = await client.get("/api/v1/auth/activate/", params={"token": await scene.token_for(user)})
        assert (answer.status_code, answer.json()["id"]) == (200, user["id"])


async def test_the_link_works_over_a_socket_too(scene: Scene) -> None:
    async with scene.service.anyone() as client, scene.service.watch() as watcher:
        user = await scene.register(client)
        reply = await request(watcher, "POST", "/auth/activate", {"token": await scene.token_for(user)})
        assert (reply["status"], reply["body"]["is_active"]) == (200, True)


async def request(watcher: Watcher, method: str, path: str, body: Any) -> dict[str, Any]:
    await watcher.send({"action": "request", "id": 1, "method": method, "path": path, "body": body})
    return await watcher.until(lambda frame: frame.get("reply_to") == 1)


# --- links that are no good


async def test_all_links_that_are_no_good_are_answered_alike(scene: Scene) -> None:
    """Never mailed, used, expired, taken back, for something else, of an account that is disabled or deleted."""
    async with scene.service.anyone() as client, scene.service.admin() as chief:

        async def registered() -> tuple[dict[str, Any], str]:
            user = await scene.register(client)
            return user, await scene.token_for(user)

        _, used = await registered()
        assert (await client.post("/auth/activate", json={"token": used})).status_code == 200
        late, expired = await registered()
        await sql(scene.service, f"UPDATE one_time_tokens SET expires_at = created_at WHERE user_id = {late['id']}")
        shut, disabled = await registered()
        assert (await chief.http.post(f"/admin/users/{shut['id']}/deactivate")).status_code == 200
        gone, deleted = await registered()
        assert (await chief.http.delete(f"/users/{gone['id']}")).status_code == 204
        forgetful, _ = await registered()
        await client.post("/auth/password/forgot", json={"email": forgetful["email"]})
        for_a_password = await scene.token_for(forgetful, 2)
        for token in (used, expired, disabled, deleted, for_a_password, "x", "\0", "é" * 128, used[:-1]):
            answer = await client.post("/auth/activate", json={"token": token})
            assert (answer.status_code, answer.json()) == (404, BAD_LINK), token
            answer = await client.get("/auth/activate", params={"token": token})
            assert (answer.status_code, answer.json()) == (404, BAD_LINK), token
        for user in (late, shut):
            assert (await scene.sign_in(client, user)).status_code == 403


async def test_the_link_of_a_former_address_is_good_no_more_when_nobody_took_it_back(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        user = await scene.register(client)
        token = await scene.token_for(user)
        await sql(scene.service, f"UPDATE users SET email = 'new-{user['email']}' WHERE id = {user['id']}")
        assert (await client.post("/auth/activate", json={"token": token})).status_code == 404


@pytest.mark.parametrize("body", [{}, {"token": ""}, {"token": None}, {"token": 1}, {"token": "x" * 129}])
async def test_what_cannot_be_a_link_is_a_422(scene: Scene, body: dict[str, Any]) -> None:
    async with scene.service.anyone() as client:
        answer = await client.post("/auth/activate", json=body)
        assert answer.status_code == 422
        assert [problem["loc"] for problem in answer.json()["detail"]] == [["body", "token"]]


async def test_of_two_who_follow_a_link_at_once_one_gets_through(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        user = await scene.register(client)
        body = {"token": await scene.token_for(user)}
        answers = await asyncio.gather(*(client.post("/auth/activate", json=body) for _ in range(6)))
        assert sorted(answer.status_code for answer in answers) == [200] + [404] * 5
        assert (await sql(scene.service, f"SELECT version FROM users WHERE id = {user['id']}"))[0][0] == 2


async def test_the_first_link_that_is_followed_takes_the_others_back(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        user = await scene.register(client)
        first = await scene.token_for(user)
        await a_minute_passes(scene, user)
        assert (await client.post("/auth/activate/resend", json={"email": user["email"]})).status_code == 202
        second = await scene.token_for(user, 2)
        assert second != first
        assert (await client.post("/auth/activate", json={"token": second})).status_code == 200
        assert (await client.post("/auth/activate", json={"token": first})).status_code == 404
        found = await sql(scene.service, f"SELECT count(*) FROM one_time_tokens WHERE user_id = {user['id']}")
        assert found[0][0] == 0


async def a_minute_passes(scene: Scene, user: dict[str, Any]) -> None:
    await sql(
        scene.service, f"UPDATE mails SET created_at = '2026-01-01T00:00:00.000000Z' WHERE user_id = {user['id']}"
    )


# --- asking again


async def waits_no_more(scene: Scene) -> None:
    async def look() -> bool:
        return not (await sql(scene.service, "SELECT count(*) FROM mails WHERE due_at IS NOT NULL"))[0][0]

    await eventually(look, "an outbox in which nothing waits")


async def test_asking_for_another_link_is_answered_alike_for_everybody(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        waiting = await scene.register(client)
        active = await scene.register(client)
        await client.post("/auth/activate", json={"token": await scene.token_for(active)})
        await scene.token_for(waiting)
        addresses = [waiting["email"], active["email"], f"{fresh_name()}@example.org"]
        answers = [await client.post("/auth/activate/resend", json={"email": each}) for each in addresses]
        assert {(answer.status_code, answer.text) for answer in answers} == {(202, answers[0].text)}
        assert len({tuple(sorted(set(answer.headers) - {"x-request-id"})) for answer in answers}) == 1
        await waits_no_more(scene)
        # The one that waits had a mail less than a minute ago.
        assert [len(scene.mails.mails_to(each)) for each in addresses] == [1, 1, 0]


async def test_an_address_is_compared_as_it_is_at_the_door(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        user = await scene.register(client)
        await scene.token_for(user)
        await a_minute_passes(scene, user)
        await client.post("/auth/activate/resend", json={"email": user["email"].upper()})
        await scene.token_for(user, 2)


# --- registering


async def test_the_address_is_needed_and_named_with_all_other_problems(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        answer = await client.post("/auth/register", json={"username": "no", "password": "short"})
        assert answer.status_code == 422
        assert {problem["loc"][1] for problem in answer.json()["detail"]} == {"username", "password", "email"}
        found = await sql(scene.service, "SELECT count(*) FROM users WHERE username = 'no'")
        assert found[0][0] == 0


async def test_an_address_is_stored_in_the_form_that_mail_servers_take(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        name = fresh_name()
        user = await scene.register(client, username=name, email=f"{name}@EXAMPLE.Org", first_name="  Holly \u3000")
        assert user["email"] == f"{name}@example.org"
        assert user["first_name"] == "Holly"
        again = await client.post("/users", json={"email": f"{name.upper()}@example.ORG", "password": PASSWORD})
        assert again.status_code == 409
        assert again.json()["detail"][0]["loc"] == ["body", "email"]


@pytest.mark.parametrize(
    "address", ["a" * 65 + "@example.org", "holly@ab--cd.org", "holly@printer.local", "holly@xn--a.org"]
)
async def test_an_address_that_no_mail_reaches_is_refused(scene: Scene, address: str) -> None:
    async with scene.service.anyone() as client:
        answer = await client.post("/auth/register", json={"email": address, "password": PASSWORD})
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["body", "email"]


async def test_a_service_that_is_killed_while_it_sends_loses_no_mail(
    new_service: Callable[..., Service],
) -> None:
    with MailServer().running() as mails:
        service = new_service(ACCOUNT_ACTIVATION="email", SMTP_URL=mails.url).start()
        scene = Scene(service, mails)
        mails.is_silent = True
        async with service.anyone() as client:
            user = await scene.register(client)
        await eventually(lambda: mails.tried == 1, "a conversation is on its way")
        service.kill()
        mails.is_silent = False
        service.start()
        # As when the lease of the dead has run out.
        await sql(service, "UPDATE mails SET due_at = 0")
        async with service.anyone() as client:
            answer = await client.post("/auth/activate", json={"token": await scene.token_for(user)})
            assert answer.status_code == 200
            assert (await scene.sign_in(client, user)).status_code == 200


async def test_a_refused_registration_sends_nothing(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        user = await scene.register(client)
        await scene.token_for(user)
        answer = await client.post(
            "/auth/register", json={"username": fresh_name(), "email": user["email"], "password": PASSWORD}
        )
        assert answer.status_code == 409
        await waits_no_more(scene)
        assert len(scene.mails.mails_to(user["email"])) == 1


async def test_the_first_admin_is_active_at_once(scene: Scene) -> None:
    async with scene.service.admin() as chief:
        assert (await chief.http.get("/auth/me")).json()["is_active"] is True


async def test_an_admin_activates_without_a_mail_and_the_link_is_good_no_more(scene: Scene) -> None:
    async with scene.service.anyone() as client, scene.service.admin() as chief:
        user = await scene.register(client)
        token = await scene.token_for(user)
        assert (await chief.http.post(f"/admin/users/{user['id']}/activate")).status_code == 200
        assert (await scene.sign_in(client, user)).status_code == 200
        assert (await client.post("/auth/activate", json={"token": token})).status_code == 404


async def test_a_link_for_a_new_password_activates_too_for_it_proves_the_address(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        user = await scene.register(client)
        first = await scene.token_for(user)
        await client.post("/auth/password/forgot", json={"email": user["email"]})
        body = {"token": await scene.token_for(user, 2), "new_password": "prater wheel 1949"}
        assert (await client.post("/auth/password/reset", json=body)).status_code == 204
        login = {"email": user["email"], "password": body["new_password"]}
        assert (await client.post("/auth/login", json=login)).status_code == 200
        assert (await client.post("/auth/activate", json={"token": first})).status_code == 404


# --- another address


async def test_another_address_counts_when_its_link_is_followed(scene: Scene) -> None:
    async with signed_in(scene) as (client, user):
        wanted = f"{fresh_name()}@example.org"
        answer = await client.patch("/users/me", json={"email": wanted, "current_password": PASSWORD})
        assert answer.status_code == 200, answer.text
        assert answer.json()["email"] == user["email"], "not before it is proven"
        mail = await scene.mails.mail_to(wanted)
        assert mail["Subject"] == "Confirm your new email address"
        warning = await scene.mails.mail_to(user["email"], 2)
        assert warning["Subject"] == "Request to change your email address"
        assert wanted not in str(warning)
        asked = await client.get("/auth/activate", params={"token": token_in(mail)}, headers={"Accept": "text/html"})
        assert f"the address of the account {user['username']} to {wanted}" in asked.text
        confirmed = await client.get("/auth/activate", params={"token": token_in(mail)})
        assert (confirmed.status_code, confirmed.json()["email"]) == (200, wanted)
        notice = await scene.mails.mail_to(user["email"], 3)
        assert notice["Subject"] == "Your email address was changed"
        assert (await client.get("/auth/activate", params={"token": token_in(mail)})).status_code == 404


async def test_ones_own_address_takes_the_wish_for_another_one_back(scene: Scene) -> None:
    async with signed_in(scene) as (client, user):
        wanted = f"{fresh_name()}@example.org"
        await client.patch("/users/me", json={"email": wanted, "current_password": PASSWORD})
        token = token_in(await scene.mails.mail_to(wanted))
        # A form that sends everything, with another field changed, is no such decision.
        body = {"username": user["username"], "email": user["email"], "name": "Holly"}
        assert (await client.put("/users/me", json=body)).status_code == 200
        page = await client.get("/auth/activate", params={"token": token}, headers={"Accept": "text/html"})
        assert page.status_code == 200
        back = await client.patch("/users/me", json={"email": user["email"], "current_password": PASSWORD})
        assert back.status_code == 200
        followed = await client.post("/auth/activate", json={"token": token})
        assert (followed.status_code, followed.json()) == (404, BAD_LINK)


@pytest.mark.parametrize("way", ["change", "reset"])
async def test_a_new_password_takes_the_link_to_another_address_back(scene: Scene, way: str) -> None:
    """Whoever knew the old password may have asked for an address of their own."""
    async with signed_in(scene) as (client, user):
        wanted = f"{fresh_name()}@example.org"
        asked = await client.patch("/users/me", json={"email": wanted, "current_password": PASSWORD})
        assert asked.status_code == 200
        link = {"token": token_in(await scene.mails.mail_to(wanted))}
        if way == "change":
            change = {"old_password": PASSWORD, "new_password": "the ferris wheel"}
            answer = await client.post("/auth/password/change", json=change)
        else:
            await client.post("/auth/password/forgot", json={"email": user["email"]})
            reset = {"token": await scene.token_for(user, 3), "new_password": "the ferris wheel"}
            answer = await client.post("/auth/password/reset", json=reset)
        assert answer.status_code == 204
        followed = await client.post("/auth/activate", json=link)
        assert (followed.status_code, followed.json()) == (404, BAD_LINK)


async def test_who_waits_for_the_link_is_shown_to_nobody(scene: Scene) -> None:
    async with scene.service.anyone() as client:
        user = await scene.register(client)
        for path in (f"/movies/username/{user['username']}", f"/users/{user['id']}/movies"):
            assert (await client.get(path)).status_code == 404
        await client.post("/auth/activate", json={"token": await scene.token_for(user)})
        for path in (f"/movies/username/{user['username']}", f"/users/{user['id']}/movies"):
            assert (await client.get(path)).json() == []


async def test_an_address_that_somebody_took_meanwhile_is_a_409(scene: Scene) -> None:
    async with signed_in(scene) as (client, _):
        wanted = f"{fresh_name()}@example.org"
        await client.patch("/users/me", json={"email": wanted, "current_password": PASSWORD})
        token = token_in(await scene.mails.mail_to(wanted))
        await scene.register(client, email=wanted)
        answer = await client.post("/auth/activate", json={"token": token})
        assert answer.status_code == 409
        assert answer.json()["detail"][0]["loc"] == ["body", "email"]
        page = await client.post("/auth/activate", data={"token": token}, headers={"Accept": "text/html"})
        assert page.status_code == 409
        assert "This address is taken" in page.text


async def test_what_is_mailed_is_in_no_event_and_in_no_row(scene: Scene) -> None:
    """Of all that happened in this file."""
    tokens = [token_in(parsed(content)) for _, content in scene.mails.received if b"?token=" in content]
    assert len(tokens) >= 2
    tables = ("mails", "one_time_tokens", "events", "audit")
    rows = [repr(row) for table in tables for row in await sql(scene.service, f"SELECT * FROM {table}")]
    assert len(rows) > len(tokens)
    kept = "".join(rows) + scene.service.log()
    assert not [token for token in tokens if token in kept]
