"""The oracle's filters: how hypothesis draws them, which rows they match, and how a REST query expresses them.

A filter may also have a member `q`, the text of a search. `matches` implements the documentation a second time and
shares no code with the service. Values that are known only when the service runs are placeholders such as `@user0`, so
that a failing play prints the filter as it was drawn.
"""

from __future__ import annotations

import operator
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

Row = dict[str, Any]
Wanted = Mapping[str, Any]

WORDS = (
    *("Harbor", "harbour", "HARBOR", "Straße", "İzmir", "ΣΟΦΙΑΣ", "50% off", "a_b", "back\\slash", "é", "🎬 reel"),
    *("reel, 2", '"cut"'),
)
GENRES = ("Noir", "Drama", "Crime", "War")
LANGUAGES = ("English", "French", "Yoruba")
STATUSES = ("released", "in_production", "rumoured")
KEPT_AS = ("planned", "watching", "watched", "dropped")
COUNTRIES = ("GB", "FR", "NG")
DATES = tuple(f"{year}-0{month}-1{day}" for year in (1949, 1984, 2021) for month in (1, 6) for day in (0, 5))
NUMBERS = tuple(range(0, 100, 7))

ORDER = ("gt", "gte", "lt", "lte")
_COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {name: getattr(operator, name) for name in ("gt", "lt")} | {
    "gte": operator.ge,
    "lte": operator.le,
}
_COLUMNS = {"genre": "genres", "language": "languages", "actor": "actors"}
_LISTS = ("genre", "language", "actor")
SEARCHED = ("title", "name", "actors", "description", "biography", "text")


# --- drawing filters


def _ops(values: Sequence[Any], *names: str) -> st.SearchStrategy[Any]:
    """Draw a bare value, or an object of one or two operators with their values."""
    one = st.sampled_from(values)
    listed = st.lists(one, min_size=1, max_size=3, unique=True)
    by_name = {name: listed if name == "in" else one for name in names}
    single = st.sampled_from(names).flatmap(lambda name: by_name[name].map(lambda value: {name: value}))
    choices = [single, one]
    if "gte" in names:
        choices.append(st.tuples(one, one).map(lambda pair: {"gte": min(pair, key=str), "lt": max(pair, key=str)}))
    return st.one_of(choices)


_NUMBER = ("ne", "in", *ORDER)
_TEXT = ("ne", "in", *ORDER, "contains", "prefix")
_PARTS = (*WORDS, "ar", "HAR", "straß", "i̇", "σοφιας", "%", "_", "\\", "")
_TIMES = ("@begin", "@lately", "@later")

