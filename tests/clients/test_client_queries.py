"""Both clients encode filters as query strings for lists, and the service parses them into the same filters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from clients.python.marquee_client import query_of
from core.filters import parse_json, parse_query
from resources.movies import MOVIES
from tests.support.node import node_command
from tests.support.programs import output_of

MODULE = Path(__file__).resolve().parent.parent.parent / "clients" / "javascript" / "marquee.js"
PARAMETERS = {"sort": "-rating,title", "limit": 10, "q": "a & b"}
TEXTS = st.one_of(
    st.text(alphabet='a," &=+%', max_size=8), st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4)
)
CONDITIONS = st.one_of(
    st.fixed_dictionaries({"title": st.fixed_dictionaries({"in": st.lists(TEXTS, min_size=1, max_size=4)})}),
    st.fixed_dictionaries({"genre": TEXTS, "rating": st.fixed_dictionaries({"gte": st.integers(-5, 5)})}),
)
FILTERS = st.one_of(
    CONDITIONS,
    st.tuples(CONDITIONS, st.lists(CONDITIONS, min_size=1, max_size=3)).map(lambda two: {**two[0], "or": two[1]}),
)


def assert_same(query: str, wanted: dict[str, Any]) -> None:
    """Assert that the service parses a query into the filter and the parameters."""
    items = parse_qsl(query, keep_blank_values=True)
    found, problems = parse_query(items, MOVIES.fields, frozenset(PARAMETERS))
    assert problems == []
    assert found == parse_json(wanted, MOVIES.fields).filter
    assert {name: value for name, value in items if name in PARAMETERS} == {k: str(v) for k, v in PARAMETERS.items()}


@given(FILTERS)
def test_the_python_client_writes_the_filter(wanted: dict[str, Any]) -> None:
    assert_same(query_of(wanted, **PARAMETERS), wanted)


async def test_the_javascript_client_writes_the_filter() -> None:
    drawn: list[dict[str, Any]] = [{}]

    @settings(max_examples=200, phases=[Phase.generate], database=None)
    @given(FILTERS)
    def draw(wanted: dict[str, Any]) -> None:
        drawn.append(wanted)

    draw()
    program = f"""
        import {{ queryOf }} from {json.dumps(MODULE.as_uri())};
        const parameters = {json.dumps(PARAMETERS)};
        console.log(JSON.stringify({json.dumps(drawn)}.map((wanted) => queryOf(wanted, parameters))));
    """
    written = json.loads(await output_of(*node_command(), "--input-type=module", "--eval", program, seconds=30))
    assert len(written) == len(drawn)
    for query, wanted in zip(written, drawn, strict=True):
        assert_same(query, wanted)


def test_a_value_without_a_written_form_is_an_error_in_python() -> None:
    for value in (None, b"a", {"title": None}, {"in": [None]}):
        with pytest.raises(TypeError, match="expected a string"):
            query_of({"title": value})


def test_booleans_are_written_as_the_service_reads_them() -> None:
    assert query_of({"is_active": True, "id": {"ne": 5}}) == "is_active=true&id[ne]=5"
