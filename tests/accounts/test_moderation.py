"""What staff do to rows that are not their own is recorded in the audit trail, once and in the same transaction."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from alembic import command
from sqlalchemy import text

from repository.engine import migrations
from repository.engine.database import Database
from tests.conftest import Places
from tests.support.requests import ok, over_socket
from tests.support.resources import BOTH, ResourceCase, head, moderator, nothing_written
from tests.support.service import Person, Service
from tests.support.sockets import signed_in

Entry = tuple[str, str, int | None, list[int | str], int, dict[str, Any]]


@asynccontextmanager
async def entries_of(admin: Person, actor: Person) -> AsyncIterator[list[Entry]]:
    """Collect what the block adds to the audit trail: action, resource, owner, ids, count and changes, oldest first."""
    query = f"/admin/audit?actor_id={actor.id}&sort=id&limit=1000"
    before = await ok(admin.http.get(query))
    found: list[Entry] = []
    yield found
    for entry in (await ok(admin.http.get(query)))[len(before) :]:
        assert (entry["actor_id"], entry["address"]) == (actor.id, "127.0.0.1")
        found.append(tuple(entry[name] for name in ("action", "resource", "user_id", "entity_ids", "count", "changes")))


@BOTH
async def test_each_action_on_rows_of_others_is_recorded_once(service: Service, kind: ResourceCase) -> None:
    async with service.admin() as admin, service.person() as alice, service.person() as bob, moderator(service) as mod:
        hers, also_hers = [(await alice.add(kind.name))["id"] for _ in range(2)]
        his, own = (await bob.add(kind.name))["id"], (await mod.add(kind.name))["id"]
        async with entries_of(admin, mod) as found:
            path = f"{kind.path}/{hers}"
            for _ in range(2):  # the second, identical request changes nothing
                await ok(mod.http.patch(path, json={"description": "moderated"}))
            await ok(mod.http.put(path, json=kind.fields("Moderated")))
            await ok(mod.http.patch(f"{kind.path}/{own}", json={"description": "mine"}))
            edits = [{"id": each, "description": "bulk"} for each in (also_hers, his, own, hers)]
            await ok(mod.http.patch(f"{kind.path}/bulk", json=edits))
            await ok(mod.http.patch(f"{kind.path}/bulk", json=edits[:1]))
            assert (await mod.http.delete(path)).status_code == 204
            assert (await mod.http.delete(path)).status_code == 404
            assert (
                await mod.http.request("DELETE", f"{kind.path}/bulk", json={"ids": [his, own, also_hers]})
            ).is_success
        assert found == [
            ("update", kind.name, alice.id, [hers], 1, {"description": []}),
            ("update", kind.name, alice.id, [hers], 1, {kind.label: [], "description": []}),
            ("update", kind.name, alice.id, [hers, also_hers], 2, {"description": []}),
            ("update", kind.name, bob.id, [his], 1, {"description": []}),
            ("delete", kind.name, alice.id, [hers], 1, {}),
            ("delete", kind.name, alice.id, [also_hers], 1, {}),
            ("delete", kind.name, bob.id, [his], 1, {}),
        ]


async def test_changes_of_genres_are_recorded_without_an_owner(service: Service) -> None:
    async with service.admin() as admin, moderator(service) as mod:
        name = f"Noir {await head(service)}"
        async with entries_of(admin, mod) as found:
            genre = (await ok(mod.http.post("/genres", json={"name": name}), 201))["id"]
            added = await ok(mod.http.post("/genres/bulk", json=[{"name": f"{name} {n}"} for n in range(2)]), 201)
            ids = [row["id"] for row in added["added"]]
            await ok(mod.http.patch(f"/genres/{genre}", json={"name": f"{name}!"}))
            await ok(mod.http.delete(f"/genres/bulk/{ids[0]}/{ids[-1]}"))
            assert (await mod.http.delete(f"/genres/{genre}")).status_code == 204
        assert found == [
            ("create", "genres", None, [genre], 1, {}),
            ("create", "genres", None, ids, 2, {}),
            ("update", "genres", None, [genre], 1, {"name": []}),
            ("delete", "genres", None, ids, 2, {}),
            ("delete", "genres", None, [genre], 1, {}),
        ]


async def test_only_staff_may_ask_to_change_genres_even_if_none_is_found(service: Service) -> None:
    async with service.person() as alice:
        for method, path, body in (
            ("DELETE", "/genres/bulk", {"ids": [2**40]}),
            ("DELETE", f"/genres/bulk/{2**40}/{2**40 + 1}", None),
            ("PATCH", "/genres/bulk", [{"id": 2**40, "name": "Noir"}]),
            ("PATCH", "/genres/bulk", []),
        ):
            assert (await alice.http.request(method, path, json=body)).status_code == 403, (method, path)


async def test_cancelling_a_job_of_another_user_is_recorded(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice, moderator(service) as mod:
        async with entries_of(admin, mod) as found:
            hers = (await alice.generate("movies", 1_000, "?rate=1"))["id"]
            own = (await mod.generate("movies", 1_000, "?rate=1"))["id"]
            for job_id in (hers, hers, own):
                await ok(mod.http.delete(f"/jobs/{job_id}"))
        assert found == [("cancel", "jobs", alice.id, [hers], 1, {})]


async def test_owners_and_refused_actions_leave_no_entry(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice, service.person() as bob, moderator(service) as mod:
        hers, his = (await alice.add())["id"], (await bob.add())["id"]
        before = (await admin.http.get("/admin/audit?limit=0")).headers["x-total-count"]
        await ok(alice.http.patch(f"/movies/{hers}", json={"title": "Mine"}))
        await alice.delete_bulk([hers])
        async with nothing_written(service):
            await ok(alice.http.patch(f"/movies/{his}", json={"title": "Mine"}), 403)
            stale = {"If-Match": '"99-0000000000000000"'}
            await ok(mod.http.patch(f"/movies/{his}", json={"title": "Stale"}, headers=stale), 412)
            await ok(mod.http.patch("/characters/bulk", json=[{"id": hers, "movie_id": 2**40}]), 409)
        assert (await admin.http.get("/admin/audit?limit=0")).headers["x-total-count"] == before


async def test_a_request_on_a_socket_is_recorded_with_its_address(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice, moderator(service) as mod:
        movie = await alice.add()
        async with entries_of(admin, mod) as found:
            async with (
                service.watch("topics=audit", **signed_in(admin)) as theirs,
                service.watch("topics=account", **signed_in(mod)) as watcher,
            ):
                await over_socket(watcher, "DELETE", f"/movies/{movie['id']}")
                event = await theirs.expect("add", "audit")
        assert found == [("delete", "movies", alice.id, [movie["id"]], 1, {})]
        listed = await ok(admin.http.get(f"/admin/audit?resource=movies&user_id={alice.id}"))
        assert [event["data"]] == listed
        assert event["actor_id"] == mod.id


async def test_an_entry_names_the_first_hundred_rows_and_counts_all(service: Service) -> None:
    async with service.admin() as admin, service.person() as alice, moderator(service) as mod:
        ids = [row["id"] for row in await alice.add_bulk([{"title": "M"}] * 101)]
        async with entries_of(admin, mod) as found:
            await mod.delete_bulk(ids)
        assert found == [("delete", "movies", alice.id, ids[:100], 101, {})]


async def test_entries_of_earlier_versions_are_about_accounts(
    empty_places: Callable[[], Places], new_service: Callable[..., Service]
) -> None:
    places = empty_places()
    database = Database(places.database_url)
    async with database.begin() as (connection, _):
        await connection.run_sync(lambda sync: command.upgrade(migrations._config(sync), "0009"))
        await connection.execute(
            text(
                "INSERT INTO audit (actor_id, action, user_id, changes, address, created_at) "
                "VALUES (1, 'delete', 7, '{}', NULL, '2026-01-01T00:00:00.000000Z')"
            )
        )
    await database.close()
    service = new_service(places).start()
    async with service.admin() as admin:
        (entry,) = await ok(admin.http.get("/admin/audit?user_id=7"))
        assert (entry["id"], entry["resource"], entry["entity_ids"], entry["count"]) == (1, "users", [7], 1)
        newer = await ok(admin.http.get("/admin/audit?after=1"))
        assert [each["action"] for each in newer] == ["create"], "the first admin's entry has a new id"
