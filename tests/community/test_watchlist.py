"""Watchlists: private entries about movies, which only their owner reads, changes and watches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from core.errors import Conflict
from core.identity import Group, Identity
from repository.community import watchlist
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import dependants, writes
from repository.generic.dependants import TooManyDependants
from resources.movies import MOVIES
from tests.support import accounts
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, ok
from tests.support.resources import links, locations, nothing_written, sql
from tests.support.service import Person, Service
from tests.support.sockets import request, rows_of, signed_in, subscribed

Row = dict[str, Any]


async def listed(person: Person, movie: Row, **fields: Any) -> Row:
    """Add a movie to the person's watchlist, and return the entry."""
    found: Row = await ok(person.http.post("/watchlist", json={"movie_id": movie["id"], **fields}), 201)
    return found


async def test_an_entry_is_seen_live_by_its_owner_alone(service: Service) -> None:
    async with service.admin() as chief, service.person() as alice, service.person() as bob:
        movie, other = await alice.add(), await bob.add()
        async with (
            service.watch("topics=watchlist", **signed_in(alice)) as watcher,
            service.watch("topics=watchlist", **signed_in(bob)) as his,
            service.watch("topics=watchlist,audit", **signed_in(chief)) as staff,
        ):
            answer = await alice.http.post("/watchlist", json={"movie_id": movie["id"], "notes": "With Anna"})
            assert answer.status_code == 201
            entry = answer.json()
            times = dict.fromkeys(("created_at", "updated_at"), entry["created_at"])
            rest = {"status": "planned", "notes": "With Anna", "watched_at": None, "version": 1}
            assert entry == {"id": entry["id"], "movie_id": movie["id"], "user_id": alice.id, **rest, **times}
            one = answer.headers["location"]
            assert one == f"/watchlist/{entry['id']}"
            await watcher.sees(entry)
            assert answer.headers["stream-position"].endswith(f":{watcher.seqs[-1]}")

            seen = await alice.http.patch(one, json={"status": "watched"})
            assert seen.json() == entry | {
                "status": "watched",
                "watched_at": seen.json()["updated_at"],
                "version": 2,
                "updated_at": seen.json()["updated_at"],
            }
            event = await watcher.expect("update", "watchlist")
            assert (event["data"], sorted(event["changed"])) == (seen.json(), ["status", "watched_at"])
            noted = await ok(alice.http.patch(one, json={"notes": None}))
            assert (noted["watched_at"], noted["version"]) == (seen.json()["watched_at"], 3)
            assert (await watcher.expect("update", "watchlist"))["changed"] == ["notes"]
            async with nothing_written(service):
                assert await ok(alice.http.patch(one, json={"status": "watched"})) == noted
            replaced = await ok(alice.http.put(one, json={"movie_id": other["id"]}))
            assert (replaced["movie_id"], replaced["status"], replaced["watched_at"]) == (other["id"], "planned", None)
            changed = (await watcher.expect("update", "watchlist"))["changed"]
            assert sorted(changed) == ["movie_id", "status", "watched_at"]
            assert (await alice.http.delete(one)).status_code == 204
            assert (await watcher.expect("delete", "watchlist"))["data"] == {"id": entry["id"]}

            # The next event that the others receive is one of their own.
            for person, theirs in ((bob, his), (chief, staff)):
                await theirs.sees(await listed(person, movie))