_SHARED: Mapping[str, st.SearchStrategy[Any]] = {
    "user_id": _ops(("@user0", "@user1", "@admin"), "ne", "in"),
    "created_at": _ops(_TIMES, *ORDER),
}
_CATALOG: Mapping[str, st.SearchStrategy[Any]] = {
    **_SHARED,
    "id": _ops(("@movie0", "@movie1", "@movie2", "@middle"), *_NUMBER),
    "version": _ops((1, 2, 3), *_NUMBER),
    "updated_at": _ops(_TIMES, *ORDER),
    "description": _ops(_PARTS, *_TEXT),
}
FIELDS: Mapping[str, Mapping[str, st.SearchStrategy[Any]]] = {
    "movies": {
        **_CATALOG,
        "rating": _ops(NUMBERS, *_NUMBER),
        "title": _ops(_PARTS, *_TEXT),
        "status": _ops(STATUSES, *_TEXT),
        "country": _ops(COUNTRIES, *_TEXT),
        "genre": _ops(GENRES, "eq", "ne", "in"),
        "language": _ops(LANGUAGES, "eq", "ne", "in"),
        "actor": _ops(WORDS, "eq", "ne", "in"),
        "release_date": _ops(DATES, *_NUMBER),
        "duration_minutes": _ops(NUMBERS[1:], *_NUMBER),
        "budget": _ops(NUMBERS, *_NUMBER),
        "characters_count": _ops((0, 1, 2, 3), *_NUMBER),
        "comments_count": _ops((0, 1, 2, 3), *_NUMBER),
        "average_rating": _ops((1.5, 4.5, 7, 8.3, 9.0), *_NUMBER),
        "ratings_count": _ops((0, 1, 2, 3), *_NUMBER),
    },
    "characters": {
        **_CATALOG,
        "name": _ops(_PARTS, *_TEXT),
        "movie_id": _ops(("@movie0", "@movie1", "@movie2", "@middle"), *_NUMBER),
        "actor_id": _ops(("@movie0", "@movie1", "@movie2", "@middle"), *_NUMBER),
    },
    "comments": {
        **{name: values for name, values in _CATALOG.items() if name != "description"},
        "text": _ops(_PARTS, *_TEXT),
        "movie_id": _ops(("@movie0", "@movie1", "@movie2", "@middle"), *_NUMBER),
        "depth": _ops((0, 1, 2), *_NUMBER),
        "replies_count": _ops((0, 1, 2), *_NUMBER),
    },
    "genres": {
        **{name: values for name, values in _CATALOG.items() if name != "user_id"},
        "name": _ops((*_PARTS, *GENRES), *_TEXT),
        "movies_count": _ops((0, 1, 5, 20), *_NUMBER),
    },
    "actors": {
        **{name: values for name, values in _CATALOG.items() if name not in ("user_id", "description")},
        "name": _ops(_PARTS, *_TEXT),
        "birth_date": _ops(DATES, *_NUMBER),
        "movies_count": _ops((0, 1, 2, 3), *_NUMBER),
        "characters_count": _ops((0, 1, 2, 3), *_NUMBER),
        "country": _ops(COUNTRIES, *_TEXT),
        "biography": _ops(_PARTS, *_TEXT),
    },
    "ratings": {
        **{name: values for name, values in _CATALOG.items() if name != "description"},
        "score": _ops((1, 2, 7, 9), *_NUMBER),
        "movie_id": _ops(("@movie0", "@movie1", "@movie2", "@middle"), *_NUMBER),
    },
    "watchlist": {
        "status": _ops(KEPT_AS, "ne", "in"),
        "notes": _ops(_PARTS, *_TEXT),
        "movie_id": _ops(("@movie0", "@movie1", "@movie2", "@middle"), *_NUMBER),
        "version": _ops((1, 2, 3), *_NUMBER),
        "created_at": _ops(_TIMES, *ORDER),
    },
    "jobs": {
        **_SHARED,
        "kind": _ops(("generate_movies", "generate_characters"), "ne", "in"),
        "state": _ops(("done", "cancelled", "running", "queued"), "ne", "in"),
        "total": _ops((20, 60, 150), *_NUMBER),
    },
    "users": {
        "id": _ops(("@user0", "@user1", "@admin"), *_NUMBER),
        "username": _ops(("spare", "user", "SPARE-1"), "contains", "prefix", "ne"),
        "group": _ops(("user", "moderator"), "ne", "in"),
        "created_at": _ops(_TIMES, *ORDER),
    },
    "sessions": {"user_agent": _ops(("harry", "lime", "é"), *_TEXT), "created_at": _ops(_TIMES, *ORDER)},
}


_SEARCHES = ("harb", "HARBOUR", "strass", "izm", "σοφιας", "off 50", "a", "E", "reel 2", '"cut*', "noi", "a lon", "!")


def filters(topics: Sequence[str]) -> st.SearchStrategy[Wanted | None]:
    """Draw None, or a filter on fields that all these topics have, or a search if all of them have one, or both."""
    conditions = _conditions(topics)
    if not {"movies", "characters", "genres", "actors", "comments"}.issuperset(topics):
        return conditions
    search = st.sampled_from(_SEARCHES).map(lambda text: {"q": text})
    both = st.tuples(search, conditions).map(lambda parts: _merged([part for part in parts if part]))
    return st.one_of(conditions, conditions, both)


