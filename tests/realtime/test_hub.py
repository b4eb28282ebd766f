"""The hub delivers in slices. Each subscription gets every event once and in order, whatever happens between slices."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import orjson
import pytest

from core.filters import Filter
from realtime.fanout import encode, evaluation, hub, slices
from realtime.fanout.changes import Change
from realtime.fanout.costs import Budget
from realtime.fanout.encode import Shared
from realtime.fanout.evaluation import Evaluation
from realtime.fanout.matching import FilterIndex
from realtime.fanout.slices import PerTurn
from realtime.fanout.spec import Spec
from realtime.fanout.subscription import MAX_UNSENT_BYTES, Subscription
from realtime.feed.feed import PositionTooOld
from realtime.wire import frames
from realtime.wire.frames import Rendering
from repository.engine.events import Event, Head
from tests.support.hubs import KeptTexts, Stage, added, history, movie, wanted_by
from tests.support.service import eventually

MOVIES = frozenset({"movies"})
PLAIN = Spec(MOVIES)
FILTERS: tuple[dict[str, Any] | None, ...] = (
    None, {"rating": {"gte": 5}}, {"id": 7}, {"id": {"in": [3, 4, 5, 6]}}, {"title": {"contains": "baba"}},
)  # fmt: skip


@pytest.fixture(autouse=True)
def shortest_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt work wherever it may be interrupted."""
    monkeypatch.setattr(slices, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(hub, "WRITES_PER_STEP", 1)


def spec_of(number: int) -> Spec:
    wanted = FILTERS[number % len(FILTERS)]
    filters: tuple[tuple[str, Filter], ...] = (("movies", wanted_by(wanted)),) if wanted is not None else ()
    return Spec(MOVIES, Rendering("items", f"s{number % 2}"), filters=filters)


def seqs(writer: KeptTexts) -> list[Any]:
    return [orjson.loads(text)["seq"] for text in writer.texts]


@pytest.mark.parametrize("seed", range(30))
async def test_each_subscription_gets_every_event_once_and_in_order(seed: int) -> None:
    dice, stage = random.Random(seed), Stage()
    events = history(dice, 60)
    begun: dict[Subscription, tuple[KeptTexts, int]] = {}
    ended: dict[Subscription, int] = {}

    def subscribe() -> None:
        start = stage.log.head.seq
        subscription, writer = stage.subscribe(spec_of(dice.randrange(10)))
        begun[subscription] = writer, start

    def unsubscribe(subscription: Subscription) -> None:
        subscription.stop()
        ended[subscription] = subscription.position

    def change_audiences(subscription: Subscription) -> None:
        audiences = frozenset({"public", f"user:{dice.randrange(3)}"})
        subscription.change_spec(replace(subscription.spec, audiences=audiences))

    def fill(subscription: Subscription) -> None:
        begun[subscription][0].fill(MAX_UNSENT_BYTES + 1)

    def drain(subscription: Subscription) -> None:
        begun[subscription][0].drain()

    for _ in range(6):
        subscribe()
    while stage.log.head.seq < len(events):
        position = stage.log.head.seq
        stage.publish(*events[position : position + dice.randint(1, 4)])
        for _ in range(dice.randint(0, 12)):
            await asyncio.sleep(0)
            if dice.random() < 0.3:
                subscribe()
            if dice.random() < 0.5 and (present := [each for each in begun if each not in ended]):
                dice.choice((unsubscribe, change_audiences, fill, drain))(dice.choice(present))
    for subscription in begun:
        drain(subscription)
    present = [each for each in begun if each not in ended]
    await eventually(lambda: stage.hub.is_idle and len(stage.hub) == len(present), "all are live and up to date", 20)
    reference = Evaluation()
    for subscription, (writer, start) in begun.items():
        end = ended.get(subscription, len(events))
        assert writer.texts == await reference.texts(subscription.spec, events[start:end])
    assert len(ended) > 3
    assert len(present) > 3


async def next_write(writers: list[KeptTexts]) -> None:
    """Run the event loop, turn by turn, until a frame has been written."""
    for _ in range(100):
        await asyncio.sleep(0)
        if any(writer.texts for writer in writers):
            return
    raise AssertionError("expected a frame")


async def written_by_turn(stage: Stage, writers: list[KeptTexts]) -> list[int]:
    """Return how many frames were written in each turn of the event loop until the hub is idle."""
    found, total = [], 0
    while not stage.hub.is_idle:
        await asyncio.sleep(0)
        found.append(sum(len(writer.texts) for writer in writers) - total)
        total += found[-1]
    return found


@pytest.mark.parametrize("wanted", FILTERS[:2])
@pytest.mark.parametrize("steps", [1, 7])
async def test_few_frames_are_written_in_a_turn(
    monkeypatch: pytest.MonkeyPatch, wanted: dict[str, Any] | None, steps: int
) -> None:
    monkeypatch.setattr(hub, "WRITES_PER_STEP", steps)
    stage = Stage()
    filters = (("movies", wanted_by(wanted)),) if wanted is not None else ()
    alike = [stage.subscribe(Spec(MOVIES, filters=filters))[1] for _ in range(40)]
    named = [stage.subscribe(Spec(MOVIES, Rendering("items", str(each)), filters=filters))[1] for each in range(40)]
    stage.publish(added(1))
    written = await written_by_turn(stage, alike + named)
    assert (sum(written), max(written)) == (80, steps)


async def test_large_frames_are_written_one_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "WRITES_PER_STEP", 100)
    monkeypatch.setattr(hub, "BYTES_PER_STEP", len(added(1).payload))
    stage = Stage()
    writers = [stage.subscribe(PLAIN)[1] for _ in range(20)]
    stage.publish(added(1))
    assert max(await written_by_turn(stage, writers)) == 1


