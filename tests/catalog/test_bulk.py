"""Bulk writes of movies and characters: all or nothing, with one event unless they are large."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.requests import assert_problem, ok
from tests.support.resources import (
    BOTH,
    CHARACTERS,
    MOVIES,
    ResourceCase,
    as_added,
    expect_event,
    head,
    nothing_written,
    watching,
)
from tests.support.service import Person, Service


async def add_many(person: Person, kind: ResourceCase, count: int, **fields: Any) -> list[dict[str, Any]]:
    rows = [kind.fields(f"n{n}", **fields) for n in range(count)]
    answer = await person.http.post(f"{kind.path}/bulk", json=rows)
    assert answer.status_code == 201, answer.text
    assert answer.json()["skipped"] == []
    added: list[dict[str, Any]] = answer.json()["added"]
    return added


async def fetch(person: Person, kind: ResourceCase, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ids = ",".join(str(row["id"]) for row in rows)
    found: list[dict[str, Any]] = await ok(person.http.get(f"{kind.path}?id[in]={ids}&sort=id&limit=1000"))
    return found


async def delete_many(person: Person, kind: ResourceCase, ids: list[int]) -> Any:
    return await ok(person.http.request("DELETE", f"{kind.path}/bulk", json={"ids": ids}))


# --- add


@BOTH
async def test_rows_are_added_in_the_order_of_the_request(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, watching(service) as watcher:
        rows = [kind.full | kind.fields("first"), kind.fields("second"), kind.full | kind.fields("third")]
        response = await ok(alice.http.post(f"{kind.path}/bulk", json=rows), 201)
        assert set(response) == {"added", "skipped"}
        added = response["added"]
        assert [row[kind.label] for row in added] == ["first", "second", "third"]
        assert [row["id"] for row in added] == list(range(added[0]["id"], added[0]["id"] + 3))
        assert added == [as_added(kind, given, row, alice) for given, row in zip(rows, added, strict=True)]
        await expect_event(watcher, "add_bulk", kind, {"count": 3, "items": added}, alice)
        assert await fetch(alice, kind, added) == added


@BOTH
async def test_ten_thousand_rows_fit_one_request(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, watching(service) as watcher:
        added = await add_many(alice, kind, 10_000)
        assert len(added) == 10_000
        seen: list[dict[str, Any]] = []
        while len(seen) < 10_000:
            event = await watcher.expect("add_bulk", kind.name)
            assert event["data"]["count"] == len(event["data"]["items"])
            seen += event["data"]["items"]
        assert seen == added
        start = watcher.welcome["data"]["seq"]
        assert watcher.seqs == list(range(start + 1, start + 1 + len(watcher.seqs)))
        assert (await alice.http.get(f"{kind.path}/count?user_id={alice.id}")).json() == {"count": 10_000}
        first, last = added[0]["id"], added[-1]["id"]
        deleted = await ok(alice.http.delete(f"{kind.path}/bulk/{first}/{last}"))
        assert deleted == {"deleted": [row["id"] for row in added], "not_found": []}
        assert (await alice.http.get(f"{kind.path}/count?user_id={alice.id}")).json() == {"count": 0}


@BOTH
async def test_one_invalid_row_rejects_all(service: Service, kind: ResourceCase) -> None:
    rows: list[Any] = [kind.fields(f"n{n}") for n in range(5)]
    rows[1] = {kind.label: ""}
    rows[3] = {"description": "no label"}
    rows[4] = "no object"
    async with service.person() as alice, nothing_written(service):
        answer = await alice.http.post(f"{kind.path}/bulk", json=rows)
        assert_problem(answer, 422, ["body", 1, kind.label], ["body", 3, kind.label], ["body", 4])


@BOTH
async def test_skip_stores_the_valid_rows(service: Service, kind: ResourceCase) -> None:
    rows: list[Any] = [kind.fields(f"n{n}") for n in range(5)]
    rows[1] = {kind.label: "", "oops": 1}
    rows[4] = None
    async with service.person() as alice, watching(service) as watcher:
        answer = await alice.http.post(f"{kind.path}/bulk?on_error=skip", json=rows)
        assert answer.status_code == 201
        added, skipped = answer.json()["added"], answer.json()["skipped"]
        assert [row[kind.label] for row in added] == ["n0", "n2", "n3"]
        assert [each["index"] for each in skipped] == [1, 4]
        assert [set(each) for each in skipped] == [{"index", "detail"}] * 2
        assert [each["loc"] for each in skipped[0]["detail"]] == [["body", 1, kind.label], ["body", 1, "oops"]]
        assert [each["loc"] for each in skipped[1]["detail"]] == [["body", 4]]
        await expect_event(watcher, "add_bulk", kind, {"count": 3, "items": added}, alice)


@BOTH
async def test_without_valid_rows_nothing_is_stored(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, nothing_written(service):
        answer = await alice.http.post(f"{kind.path}/bulk?on_error=skip", json=[1, {}])
        assert answer.status_code == 201
        assert answer.json()["added"] == []
        assert len(answer.json()["skipped"]) == 2
        assert (await alice.http.post(f"{kind.path}/bulk", json=[])).json() == {"added": [], "skipped": []}
        assert (await alice.http.post(f"{kind.path}/bulk?on_error=maybe", json=[])).status_code == 422


async def test_characters_of_unknown_movies_are_skipped_or_rejected(service: Service) -> None:
    async with service.person() as alice:
        movie = await alice.add()
        rows = [{"name": "a", "movie_id": movie["id"]}, {"name": "b", "movie_id": 10**9}, {"name": ""}, {"name": "d"}]
        async with nothing_written(service):
            answer = await alice.http.post("/characters/bulk", json=[rows[0], rows[1]])
            assert_problem(answer, 409, ["body", 1, "movie_id"])
        async with watching(service) as watcher:
            answer = await alice.http.post("/characters/bulk?on_error=skip", json=rows)
            added, skipped = answer.json()["added"], answer.json()["skipped"]
            assert [row["name"] for row in added] == ["a", "d"]
            assert [(each["index"], each["detail"][0]["loc"]) for each in skipped] == [
                (1, ["body", 1, "movie_id"]),
                (2, ["body", 2, "name"]),
            ]
            await expect_event(watcher, "add_bulk", CHARACTERS, {"count": 2, "items": added}, alice)
            movie["characters_count"] = 1
            await expect_event(watcher, "update", MOVIES, movie, alice, ["characters_count"])


# --- change


@BOTH
async def test_a_bulk_edit_causes_one_event(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        rows = await add_many(alice, kind, 4, description="old")
        async with watching(service) as watcher:
            changes = [
                {"id": rows[2]["id"], kind.label: "two"},
                {"id": rows[0]["id"], "description": None},
                {"id": 10**9, kind.label: "unknown"},
                {"id": rows[1]["id"]},
                {"id": 2 * 10**9},
            ]
            answer = await alice.http.patch(f"{kind.path}/bulk", json=changes)
            assert answer.status_code == 200
            now = {row["id"]: row for row in await fetch(alice, kind, rows)}
            two, zero, one = (now[rows[n]["id"]] for n in (2, 0, 1))
            # The rows are in the order of the request and include the unchanged one.
            assert answer.json() == {"updated": [two, zero, one], "not_found": [10**9, 2 * 10**9]}
            assert two == {**rows[2], kind.label: "two", "version": 2, "updated_at": two["updated_at"]}
            assert zero == {**rows[0], "description": None, "version": 2, "updated_at": zero["updated_at"]}
            assert one == rows[1]
            event = await watcher.expect("update_bulk", kind.name)
            assert event["data"] == {"count": 2, "items": [zero, two]}
            assert sorted(event["changed"]) == sorted([kind.label, "description"])


@BOTH
async def test_an_id_given_twice_gets_both_edits(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        mine = await alice.add(kind.name)
        changes = [
            {"id": mine["id"], kind.label: "first", "description": "kept"},
            {"id": mine["id"], kind.label: "second"},
        ]
        answer = await alice.http.patch(f"{kind.path}/bulk", json=changes)
        [after] = answer.json()["updated"]
        assert (after[kind.label], after["description"], after["version"]) == ("second", "kept", 2)


@BOTH
async def test_a_bulk_edit_may_change_every_field(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        rows = await add_many(alice, kind, 3)
        changes = [{"id": row["id"]} | kind.full for row in rows]
        updated = (await alice.http.patch(f"{kind.path}/bulk", json=changes)).json()["updated"]
        assert updated == await fetch(alice, kind, rows)
        assert all(row | kind.full == row for row in updated)


@BOTH
async def test_a_bulk_edit_needs_ids_and_valid_fields(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        mine = await alice.add(kind.name)
        async with nothing_written(service):
            changes = [{"id": mine["id"], kind.label: "new"}, {kind.label: "x"}, {"id": mine["id"], kind.label: None}]
            answer = await alice.http.patch(f"{kind.path}/bulk", json=changes)
            assert_problem(answer, 422, ["body", 1, "id"], ["body", 2, kind.label])
            assert (await alice.http.patch(f"{kind.path}/bulk", json=[])).json() == {"updated": [], "not_found": []}


# --- delete


@BOTH
async def test_a_bulk_deletion_causes_one_event(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        rows = await add_many(alice, kind, 4)
        ids = [row["id"] for row in rows]
        async with watching(service) as watcher:
            wanted = [ids[2], 10**9, ids[0], ids[2], 10**9]
            assert await delete_many(alice, kind, wanted) == {"deleted": [ids[2], ids[0]], "not_found": [10**9]}
            await expect_event(watcher, "delete_bulk", kind, {"count": 2, "ids": [ids[0], ids[2]]}, alice)
        assert [row["id"] for row in await fetch(alice, kind, rows)] == [ids[1], ids[3]]


@BOTH
async def test_a_range_is_deleted_including_both_ends(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice:
        ids = [row["id"] for row in await add_many(alice, kind, 5)]
        await alice.http.delete(f"{kind.path}/{ids[2]}")
        async with watching(service) as watcher:
            answer = await alice.http.delete(f"{kind.path}/bulk/{ids[1]}/{ids[3]}")
            assert answer.json() == {"deleted": [ids[1], ids[3]], "not_found": [ids[2]]}
            await expect_event(watcher, "delete_bulk", kind, {"count": 2, "ids": [ids[1], ids[3]]}, alice)
        async with nothing_written(service):
            assert_problem(await alice.http.delete(f"{kind.path}/bulk/{ids[3]}/{ids[1]}"), 422, ["path", "end_id"])
            answer = await alice.http.delete(f"{kind.path}/bulk/{10**9}/{10**9 + 1}")
            assert answer.json() == {"deleted": [], "not_found": [10**9, 10**9 + 1]}


# --- rights


@BOTH
async def test_one_row_of_another_user_rejects_all(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, service.person() as bob:
        first, foreign, last = await alice.add(kind.name), await bob.add(kind.name), await alice.add(kind.name)
        ids = [first["id"], foreign["id"], last["id"]]
        async with nothing_written(service):
            for answer in (
                await alice.http.patch(f"{kind.path}/bulk", json=[{"id": each, kind.label: "x"} for each in ids]),
                await alice.http.request("DELETE", f"{kind.path}/bulk", json={"ids": [*ids, 10**9]}),
                await alice.http.delete(f"{kind.path}/bulk/{ids[0]}/{ids[2]}"),
            ):
                assert answer.status_code == 403
                assert str(foreign["id"]) in answer.json()["detail"]
                assert str(first["id"]) not in answer.json()["detail"].split()
        assert await fetch(alice, kind, [first, foreign, last]) == [first, foreign, last]


# --- movies and their characters


async def test_bulk_writes_update_the_characters_count(service: Service) -> None:
    async with service.person() as alice:
        one, two = await add_many(alice, MOVIES, 2)
        async with watching(service) as watcher:
            cast = await add_many(alice, CHARACTERS, 3, movie_id=one["id"])
            await expect_event(watcher, "add_bulk", CHARACTERS, {"count": 3, "items": cast}, alice)
            one["characters_count"] = 3
            await expect_event(watcher, "update", MOVIES, one, alice, ["characters_count"])

            changes: list[dict[str, Any]] = [
                {"id": cast[0]["id"], "movie_id": two["id"]},
                {"id": cast[1]["id"], "movie_id": None},
            ]
            moved = (await alice.http.patch("/characters/bulk", json=changes)).json()["updated"]
            await expect_event(watcher, "update_bulk", CHARACTERS, {"count": 2, "items": moved}, alice, ["movie_id"])
            one["characters_count"], two["characters_count"] = 1, 1
            await expect_event(
                watcher, "update_bulk", MOVIES, {"count": 2, "items": [one, two]}, alice, ["characters_count"]
            )

            ids = [row["id"] for row in cast]
            await delete_many(alice, CHARACTERS, ids[1:])
            await expect_event(watcher, "delete_bulk", CHARACTERS, {"count": 2, "ids": ids[1:]}, alice)
            one["characters_count"] = 0
            await expect_event(watcher, "update", MOVIES, one, alice, ["characters_count"])

            await alice.http.delete(f"/movies/bulk/{one['id']}/{two['id']}")
            left = (await alice.http.get(f"/characters/{ids[0]}")).json()
            assert (left["movie_id"], left["version"]) == (None, 3)
            await expect_event(watcher, "update", CHARACTERS, left, alice, ["movie_id"])
            await expect_event(watcher, "delete_bulk", MOVIES, {"count": 2, "ids": [one["id"], two["id"]]}, alice)


@pytest.mark.parametrize("big", [True, False])
async def test_large_bulks_are_split_into_events_below_one_mebibyte(service: Service, big: bool) -> None:
    """Most websocket clients reject frames above 1 MiB."""
    count = 200 if big else 2_500
    async with service.person() as alice, watching(service) as watcher:
        added = await add_many(alice, MOVIES, count, description="é" * (9_000 if big else 1))
        seen: list[Any] = []
        while len(seen) < count:
            event = await watcher.expect("add_bulk", "movies")
            assert len(event["data"]["items"]) <= 1_000
            assert len(str(event["data"]).encode()) < 2**20
            seen += event["data"]["items"]
        assert seen == added
        assert await head(service) == watcher.seqs[-1]


# --- the size limit


@BOTH
async def test_a_write_of_many_long_rows_is_refused_before_it_is_done(service: Service, kind: ResourceCase) -> None:
    """Short requests can change long rows: 2,000 rows of 10,000 characters are 20 MB, and the limit is 16 MiB."""
    async with service.person() as alice:
        ids: list[int] = []
        for _ in range(2):
            ids += [row["id"] for row in await add_many(alice, kind, 1_000, description="x" * 10_000)]
        short = next(name for name in kind.full if name not in ("description", kind.label))
        edits = [{"id": entity_id, short: kind.full[short]} for entity_id in ids]
        before = await head(service)
        for method, body in (("PATCH", edits), ("DELETE", {"ids": ids})):
            response = await alice.http.request(method, f"{kind.path}/bulk", json=body)
            assert response.status_code == 413, response.text
            assert "at most 16,777,216 bytes" in response.json()["detail"]
        ranged = await alice.http.delete(f"{kind.path}/bulk/{ids[0]}/{ids[-1]}")
        assert ranged.status_code == 413, ranged.text
        assert await head(service) == before
        updated = await ok(alice.http.patch(f"{kind.path}/bulk", json=edits[:1_000]))
        assert len(updated["updated"]) == 1_000
        for part in (ids[:1_000], ids[1_000:]):
            assert (await delete_many(alice, kind, part))["deleted"] == part