def _conditions(topics: Sequence[str]) -> st.SearchStrategy[Wanted | None]:
    names = sorted(set.intersection(*(set(FIELDS[topic]) for topic in topics)))
    fields = FIELDS[topics[0]]
    one = st.sampled_from(names).flatmap(lambda name: fields[name].map(lambda value: {name: value}))
    group = st.lists(one, min_size=1, max_size=2).map(_merged)
    groups = st.lists(group, min_size=1, max_size=3).map(lambda found: {"or": found})
    return st.one_of(one, groups, group, st.none(), st.tuples(one, groups).map(_merged))


def _merged(parts: Sequence[Wanted]) -> Wanted:
    return {name: value for part in parts for name, value in part.items()}


def resolved(wanted: Any, names: Mapping[str, Any]) -> Any:
    """Return the filter with its placeholders replaced by their values."""
    if isinstance(wanted, dict):
        return {key: resolved(value, names) for key, value in wanted.items()}
    if isinstance(wanted, list):
        return [resolved(value, names) for value in wanted]
    return names[wanted[1:]] if isinstance(wanted, str) and wanted.startswith("@") else wanted


# --- which rows match a filter


def matches(wanted: Wanted | None, row: Row) -> bool:
    """Return whether a row matches every field and, if the filter has `or` groups, at least one of them, and has every
    word of the search.
    """
    if not wanted:
        return True
    groups = wanted.get("or")
    fields = {name: value for name, value in wanted.items() if name not in ("or", "q")}
    return (
        _is_found(wanted.get("q", ""), row)
        and _all(fields, row)
        and (groups is None or any(_all(group, row) for group in groups))
    )


def _is_found(text: str, row: Row) -> bool:
    found = [word for name in SEARCHED for word in _words(row.get(name))]
    return all(any(word.startswith(start) for word in found) for start in _words(text))


def _words(value: str | Sequence[str] | None) -> list[str]:
    """Return the words of a text, without accents. This is right for the texts in this module only."""
    text = value if isinstance(value, str) else " ".join(value or ())
    parts = unicodedata.normalize("NFD", text.casefold().replace("ı", "i"))
    return re.findall(r"[^\W_]+", "".join(part for part in parts if not unicodedata.combining(part)))


def _all(fields: Wanted, row: Row) -> bool:
    for name, value in fields.items():
        held = row[_COLUMNS.get(name, name)]
        conditions = value if isinstance(value, dict) else {"eq": value}
        if not all(_holds(name in _LISTS, held, op, wanted) for op, wanted in conditions.items()):
            return False
    return True


def _holds(is_list: bool, held: Any, op: str, wanted: Any) -> bool:
    if is_list:
        if op == "ne":
            return wanted not in held
        return any(one in held for one in (wanted if op == "in" else [wanted]))
    if op in ("eq", "ne", "in"):
        found = held in wanted if op == "in" else held == wanted
        return not found if op == "ne" else found
    if held is None:
        return False
    if op in ("contains", "prefix"):
        text, part = _plain(held), _plain(wanted)
        return part in text if op == "contains" else text.startswith(part)
    return _COMPARISONS[op](held, wanted)


def _plain(text: str) -> str:
    return text.lower().replace("ς", "σ")


# --- filters in a REST query


def query(wanted: Wanted | None) -> list[tuple[str, str]]:
    if not wanted:
        return []
    found = _query(wanted, "{}")
    for number, group in enumerate(wanted.get("or", [])):
        found += _query(group, f"or[{number}][{{}}]")
    return found


def _query(fields: Wanted, form: str) -> list[tuple[str, str]]:
    found = []
    for name, value in fields.items():
        if name == "or":
            continue
        if name == "q":
            found.append((name, value))
            continue
        for op, wanted in (value if isinstance(value, dict) else {"": value}).items():
            text = ",".join(map(_listed, wanted)) if isinstance(wanted, list) else str(wanted)
            found.append((form.format(name) + (f"[{op}]" if op else ""), text))
    return found


def _listed(value: Any) -> str:
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if "," in text or text[:1] == '"' else text