async def test_a_full_socket_gets_nothing_until_it_has_room() -> None:
    stage = Stage()
    (slow, full), (_, fast) = stage.subscribe(PLAIN), stage.subscribe(PLAIN)
    full.fill(MAX_UNSENT_BYTES + 1)
    stage.publish(added(1), added(2))
    await eventually(lambda: stage.hub.is_idle, "the events are delivered")
    assert (seqs(full), seqs(fast), slow.is_live) == ([], [1, 2], False)
    full.drain()
    await eventually(lambda: slow.is_live, "the subscription is live again")
    assert seqs(full) == [1, 2]


async def test_a_subscription_that_leaves_between_slices_knows_what_it_got() -> None:
    stage = Stage()
    subscriptions = [stage.subscribe(PLAIN) for _ in range(10)]
    stage.publish(added(1))
    await next_write([writer for _, writer in subscriptions])
    for subscription, _ in subscriptions:
        subscription.stop()
    assert {subscription.position for subscription, _ in subscriptions} == {0, 1}
    assert all(seqs(writer) == [1] * subscription.position for subscription, writer in subscriptions)
    await eventually(lambda: stage.hub.is_idle, "nothing is left to do")


async def test_events_that_arrive_during_a_delivery_follow_it_in_one_write() -> None:
    stage = Stage()
    writers = [stage.subscribe(PLAIN)[1] for _ in range(3)]
    stage.publish(added(1))
    await asyncio.sleep(0)
    writes = [0] * 3

    def counted(index: int, written: frames.Frames) -> None:
        writes[index] += 1
        writers[index].texts += written.texts

    for index, writer in enumerate(writers):
        writer.write = partial(counted, index)  # type: ignore[method-assign]
    stage.publish(added(2))
    stage.publish(added(3))
    await eventually(lambda: stage.hub.is_idle, "the events are delivered")
    assert [seqs(writer) for writer in writers] == [[1, 2, 3]] * 3
    assert sorted(writes) == [1, 2, 2], "the first socket had got the first event before the writes were counted"


@asynccontextmanager
async def running(stage: Stage) -> AsyncIterator[None]:
    task = asyncio.create_task(stage.hub.run())
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_a_hub_that_is_behind_the_ring_reads_the_log_once_for_all() -> None:
    stage = Stage()
    async with running(stage):
        writers = [stage.subscribe(PLAIN)[1] for _ in range(20)]
        stage.publish(*map(added, range(1, 8)))
        stage.log.oldest = 7
        await asyncio.sleep(0)
        late, _ = stage.subscribe(PLAIN)
        await eventually(lambda: stage.hub.is_idle, "the events are delivered")
        assert [seqs(writer) for writer in writers] == [list(range(1, 8))] * 20
        assert stage.log.reads == [0, 3, 6]
        late.stop()
        assert late.position == 7


async def test_subscriptions_restart_if_the_log_no_longer_has_the_next_event() -> None:
    stage = Stage()
    read_after = stage.log.read_after

    async def pruned(seq: int) -> list[Event]:
        if seq < 5:
            raise PositionTooOld(seq)
        return await read_after(seq)

    stage.log.read_after = pruned  # type: ignore[method-assign]
    async with running(stage):
        writers = [stage.subscribe(PLAIN)[1] for _ in range(5)]
        stage.publish(*map(added, range(1, 6)))
        stage.log.oldest = 5
        await eventually(lambda: all(writer.texts for writer in writers), "all start over")
        await eventually(lambda: stage.hub.is_idle and len(stage.hub) == 5, "all are live again")
        stage.publish(added(6))
        await eventually(lambda: stage.hub.is_idle, "the next event is delivered")
    for writer in writers:
        first, second = map(orjson.loads, writer.texts)
        assert (first["operation"], first["data"]["seq"], second["seq"]) == ("resync", 5, 6)


