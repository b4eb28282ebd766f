"""Objects with too many members are rejected with one problem, and few problems are built for many mistakes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from core import errors
from core.errors import MAX_MEMBERS, MAX_PROBLEMS, FieldProblem
from core.filters import parse_json
from realtime.sockets import actions
from realtime.sockets.parsing import (
    MAX_BURST_MESSAGES,
    MAX_COUNTED_CHARACTERS,
    BadMessage,
    Bucket,
    parse_filters,
    parse_members,
    weight_of,
)
from resources.movies import MOVIES
from resources.topics import TOPIC_FIELDS
from routes.http import parsing
from routes.http.parsing import MAX_PROBLEMS_OF_ROW, check_rows
from schemas import Body
from tests.support.backends import SQLITE_ONLY
from tests.support.served_here import served_here
from tests.support.service import Service
from tests.support.sockets import request, signed_in

MANY: dict[str, Any] = {f"unknown{number}": 1 for number in range(MAX_MEMBERS + 1)}


def problem(*loc: str | int) -> dict[str, Any]:
    return {"loc": list(loc), "msg": f"Expected at most {MAX_MEMBERS} members", "type": "too_long"}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[FieldProblem]:
    """Return a list to which each new problem is added."""
    problems: list[FieldProblem] = []
    create = FieldProblem.__init__

    def init(self: FieldProblem, *values: Any, **named: Any) -> None:
        problems.append(self)
        create(self, *values, **named)

    monkeypatch.setattr(errors.FieldProblem, "__init__", init)
    return problems


@SQLITE_ONLY
async def test_a_body_with_many_members_is_one_problem(service: Service) -> None:
    async with service.person() as alice, service.watch(**signed_in(alice)) as watcher:
        for method, path in (
            ("POST", "/movies"),
            ("PATCH", "/movies/1"),
            ("POST", "/auth/register"),  # has rules about several members, and checks the password
            ("PATCH", "/movies/bulk"),
            ("POST", "/movies/bulk"),
            ("DELETE", "/movies/bulk"),
        ):
            body = MANY | {"password": "x"}
            answer = await alice.http.request(method, path, json=body)
            assert (answer.status_code, answer.json()) == (422, {"detail": [problem("body")]}), path
            reply = await request(watcher, method, path, body=body)
            assert (reply["status"], reply["body"]) == (422, {"detail": [problem("body")]}), path


async def test_a_row_with_many_members_is_one_problem(service: Service) -> None:
    async with service.person() as alice:
        answer = await alice.http.post("/movies/bulk", json=[{"title": "M"}, MANY])
        assert (answer.status_code, answer.json()) == (422, {"detail": [problem("body", 1)]})
        answer = await alice.http.patch("/movies/bulk", json=[MANY])
        assert (answer.status_code, answer.json()) == (422, {"detail": [problem("body", 0)]})
        answer = await alice.http.post("/movies/bulk?on_error=skip", json=[{"title": "M"}, MANY, {}])
        assert answer.status_code == 201, answer.text
        missing = {"loc": ["body", 2, "title"], "msg": "Field required", "type": "missing"}
        assert answer.json()["skipped"] == [
            {"index": 1, "detail": [problem("body", 1)]},
            {"index": 2, "detail": [missing]},
        ]


@pytest.mark.parametrize(
    ("model", "members", "loc"),
    [
        (actions.Ping, MANY, ()),
        (actions.Subscribe, MANY, ()),
        (actions.Subscribe, {"deliver": MANY}, ("deliver",)),
        (actions.Request, {"method": "GET", "path": "/", "headers": MANY}, ("headers",)),
    ],
)
def test_a_message_with_many_members_is_one_problem(
    model: type[Body], members: dict[str, Any], loc: tuple[str, ...], built: list[FieldProblem]
) -> None:
    with pytest.raises(BadMessage) as refused:
        parse_members(model, members)
    assert refused.value.detail == [problem(*loc)]
    assert len(built) == 1


@pytest.mark.parametrize(
    ("wanted", "loc"),
    [
        (MANY, ("filter",)),
        ({"rating": MANY}, ("filter", "rating")),
        ({"or": [{"title": "M"}, MANY]}, ("filter", "or", 1)),
        ({"or": [{"rating": MANY}]}, ("filter", "or", 0, "rating")),
    ],
)
def test_a_filter_with_many_members_is_one_problem(
    wanted: Any, loc: tuple[str | int, ...], built: list[FieldProblem]
) -> None:
    assert [each.as_dict() for each in parse_json(wanted, MOVIES.fields).problems] == [problem(*loc)]
    assert len(built) == 1
    with pytest.raises(BadMessage) as refused:
        parse_filters(wanted, ("movies",))
    assert refused.value.detail == [problem(*loc)]


def test_a_filter_may_name_every_field_and_groups() -> None:
    for fields in TOPIC_FIELDS.values():
        wanted = dict.fromkeys(fields) | {"or": None}
        assert len(wanted) <= MAX_MEMBERS / 2
        assert {each.msg for each in parse_json(wanted, fields).problems}.isdisjoint({problem()["msg"]})


class Row(Body):
    number: int


async def test_validation_of_rows_stops_when_enough_problems_are_found(built: list[FieldProblem]) -> None:
    wrong = {f"unknown{number}": 1 for number in range(MAX_MEMBERS)}
    checked = await check_rows(Row, [wrong] * 1_000)
    assert len(built) == MAX_PROBLEMS
    assert {len(found) for found in checked.invalid.values()} == {MAX_PROBLEMS_OF_ROW}
    checked = await check_rows(Row, [{"number": 1}, *[wrong] * 1_000, {"number": 2}], skips_invalid=True)
    assert len(checked.invalid) == 1_000
    assert checked.valid == {0: {"number": 1}, 1_001: {"number": 2}}
    assert [each.as_dict() for each in checked.invalid[1]] == [
        {"loc": ["body", 1, f"unknown{number}"], "msg": "Extra inputs are not permitted", "type": "extra_forbidden"}
        for number in range(MAX_PROBLEMS_OF_ROW)
    ]


async def test_of_many_unknown_members_pydantic_finds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "problems_of", None)
    many, few = MAX_PROBLEMS_OF_ROW + 1, MAX_PROBLEMS_OF_ROW
    await check_rows(Row, [{f"unknown{number}": 1 for number in range(many)}], skips_invalid=True)
    with pytest.raises(TypeError):
        await check_rows(Row, [{f"unknown{number}": 1 for number in range(few)}], skips_invalid=True)


@pytest.mark.parametrize(("seconds", "turns"), [(0.0, 20), (3600.0, 0)])
async def test_slices_of_rows_end_by_time(monkeypatch: pytest.MonkeyPatch, seconds: float, turns: int) -> None:
    monkeypatch.setattr(parsing, "SLICE_SECONDS", seconds)
    had = 0

    async def other() -> None:
        nonlocal had
        while True:
            await asyncio.sleep(0)
            had += 1

    task = asyncio.create_task(other())
    await asyncio.sleep(0)
    await check_rows(Row, [{"number": 1}] * 20)
    task.cancel()
    assert had == turns


def test_a_long_message_counts_as_several() -> None:
    assert weight_of("") == weight_of("x" * MAX_COUNTED_CHARACTERS) == 1
    assert weight_of("x" * (MAX_COUNTED_CHARACTERS + 1)) == 2
    bucket = Bucket(0.0)
    assert bucket.take(0.0, MAX_BURST_MESSAGES - 3)
    assert not bucket.take(0.0, 4)
    assert bucket.refused == 4
    assert bucket.take(0.0, 3), "a rejected message costs nothing"


@SQLITE_ONLY
async def test_the_size_of_a_message_counts(
    new_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("realtime.sockets.parsing.MESSAGES_PER_SECOND", 0.0)
    service = new_service(RATE_LIMITS="on")
    async with served_here(service), service.watch() as watcher:
        path = "/" + "x" * MAX_COUNTED_CHARACTERS
        long = {"id": 1, "action": "request", "method": "GET", "path": path, "body": "x" * 60 * MAX_COUNTED_CHARACTERS}
        weight = 62
        for _ in range(MAX_BURST_MESSAGES // weight):
            await watcher.send(long)
            assert (await watcher.next())["status"] == 404
        await watcher.send(long)
        assert (await watcher.next())["error"]["code"] == "rate_limited"
        await watcher.send({"id": 2, "action": "ping"})
        assert (await watcher.next())["ok"]
