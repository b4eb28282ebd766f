"""Costly filters delay only the subscriptions that have them, whatever anonymous clients subscribe to."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import orjson
import pytest

from core import filters
from core.filters import Filter, Matcher
from realtime.fanout import changes, evaluation, hub
from realtime.fanout.changes import Change, FilteredChange
from realtime.fanout.costs import Budget
from realtime.fanout.evaluation import Evaluation
from realtime.fanout.matching import FilterIndex
from realtime.fanout.spec import Spec
from realtime.sockets.places import MAX_CONDITIONS_PER_SOCKET, MAX_SUBSCRIPTIONS_PER_ADDRESS, Places, TooMany
from realtime.wire.frames import Rendering
from repository.engine.events import Event
from tests.support.frames_checked import check_frame
from tests.support.hubs import KeptTexts, Stage, history, movie, wanted_by
from tests.support.service import Service, Watcher, eventually

MOVIE_TOPIC = frozenset({"movies"})


def always_true(number: int) -> dict[str, Any]:
    """Return a filter whose 200 conditions are all evaluated for each row: only the last of 20 groups matches."""
    group = {
        "title": {"contains": "", "prefix": "", "ne": f"{number}"},
        "description": {"contains": "a", "prefix": "a", "gte": ""},
        "rating": {"gte": 1, "lte": 100, "ne": 101},
    }
    last = [{**group, "user_id": {"ne": -number - 1}}]
    return {"or": [{**group, "user_id": {"eq": -number * 20 - each - 1}} for each in range(19)] + last}


@pytest.mark.alone
@pytest.mark.parametrize("deliver", ["all", {"latest_every_ms": 50}])
async def test_the_service_answers_at_once_whatever_anonymous_clients_subscribe_to(
    new_service: Callable[..., Service], deliver: Any
) -> None:
    with new_service().running() as service:
        async with AsyncExitStack() as stack:
            alice = await stack.enter_async_context(service.person())
            probe = await stack.enter_async_context(service.anyone())
            cheap = await stack.enter_async_context(service.watch("topics=jobs"))
            reply = await cheap.ask({"id": 1, "action": "subscribe", "topics": ["movies"], "filter": {"rating": 50}})
            assert reply["ok"]
            sockets = [await stack.enter_async_context(service.watch("topics=jobs")) for _ in range(10)]
            accepted = [await subscribed_to_all(socket, deliver, number) for number, socket in enumerate(sockets)]
            assert min(map(len, accepted)) == MAX_CONDITIONS_PER_SOCKET // 200
            rows = [{"title": "t" * 100, "description": "a" * 500, "rating": 50} for _ in range(1_000)]
            writing = asyncio.create_task(alice.add_bulk(rows))
            longest = 0.0
            reading = [
                asyncio.create_task(bulk_frames(each, 1_000 * len(names)))
                for each, names in zip(sockets, accepted, strict=True)
            ]
            while not all(task.done() for task in (*reading, writing)):
                begun = time.monotonic()
                assert (await probe.get("/healthz")).status_code == 200
                longest = max(longest, time.monotonic() - begun)
                await asyncio.sleep(0.01)
            ids = [row["id"] for row in await writing]
            for task, names in zip(reading, accepted, strict=True):
                assert ids_by_subscription(await task) == dict.fromkeys(names, ids)
            assert longest < 0.5
            assert ids_by_subscription(await bulk_frames(cheap, 1_000)) == {"s1": ids}
        # When a client leaves, its conditions no longer count.
        async with service.watch("topics=jobs") as again:
            assert len(await subscribed_to_all(again, deliver, 50)) == MAX_CONDITIONS_PER_SOCKET // 200


async def subscribed_to_all(watcher: Watcher, deliver: Any, number: int) -> list[str]:
    """Try to begin 32 subscriptions, and return the names of those that were accepted."""
    names = []
    for each in range(32):
        wanted = always_true(number * 32 + each)
        message = {"id": each, "action": "subscribe", "topics": ["movies"], "filter": wanted, "deliver": deliver}
        reply = await watcher.ask(message)
        if reply["ok"]:
            names.append(reply["data"]["subscription"])
        else:
            assert reply["error"]["code"] == "too_many_conditions"
            assert "at most 1,000 conditions" in reply["error"]["detail"]
    return names


async def bulk_frames(watcher: Watcher, rows: int) -> list[bytes]:
    """Return the next bulk frames, with `rows` rows in total. They are parsed later, to keep this process idle."""
    found: list[bytes] = []
    async with asyncio.timeout(60):
        while sum(frame.count(b'"version":') for frame in found) < rows:
            found.append(await watcher.socket.recv(decode=False))
    return [frame for frame in found if frame.startswith(b'{"operation":"add_bulk"')]


def ids_by_subscription(texts: Sequence[bytes]) -> dict[str, list[int]]:
    """Return the ids that each subscription received, in order."""
    found: dict[str, list[int]] = {}
    for frame in map(orjson.loads, texts):
        check_frame(frame)
        found.setdefault(frame["subscription"], []).extend(row["id"] for row in frame["data"]["items"])
    return found


# --- the order of events if a filter is too costly for one turn of the event loop


WANTED = (
    {"rating": {"gte": 5}}, {"rating": {"gte": 2, "lte": 7}, "title": {"contains": "ABA", "prefix": "a"}},
    {"title": {"contains": "zz"}}, {"or": [{"rating": {"lt": 3}}, {"title": {"prefix": "abab"}}]}, {"user_id": 1},
)  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
async def test_a_group_that_is_too_costly_gets_every_event_once_and_in_order(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    dice = random.Random(seed)
    events = history(dice, 40)

    async def received(max_tests: int) -> list[list[bytes]]:
        monkeypatch.setattr(hub, "MAX_TESTS_PER_TURN", max_tests)
        monkeypatch.setattr(evaluation, "SLICE_SECONDS", 0.0)
        stage, pace = Stage(), random.Random(seed)
        writers: list[KeptTexts] = []
        for index in range(2 * len(WANTED)):
            wanted = wanted_by(WANTED[index % len(WANTED)])
            spec = Spec(MOVIE_TOPIC, Rendering("items", f"s{index // 4}"), filters=(("movies", wanted),))
            _, writer = stage.subscribe(spec)
            writers.append(writer)
        position = 0
        while position < len(events):
            some = events[position : position + pace.randint(1, 4)]
            stage.publish(*some)
            position += len(some)
            for _ in range(pace.randint(0, 6)):
                await asyncio.sleep(0)
        await eventually(lambda: len(stage.hub) == len(writers), "every subscription is live again", 20)
        await eventually(lambda: stage.hub.is_idle, "the hub has written all events", 20)
        return [writer.texts for writer in writers]

    costly = await received(30)
    assert costly == await received(10**9)
    assert sum(map(len, costly)) > 100


async def test_an_evaluation_lets_everything_else_run_between_its_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "SLICE_SECONDS", 0.0)
    rows = [movie(key, key % 9 + 1) for key in range(1, 1_001)]
    event = Event("e", 1, "movies", "add_bulk", None, "public", orjson.dumps({"items": rows}), None, (), 1, "t")
    source = Evaluation()
    wanted = [wanted_by({"rating": {"gte": 1}, "id": {"gt": -number}}) for number in range(9)]
    specs = [Spec(MOVIE_TOPIC, filters=(("movies", each),)) for each in wanted]
    evaluating = asyncio.gather(*(source.texts(spec, [event]) for spec in specs))
    turns = 0
    while not evaluating.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns >= len(specs) * 2, "each filter took several turns of the event loop"
    assert [len(texts) for texts in await evaluating] == [1] * len(specs)


async def test_equal_filters_that_are_behind_together_are_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = []

    def filter_changes(matches: Matcher, some: Iterable[Change]) -> list[FilteredChange]:
        evaluated.append(matches)
        return changes.filter_changes(matches, some)

    monkeypatch.setattr(evaluation, "filter_changes", filter_changes)
    rows = [movie(key, key % 9 + 1) for key in range(1, 101)]
    event = Event("e", 1, "movies", "add_bulk", None, "public", orjson.dumps({"items": rows}), None, (), 1, "t")
    source = Evaluation()
    wanted = (("movies", wanted_by({"rating": {"gte": 5}})),)
    specs = [Spec(MOVIE_TOPIC, Rendering("items", f"s{number}"), filters=wanted) for number in range(50)]
    found = await asyncio.gather(*(source.texts(spec, [event]) for spec in specs))
    assert len(evaluated) == 1
    assert {len(texts) for texts in found} == {1}


def test_a_text_is_converted_once_for_each_row_and_event(monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[str] = []

    def without_case(text: str) -> str:
        converted.append(text)
        return text.lower()

    index = FilterIndex()
    for number in range(30):
        group = {"title": {"contains": str(number), "prefix": "a"}}
        index.add(wanted_by({"title": {"contains": f"a{number % 2}"}, "or": [group]}))
    monkeypatch.setattr(filters, "without_case", without_case)
    rows = [{"id": key, "title": f"A{key}"} for key in range(5)]
    list(index.affected_filters([Change(None, row) for row in rows], 1_000, Budget(10**6)))
    assert sorted(converted) == [row["title"] for row in rows]


# --- budgets


def filters_with(conditions: int, number: int = 0) -> Sequence[tuple[str, Filter]]:
    """Return one filter with this many conditions. Each `number` results in a different filter."""
    operators = ("gt", "gte", "lt", "lte", "ne")
    groups = [
        {
            field: {op: 1_000 * number + 10 * each + place for place, op in enumerate(operators)}
            for field in ("id", "rating")
        }
        for each in range(conditions // 10)
    ]
    return (("movies", wanted_by({"or": groups})),)


def test_conditions_are_counted_for_each_socket_and_network() -> None:
    places = Places(max_connections=100, max_per_address=100)
    with ExitStack() as stack:
        here = [stack.enter_context(places.take(f"2001:db8::{number}")) for number in range(1, 12)]
        there = stack.enter_context(places.take("192.0.2.1"))
        for number in range(50):
            here[number // 5].hold(filters_with(200, number))
        with pytest.raises(TooMany, match=r"at most 1,000 conditions .* of one socket.* got 1,010"):
            here[0].hold(filters_with(10))
        with pytest.raises(TooMany, match=r"at most 10,000 conditions .* from one address, got 10,010"):
            here[10].hold(filters_with(10, 99))
        there.hold(filters_with(10, 99))
        here[10].hold(filters_with(200, 49))  # another socket has the same filter, so the conditions count only once
        here[9].release(filters_with(200, 49))
        with pytest.raises(TooMany):
            here[10].hold(filters_with(10, 99))
        here[10].release(filters_with(200, 49))
        here[10].hold(filters_with(200, 99))


def test_the_subscriptions_of_a_network_are_bounded() -> None:
    places = Places(max_connections=1_000, max_per_address=1_000)
    with ExitStack() as stack:
        here = [stack.enter_context(places.take("192.0.2.1")) for _ in range(200)]
        there = stack.enter_context(places.take("192.0.2.2"))
        for number in range(MAX_SUBSCRIPTIONS_PER_ADDRESS):
            here[number % 200].hold(())
        with pytest.raises(TooMany, match=r"at most 4,000 subscriptions .* one address") as refused:
            here[0].hold(())
        assert refused.value.code == "too_many_subscriptions"
        there.hold(())
        here[7].release(())
        here[0].hold(())


def test_only_the_budget_of_a_socket_holds_without_rate_limits() -> None:
    places = Places(max_connections=100, max_per_address=None)
    with ExitStack() as stack:
        here = [stack.enter_context(places.take("192.0.2.1")) for _ in range(12)]
        for number in range(60):
            here[number // 5].hold(filters_with(200, number))
        with pytest.raises(TooMany, match="of one socket"):
            here[0].hold(filters_with(10))