@pytest.mark.parametrize("turns", range(1, 8))
async def test_no_event_of_a_replaced_log_follows_the_resync(turns: int) -> None:
    stage = Stage()
    writers = [stage.subscribe(PLAIN)[1] for _ in range(5)]
    stage.publish(added(1), added(2))
    for _ in range(turns):
        await asyncio.sleep(0)
    _, late = stage.subscribe(PLAIN)
    stage.log.generation += 1
    stage.log.events = [added(1)]
    stage.hub.on_reset(Head("f", 1))
    stage.publish(added(2))
    await eventually(lambda: stage.hub.is_idle, "the event is delivered")
    for writer in (*writers, late):
        found = [orjson.loads(text) for text in writer.texts]
        operations = [each["operation"] for each in found]
        assert operations in (["add", "add", "resync", "add"], ["resync", "add"])
        assert found[-1]["seq"] == 2


async def test_an_unnumbered_frame_follows_the_events_before_it() -> None:
    stage = Stage()
    writers = [stage.subscribe(spec_of(number))[1] for number in range(0, 20, 5)]
    latest, pulsing = stage.subscribe(Spec(MOVIES, latest_every_ms=60_000))
    stage.publish(added(1))
    row = {"id": 1}
    stage.hub.send_ephemeral("movies", row, lambda _: b'{"seq":"out of date"}')
    stage.hub.send_ephemeral("movies", row, lambda _: b'{"seq":"progress"}')
    await eventually(lambda: stage.hub.is_idle, "all is written")
    assert [seqs(writer) for writer in writers] == [[1, "progress"]] * 4
    assert seqs(pulsing) == ["progress"]
    latest.stop()


@pytest.mark.parametrize("deliver", [None, 1])
async def test_an_error_of_the_hub_ends_its_task(monkeypatch: pytest.MonkeyPatch, deliver: int | None) -> None:
    stage = Stage()
    stage.subscribe(replace(PLAIN, latest_every_ms=deliver))

    def fail(seq: int) -> list[Event]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(stage.log, "newest_after", fail)
    stage.publish(added(1))
    with pytest.raises(RuntimeError, match="a bug"):
        await asyncio.wait_for(stage.hub.run(), 5)


async def test_the_latest_states_are_sent_in_slices() -> None:
    stage = Stage()
    subscriptions = [stage.subscribe(Spec(MOVIES, latest_every_ms=1)) for _ in range(30)]
    stage.publish(added(1), added(2))
    largest, total = 0, 0
    while total < 30:
        await asyncio.sleep(0)
        now = sum(len(writer.texts) for _, writer in subscriptions)
        largest, total = max(largest, now - total), now
        if total == 10:
            unwritten = next(each for each, writer in subscriptions if not writer.texts)
            unwritten.stop()
            subscriptions.append(stage.subscribe(Spec(MOVIES, latest_every_ms=1)))
            stage.publish(added(3))
    assert largest <= 2
    await eventually(lambda: all(each.position == 3 for each, _ in subscriptions if each.is_live), "all have beaten")
    assert {each.spec for each, writer in subscriptions if not writer.texts} == {unwritten.spec}
    for each, _ in subscriptions:
        each.stop()


async def test_few_subscriptions_begin_a_page_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MAX_PAGES_PER_TURN", 3)
    stage = Stage()
    subscriptions = [stage.subscribe(PLAIN) for _ in range(30)]
    for _, writer in subscriptions:
        writer.fill(MAX_UNSENT_BYTES + 1)
    stage.publish(added(1))
    await eventually(lambda: stage.hub.is_idle, "all have fallen behind")
    for _, writer in subscriptions:
        writer.drain()
    await eventually(lambda: len(stage.hub) == 30, "all are live again")
    assert [seqs(writer) for _, writer in subscriptions] == [[1]] * 30


async def test_tasks_take_turns_in_order_and_may_be_cancelled() -> None:
    turns, order = PerTurn(3), list[int]()

    async def work(number: int) -> None:
        await turns.turn()
        order.append(number)

    tasks = [asyncio.create_task(work(number)) for number in range(20)]
    await asyncio.sleep(0)
    for number in (5, 9):
        tasks[number].cancel()
    largest = 0
    while not all(task.done() for task in tasks):
        before = len(order)
        await asyncio.sleep(0)
        largest = max(largest, len(order) - before)
    assert order == [number for number in range(20) if number not in (5, 9)]
    assert largest <= 3


def test_what_groups_share_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "MAX_SHARED_BYTES", 10)
    shared: Shared[str] = Shared()
    for key in "abc":
        shared.add(key, key, 4)
    assert [key in shared for key in "abc"] == [False, False, True]


def test_filters_that_require_one_value_share_its_changes() -> None:
    index = FilterIndex()
    for number in range(100):
        index.add(wanted_by({"user_id": 1, "rating": {"gt": number}}))
    index.add(wanted_by({"id": {"in": [2, 3, 5]}}))
    changes = [Change(movie(key, 1), movie(key, 9)) for key in range(1, 7)]
    lists = index._indexed(changes)
    assert len({id(each) for entry in lists for each in lists[entry]}) == 1 + 3
    found = dict(index.affected_filters(changes, 1_000, Budget(10**6)))
    assert [one.change.id for one in found[wanted_by({"id": {"in": [2, 3, 5]}})] or ()] == [2, 3, 5]
    assert len(found) == 1 + 9