async def test_an_entry_of_another_user_does_not_exist(service: Service) -> None:
    async with service.admin() as chief, service.person() as alice, service.anyone() as anonymous:
        movie = await alice.add()
        position = (await chief.http.get("/movies/count")).headers["stream-position"]
        await listed(chief, movie)
        one = f"/watchlist/{(await listed(alice, movie))['id']}"
        requests: list[tuple[str, Any]] = [
            ("GET", None),
            ("PUT", {"movie_id": movie["id"]}),
            ("PATCH", {"status": "dropped"}),
            ("DELETE", None),
        ]
        async with nothing_written(service):
            for method, body in requests:
                answer = await chief.http.request(method, one, json=body)
                assert_problem(answer, 404)
                missing = await chief.http.request(method, f"/watchlist/{2**40}", json=body)
                assert missing.json()["detail"] == answer.json()["detail"].replace(one.rpartition("/")[2], str(2**40))
                assert (await anonymous.request(method, one, json=body)).status_code == 401
            assert (await anonymous.get("/watchlist")).status_code == 401
            assert len(await ok(chief.http.get(f"/watchlist?movie_id={movie['id']}"))) == 1
            async with service.watch() as watcher:
                reply = await watcher.ask({"id": 1, "action": "subscribe", "topics": ["watchlist"]})
                assert (reply["ok"], reply["error"]["code"]) == (False, "forbidden")
        page = await ok(chief.http.get(f"/events?topics=watchlist&limit=1000&after={position}"))
        assert {frame["actor_id"] for frame in page["data"]} == {chief.id}


async def test_the_conventions_of_all_entities_hold(service: Service) -> None:
    async with service.person() as alice:
        movie, other = await alice.add(), await alice.add()
        body, key = {"movie_id": movie["id"]}, {"Idempotency-Key": "once"}
        first, again = [await alice.http.post("/watchlist", json=body, headers=key) for _ in range(2)]
        assert (again.status_code, again.json(), again.headers["idempotency-replayed"]) == (201, first.json(), "true")
        one = first.headers["location"]
        found = await alice.http.get(one)
        assert (found.json(), found.headers["etag"]) == (first.json(), first.headers["etag"])
        known = {"If-None-Match": found.headers["etag"]}
        assert (await alice.http.get(one, headers=known)).status_code == 304
        assert await ok(alice.http.get(f"{one}?fields=status,id")) == {"id": first.json()["id"], "status": "planned"}
        merged = {"Content-Type": "application/merge-patch+json", "If-Match": found.headers["etag"]}
        assert (await alice.http.patch(one, content=b'{"notes":"x"}', headers=merged)).status_code == 200
        second = await listed(alice, other)
        async with nothing_written(service):
            for answer in (
                await alice.http.patch(one, content=b'{"notes":"y"}', headers=merged),
                await alice.http.delete(one, headers={"If-Match": found.headers["etag"]}),
            ):
                assert answer.status_code == 412
            for answer, kind in (
                (await alice.http.post("/watchlist", json=body), "taken"),
                (await alice.http.post("/watchlist", json={"movie_id": 2**40}), "unknown_movie"),
                (await alice.http.patch(f"/watchlist/{second['id']}", json=body), "taken"),
                (await alice.http.put(one, json={"movie_id": 2**40}), "unknown_movie"),
            ):
                assert_problem(answer, 409, ["body", "movie_id"])
                assert answer.json()["detail"][0]["type"] == kind
        # Of several requests at once, one adds the movie.
        third = await alice.add()
        answers = await asyncio.gather(
            *(alice.http.post("/watchlist", json={"movie_id": third["id"]}) for _ in range(5))
        )
        assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409]


@SQLITE_ONLY
async def test_invalid_requests_name_every_problem(service: Service) -> None:
    async with service.person() as alice, nothing_written(service):
        bad = {"movie_id": "7", "status": "seen", "notes": "x" * 1_001, "stars": 5}
        answer = await alice.http.post("/watchlist?x=1", json=bad)
        names = ("movie_id", "status", "notes", "stars")
        assert sorted(locations(answer)) == sorted([*(["body", name] for name in names), ["query", "x"]])
        assert_problem(await alice.http.post("/watchlist", json={}), 422, ["body", "movie_id"])
        for body in ({"status": None}, {"movie_id": None}, {"status": "Planned"}, {"watched_at": 5}):
            assert_problem(await alice.http.patch("/watchlist/1", json=body), 422, ["body", next(iter(body))])
        answer = await alice.http.get("/watchlist?status=seen&sort=-state&status[in]=planned,x&limit=x")
        assert {loc[1] for loc in locations(answer)} == {"status", "sort", "status[in]", "limit"}


