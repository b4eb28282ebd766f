"""Filters: their grammar and the formats of times, and equal results in the database and in the hub."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

import asyncpg
import orjson
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import Table, delete, insert

import models
from core import filters, times
from core.databases.columns import Strings
from core.filters import FieldType, Op, parse_json, parse_query
from core.texts import listed
from core.texts.normal import without_case
from repository.engine import migrations
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import lists, writes
from repository.generic.snapshots import SOURCES, read_page
from resources.accounts.fields import USER_FIELDS
from resources.characters import CHARACTERS
from resources.comments import COMMENTS
from resources.movies import MOVIES
from resources.topics import TOPIC_FIELDS
from tests.conftest import Places
from tests.support.requests import values_by_field


def parsed(key: str, value: str) -> Any:
    found, problems = parse_query([(key, value)], MOVIES.fields)
    if problems:
        assert not found
        return problems[0].type
    [condition] = found.all
    return condition.field.column, condition.op, condition.value


INVALID = {
    "rating": ["", "5.0", "+5", " 5", "5\n", "٥", str(2**63)],
    "rating[in]": ["", "1,,2"],
    "release_date": ["1999-2-1", "2001-02-29"],
    "title": ["nul\0"],
    "title[in]": ['"', '"a', '"a""', '"a"b', 'a,"b" ,c', f'"{"x" * 256}"'],
}


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("rating", "50", ("rating", Op.EQ, 50)),
        ("rating[gte]", "-5", ("rating", Op.GTE, -5)),
        ("rating[in]", "1,2,3", ("rating", Op.IN, (1, 2, 3))),
        ("rating", str(2**63 - 1), ("rating", Op.EQ, 2**63 - 1)),
        ("title", "", ("title", Op.EQ, "")),
        ("title[in]", "a,", ("title", Op.IN, ("", "a"))),
        ("title[in]", '"The Good, the Bad",Alien', ("title", Op.IN, ("Alien", "The Good, the Bad"))),
        ("title[in]", '"",5" nails', ("title", Op.IN, ("", '5" nails'))),
        ("title[in]", '"""a"", b"', ("title", Op.IN, ('"a", b',))),
        ("genre[in]", '"Noir, French"', ("genres", Op.IN, ("Noir, French",))),
        ("rating[in]", '"1",2', ("rating", Op.IN, (1, 2))),
        ("title[prefix]", "50", ("title", Op.PREFIX, "50")),
        ("genre", "Drama", ("genres", Op.EQ, "Drama")),
        ("language[ne]", "French", ("languages", Op.NE, "French")),
        ("release_date[lt]", "2000-02-29", ("release_date", Op.LT, "2000-02-29")),
        ("created_at[gt]", "2000-01-01T01:00:00+01:00", ("created_at", Op.GT, "2000-01-01T00:00:00.000000Z")),
        ("rating[prefix]", "5", "unknown_operator"),
        ("genre[contains]", "x", "unknown_operator"),
        *((name, "5", "unknown_parameter") for name in ("rating[GTE]", "rating[gte", "rating[gte]\n", "genres", "")),
        *((name, value, "invalid_filter") for name, value in values_by_field(INVALID)),
    ],
)
def test_a_condition_is_parsed_or_rejected(key: str, value: str, wanted: Any) -> None:
    assert parsed(key, value) == wanted


@given(st.lists(st.one_of(st.text(alphabet='a," \n', max_size=8), st.text(max_size=4)), min_size=1, max_size=5))
def test_a_list_is_taken_apart_into_the_values_it_was_made_from(values: list[str]) -> None:
    assert listed.split(listed.join(values)) == values


@given(st.text(alphabet='ab,"', max_size=12))
def test_a_text_that_is_a_list_has_one_meaning(text: str) -> None:
    values = listed.split(text)
    if values is not None:
        assert listed.split(listed.join(values)) == values
        if '"' not in text:
            assert values == text.split(",")


