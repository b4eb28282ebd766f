"""Explicit subscriptions: several on a socket, with filters, snapshots, resume and coalescing.

`tests/oracle` tests that a snapshot plus the events after it equals the list, even while clients write.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.backends import SQLITE_ONLY
from tests.support.event_logs import renew_epoch
from tests.support.resources import watching
from tests.support.service import Person, Service, Watcher
from tests.support.sockets import bulk_rows, rows_of, signed_in, subscribed


async def silent(watcher: Watcher) -> None:
    """Assert that no event is on its way, by subscribing: a new subscription begins after all committed events."""
    await watcher.send({"id": "reach", "action": "subscribe", "topics": ["jobs"], "as": "silence"})
    await watcher.send({"id": "leave", "action": "unsubscribe", "subscription": "silence"})
    await watcher.send({"id": "silent", "action": "ping"})
    for name in ("reach", "leave", "silent"):
        assert (await watcher.next()).get("reply_to") == name


async def test_a_subscription_is_named_and_replaces_the_default_one(service: Service) -> None:
    async with service.person() as alice, watching(service) as watcher:
        first = await subscribed(watcher, topics=["movies"])
        assert first == {"subscription": "s1", "seq": watcher.welcome["data"]["seq"]}
        second = await subscribed(watcher, topics=["characters"], **{"as": "cast"})
        assert second["subscription"] == "cast"
        assert (await watcher.sees(await alice.add()))["subscription"] == "s1"
        assert (await watcher.sees(await alice.add("characters")))["subscription"] == "cast"
        await silent(watcher)


async def test_two_subscriptions_of_a_socket_each_get_an_event(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher:
        await subscribed(watcher, topics=["movies"])
        await subscribed(watcher, topics=["movies"], filter={"rating": {"gte": 50}})
        await alice.add(rating=70)
        events = [await watcher.expect("add"), await watcher.expect("add")]
        assert {event["subscription"] for event in events} == {"s1", "s2"}
        assert events[0]["seq"] == events[1]["seq"]


async def test_a_subscription_is_silent_after_unsubscribe(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher:
        await subscribed(watcher, topics=["movies"])
        reply = await watcher.ask({"id": 1, "action": "unsubscribe", "subscription": "s1"})
        assert reply == {"reply_to": 1, "ok": True, "data": {"subscription": "s1"}}
        await alice.add()
        await silent(watcher)
        assert (await subscribed(watcher, topics=["movies"]))["subscription"] == "s1", "the name is free again"


async def test_a_search_is_kept_up_to_date(service: Service) -> None:
    """The rows of a subscription with `q` are those that the list finds, in the snapshot, live and after a resume."""
    async with service.person() as alice, service.watch() as watcher:
        mark = f"mark{alice.id}"
        wanted: dict[str, Any] = {"topics": ["characters", "movies"], "q": f"  CAFE {mark.upper()}\u0301 "}
        first = await alice.add(title=f"Le Café, {mark}", rating=60)
        await alice.add(title=f"caf {mark}")
        await subscribed(watcher, **wanted, snapshot=True, filter={"user_id": alice.id}, **{"as": "found"})
        found = {topic: await rows_of(watcher, topic) for topic in ("characters", "movies")}
        assert found == {"movies": [first], "characters": []}
        assert (await alice.http.get("/movies", params={"q": wanted["q"]})).json() == [first]

        second = await alice.add(title="Ｃａｆé", description=f"{mark}: 'OR' \" NEAR(")
        assert (await watcher.expect("add"))["data"] == second
        edits = [{"id": first["id"], "title": f"no {mark}"}, {"id": second["id"], "rating": 3}]
        await alice.http.patch("/movies/bulk", json=edits)
        assert (await watcher.expect("update_bulk"))["data"]["count"] == 1
        left = await watcher.expect("delete_bulk")
        assert (left["data"]["ids"], left["reason"]) == ([first["id"]], "filter")
        character = await alice.http.post("/characters", json={"name": "x", "description": f"cafés {mark}"})
        await watcher.expect("add", "characters")
        await alice.http.delete(f"/movies/{second['id']}")
        gone = await watcher.expect("delete")

        async with service.watch() as late:
            resumed = wanted | {"since": await service.position(left["seq"]), "as": "found"}
            await subscribed(late, **resumed)
            assert (await late.expect("add", "characters"))["data"] == character.json()
            assert (await late.expect("delete"))["seq"] == gone["seq"]

        # Words without letters or digits restrict nothing.
        await subscribed(watcher, topics=["jobs"], q='"*: - \u0301', **{"as": "jobs"})
        for topics, text, loc in ((["jobs", "movies"], "a", ["q"]), (["movies"], "a b c d e f g h i", ["q"])):
            reply = await watcher.ask({"id": 1, "action": "subscribe", "topics": topics, "q": text})
            assert (reply["ok"], reply["error"]["detail"][0]["loc"]) == (False, loc)


async def test_a_filtered_row_enters_changes_and_leaves(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher:
        wanted = {"genre": "Noir", "rating": {"gte": 50}, "user_id": alice.id}
        await subscribed(watcher, topics=["movies"], filter=wanted)
        movie = await alice.add(genres=["Noir"], rating=10)
        await alice.http.patch(f"/movies/{movie['id']}", json={"title": "still out"})
        answer = await alice.http.patch(f"/movies/{movie['id']}", json={"rating": 60})
        assert "changed" not in await watcher.sees(answer.json())
        await alice.http.patch(f"/movies/{movie['id']}", json={"title": "in"})
        assert (await watcher.expect("update"))["changed"] == ["title"]
        await alice.http.patch(f"/movies/{movie['id']}", json={"genres": ["Western"]})
        left = await watcher.expect("delete")
        assert (left["data"], left["reason"]) == ({"id": movie["id"]}, "filter")
        await alice.http.delete(f"/movies/{movie['id']}")
        other = await alice.add(genres=["Drama", "Noir"], rating=99)
        await watcher.sees(other)
        await alice.http.delete(f"/movies/{other['id']}")
        gone = await watcher.expect("delete")
        assert gone["data"] == {"id": other["id"]}
        assert "reason" not in gone
        await silent(watcher)


async def test_a_bulk_event_is_filtered_row_by_row(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher:
        await subscribed(watcher, topics=["movies"], filter={"rating": {"gte": 50}, "user_id": alice.id})
        rows = [{"title": f"m{n}", "rating": n * 10 + 5} for n in range(10)]
        movies = await alice.add_bulk(rows)
        event = await watcher.expect("add_bulk")
        assert event["data"] == {"count": 5, "items": movies[5:]}
        ids = [movie["id"] for movie in movies]
        edits = [
            {"id": ids[0], "rating": 90},  # the row enters the filter
            {"id": ids[1], "rating": 11},  # the row stays outside the filter
            {"id": ids[7], "rating": 99},  # the row stays inside the filter
            {"id": ids[8], "rating": 1},  # the row leaves the filter
        ]
        updated = (await alice.http.patch("/movies/bulk", json=edits)).json()["updated"]
        parts = [await watcher.next() for _ in range(3)]
        assert [part["operation"] for part in parts] == ["add_bulk", "update_bulk", "delete_bulk"]
        assert [part.get("more", False) for part in parts] == [True, True, False]
        assert len({part["seq"] for part in parts}) == 1
        assert [part.get("reason") for part in parts] == [None, None, "filter"]
        assert parts[0]["data"] == {"count": 1, "items": [updated[0]]}
        assert parts[1]["data"] == {"count": 1, "items": [updated[2]]}
        assert parts[2]["data"] == {"count": 1, "ids": [ids[8]]}
        await alice.delete_bulk(ids)
        event = await watcher.expect("delete_bulk")
        assert event["data"] == {"count": 5, "ids": [ids[0], ids[5], ids[6], ids[7], ids[9]]}
        assert "reason" not in event
        await silent(watcher)


async def test_groups_of_conditions_are_alternatives(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher:
        wanted = {"user_id": alice.id, "or": [{"title": {"prefix": "the "}}, {"rating": {"in": [1, 2]}}]}
        await subscribed(watcher, topics=["movies"], filter=wanted)
        await alice.add(title="A", rating=3)
        await watcher.sees(await alice.add(title="The Third Man"))
        await watcher.sees(await alice.add(title="B", rating=2))


def apply_strictly(view: dict[int, Any], event: dict[str, Any]) -> None:
    """Apply an event to the rows of a snapshot. Assert that it adds only a new row, and changes or deletes
    only an existing one.
    """
    operation, data = event["operation"], event["data"]
    assert operation in ("add", "update", "delete"), event
    assert (data["id"] in view) == (operation != "add"), event
    view[data["id"]] = data
    if operation == "delete":
        del view[data["id"]]


async def listed(person: Person, query: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while True:
        after = rows[-1]["id"] if rows else 0
        page = (await person.http.get(f"/movies?{query}&limit=1000&after={after}")).json()
        rows += page
        if len(page) < 1000:
            return rows


async def test_a_snapshot_of_several_topics_ends_for_each_of_them(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher:
        movie = await alice.add()
        lime = await alice.add("characters", movie_id=movie["id"])
        await subscribed(watcher, topics=["characters", "movies"], filter={"user_id": alice.id}, snapshot=True)
        assert await rows_of(watcher, "characters") == [lime]
        [found] = await rows_of(watcher, "movies")
        assert found == movie | {"characters_count": 1}
        await silent(watcher)


async def test_a_valid_position_resumes_instead_of_a_snapshot(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher:
        welcome = watcher.welcome["data"]
        missed = await alice.add()
        await subscribed(watcher, topics=["movies"], snapshot=True, since=welcome["seq"], epoch=welcome["epoch"])
        await watcher.sees(missed)


@pytest.mark.parametrize("position", [{"since": 1, "epoch": "another"}, {"since": "another:1"}, {"since": 2**40}])
@pytest.mark.parametrize("snapshot", [True, False])
async def test_an_invalid_position_gets_a_resync(service: Service, position: dict[str, Any], snapshot: bool) -> None:
    async with service.person() as alice, service.watch() as watcher:
        movie = await alice.add()
        position = {"epoch": watcher.welcome["data"]["epoch"], **position} if position["since"] == 2**40 else position
        data = await subscribed(watcher, topics=["movies"], filter={"id": movie["id"]}, snapshot=snapshot, **position)
        resync = await watcher.next()
        assert (resync["operation"], resync["subscription"]) == ("resync", data["subscription"])
        assert resync["data"]["seq"] == data["seq"]
        if snapshot:
            assert await rows_of(watcher) == [movie]
        await alice.http.delete(f"/movies/{movie['id']}")
        assert (await watcher.expect("delete"))["data"] == {"id": movie["id"]}


async def test_a_coalesced_subscription_gets_the_newest_state_at_intervals(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher:
        wanted = {"user_id": alice.id}
        await subscribed(watcher, topics=["movies"], filter=wanted, snapshot=True, deliver={"latest_every_ms": 300})
        assert await rows_of(watcher) == []
        started = time.monotonic()
        movie = await alice.add()
        for rating in range(1, 30):
            last = (await alice.http.patch(f"/movies/{movie['id']}", json={"rating": rating})).json()
        view: dict[int, Any] = {}
        count = 0
        while view.get(movie["id"]) != last:
            apply_strictly(view, await watcher.next())
            count += 1
        assert count <= (time.monotonic() - started) / 0.3 + 2, "expected coalesced updates"
        short = await alice.add(title="came and went")
        await alice.http.delete(f"/movies/{short['id']}")
        rows = await alice.add_bulk([{"title": f"m{n}"} for n in range(3)])
        event = await watcher.until(lambda frame: frame["operation"] == "add_bulk")
        assert event["data"] == {"count": 3, "items": rows}


async def test_progress_reaches_named_subscriptions(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher:
        await subscribed(watcher, topics=["jobs"], filter={"user_id": alice.id})
        job = await alice.generate("movies", 300, "?rate=600&batch_size=50")
        frame = await watcher.until(lambda frame: frame["operation"] == "progress")
        assert (frame["subscription"], frame["data"]["id"]) == ("s1", job["id"])
        await alice.job_ended(job["id"])  # wait for the job, because other tests watch the same service


@pytest.mark.parametrize(
    ("message", "code", "loc"),
    [
        ({"topics": ["planets"]}, "invalid_message", ["topics", 0]),
        ({"topics": ["movies"], "filter": {"planet": 1}}, "invalid_filter", ["filter", "planet"]),
        ({"topics": ["movies"], "filter": {"rating": {"gte": "x"}}}, "invalid_filter", ["filter", "rating", "gte"]),
        ({"topics": ["movies", "characters"], "filter": {"genre": "x"}}, "invalid_filter", ["filter", "genre"]),
        ({"deliver": {"latest_every_ms": 1}}, "invalid_message", ["deliver", "latest_every_ms"]),
    ],
)
@SQLITE_ONLY
async def test_an_invalid_subscription_is_refused_and_the_stream_goes_on(
    service: Service, message: dict[str, Any], code: str, loc: list[Any]
) -> None:
    """Other kinds of invalid messages are tested in `test_asyncapi`."""
    async with service.person() as alice, service.watch() as watcher:
        reply = await watcher.ask({"id": 1, "action": "subscribe", **message})
        assert (reply["ok"], reply["error"]["code"]) == (False, code)
        assert loc in [problem["loc"] for problem in reply["error"]["detail"]]
        await watcher.sees(await alice.add())  # the default subscription continues


@SQLITE_ONLY
async def test_names_are_unique_and_the_number_of_subscriptions_is_limited(service: Service) -> None:
    async with service.watch() as watcher:
        await subscribed(watcher, **{"as": "mine"})
        reply = await watcher.ask({"id": 1, "action": "subscribe", "as": "mine"})
        assert reply["error"]["code"] == "name_taken"
        for _ in range(31):
            await subscribed(watcher)
        reply = await watcher.ask({"id": 2, "action": "subscribe"})
        assert reply["error"]["code"] == "too_many_subscriptions"
        reply = await watcher.ask({"id": 3, "action": "unsubscribe", "subscription": "unknown"})
        assert reply["error"]["code"] == "unknown_subscription"


async def test_restricted_topics_need_the_right_to_see_them(service: Service) -> None:
    async with service.person() as alice, service.admin() as admin, service.watch() as watcher:
        for topic, action in itertools.product(("users", "sessions"), ("subscribe", "presence")):
            reply = await watcher.ask({"id": 1, "action": action, "topics": ["movies", topic]})
            assert (reply["ok"], reply["error"]["code"]) == (False, "forbidden")
        assert (await watcher.ask({"id": 2, "action": "auth", "token": alice.token}))["ok"]
        for action, topic in (("subscribe", "users"), ("presence", "users"), ("presence", "sessions")):
            reply = await watcher.ask({"id": 3, "action": action, "topics": [topic]})
            assert reply["error"]["code"] == "forbidden"
        await subscribed(watcher, topics=["sessions"], snapshot=True)
        [session] = await rows_of(watcher, "sessions")
        assert session["user_id"] == alice.id
        async with service.watch(**signed_in(admin)) as theirs:
            await subscribed(theirs, topics=["users"], snapshot=True)
            users = await rows_of(theirs, "users")
            assert alice.id in {user["id"] for user in users}
            assert not {"password_hash", "username_key", "email_key"} & users[0].keys()


async def test_a_large_snapshot_delays_no_other_client(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as alice, service.watch() as live, service.watch(max_queue=1) as slow:
        await alice.generated("movies", 30_000)
        await subscribed(slow, topics=["movies"], snapshot=True)
        first = await slow.next()
        movie = await alice.add(title="while the snapshot waits")
        await live.until(lambda frame: frame.get("data") == movie)
        await alice.http.request("DELETE", "/movies/bulk/1/10000")
        rows = len(first["data"]["items"])
        while True:
            frame = await slow.next()
            if frame["operation"] != "snapshot":
                break
            rows += len(frame["data"]["items"])
        assert rows == 30_000, "expected the rows as of the number in the reply"
        assert frame["data"] == movie
        await bulk_rows(slow, 10_000, "delete_bulk")


async def test_a_replaced_log_sends_the_snapshot_again(new_service: Callable[..., Service]) -> None:
    service = new_service().start()
    async with service.person() as alice, service.watch() as watcher:
        movie = await alice.add()
        await subscribed(watcher, topics=["movies"], snapshot=True)
        assert await rows_of(watcher) == [movie]
        epoch = await renew_epoch(service)
        resync = await watcher.next()
        assert (resync["operation"], resync["data"]["epoch"], resync["subscription"]) == ("resync", epoch, "s1")
        assert await rows_of(watcher) == [movie]
        await watcher.sees(await alice.add())


async def test_a_slow_reader_with_a_filter_catches_up_from_the_log(service: Service) -> None:
    async with service.person() as alice, service.watch(max_queue=1) as watcher:
        await subscribed(watcher, topics=["movies"], filter={"user_id": alice.id, "rating": {"gte": 50}})
        rows = [{"title": "x", "description": "y" * 2_000, "rating": n % 100 + 1} for n in range(1_000)]
        for _ in range(6):
            await alice.add_bulk(rows)
        wanted = await listed(alice, f"user_id={alice.id}&rating[gte]=50")
        seen: list[dict[str, Any]] = []
        while len(seen) < len(wanted):
            seen += (await watcher.expect("add_bulk"))["data"]["items"]
        assert seen == wanted
        await silent(watcher)


@SQLITE_ONLY
async def test_a_filter_with_thousands_of_mistakes_gets_a_short_reply(service: Service) -> None:
    async with service.watch() as watcher:
        wrong = {"or": [{f"field{n}": 1 for n in range(400)} for _ in range(20)]}
        reply = await watcher.ask({"id": 1, "action": "subscribe", "topics": ["movies"], "filter": wrong})
        assert reply["error"]["code"] == "invalid_filter"
        assert 1 <= len(reply["error"]["detail"]) <= 100