async def test_a_watchlist_is_filtered_searched_sorted_and_walked(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        titles = ("The Third Man", "Touch of Evil", "Odd Man Out", "M")
        movies = [await bob.add(title=title) for title in titles]
        notes = ("a third viewing", None, "MAN overboard", "50% évil")
        states = ("watched", "planned", "watching", "planned")
        entries = [
            await listed(alice, movie, notes=note, status=status)
            for movie, note, status in zip(movies, notes, states, strict=True)
        ]
        await listed(bob, movies[0], notes="evil man")
        for query, places in (
            ("", [0, 1, 2, 3]),
            ("status=planned", [1, 3]),
            ("status[in]=watched,watching&sort=-id", [2, 0]),
            ('filter={"or":[{"status":"watching"},{"notes":{"contains":"VIEW"}}]}', [0, 2]),
            ("q=man", [0, 2]),
            ("q=third+MAN+viewing", [0]),
            ("q=évil", [3]),
            ("q=evil", [1]),
            ("q=man&status=watching", [2]),
            ("sort=-status,id", [2, 0, 1, 3]),
            ("sort=watched_at,-id", [0, 3, 2, 1]),
            (f"movie_id={movies[3]['id']}", [3]),
            ("offset=1&limit=2", [1, 2]),
        ):
            answer = await alice.http.get(f"/watchlist?{query}")
            assert answer.json() == [entries[place] for place in places], query
            assert answer.headers["stream-position"]
            if "limit" not in query:
                assert answer.headers["x-total-count"] == str(len(places))
        walked, url = [], "/watchlist?sort=-status&limit=1&fields=id"
        while url:
            page = await alice.http.get(url)
            walked += [row["id"] for row in page.json()]
            url = links(page).get("next", "")
        assert walked == [entries[place]["id"] for place in (2, 0, 1, 3)]


async def test_a_snapshot_and_a_resumed_stream_have_only_the_owners_entries(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        movies = [await alice.add() for _ in range(3)]
        mine = [await listed(alice, movie) for movie in movies[:2]]
        await listed(bob, movies[0])
        async with service.watch(**signed_in(alice)) as watcher:
            data = await subscribed(watcher, topics=["watchlist"], snapshot=True)
            assert await rows_of(watcher, "watchlist") == mine
            position = f"{watcher.welcome['data']['epoch']}:{data['seq']}"
            # The whole API works on the socket, too.
            reply = await request(watcher, "PATCH", f"/watchlist/{mine[0]['id']}", body={"status": "dropped"})
            assert reply["status"] == 200
        await listed(bob, movies[1])
        last = await listed(alice, movies[2])
        async with service.watch(**signed_in(alice)) as resumed:
            await subscribed(resumed, topics=["watchlist"], filter={"status": "planned"}, since=position)
            gone = await resumed.expect("delete", "watchlist")
            assert (gone["data"], gone["reason"]) == ({"id": mine[0]["id"]}, "filter")
            await resumed.sees(last)


async def test_a_deleted_movie_leaves_every_watchlist_with_one_event_for_each_owner(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        movies = [await alice.add() for _ in range(4)]
        first = await listed(bob, movies[0], notes="n")
        ids = [(await listed(bob, movie))["id"] for movie in movies[1:3]]
        hers = await listed(alice, movies[1])
        kept = await listed(bob, movies[3])
        await ok(bob.http.post(f"/movies/{movies[1]['id']}/ratings", json={"score": 3}), 201)
        async with (
            service.watch("topics=watchlist,movies", **signed_in(bob)) as his,
            service.watch("topics=watchlist,ratings", **signed_in(alice)) as watcher,
        ):
            assert (await alice.http.delete(f"/movies/{movies[0]['id']}")).status_code == 204
            gone = await his.expect("delete", "watchlist")
            assert (gone["data"], gone["actor_id"]) == ({"id": first["id"]}, alice.id)
            await his.expect("delete", "movies")
            await alice.delete_bulk([movie["id"] for movie in movies[1:3]])
            assert (await his.expect("delete_bulk", "watchlist"))["data"] == {"count": 2, "ids": ids}
            await his.expect("delete_bulk", "movies")
            assert (await watcher.expect("delete", "ratings"))["data"]["id"] > 0
            assert (await watcher.expect("delete", "watchlist"))["data"] == {"id": hers["id"]}
        assert await ok(bob.http.get("/watchlist")) == [kept]
        assert await ok(alice.http.get("/watchlist")) == []


async def test_a_deleted_account_takes_its_watchlist_along(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        movie = await alice.add()
        await listed(alice, movie)
        await listed(bob, movie)
        assert (await bob.http.delete("/users/me")).status_code == 204
        stored = await sql(service, f"SELECT user_id FROM watchlist WHERE movie_id = {movie['id']}")
        assert stored == [(alice.id,)]


async def test_only_watched_movies_can_be_rated_if_the_setting_says_so(new_service: Callable[..., Service]) -> None:
    service = new_service(RATINGS_REQUIRE_WATCHED="True").start()
    async with service.person() as alice, service.admin() as chief:
        movie = await alice.add()
        path = f"/movies/{movie['id']}/ratings"
        assert_problem(await alice.http.post(path, json={"score": 7}), 403)
        entry = f"/watchlist/{(await listed(alice, movie, status='watching'))['id']}"
        await listed(chief, movie, status="watched")
        async with nothing_written(service):
            answer = await alice.http.post(path, json={"score": 7})
            assert_problem(answer, 403)
            assert "watchlist" in answer.json()["detail"]
            assert (await alice.http.post(f"/movies/{2**40}/ratings", json={"score": 7})).status_code == 404
        await ok(alice.http.patch(entry, json={"status": "watched"}))
        rating = await ok(alice.http.post(path, json={"score": 7}), 201)
        one = f"/ratings/{rating['id']}"
        await ok(alice.http.patch(one, json={"score": 8}))
        await ok(alice.http.patch(entry, json={"status": "dropped"}))
        async with nothing_written(service):
            assert_problem(await alice.http.post(path, json={"score": 9}), 403)
            assert_problem(await alice.http.patch(one, json={"score": 9}), 403)
        await ok(chief.http.patch(one, json={"score": 1}))  # moderation
        assert (await alice.http.delete(one)).status_code == 204


async def test_watchlists_and_what_a_deletion_takes_along_are_bounded(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchlist, "MAX_ENTRIES", 2)
    monkeypatch.setattr(dependants, "MAX_DEPENDANTS", 3)
    users = [await accounts.account(database, f"holly{number}") for number in range(2)]

    async def movies(tx: Transaction) -> list[int]:
        rows = [{"title": "M", "languages": [], "genres": []} for _ in range(3)]
        await writes.store(tx, MOVIES, rows, None)
        return [1, 2, 3]

    ids = await database.write(movies)

    async def add(user_id: int, movie_id: int) -> Any:
        identity = Identity(user_id, Group.USER, time.time() + 60, "", None)
        work = database.write(lambda tx: watchlist.add(tx, identity, {"movie_id": movie_id, "status": "planned"}))
        found = await accounts.outcome(work)
        return found if isinstance(found, type) else None

    assert [await add(users[0], movie) for movie in ids] == [None, None, Conflict]
    assert [await add(users[1], movie) for movie in ids[:2]] == [None, None]
    admin = Identity(users[0], Group.ADMIN, time.time() + 60, "", None)

    async def remove(movie_ids: list[int]) -> Any:
        return await accounts.outcome(database.write(lambda tx: writes.remove_bulk(tx, MOVIES, admin, movie_ids)))

    assert await remove(ids) is TooManyDependants
    assert (await remove(ids[:1])).done == ids[:1]