def test_reserved_parameters_are_ignored() -> None:
    found, problems = parse_query([("limit", "x"), ("id", "1")], CHARACTERS.fields, frozenset({"limit"}))
    assert [condition.field.name for condition in found.all] == ["id"]
    assert problems == []


def test_every_problem_is_reported_with_its_location() -> None:
    _, problems = parse_query([("rating", "x"), ("oops", "1"), ("id", "1"), ("id[like]", "1")], MOVIES.fields)
    assert [problem.loc for problem in problems] == [("query", "rating"), ("query", "oops"), ("query", "id[like]")]


def test_values_conditions_and_groups_are_bounded() -> None:
    assert parsed("rating[in]", ",".join(["1"] * filters.MAX_VALUES_IN_LIST))[1] is Op.IN
    assert parsed("rating[in]", ",".join(["1"] * (filters.MAX_VALUES_IN_LIST + 1))) == "invalid_filter"
    _, problems = parse_query([("id", "1")] * (filters.MAX_CONDITIONS + 1), MOVIES.fields)
    assert [problem.type for problem in problems] == ["too_many_conditions"]
    _, problems = parse_query([(f"or[{n}][id]", "1") for n in range(filters.MAX_GROUPS + 1)], MOVIES.fields)
    assert [problem.type for problem in problems] == ["too_many_groups"]
    _, problems = parse_json({"or": [{"id": 1}] * (filters.MAX_GROUPS + 1)}, MOVIES.fields)
    assert [problem.type for problem in problems] == ["too_many_groups"]


@pytest.mark.parametrize(
    ("in_json", "in_query"),
    [
        ({}, ""),
        ({"rating": 7}, "rating=7"),
        ({"rating": {"in": [7.0, 8]}}, "rating[in]=7,8"),
        ({"rating": {"gte": 50, "lt": 90}}, "rating[lt]=90&rating[gte]=50"),
        ({"genre": {"in": ["Noir", "Drama", "Noir"]}}, "genre[in]=Drama,Noir"),
        ({"status": "released", "or": [{"genre": "Drama"}, {"rating": {"gte": 90}, "country": "GB"}]},
         "or[7][rating][gte]=90&or[1][genre]=Drama&status=released&or[7][country]=GB"),
        ({"created_at": {"gt": "2000-01-01T01:00:00+01:00"}}, "created_at[gt]=2000-01-01T00:00:00Z"),
    ],
)  # fmt: skip
def test_json_and_query_express_the_same_filter(in_json: Any, in_query: str) -> None:
    found, problems = parse_json(in_json, MOVIES.fields)
    assert problems == []
    assert (found, []) == parse_query(parse_qsl(in_query), MOVIES.fields)
    assert hash(found) == hash(parse_query(parse_qsl(in_query), MOVIES.fields)[0])


DEEP = orjson.loads("[" * 1_000 + "]" * 1_000)
INVALID_JSON: dict[str, list[Any]] = {
    "rating": [{}, None, True, 1.5, "50", [1], DEEP],
    "title": ["nul\0"],
    "or": [{}, [], [1]],
}


@pytest.mark.parametrize(
    ("value", "loc", "kind"),
    [
        (None, (), "invalid_filter"),
        ([], (), "invalid_filter"),
        ("rating=1", (), "invalid_filter"),
        *(({name: value}, (name,), "invalid_filter") for name, value in values_by_field(INVALID_JSON)),
        ({"rating": {"in": 1}}, ("rating", "in"), "invalid_filter"),
        ({"rating": {"in": []}}, ("rating", "in"), "invalid_filter"),
        ({"rating": {"in": [1, "2"]}}, ("rating", "in"), "invalid_filter"),
        ({"rating": {"in": [1, None]}}, ("rating", "in"), "invalid_filter"),
        ({"rating": {"in": [1, DEEP]}}, ("rating", "in"), "invalid_filter"),
        ({"rating": {"gte": {"gte": 1}}}, ("rating", "gte"), "invalid_filter"),
        ({"rating": {"like": 1}}, ("rating", "like"), "unknown_operator"),
        ({"planet": 1}, ("planet",), "unknown_field"),
        ({"or": [{}]}, ("or", 0), "invalid_filter"),
        ({"or": [{"id": 1}, {"or": [{"id": 1}]}]}, ("or", 1, "or"), "unknown_field"),
    ],
)
def test_an_error_in_json_is_reported_with_its_location(value: Any, loc: tuple[Any, ...], kind: str) -> None:
    _, problems = parse_json(value, MOVIES.fields)
    assert [(problem.loc, problem.type) for problem in problems] == [(("filter", *loc), kind)]


