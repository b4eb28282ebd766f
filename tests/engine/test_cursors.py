"""Cursors: what a text must hold, and that walking by cursor is reading the sorted list, on both databases."""

from __future__ import annotations

import json
import random
import re
from base64 import urlsafe_b64encode
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Table, insert

import models
from core import filters
from repository import jobs
from repository.accounts import audit, sessions, users
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import cursors, lists
from repository.generic.cursors import Cursor, Order, Ordering
from repository.generic.lists import Listed, ListRequest
from resources.movies import MOVIES
from tests.support.requests import values_by_field

EXPECTED = f"^{re.escape(cursors.EXPECTED)}$"
OF_MOVIES = lists.ordering_of(MOVIES)
BY_ALL: Order = tuple((name, False) for name in ("title", "release_date", "rating", "budget", "created_at"))
ROW: dict[str, Any] = {
    "title": "Été \U0001f600",
    "release_date": "0001-01-01",
    "rating": None,
    "budget": -(2**63),
    "created_at": "9999-12-31T23:59:59.999999Z",
    "id": 2**63 - 1,
}


def encoded(content: object) -> str:
    return in_base64(json.dumps(content).encode())


def in_base64(content: bytes) -> str:
    return urlsafe_b64encode(content).rstrip(b"=").decode()


def with_values(ordering: Ordering, sort: Order, *values: object, after: object = None) -> str:
    """Return the text of a cursor with the right digest."""
    order = ordering.order_of(sort, after if isinstance(after, int) else None)
    return encoded([cursors.digest_of(order), after, *values])


# --- the text


@pytest.mark.parametrize("after", [None, 0, 2**63 - 1])
def test_a_cursor_survives_its_text(after: int | None) -> None:
    cursor = cursors.at(cursors.total_order(BY_ALL), ROW, after)
    text = cursors.encode(cursor)
    assert text is not None
    assert "=" not in text
    assert cursors.decode(text) == cursor
    cursors.check(cursor, OF_MOVIES, BY_ALL)


NO_BASE64 = ["", "x", "=", "WyJ4Il0=", "a b", "ab\n", "é", "٣", "\x00", "\ud800", "a+/b", "A" * 2_049]
NO_JSON = [
    b"\xff",
    b"[",
    b"[" * 1_500,
    b'["x",null,1]]',
    b'["x",null,NaN]',
    b'["x",null,1e400]',
    b'["x",null,"\\ud800"]',
]
NO_JSON += [b'["x",null,"\xed\xa0\x80"]', b'["x",null,' + b"9" * 1_000 + b"]"]
NO_CURSORS: list[Any] = [None, 1, "x", {}, [], ["x"], [1, None, 1], [None, None, 1], ["x", None, [1]]]
NO_CURSORS += [
    ["x", "1", 1],
    ["x", True, 1],
    ["x", -1, 1],
    ["x", 2**63, 1],
    ["x", 1.5, 1],
    ["x", [], 1],
    ["x", None, {}],
]
BROKEN = [*NO_BASE64, *map(in_base64, NO_JSON), *map(encoded, NO_CURSORS)]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_text_is_rejected_with_what_was_expected(text: str) -> None:
    with pytest.raises(ValueError, match=EXPECTED):
        cursors.decode(text)


@settings(max_examples=50)
@given(st.one_of(st.text(), st.binary().map(in_base64)))
def test_any_other_text_is_rejected_too(text: str) -> None:
    with pytest.raises(ValueError, match=EXPECTED):
        cursors.decode(text)


BAD_IDS: list[list[Any]] = [[], [None], ["1"], [True], [1, 1], [2**63], [-(2**63) - 1]]
BAD_VALUES: dict[str, list[Any]] = {
    "title": [None, 1, "nul\0", False],  # not nullable
    "description": [1, True],
    "rating": ["5", True, 2**63],
    "release_date": [1, "", "1999-02-29", "1999-2-1", "1999-01-01\n", "10000-01-01", "0000-01-01"],
    "created_at": [
        *(None, 1, "2020-01-01", "2020-01-01T00:00:00Z", "2020-01-01T00:00:00.000000+00:00"),
        *("2020-13-01T00:00:00.000000Z", "10000-01-01T00:00:00.000000Z", "2020-01-01T00:00:00.000000z"),
    ],
}
WRONG_VALUES: list[tuple[Ordering, Order, list[Any]]] = [
    *((OF_MOVIES, (), values) for values in BAD_IDS),
    *((OF_MOVIES, ((name, True),), [value, 1]) for name, value in values_by_field(BAD_VALUES)),
    (users.ORDERING, (("is_active", False),), [1, 1]),
    (users.ORDERING, (("is_active", False),), ["true", 1]),
    (jobs.ORDERING, (), ["2020-01-01T00:00:00.000000Z", 1]),
    (sessions.ORDERING, (), [None, "x"]),
]


