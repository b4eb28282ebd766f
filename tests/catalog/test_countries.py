"""Countries and languages: the codes of the standards are there from the start, and admins edit their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
from alembic import command
from sqlalchemy import insert, inspect, select

import models
from repository.engine import migrations
from repository.engine.database import Database
from resources.countries import CODES as COUNTRY_CODES
from resources.countries import COUNTRIES
from resources.languages import CODES as LANGUAGE_CODES
from resources.languages import LANGUAGES
from resources.resource import Resource
from tests.conftest import Places
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, ok
from tests.support.resources import moderator, nothing_written, watching
from tests.support.service import Service
from tests.support.sockets import rows_of, subscribed


@dataclass(frozen=True)
class Case:
    """A resource with codes. `codes` holds all codes, `read` one that the tests only read, `written` two others."""

    resource: Resource
    codes: Sequence[str]
    number: int
    read: tuple[str, str]
    written: tuple[str, str]
    invalid: Sequence[Any]

    @property
    def path(self) -> str:
        return f"/{self.resource.name}"


CASES = (
    Case(COUNTRIES, COUNTRY_CODES, 249, ("AT", "Austria"), ("HM", "UM"), ["at", "AUT", "XX", "", 1, None, " AT"]),
    Case(LANGUAGES, LANGUAGE_CODES, 183, ("de", "German"), ("ie", "io"), ["DE", "deu", "xx", "", 1, "de "]),
)
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.resource.name)


@EACH
async def test_a_new_database_has_every_code_of_the_standard(database: Database, case: Case) -> None:
    table = case.resource.table
    rows = await database.select(select(table).order_by(table.c.id))
    assert [row.code for row in rows] == sorted(case.codes)
    assert len(rows) == len(set(case.codes)) == len({row.name for row in rows}) == case.number
    for number, row in enumerate(rows, 1):
        body = {"code": row.code, "name": row.name}
        assert case.resource.body.model_validate(body).model_dump() == body
        assert (row.id, row.code_key, row.version) == (number, row.code.lower(), 1)
    assert case.read in {(row.code, row.name) for row in rows}
    assert await database.select(select(models.events.c.seq)) == []


async def test_an_upgrade_adds_all_codes_with_their_events(
    empty_places: Callable[[], Places], new_service: Callable[..., Service]
) -> None:
    places = empty_places()
    database = Database(places.database_url)
    async with database.begin() as (connection, _):
        await connection.run_sync(lambda sync: command.upgrade(migrations._config(sync), "0011"))
        await connection.execute(insert(models.event_head).values(id=1, epoch="e" * 16, seq=5, size=7))
        await connection.run_sync(lambda sync: command.upgrade(migrations._config(sync), "0012"))
        events = (await connection.execute(select(models.events).order_by(models.events.c.seq))).all()
        size = (await connection.execute(select(models.event_head.c.size))).scalar_one()
    assert size == 7 + sum(len(event.payload) + len(event.before or b"") for event in events)
    with new_service(places).running() as service:
        async with service.anyone() as client:
            for case, event in zip(CASES, events, strict=True):
                listed = await ok(client.get(f"{case.path}?limit=1000"))
                shown = [{name: value for name, value in row.items() if name != "movies_count"} for row in listed]
                assert (event.topic, event.operation) == (case.resource.name, "add_bulk")
                assert orjson.loads(event.payload) == {"count": case.number, "items": shown}
                assert event.actor_id is None
            assert event.seq == 7
            assert await ok(client.get("/actors")) == []
    async with database.begin() as (connection, _):
        await connection.run_sync(lambda sync: command.downgrade(migrations._config(sync), "0011"))
        assert not await connection.run_sync(lambda sync: inspect(sync).has_table("countries"))
    await database.close()


@EACH
async def test_a_row_is_found_by_its_code_or_its_id(service: Service, case: Case) -> None:
    code, name = case.read
    async with service.anyone() as reader:
        found = await reader.get(f"{case.path}/{code}")
        row = found.json()
        assert (row["code"], row["name"]) == (code, name)
        for other in (code.lower(), code.upper(), code.title(), row["id"]):
            again = await reader.get(f"{case.path}/{other}", headers={"If-None-Match": found.headers["etag"]})
            assert again.status_code == 304, other
        missing = await reader.get(f"{case.path}/xx")
        assert_problem(missing, 404)
        assert missing.json()["detail"] == f"There is no {case.resource.singular} xx"
        for invalid in ("0", "-1", str(2**63), "1.0", "x", f"{code}x", "%C3%A9%C3%A9", "a%0a"):
            answer = await reader.get(f"{case.path}/{invalid}")
            assert_problem(answer, 422, ["path", "id"])
            assert answer.json()["detail"][0]["msg"] == "Expected an id or a code of two letters"


@EACH
async def test_an_admin_edits_deletes_and_adds_a_row(service: Service, case: Case) -> None:
    code = case.written[0]
    async with service.admin() as chief, moderator(service) as mona, watching(service) as watcher:
        row = await ok(chief.http.get(f"{case.path}/{code}"))
        one = f"{case.path}/{row['id']}"
        refused = await mona.http.patch(one, json={"name": "Mine"})
        assert_problem(refused, 403)
        assert refused.json()["detail"] == f"Only admins may change {case.resource.singular} {row['id']}"
        assert_problem(await mona.http.request("PATCH", f"{case.path}/bulk", json=[]), 403)

        renamed = await ok(chief.http.patch(one, json={"name": "Renamed"}))
        assert renamed == row | {"name": "Renamed", "version": 2, "updated_at": renamed["updated_at"]}
        event = await watcher.expect("update", case.resource.name)
        assert (event["data"], event["changed"]) == (renamed, ["name"])
        assert (await chief.http.delete(one)).status_code == 204
        assert (await watcher.expect("delete", case.resource.name))["data"] == {"id": row["id"]}
        assert_problem(await chief.http.get(f"{case.path}/{code}"), 404)

        added = await ok(chief.http.post(case.path, json={"code": code, "name": row["name"]}), 201)
        assert added["id"] > case.number
        assert (await watcher.expect("add", case.resource.name))["data"] == added
        async with nothing_written(service):
            taken = await chief.http.post(case.path, json={"code": code, "name": "Again"})
            assert_problem(taken, 409, ["body", "code"])
            assert taken.json()["detail"][0]["type"] == "taken"
        assert await ok(chief.http.get(f"{case.path}/{code}")) == added


@EACH
async def test_codes_in_bulk_are_unique_and_can_be_swapped(service: Service, case: Case) -> None:
    async with service.admin() as chief:
        bulk = f"{case.path}/bulk"
        first, second = [await ok(chief.http.get(f"{case.path}/{code}")) for code in case.written]
        codes = [first["code"], second["code"]]
        for swapped in (codes[::-1], codes):
            edits = [{"id": row["id"], "code": code} for row, code in zip((first, second), swapped, strict=True)]
            assert [row["code"] for row in (await ok(chief.http.patch(bulk, json=edits)))["updated"]] == swapped
            assert (await ok(chief.http.get(f"{case.path}/{swapped[0]}")))["id"] == first["id"]
        async with nothing_written(service):
            edit = {"id": first["id"], "code": second["code"]}
            assert_problem(await chief.http.patch(bulk, json=[edit]), 409, ["body", 0, "code"])

        gone = await ok(chief.http.request("DELETE", bulk, json={"ids": [first["id"]]}))
        assert gone == {"deleted": [first["id"]], "not_found": []}
        rows = [{"code": code, "name": first["name"]} for code in (codes[0], codes[1], codes[0], "??")]
        answer = await ok(chief.http.post(f"{bulk}?on_error=skip", json=rows), 201)
        assert [row["code"] for row in answer["added"]] == [codes[0]]
        assert [skipped["index"] for skipped in answer["skipped"]] == [1, 2, 3]


@EACH
@SQLITE_ONLY
async def test_a_code_that_the_standard_lacks_is_rejected(service: Service, case: Case) -> None:
    async with service.admin() as chief, nothing_written(service):
        row = await ok(chief.http.get(f"{case.path}/{case.read[0]}"))
        for code in case.invalid:
            for method, path in (("POST", case.path), ("PATCH", f"{case.path}/{row['id']}")):
                body = {"name": "Atlantis", "code": code}
                assert_problem(await chief.http.request(method, path, json=body), 422, ["body", "code"])
        # Only GET takes a code in the path.
        for method in ("PUT", "PATCH", "DELETE"):
            assert_problem(await chief.http.request(method, f"{case.path}/{case.read[0]}", json={}), 422)


@EACH
async def test_rows_are_listed_searched_and_watched(service: Service, case: Case) -> None:
    code, name = case.read
    async with service.anyone() as reader, service.watch() as watcher:
        (row,) = await ok(reader.get(case.path, params={"code": code}))
        assert await ok(reader.get(case.path, params={"q": f"{code} {name[:4]}"})) == [row]
        found = await reader.get(f"{case.path}/names", params={"code[in]": f"{code},??", "sort": "-name"})
        assert found.json() == [name]
        assert await ok(reader.get(f"{case.path}/count", params={"name": name})) == {"count": 1}
        assert (await reader.get(case.path, params={"code_key": code})).status_code == 422
        wanted = {"topics": [case.resource.name], "filter": {"code": code}, "snapshot": True, "as": "one"}
        await subscribed(watcher, **wanted)
        assert await rows_of(watcher, case.resource.name) == [row]