@pytest.mark.parametrize(
    ("in_json", "in_query", "is_valid"),
    [
        (True, "is_active=true", True),
        ({"ne": False}, "is_active[ne]=false", True),
        ("true", "is_active=True", False),
        (1, "is_active=1", False),
        ({"in": [True]}, "is_active[in]=true", False),
        ({"gt": False}, "is_active[gt]=false", False),
    ],
    ids=repr,
)
def test_boolean_conditions_are_parsed(in_json: Any, in_query: str, is_valid: bool) -> None:
    found, problems = parse_json({"is_active": in_json}, USER_FIELDS)
    same, wrong = parse_query(parse_qsl(in_query), USER_FIELDS)
    assert (found == same, not problems, not wrong) == (True, is_valid, is_valid)


# --- the database and the hub match the same rows

TEXTS = st.sampled_from(["", "a", "A", "ab", "Ab%", "a_b", "É", "é", "ς", "Σ", "σ", "Ωmega", "z\U0001f600", "%", "\\"])
VALUES = {
    "id": st.integers(1, 12),
    "title": TEXTS.filter(bool),
    "description": TEXTS,
    "release_date": st.sampled_from(["1949-09-01", "1949-09-02", "2001-01-01"]),
    "rating": st.integers(1, 5),
    "status": TEXTS.filter(bool),
    "country": st.sampled_from(["GB", "AT"]),
    "genre": TEXTS.filter(bool),
    "language": TEXTS.filter(bool),
    "version": st.integers(0, 2),
}


@st.composite
def conditions(draw: st.DrawFn) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=3, unique=True)):
        op = draw(st.sampled_from(filters.OPERATORS[MOVIES.fields[name].kind]))
        value = VALUES[name]
        found[name] = {op.value: draw(st.lists(value, min_size=1, max_size=3) if op is Op.IN else value)}
    return found


@st.composite
def wanted(draw: st.DrawFn) -> dict[str, Any]:
    found = draw(st.one_of(st.just({}), conditions()))
    groups = draw(st.lists(conditions(), max_size=3))
    return {**found, "or": groups} if groups else found


async def test_the_database_and_the_hub_match_the_same_rows(database: Database) -> None:
    rows: list[dict[str, Any]] = []

    @settings(max_examples=1, phases=[Phase.generate], deadline=None, derandomize=True)
    @given(st.data())
    def make(data: st.DataObject) -> None:
        for _ in range(60):
            optional = {
                name: data.draw(st.one_of(st.none(), VALUES[name]))
                for name in ("description", "release_date", "rating", "status", "country")
            }
            lists = {
                name: data.draw(st.lists(VALUES[one], max_size=2, unique=True))
                for name, one in (("genres", "genre"), ("languages", "language"))
            }
            rows.append({"title": data.draw(VALUES["title"]), **optional, **lists})

    make()

    async def store(tx: Transaction) -> None:
        await writes.store(tx, MOVIES, rows, None)

    await database.write(store)
    stored = (await lists.page_of(database, MOVIES, lists.ListRequest(limit=1000))).rows
    found: list[filters.Filter] = []

    @settings(max_examples=400, phases=[Phase.generate], deadline=None, derandomize=True)
    @given(wanted())
    def collect(value: dict[str, Any]) -> None:
        one, problems = parse_json(value, MOVIES.fields)
        assert problems == []
        found.append(one)

    collect()
    assert len(found) >= 400
    matched = 0
    for one in found:
        test = filters.matcher_of(one)
        ours = [row["id"] for row in stored if test(row)]
        theirs = (await lists.page_of(database, MOVIES, lists.ListRequest(filter=one, limit=1000))).rows
        assert ours == [row["id"] for row in theirs], one
        matched += bool(ours)
    assert matched > 50, "expected more filters to match a row"