@pytest.mark.parametrize(("ordering", "sort", "values"), WRONG_VALUES, ids=range(len(WRONG_VALUES)))
def test_a_value_that_the_column_cannot_hold_is_rejected(ordering: Ordering, sort: Order, values: Any) -> None:
    with pytest.raises(ValueError, match=EXPECTED):
        cursors.check(cursors.decode(with_values(ordering, sort, *values)), ordering, sort)


def test_a_list_of_string_ids_has_no_integer_after() -> None:
    values = ("2020-01-01T00:00:00.000000Z", "x")
    cursors.check(cursors.decode(with_values(jobs.ORDERING, (), *values)), jobs.ORDERING, ())
    with pytest.raises(ValueError, match=EXPECTED):
        cursors.check(cursors.decode(with_values(jobs.ORDERING, (), *values, after=1)), jobs.ORDERING, ())


def test_a_cursor_is_valid_for_its_order_only() -> None:
    cursor = cursors.at((("rating", True), ("id", False)), {"rating": 5, "id": 1}, None)
    # Columns after the id do not change the order, nor does a column that is named again.
    same: list[Order] = [
        (("rating", True),),
        (("rating", True), ("id", False), ("title", True)),
        (("rating", True), ("rating", False)),
    ]
    for sort in same:
        cursors.check(cursor, OF_MOVIES, sort)
    others: list[Order] = [(), (("rating", False),), (("rating", True), ("id", True)), (("version", True),)]
    for sort in others:
        with pytest.raises(ValueError, match="same `sort`"):
            cursors.check(cursor, OF_MOVIES, sort)
    # The audit trail is listed newest first, but oldest first after an id.
    trail = cursors.at((("id", False),), {"id": 7}, 3)
    cursors.check(trail, audit.ORDERING, ())
    with pytest.raises(ValueError, match="same `sort`"):
        cursors.check(Cursor(trail.digest, trail.values), audit.ORDERING, ())


def test_a_cursor_has_a_maximum_length() -> None:
    order = cursors.total_order((("description", False),))
    texts = [cursors.encode(cursors.at(order, {"description": "x" * n, "id": 1}, None)) for n in range(1_600)]
    longest = max((text for text in texts if text is not None), key=len)
    assert len(longest) == cursors.MAX_CURSOR_BYTES
    cursors.check(cursors.decode(longest), OF_MOVIES, order)
    assert texts[-1] is None


# --- the walk

TEXTS = ["", "-b", "10", "A", "Z", "a", "a-b", "ab", "É", "é", "\uff5e", "\U0001f600", None]
SORTED: dict[str, list[Any]] = {
    "title": TEXTS[1:-1],
    "description": TEXTS,
    "release_date": ["1949-09-01", "2001-01-01", "9999-12-31", None],
    "rating": [1, 2, 3, None],
    "budget": [-1, 0, 2**53 - 1, None],
    "created_at": [f"2020-01-01T00:00:0{second}.{fraction}Z" for second in (0, 1) for fraction in ("000000", "000001")],
    "id": [],
}
Read = Callable[[ListRequest], Awaitable[Listed[dict[str, Any]]]]


def in_order(rows: Sequence[dict[str, Any]], sort: Order) -> list[int]:
    """Return the ids of the rows in the order in which a list must return them."""
    found = sorted(rows, key=lambda row: row["id"])
    for name, is_descending in reversed(sort):
        some = [row for row in found if row[name] is not None]
        some.sort(key=lambda row: row[name], reverse=is_descending)
        found = some + [row for row in found if row[name] is None]
    return [row["id"] for row in found]


