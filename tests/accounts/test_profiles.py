"""Profiles are created once, and only their owner and admins can see and change them."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from resources.accounts import profiles
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, ok, values_by_field
from tests.support.resources import moderator, nothing_written, sql
from tests.support.service import Service

FULL = {
    "first_name": "Holly",
    "last_name": "Märtins",
    "gender": "male",
    "date_of_birth": "1905-05-15",
    "info": "Writes westerns.",
}
NOTHING = dict.fromkeys(FULL)
PATHS = pytest.mark.parametrize("mine", [True, False], ids=["me", "id"])


def path_of(user_id: int, *, mine: bool) -> str:
    return "/users/me/profile" if mine else f"/users/{user_id}/profile"


@PATHS
async def test_a_profile_is_created_once(service: Service, mine: bool) -> None:
    async with service.person() as alice:
        path = path_of(alice.id, mine=mine)
        async with nothing_written(service):
            for method in ("GET", "PUT", "PATCH"):
                body = None if method == "GET" else {"info": "x"}
                assert (await alice.http.request(method, path, json=body)).status_code == 404, method
        answer = await alice.http.post(f"/api/v1{path}", json=FULL)
        assert answer.status_code == 201
        assert answer.headers["location"] == f"/api/v1/users/{alice.id}/profile"
        profile = answer.json()
        times = {name: profile[name] for name in ("created_at", "updated_at")}
        avatar = {"avatar_url": None, "avatar_thumbnail_url": None}
        assert profile == {"user_id": alice.id, **FULL, **avatar, "version": 2, **times}
        found = await alice.http.get(path)
        assert (found.json(), found.headers["etag"]) == (profile, answer.headers["etag"])
        account = (await alice.http.get("/users/me")).json()
        assert {name: account[name] for name in FULL} == FULL
        assert (account["has_profile"], account["version"]) == (True, 2)
        async with nothing_written(service):
            again = await alice.http.post(path, json=FULL)
            assert (again.status_code, again.json()) == (409, {"detail": f"User {alice.id} already has a profile"})


async def test_a_profile_may_be_empty(service: Service) -> None:
    async with service.person() as alice:
        profile = await ok(alice.http.post("/users/me/profile", json={}), 201)
        assert profile | NOTHING == profile


async def test_the_profile_and_the_account_share_the_names(service: Service) -> None:
    async with service.person() as alice:
        assert (await alice.http.patch("/users/me", json={"first_name": "Alice", "last_name": "L"})).is_success
        profile = (await alice.http.post("/users/me/profile", json={"last_name": "Kingsleigh"})).json()
        assert (profile["first_name"], profile["last_name"]) == ("Alice", "Kingsleigh")
        assert (await alice.http.get("/users/me")).json()["last_name"] == "Kingsleigh"


async def test_only_one_of_several_concurrent_creations_succeeds(service: Service) -> None:
    async with service.person() as alice:
        answers = await asyncio.gather(*(alice.http.post("/users/me/profile", json=FULL) for _ in range(4)))
        assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409]
        events = f"SELECT COUNT(*) FROM events WHERE topic = 'account' AND audience = 'user:{alice.id}'"
        assert await sql(service, f"{events} AND operation = 'update'") == [(1,)]


async def test_a_repeated_creation_gets_the_same_response(service: Service) -> None:
    async with service.person() as alice:
        key = {"Idempotency-Key": "one-profile"}
        first = await alice.http.post("/users/me/profile", json=FULL, headers=key)
        async with nothing_written(service):
            again = await alice.http.post("/users/me/profile", json=FULL, headers=key)
            assert (again.status_code, again.content) == (201, first.content)
            assert again.headers["etag"] == first.headers["etag"]


@PATHS
async def test_a_profile_is_changed_and_replaced(service: Service, mine: bool) -> None:
    async with service.person() as alice:
        path = path_of(alice.id, mine=mine)
        created = await alice.http.post(path, json=FULL)
        profile = await ok(alice.http.patch(path, json={"info": None, "gender": "other"}))
        changed = {"info": None, "gender": "other", "version": 3, "updated_at": profile["updated_at"]}
        assert profile == {**created.json(), **changed}
        async with nothing_written(service):
            for method in ("PATCH", "PUT"):
                stale = {"If-Match": created.headers["etag"]}
                assert (await alice.http.request(method, path, json={"info": "x"}, headers=stale)).status_code == 412
            assert (await alice.http.patch(path, json={"gender": "other"})).json() == profile
        answer = await alice.http.put(path, json={"info": "Wrote westerns."})
        assert answer.json() | NOTHING | {"info": "Wrote westerns."} == answer.json()
        tag = answer.headers["etag"]
        assert (await alice.http.get(path, headers={"If-None-Match": tag})).status_code == 304
        assert (await alice.http.get("/users/me")).json()["username"] == alice.name, "the account is unchanged"


INVALID: dict[str, list[Any]] = {
    "first_name": [""],
    "last_name": ["x" * 101],
    "gender": ["unknown", 1],
    "info": ["x" * 10_001, "nul \0"],
    "date_of_birth": ["1905-02-30", "15.5.1905", "1899-12-31", "9999-01-01", 19050515],
    "avatar_url": ["/x"],
    "username": ["xyz"],
    "user_id": [1],
}


@SQLITE_ONLY
async def test_an_invalid_profile_is_rejected(service: Service) -> None:
    async with service.person() as alice:
        async with nothing_written(service):
            for field, value in values_by_field(INVALID):
                answer = await alice.http.post("/users/me/profile", json={**FULL, field: value})
                assert_problem(answer, 422, ["body", field])
        await ok(alice.http.post("/users/me/profile", json={}), 201)
        async with nothing_written(service):
            for field, value in values_by_field(INVALID):
                for method in ("PUT", "PATCH"):
                    answer = await alice.http.request(method, "/users/me/profile", json={field: value})
                    assert_problem(answer, 422, ["body", field])


@SQLITE_ONLY
async def test_users_must_be_at_least_thirteen(service: Service) -> None:
    async with service.person() as alice:
        assert (await alice.http.post("/users/me/profile", json={})).is_success
        today = datetime.now(UTC).date()
        for born, status in (
            (today, 422),
            (today + timedelta(days=1), 422),
            (today.replace(year=today.year - 12, day=1), 422),
            (today.replace(year=today.year - 14, day=1), 200),
            (date(1900, 1, 1), 200),
        ):
            answer = await alice.http.patch("/users/me/profile", json={"date_of_birth": born.isoformat()})
            assert answer.status_code == status, born


@pytest.mark.parametrize(
    ("today", "latest"),
    [
        (date(2026, 11, 21), "2013-11-21"),
        (date(2024, 2, 29), "2011-02-28"),
        (date(2025, 2, 28), "2012-02-28"),
        (date(2025, 3, 1), "2012-03-01"),
    ],
)
def test_the_latest_date_of_birth_is_the_thirteenth_birthday(today: date, latest: str) -> None:
    assert profiles.latest_birth(today) == latest


async def test_text_comes_back_unchanged(service: Service) -> None:
    async with service.person() as alice:
        await ok(alice.http.post("/users/me/profile", json={}), 201)
        for info in ("", "\u202e😀\n" * 100, "<script>alert(1)</script>", "x" * 10_000):
            assert (await alice.http.patch("/users/me/profile", json={"info": info})).json()["info"] == info
            assert (await alice.http.get(f"/users/{alice.id}/profile")).json()["info"] == info


async def test_only_the_owner_and_admins_see_and_change_a_profile(service: Service) -> None:
    requests = (("GET", None), *((method, {"info": "x"}) for method in ("POST", "PUT", "PATCH")))
    async with service.person() as alice, service.person() as bob, moderator(service) as mod, service.admin() as admin:
        path = f"/users/{alice.id}/profile"
        await ok(alice.http.post(path, json=FULL), 201)
        async with nothing_written(service):
            for method, body in requests:
                for client in (bob.http, mod.http):
                    for user_id in (alice.id, admin.id, 999_999_999):
                        answer = await client.request(method, f"/users/{user_id}/profile", json=body)
                        assert answer.status_code == 403, (method, user_id)
                assert (await admin.http.request(method, "/users/999999999/profile", json=body)).status_code == 404
        assert (await admin.http.get(path)).json()["info"] == FULL["info"]
        assert (await ok(admin.http.put(path, json={"info": "Known to us."})))["info"] == "Known to us."
        await ok(admin.http.post(f"/users/{bob.id}/profile", json={}), 201)
        await ok(bob.http.get("/users/me/profile"))
