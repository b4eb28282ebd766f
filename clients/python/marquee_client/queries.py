"""Query strings for REST lists, built from filters in the form that subscriptions take. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode


def query_of(filter: Mapping[str, Any] | None = None, **parameters: Any) -> str:  # noqa: A002 (the protocol's name)
    """Return the query string for a REST list with this filter and with parameters such as `sort`, `limit` and `q`.

    A value of `in` that contains a comma or starts with a quote is written in double quotes, with the quotes inside
    doubled. Raises TypeError for values other than strings, numbers and booleans.

        path = "/movies?" + query_of({"title": {"in": ["The Good, the Bad and the Ugly", "Alien"]}}, sort="-rating")
    """
    conditions = dict(filter or {})
    groups = conditions.pop("or", [])
    pairs = [*_pairs(conditions, "{}")]
    for number, group in enumerate(groups):
        pairs += _pairs(group, f"or[{number}][{{}}]")
    pairs += [(name, _text(value)) for name, value in parameters.items() if value is not None]
    return urlencode(pairs, safe="[],:")


def _pairs(conditions: Mapping[str, Any], form: str) -> Iterator[tuple[str, str]]:
    for field, member in conditions.items():
        name = form.format(field)
        if not isinstance(member, Mapping):
            yield name, _text(member)
            continue
        for operator, value in member.items():
            yield f"{name}[{operator}]", ",".join(map(_listed, value)) if operator == "in" else _text(value)


def _listed(value: Any) -> str:
    text = _text(value)
    return '"' + text.replace('"', '""') + '"' if "," in text or text.startswith('"') else text


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float):
        raise TypeError(f"expected a string, a number or a boolean, got {value!r}")
    return str(value)