def drawn_sort(chance: random.Random, names: Sequence[str]) -> Order:
    return tuple((name, chance.random() < 0.5) for name in chance.sample(names, chance.randint(1, 3)))


async def walked(read: Read, request: dict[str, Any], ordering: Ordering) -> list[Any]:
    """Return the rows of all pages. Encode each cursor as text and decode it again."""
    found: list[Any] = []
    page = await read(ListRequest(**request))
    total = page.total
    while page.rows:
        found += page.rows
        assert page.end is not None
        text = cursors.encode(page.end)
        assert text is not None
        cursor = cursors.decode(text)
        cursors.check(cursor, ordering, request["sort"])
        page = await read(ListRequest(**request | {"cursor": cursor, "offset": 0}))
        assert page.total == total
        assert len(found) <= total, "rows come again"
    assert page.end is None
    return found


async def store(database: Database, table: Table, rows: Sequence[dict[str, Any]]) -> None:
    async def work(tx: Transaction) -> None:
        await tx.connection.execute(insert(table), rows)

    await database.write(work)


async def test_a_walk_is_the_sorted_list(database: Database) -> None:
    """Walk random rows with nulls and ties in random orders, with and without a filter, an offset and an `after`."""
    chance = random.Random(7)
    others = {"languages": [], "genres": [], "characters_count": 0, "comments_count": 0, "version": 1}
    rows = [
        {**others, **{name: chance.choice(values) for name, values in SORTED.items() if values}, "id": number}
        for number in range(1, 26)
    ]
    for row in rows:
        row["updated_at"] = row["created_at"]
    await store(database, models.movies, rows)

    async def entities(page: ListRequest) -> Listed[dict[str, Any]]:
        return await lists.page_of(database, MOVIES, page)

    any_id = filters.parse_json({"id": {"gte": 0}}, MOVIES.fields).filter
    for _ in range(40):
        sort = drawn_sort(chance, list(SORTED))
        offset = chance.choice([0, 0, 4])
        after = chance.choice([None, None, 0, 5])
        request = {"sort": sort, "limit": chance.randint(1, 12), "offset": offset, "after": after}
        if chance.random() < 0.5:
            request["filter"] = any_id  # read through SQLAlchemy
        ids = in_order([row for row in rows if row["id"] > (after or 0)], sort)[offset:]
        found = await walked(entities, request, OF_MOVIES)
        assert [row["id"] for row in found] == ids, request


async def test_a_walk_through_labels_and_through_booleans_is_the_sorted_list(database: Database) -> None:
    chance = random.Random(8)
    moment = "2020-01-01T00:00:00.000000Z"
    others = {"password_hash": "x", "group": "user", "version": 1, "created_at": moment, "updated_at": moment}
    rows = [
        {"id": number, **others, "is_active": chance.random() < 0.5, "awaits_activation": chance.random() < 0.5}
        | {"name": chance.choice(TEXTS)}
        for number in range(1, 16)
    ]
    await store(database, models.users, rows)
    named = ({"languages": [], "genres": [], "characters_count": 0, "comments_count": 0, **others} for _ in rows)
    shared = ("languages", "genres", "characters_count", "comments_count", "version", "created_at", "updated_at")
    films = [
        {name: row[name] for name in shared}
        | {"id": number, "title": f"{number}", "rating": chance.choice([1, None]), "release_date": None}
        for number, row in enumerate(named, 1)
    ]
    await store(database, models.movies, films)

    async def accounts(page: ListRequest) -> Listed[dict[str, Any]]:
        return await users.page_of(database, page, sees_everything=True)

    async def labels(page: ListRequest) -> Listed[Any]:
        return await lists.labels_of(database, MOVIES, page)

    for _ in range(15):
        sort = drawn_sort(chance, ["is_active", "awaits_activation", "name"])
        found = await walked(accounts, {"sort": sort, "limit": chance.randint(1, 6)}, users.ORDERING)
        assert [row["id"] for row in found] == in_order(rows, sort), sort
        sort = drawn_sort(chance, ["rating", "release_date", "created_at", "title"])
        pairs = await walked(labels, {"sort": sort, "limit": chance.randint(1, 6)}, OF_MOVIES)
        assert pairs == [(id_, f"{id_}") for id_ in in_order(films, sort)], sort
