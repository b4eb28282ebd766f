"""The history of an entity: what the event log still holds of it, single and bulk events alike, newest first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from alembic import command
from sqlalchemy import text

from core.identity import Group, Identity
from repository.engine import migrations
from repository.engine.database import Database
from repository.generic import writes
from repository.transfers import history
from resources.movies import MOVIES
from tests.conftest import Places
from tests.support.event_logs import prune
from tests.support.requests import assert_problem
from tests.support.resources import BOTH, ResourceCase, links, moderator
from tests.support.service import Person, Service

ADMIN = Identity(1, Group.ADMIN, 2.0**40, "a session", None)


async def history_of(person: Person, path: str, query: str = "") -> list[dict[str, Any]]:
    """Return all pages of a history, and assert that each page begins where the previous one ended."""
    found: list[dict[str, Any]] = []
    url: str | None = f"{path}/history{query}"
    while url is not None:
        answer = await person.http.get(url)
        assert answer.status_code == 200, answer.text
        found += answer.json()
        url = links(answer).get("next")
    seqs = [change["seq"] for change in found]
    assert seqs == sorted(set(seqs), reverse=True)
    return found


@BOTH
async def test_a_history_holds_every_change_with_both_states(service: Service, kind: ResourceCase) -> None:
    async with service.person() as alice, moderator(service) as bob:
        first = (await alice.add_bulk([kind.fields("one"), kind.fields("two"), kind.fields("three")], kind.name))[1]
        path = f"{kind.path}/{first['id']}"
        second = (await bob.http.patch(path, json={"description": "changed"})).json()
        await bob.http.patch(
            f"{kind.path}/bulk",
            json=[{"id": first["id"], kind.label: "2"}, {"id": first["id"] + 1, "description": "x"}],
        )
        third = (await alice.http.get(path)).json()
        assert [change["operation"] for change in await history_of(alice, path)] == ["update", "update", "add"]
        await alice.delete_bulk([first["id"], first["id"] + 1], kind.name)

        for query in ("", "?limit=1"):
            changes = await history_of(alice, path, query)
            assert [(change["before"], change["after"]) for change in changes] == [
                (third, None),
                (second, third),
                (first, second),
                (None, first),
            ]
            assert [change["operation"] for change in changes] == ["delete", "update", "update", "add"]
            assert [change["changed"] for change in changes] == [[], [kind.label], ["description"], []]
            assert [change["actor_id"] for change in changes] == [alice.id, bob.id, bob.id, alice.id]
        newest = (await alice.http.get(f"{path}/history?limit=1")).json()[0]
        event = (
            await alice.http.get(f"/events?topics={kind.name}&after={await service.position(newest['seq'] - 1)}")
        ).json()
        assert (event["data"][0]["seq"], event["data"][0]["ts"]) == (newest["seq"], newest["at"])
        one = await alice.add(kind.name)
        async with service.anyone() as anonymous:
            answer = await anonymous.get(f"{kind.path}/{one['id']}/history")
        assert [change["after"] for change in answer.json()] == [one]
        assert answer.headers["Stream-Position"] == await service.position(answer.json()[0]["seq"])


async def test_derived_changes_of_parents_are_in_their_history(service: Service) -> None:
    async with service.person() as alice:
        movies = await alice.add_bulk([{"title": "a"}, {"title": "b"}])
        await alice.add_bulk([{"name": "x", "movie_id": movie["id"]} for movie in movies], "characters")
        (counted, added) = await history_of(alice, f"/movies/{movies[0]['id']}")
        assert (counted["changed"], counted["before"], added["after"]) == (["characters_count"], movies[0], movies[0])
        assert counted["after"]["characters_count"] == 1


async def test_only_an_entity_that_never_was_has_no_history(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as alice:
        kept, gone = await alice.add(), await alice.add()
        await alice.http.delete(f"/movies/{gone['id']}")
        assert len(await history_of(alice, f"/movies/{gone['id']}")) == 2
        assert_problem(await alice.http.get("/movies/999999/history"), 404)
        for query, name in (
            ("before=0", "before"),
            ("before=x", "before"),
            ("limit=0", "limit"),
            ("limit=101", "limit"),
        ):
            assert_problem(await alice.http.get(f"/movies/1/history?{query}"), 422, ["query", name])
        await alice.add()
        await prune(service, 1)
        assert await history_of(alice, f"/movies/{kept['id']}") == []
        assert_problem(await alice.http.get(f"/movies/{gone['id']}/history"), 404)


async def test_each_page_searches_a_bounded_number_of_bulk_events(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bulk events may hold only rows with lower and higher ids. A page searches only a few of them."""
    monkeypatch.setattr(history, "MAX_CANDIDATES", 3)
    await database.write(lambda tx: writes.store(tx, MOVIES, [{"title": f"m{n}"} for n in range(3)], None))
    for turn in range(7):
        fields = {"title": f"turn {turn}"}
        edits = [(id_, fields) for id_ in ([1, 2, 3] if turn == 2 else [1, 3])]
        await database.write(partial(writes.edit_bulk, resource=MOVIES, identity=ADMIN, edits=edits))
    pages, before = [], None
    while True:
        page = await history.page_of(database, MOVIES, 2, {"public"}, before=before, limit=50)
        pages.append([(change["seq"], change["operation"]) for change in page.changes])
        before = page.next_before
        if before is None:
            break
    assert pages == [[], [(6, "update")], [(1, "add")]]


async def test_single_and_bulk_events_are_found_by_an_index(database: Database) -> None:
    await database.write(lambda tx: writes.store(tx, MOVIES, [{"title": "m"}, {"title": "n"}], None))
    single = "SELECT seq FROM events WHERE topic = 'movies' AND entity_id = '1' AND seq < 9 ORDER BY seq DESC LIMIT 9"
    bulk = (
        "SELECT seq FROM event_spans WHERE topic = 'movies' AND first_id <= 1 AND last_id >= 1 AND seq < 9"
        " ORDER BY seq DESC LIMIT 9"
    )
    for query, index in ((single, "ix_events_entity_id"), (bulk, "ix_event_spans_topic")):
        if database.is_sqlite:
            plan = await database.select(text(f"EXPLAIN QUERY PLAN {query}"))
            assert index in str(plan), plan
            assert "TEMP B-TREE" not in str(plan), plan
            continue

        async def explain(tx: Any, query: str = query) -> str:
            await tx.connection.execute(text("SET LOCAL enable_seqscan = off"))
            await tx.connection.execute(text("SET LOCAL enable_sort = off"))
            return str((await tx.connection.execute(text(f"EXPLAIN {query}"))).all())

        plan_text = await database.write(explain)
        assert index in plan_text, plan_text


async def test_the_migration_finds_the_ids_of_older_bulk_events(new_places: Callable[[], Places]) -> None:
    database = Database(new_places().database_url)
    await migrations.migrate(database)
    await database.write(lambda tx: writes.store(tx, MOVIES, [{"title": f"m{n}"} for n in range(1_200)], None))
    await database.write(partial(writes.remove_bulk, resource=MOVIES, identity=ADMIN, ids=[7, 1_100]))
    async with database.begin() as (connection, _):
        await connection.run_sync(lambda sync: command.downgrade(migrations._config(sync), "0015"))
        await connection.run_sync(lambda sync: command.upgrade(migrations._config(sync), "head"))
    found = await database.select(text("SELECT seq, topic, first_id, last_id FROM event_spans ORDER BY seq"))
    assert [tuple(row) for row in found] == [
        (1, "movies", 1, 1_000),
        (2, "movies", 1_001, 1_200),
        (3, "movies", 7, 1_100),
    ]
    await database.close()
