"""Walking a list by `Link`: every row that exists the whole time comes once, whatever else is deleted or inserted."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from repository.generic import cursors
from repository.generic.cursors import Order
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import assert_problem, change_group, ok, sign_in
from tests.support.resources import links, sql
from tests.support.service import PASSWORD, Person, Service

Between = Callable[[list[Any]], Awaitable[None]]  # takes the rows read so far


async def walked(client: httpx.AsyncClient, url: str, between: Between | None = None) -> list[Any]:
    """Return the rows of all pages. Call `between` after each page but the last."""
    rows: list[Any] = []
    following: str | None = url
    while following is not None:
        answer = await client.get(following)
        assert answer.status_code == 200, answer.text
        rows += answer.json()
        following = links(answer).get("next")
        if following is not None and between is not None:
            await between(rows)
        assert len(rows) < 100
    return rows


def after_in(answer: httpx.Response) -> str:
    return httpx.URL(links(answer)["next"]).params["after"]


def film(number: int) -> dict[str, Any]:
    """Return a movie that shares most of its values with others."""
    return {
        "title": f"film {number:02}",
        "rating": [None, 10, 10, 20][number % 4],
        "release_date": ["1949-09-01", None, "2001-01-01"][number % 3],
        "status": ["released", None][number % 2],
    }


async def films(alice: Person, count: int) -> list[dict[str, Any]]:
    return await alice.add_bulk([film(number) for number in range(count)])


# --- rows that are deleted and inserted


class Crowd:
    """Movies of which some come and others go after each page.

    The last row of the page, the first row of all pages and one that is still to come are deleted; two are inserted,
    one of them without a rating.
    """

    def __init__(self, owner: Person, rows: list[dict[str, Any]]) -> None:
        self.owner = owner
        self.staying = {row["title"]: row["id"] for row in rows}
        self.inserted = 0

    async def change(self, seen: list[Any]) -> None:
        titles = titles_of(seen)
        to_come = [title for title in self.staying if title not in titles]
        gone = [title for title in (titles[-1], titles[0], *to_come[1:2]) if title in self.staying]
        if gone:
            await self.owner.delete_bulk([self.staying.pop(title) for title in dict.fromkeys(gone)])
        self.inserted += 2
        await self.owner.add_bulk([film(number) | {"title": f"new {self.inserted} {number}"} for number in (0, 3)])


def titles_of(rows: list[Any]) -> list[str]:
    return [row if isinstance(row, str) else row["title"] for row in rows]


@pytest.mark.parametrize(
    ("path", "sort"),
    [
        ("/movies", ""),
        ("/movies", "-rating"),
        ("/movies", "created_at,-title"),
        ("/movies/names", "-id"),
        ("/movies/names", "-rating,release_date,-id"),
        ("/movies/names", "-status,rating"),
    ],
)
async def test_no_row_is_missed_or_repeated_while_others_come_and_go(service: Service, path: str, sort: str) -> None:
    async with service.person() as alice:
        crowd = Crowd(alice, await films(alice, 14))
        query = f"user_id={alice.id}&limit=3{'&sort=' if sort else ''}{sort}"
        titles = titles_of(await walked(alice.http, f"{path}?{query}", crowd.change))
        assert len(titles) == len(set(titles))
        assert set(titles) >= crowd.staying.keys()
        assert 0 < len(crowd.staying) < 12


async def assert_walk(
    client: httpx.AsyncClient,
    url: str,
    ids: list[Any],
    insert: Callable[[], Awaitable[Any]],
    delete: Callable[[Any], Awaitable[Any]] | None = None,
) -> None:
    """Assert that a walk finds exactly the rows `ids`, while rows are inserted at its front and, after each page, the
    row at its end is deleted.
    """

    async def between(rows: list[Any]) -> None:
        await insert()
        if delete is not None:
            await delete(rows[-1]["id"])

    found = [row["id"] for row in await walked(client, f"{url}&limit=2", between)]
    assert found != []
    assert sorted(found) == sorted(ids), url


async def test_users_are_walked_like_other_rows(service: Service) -> None:
    async with service.person() as alice, service.admin() as chief:
        family = f"Walker-{alice.id}"
        ids: list[int] = []
        numbers = itertools.count(1)

        async def insert() -> None:
            body = {"username": f"{family}-{next(numbers)}", "password": PASSWORD, "last_name": family}
            ids.append((await ok(chief.http.post("/admin/users", json=body), 201))["id"])

        async def delete(user_id: int) -> None:
            assert (await chief.http.delete(f"/users/{user_id}")).status_code == 204

        for path, sort in (("/users", "-created_at"), ("/users/nonAdmin", "is_active,email,-id")):
            while len(ids) < 5:
                await insert()
            await assert_walk(chief.http, f"{path}?last_name={family}&sort={sort}", ids.copy(), insert, delete)
            ids = [row["id"] for row in await ok(chief.http.get(f"/users?last_name={family}"))]


async def test_users_who_are_not_admins_walk_the_users(service: Service) -> None:
    async with service.person() as alice, service.person() as bob, service.person() as carol:
        ids = [carol.id, bob.id, alice.id]
        url = f"/users?id[in]={alice.id},{bob.id},{carol.id}&limit=1&sort="
        assert [row["id"] for row in await walked(alice.http, f"{url}-id")] == ids
        assert len(await walked(alice.http, f"{url}name,-username")) == 3
        cursor = after_in(await alice.http.get(f"{url}name"))
        assert (await alice.http.get(f"{url}-email&after={cursor}")).status_code == 422
        shown = await alice.http.get(f"/users?sort=name&limit=1000&after={cursor}")
        assert all(set(row) == {"id", "username", "name"} for row in shown.json())


async def test_the_audit_trail_is_walked_while_it_grows(service: Service) -> None:
    async with service.person() as alice, service.admin() as chief:
        groups = ["moderator", "user"] * 10
        for _ in range(5):
            await change_group(chief, alice, groups.pop(0))
        url = f"/admin/audit?user_id={alice.id}"
        ids = [row["id"] for row in await ok(chief.http.get(url))]
        assert ids == sorted(ids, reverse=True)

        async def insert() -> None:
            await change_group(chief, alice, groups.pop(0))

        await assert_walk(chief.http, url, ids, insert)
        # With `after=<id>`, the oldest entries come first, also on the following pages, which are reached by a cursor.
        newer = await ok(chief.http.get(f"{url}&after={ids[-1]}"))
        assert await walked(chief.http, f"{url}&after={ids[-1]}&offset=1&limit=2") == newer[1:]


async def test_jobs_are_walked_newest_first(service: Service) -> None:
    async with service.person() as alice:

        async def insert(moment: str = "2021-01-01T00:00:00.000000Z") -> None:
            ids.append(str(uuid.uuid4()))
            columns = "id, kind, state, done, total, seed, batch_size, user_id, created_at, rows_per_second, attempts"
            values = f"'{ids[-1]}', 'generate_movies', 'done', 1, 1, 1, 1, {alice.id}, '{moment}', 1, 0"
            await sql(service, f"INSERT INTO jobs ({columns}) VALUES ({values})")

        async def delete(job_id: str) -> None:
            await sql(service, f"DELETE FROM jobs WHERE id = '{job_id}'")

        ids: list[str] = []
        for moment in ("000001", "000000", "000000", "000000", "000002"):
            await insert(f"2020-01-01T00:00:00.{moment}Z")
        await assert_walk(alice.http, f"/jobs?user_id={alice.id}", ids.copy(), insert, delete)


async def test_sessions_are_walked_newest_first(service: Service) -> None:
    async with service.person() as alice, service.anyone() as elsewhere:

        async def insert() -> None:
            assert (await sign_in(elsewhere, alice.name)).is_success

        async def delete(session_id: str) -> None:
            if session_id != first:
                assert (await alice.http.delete(f"/auth/sessions/{session_id}")).status_code == 204

        (first,) = [row["id"] for row in await ok(alice.http.get("/auth/sessions"))]
        for _ in range(4):
            await insert()
        ids = [row["id"] for row in await ok(alice.http.get("/auth/sessions"))]
        await assert_walk(alice.http, "/auth/sessions?", ids, insert, delete)


# --- the headers


async def test_a_page_after_a_cursor_links_to_the_first_and_the_next_page_only(service: Service) -> None:
    async with service.person() as alice:
        rows = await films(alice, 7)
        base = f"/movies?user_id={alice.id}&limit=2"
        for start, found in (
            ("", {"first", "next", "last"}),
            ("&sort=rating&offset=2", {"first", "prev", "next", "last"}),
            (f"&sort=-id&after={rows[0]['id']}", {"first", "next"}),
            (f"&sort=-id&after={rows[0]['id']}&skip=2", {"first", "prev", "next"}),
            (f"&after={rows[0]['id']}&offset=1", {"first", "prev", "next"}),
            (f"&after={rows[0]['id']}", {"next"}),
        ):
            page = await alice.http.get(base + start)
            assert links(page).keys() == found, start
            following = await alice.http.get(links(page)["next"])
            assert following.headers["x-total-count"] == page.headers["x-total-count"] == "7"
            if "first" in found:
                assert links(following).keys() == {"first", "next"}, start
                beginning = {
                    name: value for name, value in httpx.QueryParams(start).items() if name in ("sort", "after")
                }
                first = httpx.URL(links(following)["first"]).params
                assert dict(first) == {"user_id": str(alice.id), "limit": "2", **beginning}
                assert links(page)["first"] == links(following)["first"]
        # The offset counts from the cursor.
        cursor = after_in(await alice.http.get(f"{base}&sort=-id"))
        skipped = await alice.http.get(f"{base}&sort=-id&after={cursor}&offset=1")
        assert [row["id"] for row in skipped.json()] == [rows[3]["id"], rows[2]["id"]]
        assert links(await alice.http.get(f"{base}&limit=0".replace("&limit=2", ""))) == {}


async def test_a_list_can_be_walked_with_filters_and_a_search(service: Service) -> None:
    async with service.person() as alice:
        await films(alice, 9)
        for query in ("rating[gte]=10", "q=film", "or[0][rating]=10&or[1][status]=released"):
            whole = await ok(alice.http.get(f"/movies?user_id={alice.id}&sort=-release_date&{query}"))
            assert len(whole) > 4
            url = f"/users/{alice.id}/movies?sort=-release_date&limit=2&{query}"
            assert await walked(alice.http, url) == whole


async def test_a_list_can_be_walked_with_a_repeated_sort(service: Service) -> None:
    async with service.person() as alice:
        await films(alice, 9)
        base = f"/movies?user_id={alice.id}"
        repeated, joined = f"{base}&limit=2&sort=-release_date&sort=-title", f"{base}&limit=2&sort=-release_date,-title"
        whole = await ok(alice.http.get(f"{base}&sort=-release_date,-title"))
        assert await walked(alice.http, repeated) == whole
        page = await alice.http.get(repeated)
        assert httpx.URL(links(page)["next"]).params.get_list("sort") == ["-release_date", "-title"]
        assert await ok(alice.http.get(f"{joined}&after={after_in(page)}")) == whole[2:4]


# --- long values


async def test_a_cursor_that_would_be_too_long_is_replaced_by_an_offset(service: Service) -> None:
    async with service.person() as alice:
        texts = ["a", "b", "c" * 1_800, "d" * 10_000, "e", "é" * 3_000, None]
        await alice.add_bulk([{"name": f"{n}", "description": text} for n, text in enumerate(texts)], "characters")
        for path in ("/characters", "/characters/names"):
            for limit in (1, 2, 3):
                url: str | None = f"{path}?user_id={alice.id}&sort=description&limit={limit}"
                followed, found = [], []
                while url is not None:
                    answer = await alice.http.get(url)
                    found += [row if isinstance(row, str) else row["name"] for row in answer.json()]
                    assert len(found) <= len(texts), "rows come again"
                    url = links(answer).get("next")
                    followed.append(httpx.URL(url or "").params)
                    assert all(len(each.get("after", "")) <= cursors.MAX_CURSOR_BYTES for each in followed)
                assert found == ["0", "1", "2", "3", "4", "5", "6"], (path, limit)
                assert any("offset" in each for each in followed)
        # A page that is measured before it is read has a cursor, too.
        page = await alice.http.get(f"/characters?user_id={alice.id}&sort=-description&limit=1000")
        assert len(page.json()) == 7
        cursor = cursors.at((("description", True), ("id", False)), {"description": "d" * 1_000, "id": 1}, None)
        rest = await alice.http.get(
            f"/characters?user_id={alice.id}&sort=-description&limit=1000&after={text_of(cursor)}"
        )
        assert [row["name"] for row in rest.json()] == ["2", "1", "0", "6"]


# --- what is rejected


def text_of(cursor: cursors.Cursor) -> str:
    text = cursors.encode(cursor)
    assert text is not None
    return text


def at_rating(rating: int, sort: Order = (("rating", False),)) -> str:
    return text_of(cursors.at(cursors.total_order(sort), {"rating": rating, "id": 2**63 - 1}, None))


@SQLITE_ONLY
async def test_a_cursor_of_another_order_is_rejected_with_all_other_problems(service: Service) -> None:
    cursor = at_rating(10)
    async with service.admin() as chief:
        for query, wrong in (
            (f"after={cursor}", ["after"]),
            (f"sort=-rating&after={cursor}", ["after"]),
            (f"sort=rating,-id&after={cursor}", ["after"]),
            (f"limit=x&offset=-1&id[like]=1&sort=title&after={cursor}", ["after", "limit", "offset", "id[like]"]),
            ("sort=oops&after=y", ["sort", "after"]),
            (f"sort=oops&after={cursor}", ["sort"]),
            (f"sort=rating&after={cursor}x", ["after"]),
            (f"sort=rating&after={cursor}&after={cursor}", ["after"]),
            ("after=", ["after"]),
            ("after=1.5", ["after"]),
            ("after=-1", ["after"]),
            ("after=" + "9" * 5_000, ["after"]),
            ("after=%00", ["after"]),
        ):
            for path in ("/movies", "/movies/names", "/movies/user", f"/users/{chief.id}/movies"):
                answer = await chief.http.get(f"{path}?{query}")
                assert_problem(answer, 422, *sorted_problems(answer, wrong))
        for path in ("/jobs", "/auth/sessions"):
            for value in ("1", "0", "x", cursor):
                answer = await chief.http.get(f"{path}?after={value}&limit=-1")
                assert_problem(answer, 422, *sorted_problems(answer, ["after", "limit"]))
        for path in ("/users", "/users/nonAdmin", "/admin/audit"):
            assert_problem(await chief.http.get(f"{path}?after={cursor}"), 422, ["query", "after"])
        assert (await chief.http.get(f"/movies?sort=rating&after={cursor}")).status_code == 200
        assert_problem(await chief.http.get(f"/movies/count?after={cursor}"), 422, ["query", "after"])


def sorted_problems(answer: httpx.Response, names: list[str]) -> list[list[str]]:
    """Return the locations of these parameters in the order in which the response has them."""
    order = [problem["loc"] for problem in answer.json()["detail"]]
    return sorted((["query", name] for name in names), key=lambda loc: order.index(loc) if loc in order else -1)


async def test_a_cursor_may_hold_a_number_beyond_the_range_of_the_column(service: Service) -> None:
    async with service.person() as alice:
        await films(alice, 4)
        for number, count in ((-(2**63), 4), (10, 2), (40_000, 1), (2**63 - 1, 1)):
            for query in ("", "&version=1"):
                url = f"/movies?user_id={alice.id}&sort=rating{query}&after={at_rating(number)}"
                assert len(await ok(alice.http.get(url))) == count, url
                url = f"/movies/user?sort=rating{query}&after={at_rating(number)}"
                assert len(await ok(alice.http.get(url))) == count, url
