"""Comments: trees with exact counts, deleted comments that keep their place, rights, and what watchers see."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import text

from core.errors import Conflict
from core.identity import Group, Identity
from core.times import utc_now
from repository.community import comment_trees, comments
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import dependants, relations, rows, writes
from repository.generic.lists import ListRequest
from resources.comments import COMMENTS
from resources.movies import MOVIES
from tests.conftest import Places
from tests.support import accounts
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, ok, over_socket, values_by_field
from tests.support.resources import TIME, head, links, moderator, nothing_written, sql, watching
from tests.support.service import Person, Service, several_services
from tests.support.sockets import rows_of, subscribed
from tests.support.statements import plan_of, statements

Row = dict[str, Any]


async def comment(person: Person, movie: Row, words: str = "Splendid") -> Row:
    found: Row = await ok(person.http.post(f"/movies/{movie['id']}/comments", json={"text": words}), 201)
    return found


async def reply(person: Person, above: Row, words: str = "Indeed") -> Row:
    found: Row = await ok(person.http.post(f"/comments/{above['id']}/replies", json={"text": words}), 201)
    return found


async def delete(person: Person, row: Row) -> None:
    answer = await person.http.delete(f"/comments/{row['id']}")
    assert answer.status_code == 204, answer.text


def shape(trees: list[Row]) -> list[Any]:
    """Return the ids of trees, each with the shapes of its replies."""
    return [(tree["id"], shape(tree["replies"])) if tree["replies"] else tree["id"] for tree in trees]


# --- one comment


async def test_watchers_see_a_comment_added_answered_and_edited(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, service.anyone() as reader:
        movie = await alice.add()
        async with watching(service) as watcher:
            answer = await bob.http.post(f"/api/v1/movies/{movie['id']}/comments", json={"text": "Splendid\nfilm"})
            first = answer.json()
            path = f"/comments/{first['id']}"
            assert (answer.status_code, answer.headers["location"]) == (201, f"/api/v1{path}")
            times = dict.fromkeys(("created_at", "updated_at"), first["created_at"])
            of_movie = {"user_id": bob.id, "movie_id": movie["id"], "parent_id": None, "depth": 0}
            rest = {"deleted": False, "edited_at": None, "replies_count": 0, "version": 1}
            assert first == {"id": first["id"], "text": "Splendid\nfilm", **of_movie, **rest, **times}
            assert (await watcher.expect("add", "comments"))["data"] == first
            counted = await watcher.expect("update", "movies")
            assert (counted["data"], counted["changed"]) == (movie | {"comments_count": 1}, ["comments_count"])
            assert answer.headers["stream-position"].endswith(f":{counted['seq']}")
            read = await reader.get(path)
            assert (read.json(), read.headers["etag"]) == (first, answer.headers["etag"])
            assert (await reader.get(path, headers={"If-None-Match": read.headers["etag"]})).status_code == 304

            second = await reply(alice, first)
            assert (second["parent_id"], second["movie_id"], second["depth"]) == (first["id"], movie["id"], 1)
            assert (await watcher.expect("add", "comments"))["data"] == second
            first["replies_count"] = 1
            answered = await watcher.expect("update", "comments")
            assert (answered["data"], answered["changed"]) == (first, ["replies_count"])
            assert (await watcher.expect("update", "movies"))["data"] == movie | {"comments_count": 2}

            merge_patch = {"Content-Type": "application/merge-patch+json", "If-Match": read.headers["etag"]}
            edited = await ok(bob.http.patch(path, content=b'{"text": "Superb"}', headers=merge_patch))
            assert (edited["text"], edited["version"], edited["edited_at"]) == ("Superb", 2, edited["updated_at"])
            assert TIME.match(edited["edited_at"])
            seen = await watcher.expect("update", "comments")
            assert (seen["data"], seen["changed"]) == (edited, ["text", "edited_at"])
            async with nothing_written(service):
                assert await ok(bob.http.put(path, json={"text": "Superb"})) == edited
                for method in ("PUT", "PATCH", "DELETE"):
                    body = {"text": "Again"} if method != "DELETE" else None
                    stale = await bob.http.request(method, path, headers={"If-Match": read.headers["etag"]}, json=body)
                    assert stale.status_code == 412
        kept = {name: edited[name] for name in ("id", "edited_at")}
        assert await ok(reader.get(f"{path}?fields=edited_at,id")) == kept


INVALID: dict[str, list[Any]] = {
    "text": ["", "x", " \u200b", "\n\n", "a\0", "x" * 10_001, "e\u0301", None, 5, ["xy"]],
    "movie_id": [1],
    "titel": ["xy"],
}


@SQLITE_ONLY
async def test_invalid_comments_are_refused_with_every_problem(service: Service) -> None:
    async with service.person() as alice, service.anyone() as anonymous:
        movie = await alice.add()
        first = await comment(alice, movie, "é!" + "x" * 9_998)
        places = [f"/movies/{movie['id']}/comments", f"/comments/{first['id']}/replies", f"/comments/{first['id']}"]
        async with nothing_written(service):
            for name, value in values_by_field(INVALID):
                for method, path in zip(("POST", "POST", "PUT"), places, strict=True):
                    answer = await alice.http.request(method, path, json={"text": "fine", name: value})
                    assert_problem(answer, 422, ["body", name])
            assert_problem(await alice.http.post(places[0], json={"t": 1}), 422, ["body", "text"], ["body", "t"])
            assert_problem(await alice.http.post("/movies/x/comments", json={}), 422, ["path", "id"], ["body", "text"])
            for path in ("/movies/9999999/comments", "/comments/9999999/replies"):
                assert (await anonymous.get(path)).status_code == 404
                assert_problem(await alice.http.post(path, json={"text": "fine"}), 404)
                assert_problem(await anonymous.post(path, json={"text": "fine"}), 401)
            for method in ("PUT", "PATCH", "DELETE"):
                body = {"text": "fine"} if method != "DELETE" else None
                assert_problem(await alice.http.request(method, "/comments/9999999", json=body), 404)
            assert_problem(await anonymous.get(f"{places[0]}?sort=titel&limit=x&txt=1"), 422)


async def test_a_repeated_comment_is_stored_once(service: Service) -> None:
    async with service.person() as alice:
        path, key = f"/movies/{(await alice.add())['id']}/comments", {"Idempotency-Key": "k1"}
        first, again = [await alice.http.post(path, json={"text": "Once"}, headers=key) for _ in range(2)]
        assert (again.json(), again.headers["idempotency-replayed"]) == (first.json(), "true")
        assert again.headers["stream-position"] == first.headers["stream-position"]
        assert_problem(await alice.http.post(path, json={"text": "Twice"}, headers=key), 422)
        assert (await alice.http.get(path)).headers["x-total-count"] == "1"


async def test_only_authors_and_staff_change_comments_and_staff_leave_an_audit_entry(service: Service) -> None:
    async with service.admin() as chief, service.person() as alice, service.person() as bob, moderator(service) as mona:
        movie = await bob.add()
        hers, other, own = await comment(alice, movie), await comment(alice, movie), await comment(mona, movie)
        path = f"/comments/{hers['id']}"
        async with nothing_written(service):
            for request in (
                bob.http.patch(path, json={"text": "Mine"}),
                bob.http.put(path, json={"text": "Mine"}),
                bob.http.delete(path),
                bob.http.request("DELETE", "/comments/bulk", json={"ids": [hers["id"]]}),
            ):
                assert_problem(await request, 403)
        await ok(mona.http.patch(path, json={"text": "Moderated"}))
        await ok(mona.http.patch(f"/comments/{own['id']}", json={"text": "Mine"}))
        await delete(mona, hers)
        deleted = await ok(mona.http.delete(f"/comments/bulk/{hers['id']}/{own['id']}"))
        assert deleted == {"deleted": [other["id"], own["id"]], "not_found": [hers["id"]]}
        trail = await ok(chief.http.get(f"/admin/audit?actor_id={mona.id}&sort=id"))
        assert [(each["action"], each["resource"], each["user_id"], each["entity_ids"]) for each in trail] == [
            ("update", "comments", alice.id, [hers["id"]]),
            ("delete", "comments", alice.id, [hers["id"]]),
            ("delete", "comments", alice.id, [other["id"]]),
        ]
        assert trail[0]["changes"] == {"text": []}
        last = await comment(alice, movie)
        assert (await alice.http.request("DELETE", "/users/me")).status_code == 204
        assert await ok(bob.http.get(f"/comments/{last['id']}")) == last


# --- deleted comments


async def test_a_deleted_comment_keeps_its_place_until_its_last_reply_goes(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        movie = await alice.add()
        top = await comment(alice, movie)
        middle = await reply(bob, top)
        leaf, twin = await reply(alice, middle), await reply(bob, middle)
        async with watching(service) as watcher:
            await delete(bob, middle)
            kept = await ok(alice.http.get(f"/comments/{middle['id']}"))
            gone = {"text": None, "user_id": None, "deleted": True}
            assert kept == {**middle, **gone, "replies_count": 2, "version": 2, "updated_at": kept["updated_at"]}
            seen = await watcher.expect("update", "comments")
            assert (seen["data"], seen["changed"]) == (kept, ["text", "user_id", "deleted"])
            await delete(alice, top)
            assert (await watcher.expect("update", "comments"))["data"]["deleted"]
            async with nothing_written(service):
                for person in (alice, bob):
                    assert_problem(await person.http.delete(f"/comments/{middle['id']}"), 409)
                    assert_problem(await person.http.patch(f"/comments/{middle['id']}", json={"text": "Back"}), 409)
                    assert_problem(await person.http.post(f"/comments/{top['id']}/replies", json={"text": "Late"}), 409)
            trees = await ok(alice.http.get(f"/movies/{movie['id']}/comments"))
            assert shape(trees) == [(top["id"], [(middle["id"], [leaf["id"], twin["id"]])])]
            assert (await ok(alice.http.get(f"/movies/{movie['id']}")))["comments_count"] == 4

            await delete(alice, leaf)
            assert (await watcher.expect("delete", "comments"))["data"] == {"id": leaf["id"]}
            assert (await watcher.expect("update", "comments"))["data"] == kept | {"replies_count": 1}
            assert (await watcher.expect("update", "movies"))["data"] == movie | {"comments_count": 3}
            await delete(bob, twin)
            removed = [top["id"], middle["id"], twin["id"]]
            assert (await watcher.expect("delete_bulk", "comments"))["data"] == {"count": 3, "ids": removed}
            assert (await watcher.expect("update", "movies"))["data"] == movie
        for row in (top, middle, leaf, twin):
            assert (await alice.http.get(f"/comments/{row['id']}")).status_code == 404


async def test_comments_deleted_in_bulk_keep_their_places_where_others_replied(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, watching(service) as watcher:
        movie, empty = await alice.add(), await alice.add()
        first, second = await comment(alice, movie), await comment(alice, empty)
        below = await reply(alice, first)
        deepest, foreign = await reply(alice, below), await reply(bob, first)
        await watcher.until(lambda frame: frame.get("data", {}).get("comments_count") == 4)
        ids = [second["id"], below["id"], first["id"], deepest["id"], 9_999_999]
        deleted = await ok(alice.http.request("DELETE", "/comments/bulk", json={"ids": ids}))
        assert deleted == {"deleted": ids[:4], "not_found": ids[4:]}
        removed = await watcher.expect("delete_bulk", "comments")
        assert removed["data"]["ids"] == sorted([second["id"], below["id"], deepest["id"]])
        kept = await watcher.expect("update", "comments")
        assert (kept["data"]["id"], kept["changed"]) == (first["id"], ["text", "user_id", "deleted", "replies_count"])
        movies = (await watcher.expect("update_bulk", "movies"))["data"]["items"]
        assert [row["comments_count"] for row in movies] == [2, 0]
        trees = await ok(alice.http.get(f"/movies/{movie['id']}/comments"))
        assert shape(trees) == [(first["id"], [foreign["id"]])]


async def test_a_movie_takes_its_comments_with_it(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, watching(service, "topics=comments") as watcher:
        movies = [await alice.add() for _ in range(3)]
        top = await comment(bob, movies[0])
        replies = [await reply(alice, top) for _ in range(3)]
        single = await comment(bob, movies[1])
        last = await comment(bob, movies[2])
        await watcher.until(lambda frame: frame["data"].get("id") == last["id"])
        assert (await alice.http.delete(f"/movies/{movies[1]['id']}")).status_code == 204
        assert (await watcher.expect("delete"))["data"] == {"id": single["id"]}
        await alice.delete_bulk([movies[0]["id"], movies[2]["id"]])
        ids = [top["id"], *(row["id"] for row in replies), last["id"]]
        assert (await watcher.expect("delete_bulk"))["data"] == {"count": 5, "ids": ids}
        listed = ",".join(map(str, (*ids, single["id"])))
        assert await ok(alice.http.get(f"/comments/count?id[in]={listed}")) == {"count": 0}


async def test_a_movie_deleted_while_comments_are_added_leaves_none_behind(service: Service) -> None:
    async with service.person() as alice, service.person() as bob:
        for _ in range(3):
            movie = await alice.add()
            top = await comment(bob, movie)
            answers = await asyncio.gather(
                *(bob.http.post(f"/comments/{top['id']}/replies", json={"text": "Quick"}) for _ in range(4)),
                alice.http.delete(f"/movies/{movie['id']}"),
                *(bob.http.post(f"/movies/{movie['id']}/comments", json={"text": "Quick"}) for _ in range(4)),
            )
            assert answers[4].status_code == 204
            assert {answer.status_code for answer in answers} <= {201, 204, 404}
            assert await ok(alice.http.get(f"/comments/count?movie_id={movie['id']}")) == {"count": 0}


# --- trees and lists


async def test_a_tree_is_cut_where_it_is_deep_or_wide_and_continues_at_its_links(service: Service) -> None:
    async with service.person() as alice, service.anyone() as reader:
        movie = await alice.add()
        tops = [await comment(alice, movie, f"top {number}") for number in range(3)]
        wide = [await reply(alice, tops[0], f"wide {number}") for number in range(7)]
        chain = [tops[1]]
        for number in range(4):
            chain.append(await reply(alice, chain[-1], f"deep {number}"))
        path = f"/api/v1/movies/{movie['id']}/comments"
        found = await reader.get(path)
        first, second, third = found.json()
        assert found.headers["x-total-count"] == "3"
        assert found.headers["stream-position"].endswith(f":{await head(service)}")
        ids = [row["id"] for row in wide]
        assert shape([first]) == [(tops[0]["id"], ids[:5])]
        assert (first["replies_count"], first["replies"][0]["more_replies"], third["replies"]) == (7, None, [])
        rest = await reader.get(first["more_replies"])
        assert first["more_replies"] == f"/api/v1/comments/{first['id']}/replies?after={ids[4]}"
        assert shape(rest.json()) == ids[5:]

        numbers = [row["id"] for row in chain]
        assert shape([second]) == [(numbers[0], [(numbers[1], [numbers[2]])])]
        cut = second["replies"][0]["replies"][0]
        assert (cut["replies"], cut["more_replies"]) == ([], f"/api/v1/comments/{numbers[2]}/replies")
        assert shape(await ok(reader.get(cut["more_replies"]))) == [(numbers[3], [numbers[4]])]

        page = await reader.get(f"{path}?limit=2&sort=-id")
        assert shape(page.json()) == [tops[2]["id"], shape([second])[0]]
        following = await reader.get(links(page)["next"])
        assert shape(following.json()) == shape([first])
        assert "next" not in links(following)
        assert shape(await ok(reader.get(f"{path}?q=TOP%200&replies_count[gte]=1"))) == shape([first])
        assert await ok(reader.get(f"{path}?fields=replies,id&offset=2")) == [{"id": third["id"], "replies": []}]
        assert await ok(reader.get(f"{path}?fields=id&limit=1")) == [{"id": first["id"]}]
        empty = await reader.get(f"{path}?text=nothing")
        assert (empty.json(), empty.headers["x-total-count"]) == ([], "0")

        # The flat list contains every comment, with every convention of lists.
        flat = f"/comments?movie_id={movie['id']}"
        assert [row["id"] for row in await ok(reader.get(f"{flat}&text[prefix]=DEEP&sort=-depth"))] == numbers[:0:-1]
        assert [row["id"] for row in await ok(reader.get(f"{flat}&q=wide&parent_id={tops[0]['id']}"))] == ids
        assert (await reader.get(f"{flat}&depth=0&limit=1")).headers["x-total-count"] == "3"
        for mine in ("/comments/user", f"/comments/username/{alice.name}", f"/users/{alice.id}/comments"):
            assert (await alice.http.get(f"{mine}?limit=1")).headers["x-total-count"] == "14"
        included = await ok(reader.get(f"/movies/{movie['id']}?include=comments"))
        assert included == await ok(reader.get(f"/movies/{movie['id']}")) | {"comments": await ok(reader.get(flat))}
        assert included["comments_count"] == len(included["comments"]) == 14


async def test_comments_are_watched_with_filters_snapshots_and_resume(service: Service) -> None:
    async with (
        service.person() as alice,
        service.person() as bob,
        service.watch(additional_headers=bob.bearer) as watcher,
    ):
        movie, other = await alice.add(), await alice.add()
        top = await comment(alice, movie)
        await comment(alice, other)
        await subscribed(watcher, topics=["comments"], filter={"movie_id": movie["id"]}, snapshot=True)
        assert await rows_of(watcher, "comments") == [top]
        start = await service.position(watcher.events[-1]["seq"])
        await comment(bob, other)
        seen = len(watcher.events)
        answer = await over_socket(watcher, "POST", f"/comments/{top['id']}/replies", {"text": "Indeed"}, 7)
        assert answer["status"] == 201
        mine = answer["body"]
        while len(watcher.events) < seen + 2:
            await watcher.next()
        events = [(one["operation"], one["data"]["id"]) for one in watcher.events[seen:]]
        assert events == [("add", mine["id"]), ("update", top["id"])]
        async with service.watch() as late:
            wanted = {"parent_id": top["id"], "user_id": bob.id}
            await subscribed(late, topics=["comments"], filter=wanted, since=start)
            assert (await late.expect("add", "comments"))["data"] == mine
            await reply(alice, mine)
            assert (await late.expect("update", "comments"))["data"] == mine | {"replies_count": 1}
            await delete(bob, mine)
            # The author of a deleted comment is gone, so the comment no longer matches.
            gone = await late.expect("delete", "comments")
            assert (gone["data"], gone["reason"]) == ({"id": mine["id"]}, "filter")


async def test_a_search_selects_comments_in_lists_trees_and_subscriptions(service: Service) -> None:
    async with service.person() as alice, service.watch() as watcher:
        movie = await alice.add()
        texts = ("A café scene", "Cafe", "No words", "Café again")
        first, second, third, last = [await comment(alice, movie, text) for text in texts]
        answer = await reply(alice, third, "the cafe!")
        mine = f"user_id={alice.id}&fields=id"
        for query, expected in (
            ("cafe", [second, last, answer, first]),
            ("café", [second, last, first, answer]),
            ("caf sc", [first]),
            ("cafe&sort=-id", [answer, last, second, first]),
        ):
            assert await ok(alice.http.get(f"/comments?q={query}&{mine}")) == [{"id": row["id"]} for row in expected]
            path, found = f"/movies/{movie['id']}/comments?limit=1&q={query}", []
            while path:  # a tree is in the order of its comments
                page = await alice.http.get(path)
                found += shape(page.json())
                path = links(page).get("next", "")
            wanted = [row["id"] for row in expected if row is not answer]
            assert found == (wanted if "sort" in query else sorted(wanted)), query
        assert await ok(alice.http.get(f"/movies/{movie['id']}/comments?q=words")) == [
            {**third, "replies_count": 1, "replies": [{**answer, "replies": [], "more_replies": None}]}
            | {"more_replies": None}
        ]
        assert len(await ok(alice.http.get(f"/comments/{third['id']}/replies?q=the"))) == 1

        await subscribed(watcher, topics=["comments"], q="cafe", filter={"movie_id": movie["id"]}, snapshot=True)
        assert await rows_of(watcher, "comments") == [first, second, last, answer]
        edited = await ok(alice.http.patch(f"/comments/{third['id']}", json={"text": "Still a CAFE"}))
        assert (await watcher.expect("add", "comments"))["data"] == edited
        await delete(alice, third)  # it keeps its place, without its text
        assert (await watcher.expect("delete", "comments"))["reason"] == "filter"
        assert await ok(alice.http.get(f"/comments?q=still&movie_id={movie['id']}")) == []
        assert (await alice.http.delete(f"/movies/{movie['id']}")).status_code == 204
        assert (await watcher.expect("delete_bulk", "comments"))["data"]["count"] == 4
        ids = ", ".join(str(row["id"]) for row in (first, second, third, last, answer))
        assert await sql(service, f"SELECT id FROM comments_search WHERE id IN ({ids})") == []


# --- exact counts under concurrency


@dataclass
class Ledger:
    """What a watcher of the whole log knows: the comments, by id, and the events at which a count was wrong."""

    rows: dict[int, Row] = field(default_factory=dict)
    wrong: list[Any] = field(default_factory=list)
    checked: int = 0

    def take(self, frame: dict[str, Any]) -> None:
        """Apply an event. An event that shows a count comes after the events of all rows that are counted."""
        data, operation = frame["data"], frame["operation"]
        items = data["items"] if operation in ("add_bulk", "update_bulk") else [data]
        if frame["topic"] == "comments":
            if operation.startswith("delete"):
                for id_ in data["ids"] if operation == "delete_bulk" else [data["id"]]:
                    del self.rows[id_]
                return
            self.rows |= {row["id"]: row for row in items}
            shown = Counter(row["parent_id"] for row in self.rows.values())
            self._check(frame, [(row["replies_count"], shown[row["id"]]) for row in items if operation != "add"])
        elif frame["topic"] == "movies":
            shown = Counter(row["movie_id"] for row in self.rows.values())
            self._check(frame, [(row["comments_count"], shown[row["id"]]) for row in items])

    def _check(self, frame: dict[str, Any], pairs: list[tuple[int, int]]) -> None:
        self.checked += len(pairs)
        self.wrong += [(frame["seq"], pair) for pair in pairs if pair[0] != pair[1]]


async def test_counts_are_exact_after_every_event_of_twenty_writers_on_two_workers(
    new_places: Callable[[], Places], tmp_path: Any
) -> None:
    places = new_places()
    with several_services(2, places.database_url, places.broadcast_url, tmp_path) as (one, two):
        async with one.person() as alice, one.watch() as watcher, one.anyone() as here, two.anyone() as there:
            movies = [await alice.add() for _ in range(2)]

            async def write(number: int) -> None:
                chance, client = random.Random(number), (here, there)[number % 2]
                mine: list[int] = []
                for _ in range(8):
                    kind = chance.random()
                    if mine and kind < 0.3:
                        call = client.delete(f"/comments/{mine.pop(0)}", headers=alice.bearer)
                    elif kind < 0.65 or not known:
                        where = f"/movies/{chance.choice(movies)['id']}/comments"
                        call = client.post(where, json={"text": "Hello"}, headers=alice.bearer)
                    else:
                        where = f"/comments/{chance.choice(known[-6:])}/replies"
                        call = client.post(where, json={"text": "Hello"}, headers=alice.bearer)
                    answer = await call
                    assert answer.status_code in (201, 204, 404, 409), answer.text
                    if answer.status_code == 201:
                        mine.append(answer.json()["id"])
                        known.append(answer.json()["id"])

            known: list[int] = []
            await asyncio.gather(*map(write, range(20)))
            ledger = Ledger()
            await watcher.until_seq(await head(one))
            for frame in watcher.events:
                ledger.take(frame)
            assert (ledger.wrong, ledger.checked > 100) == ([], True)
            stored = await ok(here.get("/comments?limit=1000"))
            assert ledger.rows == {row["id"]: row for row in stored}
            counted = "SELECT count(*) FROM comments WHERE"
            assert (
                await sql(one, f"SELECT id FROM movies WHERE comments_count <> ({counted} movie_id = movies.id)") == []
            )
            off = f"SELECT id FROM comments AS one WHERE replies_count <> ({counted} parent_id = one.id)"
            assert await sql(one, f"{off} OR (deleted AND replies_count = 0)") == []


# --- large trees


@dataclass
class Library:
    """A database with a user and a movie."""

    database: Database
    me: Identity
    movie_id: int

    async def fill(self, parents: list[int | None], words: str = "A remark. " * 10) -> list[int]:
        """Store a comment for each item: the position of the comment that it replies to, or None. Return the ids."""
        replies, depths = Counter(parents), dict[int | None, int]({None: -1})
        for place, parent in enumerate(parents):
            depths[place] = depths[parent] + 1

        async def work(tx: Transaction) -> list[int]:
            ids = await rows.reserve_ids(tx, COMMENTS.table, len(parents))
            values = [
                (
                    words,
                    self.me.user_id,
                    self.movie_id,
                    None if parent is None else ids[parent],
                    depths[place],
                    False,
                    None,
                    replies[place],
                    1,
                )
                for place, parent in enumerate(parents)
            ]
            stored = rows.driver_values(COMMENTS.table, COMMENTS.written, values, is_sqlite=tx.is_sqlite)
            await rows.insert(tx, COMMENTS.table, COMMENTS.written, ids, stored, utc_now())
            (on_movie,) = COMMENTS.parents
            await relations.add_to_parents(tx, on_movie, Counter({self.movie_id: len(ids)}), None)
            return ids

        return await self.database.write(work)


@pytest.fixture
async def library(database: Database) -> Library:
    user_id = await accounts.account(database, "holly", Group.MODERATOR)
    me = Identity(user_id, Group.MODERATOR, time.time() + 600, "no session", "holly")
    movie = {**MOVIES.defaults, "title": "The Third Man"}
    stored = await database.write(lambda tx: writes.add(tx, MOVIES, me, movie))
    return Library(database, me, stored.id)


def size(trees: list[Row]) -> int:
    return sum(1 + size(tree["replies"]) for tree in trees)


async def test_a_page_of_ten_thousand_comments_is_one_statement_on_indexes(library: Library) -> None:
    chance = random.Random(1)
    parents = [None if place < 100 or chance.random() < 0.1 else chance.randrange(place) for place in range(10_000)]
    await library.fill(parents[:100])
    async with statements(library.database) as few:
        await comment_trees.on_movie(library.database, library.movie_id, ListRequest())
    await library.fill(parents)
    if not library.database.is_sqlite:
        async with library.database.begin() as (connection, _):
            await connection.execute(text("ANALYZE"))
    async with statements(library.database) as many:
        page = await comment_trees.on_movie(library.database, library.movie_id, ListRequest(offset=100))
    assert len(few) == len(many) == 1
    if library.database.is_sqlite:
        plan = await plan_of(library.database, *many[0])
        assert not {"SCAN comments", "SCAN first", "SCAN reply"} & set(re.findall(r"SCAN \w+", plan)), plan
    assert page.total == 100 + parents.count(None)
    assert size(page.rows) > 300
    # The limit is the same with more comments: those of the first level come first.
    everything = await comment_trees.on_movie(library.database, library.movie_id, ListRequest(limit=1_000))
    assert (len(everything.rows), size(everything.rows)) == (1_000, 1_000)
    best = min([await seconds_of_a_page(library) for _ in range(7)])
    assert best < 0.05


async def seconds_of_a_page(library: Library) -> float:
    start = time.perf_counter()
    await comment_trees.on_movie(library.database, library.movie_id, ListRequest(offset=100))
    return time.perf_counter() - start


async def test_a_page_ends_before_its_texts_are_too_long(library: Library) -> None:
    ids = await library.fill([None] * 100 + [place // 5 for place in range(500)], "x" * 10_000)
    page = await comment_trees.on_movie(library.database, library.movie_id, ListRequest(limit=100))
    assert (len(page.rows), size(page.rows)) == (100, 4 * 1024 * 1024 // 10_000)
    assert [reply["id"] for tree in page.rows for reply in tree["replies"]] == ids[100 : size(page.rows)]


async def test_replies_have_a_greatest_depth_and_deleting_the_last_removes_the_chain(library: Library) -> None:
    ids = await library.fill([None, *range(comments.MAX_DEPTH)])
    database, me = library.database, library.me
    refused = await accounts.outcome(database.write(lambda tx: comments.reply(tx, me, ids[-1], "Deeper")))
    assert refused is Conflict
    deleted = await database.write(lambda tx: comments.remove_bulk(tx, me, ids[:-1]))
    assert deleted.done == ids[:-1]
    (top,) = (await comment_trees.on_movie(database, library.movie_id, ListRequest())).rows
    assert (top["deleted"], top["text"], top["replies"][0]["deleted"]) == (True, None, True)
    await database.write(lambda tx: comments.remove(tx, me, ids[-1], None))
    assert (await comment_trees.on_movie(database, library.movie_id, ListRequest())).total == 0


async def test_a_movie_with_too_many_comments_is_deleted_after_a_bulk_deletion(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = 50
    monkeypatch.setattr(dependants, "MAX_DEPENDANTS", number)
    ids = await library.fill([None, *[0] * number])
    database, me, movie_id = library.database, library.me, library.movie_id

    async def remove_movie(tx: Transaction) -> None:
        await writes.remove(tx, MOVIES, me, movie_id, None)

    with pytest.raises(Conflict, match=f"has more than {number} comments.*DELETE /movies/{{id}} accepts"):
        await database.write(remove_movie)
    await database.write(lambda tx: comments.remove_bulk(tx, me, ids[1:]))
    (top,) = (await comment_trees.on_movie(database, movie_id, ListRequest())).rows
    assert (top["replies_count"], top["deleted"]) == (0, False)
    await database.write(remove_movie)
    assert await database.select(COMMENTS.table.select()) == []