IN_ORDER = ["", "-b", "10", "9", "A", "B", "Z", "_a", "a", "a-b", "ab", "b", "z", "É", "é", "\uff5e", "\U0001f600"]


async def with_english_collation(url: str) -> str:
    """Create a database with English collation and return its URL, or return `url` if that is not supported."""
    connection = await asyncpg.connect(url)
    with suppress(asyncpg.PostgresSyntaxError):  # PostgreSQL before 15 does not support this
        await connection.execute("CREATE DATABASE english TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en-US'")
        url = f"{url.rpartition('/')[0]}/english"
    await connection.close()
    return url


def row_of(table: Table, texts: dict[str, Any], number: int) -> dict[str, Any]:
    """Return a row with a value in every column that must not be null."""
    values: dict[type, Any] = {int: 1, bool: True}
    some: dict[str, Any] = {}
    for column in table.columns:
        if not column.nullable:
            is_list = column.type is Strings
            some[column.name] = [] if is_list else values.get(column.type.python_type, times.utc_now())
            if column.unique:
                some[column.name] = str(number)
    if {"movie_id", "user_id"} <= some.keys():  # each user has one row about each movie
        some["movie_id"] = number
    return {**some, "id": number, **texts}


async def test_text_compares_by_code_point_in_every_locale(new_places: Callable[[], Places]) -> None:
    url = new_places().database_url
    database = Database(await with_english_collation(url) if url.startswith("postgresql") else url)
    await migrations.migrate(database)
    assert sorted(IN_ORDER) == IN_ORDER

    async def store(tx: Transaction) -> None:
        for table in (models.countries, models.languages):  # they have rows from the start
            await tx.connection.execute(delete(table))
        first = ("users", "movies")  # other tables refer to them
        for topic in (*first, *sorted(TOPIC_FIELDS.keys() - {*first, "account"})):
            for number, text in enumerate(IN_ORDER, 1):
                table = SOURCES[topic].table
                lengths = {field.column: table.c[field.column].type.length for field in texts_of(topic)}  # type: ignore[attr-defined]
                row = row_of(table, {name: text[:length] for name, length in lengths.items()}, number)
                await tx.connection.execute(insert(table).values(row))

    await database.write(store)
    for topic in TOPIC_FIELDS.keys() - {"account"}:  # the topic `account` has the rows of `users`
        page = partial(read_page, database, topic, owner_id=1, after=None, until=None, max_rows=100)
        stored = (await page(filters.EVERYTHING)).rows
        assert len(stored) == len(IN_ORDER)
        assert stored == sorted(stored, key=lambda row: row["id"])
        for field in texts_of(topic):
            for op in (Op.GT, Op.GTE, Op.LT, Op.LTE):
                for value in ("A", "a", "b"):
                    one = filters.build([filters.Condition(field, op, value)])
                    wanted = [row["id"] for row in stored if filters.matcher_of(one)(row)]
                    assert [row["id"] for row in (await page(one)).rows] == wanted, one
    await database.close()


async def test_the_database_and_the_hub_match_the_same_booleans(database: Database) -> None:
    async def store(tx: Transaction) -> None:
        for number, (is_active, awaits) in enumerate([(True, False), (False, True), (False, False)], 1):
            fields = {"group": "user", "is_active": is_active, "awaits_activation": awaits}
            await tx.connection.execute(insert(models.users).values(row_of(models.users, fields, number)))

    await database.write(store)
    page = partial(read_page, database, "users", owner_id=None, after=None, until=None, max_rows=100)
    stored = (await page(filters.EVERYTHING)).rows
    for name, op, value, ids in (
        ("is_active", "eq", True, [1]),
        ("is_active", "ne", True, [2, 3]),
        ("awaits_activation", "eq", False, [1, 3]),
        ("awaits_activation", "ne", False, [2]),
    ):
        one, problems = parse_json({name: {op: value}}, USER_FIELDS)
        assert problems == []
        assert [row["id"] for row in (await page(one)).rows] == ids
        assert [row["id"] for row in stored if filters.matcher_of(one)(row)] == ids


