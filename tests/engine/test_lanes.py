"""Which lists are light and which are costly: the worst light list must be cheap even for a large table."""

from __future__ import annotations

from typing import Any

import pytest

from core.filters import Filter, parse_json
from repository.engine.engines import Lane
from repository.generic import lists
from repository.generic.cursors import total_order
from repository.generic.lists import ListRequest, Shape
from resources.movies import MOVIES
from routes.http import queries

TITLES = [f"title {number}" for number in range(100)]


def lane_of(conditions: dict[str, Any] | None = None, sort: str = "", **page: Any) -> Lane:
    wanted = parse_json(conditions, MOVIES.fields)[0] if conditions else Filter()
    order = tuple((name.removeprefix("-"), name.startswith("-")) for name in sort.split(",") if name)
    request = ListRequest(filter=wanted, sort=order, **page)
    return lists.lane_of(Shape(MOVIES.table, MOVIES.columns, total_order(order)), request)


@pytest.mark.parametrize(
    ("conditions", "sort", "offset"),
    [
        ({}, "", 0),
        ({}, "-id", 10_000),
        ({}, "-rating", 1_000),
        ({"country": "GB", "rating": {"gte": 50}}, "-rating", 0),
        ({"genre": "Drama", "rating": {"gte": 50}}, "-id", 0),
        ({"genre": {"in": ["Drama", "Comedy"]}}, "", 10_000),
        ({"title": {"in": TITLES}}, "", 0),
    ],
)
def test_a_list_without_much_work_is_light(conditions: dict[str, Any], sort: str, offset: int) -> None:
    assert lane_of(conditions, sort, offset=offset) is Lane.LIST


@pytest.mark.parametrize(
    ("conditions", "sort", "offset"),
    [
        ({"title": {"contains": "third"}}, "", 0),
        ({}, "", 10_001),
        ({}, "-rating", 9_999),
        ({}, "-description", 0),
        ({}, "-rating,description", 0),
        ({}, "title,country,status,rating", 0),
        ({"title": {"ne": "a"}, "country": {"ne": "b"}, "status": {"ne": "c"}}, "-title", 0),
        ({"genre": {"ne": "Drama"}}, "-rating", 0),
        ({"genre": "Drama", "language": "en"}, "", 0),
        ({"genre": {"in": TITLES}}, "", 0),
        ({"title": {"in": TITLES}, "country": "GB", "status": "done"}, "", 0),
    ],
)
def test_a_list_with_much_work_is_costly(conditions: dict[str, Any], sort: str, offset: int) -> None:
    assert lane_of(conditions, sort, offset=offset) is Lane.COSTLY


def test_the_conditions_of_two_filters_count_together() -> None:
    light = {"status": "released", "or": [{"rating": {"gte": 50}}, {"country": "GB"}]}
    other = {"title": "Alien", "or": [{"budget": 1}, {"revenue": 2}, {"version": 3}]}
    one, two = (parse_json(value, MOVIES.fields).filter for value in (light, other))
    shape = Shape(MOVIES.table, MOVIES.columns, total_order(()))
    lanes = [lists.lane_of(shape, ListRequest(filter=each)) for each in (one, two, queries.both(one, two))]
    assert lanes == [Lane.LIST, Lane.LIST, Lane.COSTLY]


def test_a_search_is_costly() -> None:
    assert lane_of(text="third") is Lane.COSTLY
