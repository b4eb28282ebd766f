"""The filter grammar and the forms of times: values in, values out."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

import filters
import times
from filters import Kind, Op, parse_conditions
from schemas import CHARACTER_FIELDS, MOVIE_FIELDS


def parsed(key: str, value: str) -> Any:
    conditions, problems = parse_conditions([(key, value)], MOVIE_FIELDS)
    if problems:
        assert not conditions
        return problems[0].type
    [condition] = conditions
    return condition.field.column, condition.op, condition.value


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("rating", "50", ("rating", Op.EQ, 50)),
        ("rating[gte]", "-5", ("rating", Op.GTE, -5)),
        ("rating[in]", "1,2,3", ("rating", Op.IN, (1, 2, 3))),
        ("rating", str(2**63 - 1), ("rating", Op.EQ, 2**63 - 1)),
        ("title", "", ("title", Op.EQ, "")),
        ("title[in]", "a,", ("title", Op.IN, ("a", ""))),
        ("title[prefix]", "50", ("title", Op.PREFIX, "50")),
        ("genre", "Drama", ("genres", Op.EQ, "Drama")),
        ("language[ne]", "French", ("languages", Op.NE, "French")),
        ("release_date[lt]", "2000-02-29", ("release_date", Op.LT, "2000-02-29")),
        ("created_at[gt]", "2000-01-01T01:00:00+01:00", ("created_at", Op.GT, "2000-01-01T00:00:00.000000Z")),
        ("rating", "", "invalid_filter"),
        ("rating", "5.0", "invalid_filter"),
        ("rating", "+5", "invalid_filter"),
        ("rating", " 5", "invalid_filter"),
        ("rating", "5\n", "invalid_filter"),
        ("rating", "٥", "invalid_filter"),
        ("rating", str(2**63), "invalid_filter"),
        ("rating[in]", "", "invalid_filter"),
        ("rating[in]", "1,,2", "invalid_filter"),
        ("release_date", "1999-2-1", "invalid_filter"),
        ("release_date", "2001-02-29", "invalid_filter"),
        ("title", "nul\0", "invalid_filter"),
        ("rating[prefix]", "5", "unknown_operator"),
        ("genre[contains]", "x", "unknown_operator"),
        ("rating[GTE]", "5", "unknown_parameter"),
        ("rating[gte", "5", "unknown_parameter"),
        ("rating[gte]\n", "5", "unknown_parameter"),
        ("genres", "Drama", "unknown_parameter"),
        ("", "5", "unknown_parameter"),
    ],
)
def test_a_condition_is_read_or_refused(key: str, value: str, wanted: Any) -> None:
    assert parsed(key, value) == wanted


def test_names_of_others_are_passed_over() -> None:
    conditions, problems = parse_conditions([("limit", "x"), ("id", "1")], CHARACTER_FIELDS, frozenset({"limit"}))
    assert [condition.field.name for condition in conditions] == ["id"]
    assert problems == []


def test_all_that_is_wrong_is_said_with_its_place() -> None:
    _, problems = parse_conditions([("rating", "x"), ("oops", "1"), ("id", "1"), ("id[like]", "1")], MOVIE_FIELDS)
    assert [problem.loc for problem in problems] == [("query", "rating"), ("query", "oops"), ("query", "id[like]")]


def test_a_list_of_values_has_an_end() -> None:
    assert parsed("rating[in]", ",".join(["1"] * filters.MAX_VALUES_IN_LIST))[1] is Op.IN
    assert parsed("rating[in]", ",".join(["1"] * (filters.MAX_VALUES_IN_LIST + 1))) == "invalid_filter"


def test_conditions_have_an_end() -> None:
    _, problems = parse_conditions([("id", "1")] * (filters.MAX_CONDITIONS + 1), MOVIE_FIELDS)
    assert [problem.type for problem in problems] == ["too_many_conditions"]


def test_every_field_has_operators_and_a_word_for_its_values() -> None:
    for kind in Kind:
        assert Op.EQ in filters.OPERATORS[kind]
        assert filters.EXPECTED[kind]


@pytest.mark.parametrize(("one", "other"), [("É", "é"), ("ΟΔΥΣ", "οδυς"), ("ΣΑΣ", "σασ"), ("İ", "i\u0307")])
def test_case_makes_no_difference(one: str, other: str) -> None:
    assert filters.without_case(one) == filters.without_case(other)


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
        ("2000-01-01T00:00:00", None),
        ("2000-01-01", None),
        ("2000-01-01T24:00:00Z", None),
        ("2000-01-01T00:00:00Z\n", None),
        ("2000-02-30T00:00:00Z", None),
        ("2000-01-01T00:00:00+99:00", None),
        ("0001-01-01T00:00:00+01:00", None),
        ("9999-12-31T23:59:59-01:00", None),
        ("", None),
    ],
)
def test_times_are_read_into_one_form(text: str, wanted: str | None) -> None:
    assert times.parse_time(text) == wanted


@pytest.mark.parametrize("text", ["1999-12-31", "2000-02-29", "0001-01-01", "9999-12-31"])
def test_days_of_the_calendar_are_dates(text: str) -> None:
    assert times.parse_date(text) == text


@pytest.mark.parametrize(
    "text", ["", "1999-12-32", "2001-02-29", "0000-01-01", "19991231", "1999-W01-1", "1999-12-31\n", "١٩٩٩-12-31"]
)
def test_other_text_is_no_date(text: str) -> None:
    assert times.parse_date(text) is None


def test_times_are_written_in_utc_with_a_fixed_width() -> None:
    there = timezone(timedelta(hours=5))
    assert times.utc_text(datetime(2000, 1, 1, 4, 0, tzinfo=there)) == "1999-12-31T23:00:00.000000Z"
    assert len(times.utc_text(datetime(1, 1, 1, tzinfo=UTC))) == len(times.utc_now()) == 27