def texts_of(topic: str) -> list[filters.Field]:
    return [field for field in TOPIC_FIELDS[topic].values() if field.kind is FieldType.TEXT]


def test_a_column_that_an_older_event_lacks_counts_as_null() -> None:
    values: dict[FieldType, Any] = {FieldType.INTEGER: 5, FieldType.DECIMAL: 5.5, FieldType.BOOLEAN: True}
    values |= {FieldType.DATE: "1999-12-31", FieldType.TIME: "1999-12-31T23:59:59Z"}
    for field in {**MOVIES.fields, **COMMENTS.fields}.values():
        value = values.get(field.kind, "x")
        for op in filters.OPERATORS[field.kind]:
            one, problems = parse_json({field.name: {op: [value] if op is Op.IN else value}}, {field.name: field})
            assert not problems
            assert filters.matcher_of(one)({}) is (op is Op.NE), (field, op)


def test_every_field_type_has_operators_and_an_error_text() -> None:
    for kind in FieldType:
        assert Op.EQ in filters.OPERATORS[kind]
        assert filters.EXPECTED[kind]


@pytest.mark.parametrize(("one", "other"), [("É", "é"), ("ΟΔΥΣ", "οδυς"), ("ΣΑΣ", "σασ"), ("İ", "i\u0307")])
def test_case_is_folded(one: str, other: str) -> None:
    assert without_case(one) == without_case(other)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("2000-01-01T00:00:00Z", "2000-01-01T00:00:00.000000Z"),
        ("2000-01-01t00:00:00z", "2000-01-01T00:00:00.000000Z"),
        ("2000-01-01T00:00:00.5Z", "2000-01-01T00:00:00.500000Z"),
        ("2000-01-01T00:00:00.123456789Z", "2000-01-01T00:00:00.123456Z"),
        ("2000-01-01T00:00:00+02:30", "1999-12-31T21:30:00.000000Z"),
        ("2000-01-01T00:00:00 02:30", "1999-12-31T21:30:00.000000Z"),
        ("2000-01-01T00:00:00-00:01", "2000-01-01T00:01:00.000000Z"),
        *((text, None) for text in ("", "2000-01-01", "2000-01-01T00:00:00", "2000-01-01T24:00:00Z")),
        *((text, None) for text in ("2000-01-01T00:00:00Z\n", "2000-02-30T00:00:00Z", "2000-01-01T00:00:00+99:00")),
        *((text, None) for text in ("0001-01-01T00:00:00+01:00", "9999-12-31T23:59:59-01:00")),
    ],
)
def test_times_are_normalised_or_rejected(text: str, wanted: str | None) -> None:
    assert times.parse_time(text) == wanted


def test_dates_are_days_of_the_calendar() -> None:
    for text in ("1999-12-31", "2000-02-29", "0001-01-01", "9999-12-31"):
        assert times.parse_date(text) == text
    for text in ("", "1999-12-32", "2001-02-29", "0000-01-01", "19991231", "1999-W01-1", "1999-12-31\n", "١٩٩٩-12-31"):
        assert times.parse_date(text) is None, text


def test_times_are_written_in_utc_with_a_fixed_width() -> None:
    there = timezone(timedelta(hours=5))
    assert times.utc_text(datetime(2000, 1, 1, 4, 0, tzinfo=there)) == "1999-12-31T23:00:00.000000Z"
    assert len(times.utc_text(datetime(1, 1, 1, tzinfo=UTC))) == len(times.utc_now()) == 27
