"""A POST that is repeated with its `Idempotency-Key` is carried out once."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import httpx

from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem
from tests.support.resources import BOTH, MOVIES, ResourceCase, head, nothing_written, sql
from tests.support.service import Person, Service

_keys = itertools.count(1)


def key() -> dict[str, str]:
    return {"Idempotency-Key": f"key-{next(_keys)}"}


def posts(kind: ResourceCase, person: Person) -> list[tuple[str, Any]]:
    return [
        (kind.path, kind.full),
        (f"/users/{person.id}{kind.path}", kind.full),
        (f"{kind.path}/bulk", [kind.full, kind.fields("second")]),
        (f"{kind.path}/bulk?on_error=skip", [kind.full, {}]),
    ]


def as_sent(answer: httpx.Response) -> tuple[int, bytes, dict[str, str]]:
    varying = ("date", "x-request-id", "idempotency-replayed")
    headers = {name: value for name, value in answer.headers.items() if name not in varying}
    return answer.status_code, answer.content, headers


@BOTH
async def test_a_repeated_post_gets_the_same_response_and_writes_once(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        for path, body in posts(kind, alice):
            headers = key()
            first = await alice.http.post(path, json=body, headers=headers)
            assert first.status_code == 201, first.text
            assert "idempotency-replayed" not in first.headers
            async with nothing_written(service):
                for _ in range(2):
                    again = await alice.http.post(path, json=body, headers=headers)
                    assert as_sent(again) == as_sent(first), path
                    assert again.headers["idempotency-replayed"] == "true"


async def test_a_repeated_import_starts_one_job(service: Service) -> None:
    async with service.person() as alice:
        headers = key() | {"Content-Type": "text/csv"}
        first, again = [
            await alice.http.post("/movies/import", content=b"title\r\nOnce\r\n", headers=headers) for _ in range(2)
        ]
        assert first.status_code == 202, first.text
        assert as_sent(again) == as_sent(first)
        assert again.headers["idempotency-replayed"] == "true"
        for content in (b"title\r\nTwice\r\n", b"no such column", b""):
            other = await alice.http.post("/movies/import", content=content, headers=headers)
            assert_problem(other, 422, ("header", "Idempotency-Key"))
        await alice.job_ended(first.json()["id"])
        stored = await sql(service, f"SELECT title FROM movies WHERE user_id = {alice.id}")
        assert [tuple(row) for row in stored] == [("Once",)]
        assert not await sql(
            service, f"SELECT id FROM jobs WHERE user_id = {alice.id} AND id <> '{first.json()['id']}'"
        )


@BOTH
async def test_a_repeated_generate_starts_one_job(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        path, headers = f"{kind.path}/generate/3", key()
        first = await alice.http.post(path, headers=headers)
        again = await alice.http.post(path, headers=headers)
        assert first.status_code == 202
        assert as_sent(again) == as_sent(first)
        await alice.job_ended(first.json()["id"])
        assert as_sent(await alice.http.post(path, headers=headers)) == as_sent(first)
        assert (await alice.http.get(f"{kind.path}/count?user_id={alice.id}")).json() == {"count": 3}


@BOTH
async def test_the_stored_response_outlives_the_row(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        headers = key()
        first = await alice.http.post(kind.path, json=kind.full, headers=headers)
        await alice.http.delete(first.headers["location"])
        again = await alice.http.post(kind.path, json=kind.full, headers=headers)
        assert as_sent(again) == as_sent(first)
        assert (await alice.http.get(first.headers["location"])).status_code == 404


@BOTH
async def test_a_key_is_rejected_with_another_request(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        headers = key()
        assert (await alice.http.post(kind.path, json=kind.full, headers=headers)).status_code == 201
        async with nothing_written(service):
            for path, body in (
                (kind.path, kind.fields("another")),
                (f"{kind.path}/bulk", [kind.full]),
                (f"/users/{alice.id}{kind.path}", kind.full),
            ):
                answer = await alice.http.post(path, json=body, headers=headers)
                assert_problem(answer, 422, ["header", "Idempotency-Key"])
                assert "idempotency-replayed" not in answer.headers


@BOTH
async def test_a_rejected_request_does_not_use_up_its_key(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        headers = key()
        async with nothing_written(service):
            assert (await alice.http.post(kind.path, json={}, headers=headers)).status_code == 422
            unknown = {"name": "Harry", "movie_id": 10**9}
            assert (await alice.http.post("/characters", json=unknown, headers=headers)).status_code == 409
        assert (await alice.http.post(kind.path, json=kind.full, headers=headers)).status_code == 201


@BOTH
async def test_only_one_of_several_concurrent_repeats_is_carried_out(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        headers, before = key(), await head(service)
        answers = await asyncio.gather(
            *(alice.http.post(kind.path, json=kind.full, headers=headers) for _ in range(8)),
        )
        assert {as_sent(answer)[:2] for answer in answers} == {as_sent(answers[0])[:2]}
        assert answers[0].status_code == 201
        assert sum("idempotency-replayed" in answer.headers for answer in answers) == 7
        # A movie also has the events of the counts of its genres, its languages and its country.
        assert await head(service) == before + (4 if kind is MOVIES else 1)
        assert await sql(service, f"SELECT COUNT(*) FROM {kind.name} WHERE user_id = {alice.id}") == [(1,)]


@BOTH
async def test_users_may_use_the_same_key(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, service.person() as bob:
        headers = key()
        hers = await alice.http.post(kind.path, json=kind.full, headers=headers)
        his = await bob.http.post(kind.path, json=kind.full, headers=headers)
        assert his.status_code == 201
        assert his.json()["id"] != hers.json()["id"]
        assert his.json()["user_id"] == bob.id


@BOTH
@SQLITE_ONLY
async def test_an_invalid_key_is_rejected(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, nothing_written(service):
        for wrong in (b"", b"two words", b"x" * 256, b"\xe9"):
            answer = await alice.http.post(kind.path, json=kind.full, headers={b"Idempotency-Key": wrong})
            assert_problem(answer, 422, ["header", "Idempotency-Key"])
