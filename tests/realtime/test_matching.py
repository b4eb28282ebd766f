"""The index finds the filters that an event affects without evaluating all filters. Coalescing sends net changes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from core.filters import Filter, matcher_of, parse_json
from realtime.fanout.changes import Change, FilteredChange, change_texts, changes_of, filter_changes, matcher_for
from realtime.fanout.costs import Budget
from realtime.fanout.encode import coalesce
from realtime.fanout.evaluation import Evaluation
from realtime.fanout.matching import FilterIndex
from realtime.fanout.spec import Spec
from realtime.wire.frames import Rendering
from repository.engine.events import Event
from resources.characters import CHARACTERS
from resources.movies import MOVIES

ROWS = st.fixed_dictionaries(
    {
        "id": st.integers(1, 6),
        "title": st.sampled_from("abc"),
        "rating": st.none() | st.integers(1, 4),
        "country": st.none() | st.sampled_from(["GB", "AT"]),
        "genres": st.lists(st.sampled_from(["Noir", "Drama"]), unique=True),
        "user_id": st.integers(1, 3),
    }
)
PARTS: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [
        {"id": 1},
        {"user_id": 2},
        {"rating": {"in": [1, 3]}},
        {"rating": {"gte": 2}},
        {"rating": {"ne": 2}},
        {"genre": "Noir"},
        {"genre": {"in": ["Drama", "Noir"]}},
        {"genre": {"ne": "Noir"}},
        {"title": "a"},
        {"country": "GB"},
        {"title": {"contains": "A"}},
    ]
)


@st.composite
def filter_values(draw: st.DrawFn) -> Filter:
    value: dict[str, Any] = {}
    for part in draw(st.lists(PARTS, max_size=3)):
        value.update(part)
    if draw(st.booleans()):
        value["or"] = draw(st.lists(PARTS, min_size=1, max_size=2))
    found, problems = parse_json(value, MOVIES.fields)
    assert not problems
    return found


CHANGES = st.lists(st.tuples(st.none() | ROWS, st.none() | ROWS).filter(lambda pair: pair != (None, None)), max_size=5)


@settings(max_examples=300, deadline=None)
@given(st.lists(filter_values(), max_size=8), CHANGES)
def test_the_index_finds_what_evaluating_every_filter_finds(wanted: list[Filter], pairs: list[tuple[Any, Any]]) -> None:
    changes = [Change(before, {**after, "id": before["id"]} if before and after else after) for before, after in pairs]
    index = FilterIndex()
    for each in wanted:
        index.add(each)
    found = dict(index.affected_filters(changes, 500, Budget(10**9)))
    expected = {each: seen for each in wanted if (seen := filter_changes(matcher_of(each), changes))}
    assert found == expected
    for each in wanted:
        index.discard(each)
    assert not index
    assert not list(index.affected_filters(changes, 500, Budget(10**9)))


class CountingRow(dict[str, Any]):
    """A row that counts how often each of its fields is read."""

    reads: ClassVar[Counter[str]] = Counter()

    def __getitem__(self, name: str) -> Any:
        self.reads[name] += 1
        return super().__getitem__(name)


def test_only_filters_that_an_event_can_affect_are_evaluated() -> None:
    index = FilterIndex()
    for movie_id in range(1, 1_001):
        wanted, _ = parse_json({"movie_id": movie_id, "name": {"contains": "a"}}, CHARACTERS.fields)
        index.add(wanted)
    row = CountingRow(id=1, movie_id=500, name="Anna")
    CountingRow.reads.clear()
    [(found, seen)] = index.affected_filters([Change(None, row)], 500, Budget(1_000))
    assert seen is not None
    assert found.all[0].value == 500
    assert [one.operation for one in seen] == ["add"]
    assert CountingRow.reads["name"] <= 2, "expected one of a thousand filters to be evaluated"


# --- the net change of a window of time


def event(seq: int, operation: str, payload: Any, before: Any = None, changed: tuple[str, ...] = ()) -> Event:
    encoded = orjson.dumps(before) if before is not None else None
    at = "2026-01-01T00:00:00.000000Z"
    return Event("e", seq, "movies", operation, None, "public", orjson.dumps(payload), encoded, changed, 1, at)


HISTORY = st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["write", "delete"]), st.integers(1, 4)), max_size=12)


@settings(max_examples=300, deadline=None)
@given(HISTORY, filter_values() | st.none(), st.integers(0, 12))
def test_a_window_leads_to_the_same_view_as_its_events(
    history: list[tuple[int, str, int]], wanted: Filter | None, start: int
) -> None:
    spec = Spec(
        frozenset({"movies"}),
        Rendering("items", "s1"),
        filters=(("movies", wanted),) if wanted is not None else (),
        latest_every_ms=100,
    )
    plain = Spec(spec.topics, spec.rendering, filters=spec.filters)
    state: dict[int, dict[str, Any]] = {}
    events: list[Event] = []
    for seq, (key, what, rating) in enumerate(history, 1):
        old = state.get(key)
        if what == "delete":
            if old is None:
                continue
            del state[key]
            events.append(event(seq, "delete", {"id": key}, old))
        else:
            new = {"id": key, "title": "abc"[rating % 3], "rating": rating, "country": None, "genres": [], "user_id": 1}
            state[key] = new
            operation = "update" if old is not None else "add"
            events.append(event(seq, operation, new, old, ("rating",) if old is not None else ()))
    before, after = events[:start], events[start:]
    view = applied({}, texts(plain, before))
    one_by_one = applied(dict(view), texts(plain, after))
    frames = [orjson.loads(text) for text in texts(spec, after)]
    assert applied(dict(view), texts(spec, after)) == one_by_one
    touched = [key for frame in frames for key in keys_of(frame)]
    assert len(touched) == len(set(touched)), "expected each row at most once"
    assert [frame.get("more", False) for frame in frames] == [True] * (len(frames) - 1) + [False] * bool(frames)
    assert len({frame["seq"] for frame in frames}) <= 1


def texts(spec: Spec, events: Sequence[Event]) -> list[bytes]:
    return asyncio.run(Evaluation().texts(spec, events))


def keys_of(frame: dict[str, Any]) -> list[int]:
    data = frame["data"]
    return data["ids"] if "ids" in data else [row["id"] for row in data.get("items", [data])]


def applied(view: dict[int, Any], texts: Any) -> dict[int, Any]:
    """Apply frames to a view. Assert that they add only new rows, and change or delete only existing ones."""
    for text in texts:
        frame = orjson.loads(text)
        operation = frame["operation"].removesuffix("_bulk")
        for key in keys_of(frame):
            assert (key in view) == (operation != "add"), frame
        if operation == "delete":
            for key in keys_of(frame):
                del view[key]
        else:
            data = frame["data"]
            view |= {row["id"]: row for row in data.get("items", [data])}
    return view


def unfiltered(event: Event) -> list[FilteredChange]:
    return filter_changes(matcher_for(None), changes_of(event))


def test_a_large_window_is_split_into_frames_of_one_group() -> None:
    spec = Spec(frozenset({"movies"}), Rendering("items", "s1"), latest_every_ms=100)
    events = [event(seq, "add", {"id": seq, "title": "x" * 2_000}) for seq in range(1, 1_501)]
    texts = coalesce(spec, events, unfiltered)
    assert len(texts) == 4
    assert max(map(len, texts)) < 800 * 1024
    frames = [orjson.loads(text) for text in texts]
    assert sum(frame["data"]["count"] for frame in frames) == 1_500
    assert [frame.get("more", False) for frame in frames] == [True, True, True, False]
    assert {frame["seq"] for frame in frames} == {1_500}


async def test_a_bulk_event_whose_rows_all_match_is_sent_unchanged() -> None:
    wanted, _ = parse_json({"rating": {"gt": 0}}, MOVIES.fields)
    rows = [{"id": number, "rating": 1} for number in range(3)]
    bulk = event(1, "add_bulk", {"count": 3, "items": rows, "job_id": "j"})
    spec = Spec(frozenset({"movies"}), filters=(("movies", wanted),))
    [text] = await Evaluation().texts(spec, [bulk])
    assert orjson.loads(text)["data"] == {"count": 3, "items": rows, "job_id": "j"}
    assert "more" not in orjson.loads(text)
    changes = changes_of(bulk)
    assert change_texts(bulk, "items", filter_changes(matcher_of(wanted), changes[:0]), 3) == ()


def test_a_window_has_the_number_of_its_last_event_even_if_that_is_not_sent() -> None:
    """If the number were lower, a client that resumes from it would receive a `delete` for a row that it never had."""
    spec = Spec(frozenset({"movies"}), Rendering("items", "s1"), latest_every_ms=100)
    row, other = {"id": 1, "title": "a"}, {"id": 2, "title": "b"}
    events = [event(1, "add", row), event(2, "add", other), event(3, "delete", {"id": 1}, row)]
    [text] = coalesce(spec, events, unfiltered)
    assert (orjson.loads(text)["data"], orjson.loads(text)["seq"]) == (other, 3)
