"""The truth: every row as REST lists it, and the rows that a view must contain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlencode

from tests.oracle.filters import Row, matches, query
from tests.oracle.http import Rest
from tests.oracle.views import Rows, View
from tests.oracle.writes import ADMIN, CATALOG
from tests.support.service import Person

PAGE = 1_000
PRIVATE = ("sessions", "watchlist")


async def walk(
    rest: Rest, path: str, person: Person, parameters: Sequence[tuple[str, str]] = (), *, by_id: bool = True
) -> list[Row]:
    """Return all rows of a list, page by page."""
    rows: list[Row] = []
    while True:
        place = ("after", str(rows[-1]["id"] if rows else 0)) if by_id else ("offset", str(len(rows)))
        asked = f"{path}?{urlencode([*parameters, place, ('limit', str(PAGE))])}"
        answer = await rest.ask("GET", asked, token=person.token)
        assert answer.status == 200, answer
        page = answer.body
        rows += page
        if len(page) < PAGE:
            return rows


@dataclass
class Truth:
    """All rows at a moment without writes. The sessions and the watchlist of user 0 are under the keys `sessions of 0`
    and `watchlist of 0`, and so on.
    """

    rest: Rest
    people: Sequence[Person]
    rows: Rows = field(default_factory=dict)
    _listed: Rows = field(default_factory=dict)

    async def read(self) -> None:
        admin = self.people[ADMIN]
        found = {resource: await walk(self.rest, f"/{resource}", admin) for resource in CATALOG}
        found["jobs"] = await walk(self.rest, "/jobs", admin, by_id=False)
        found["users"] = [(await self.rest.ask("GET", "/auth/me", token=admin.token)).body]
        found["users"] += await walk(self.rest, "/users/nonAdmin", admin, by_id=False)
        # `GET /ratings` lists the caller's own, but nobody can sign in as the users who gave the generated ones.
        rated = [row["id"] for row in found["movies"] if row["ratings_count"]]
        found["ratings"] = [row for id_ in rated for row in await walk(self.rest, f"/movies/{id_}/ratings", admin)]
        for number, person in enumerate(self.people):
            found[f"watchlist of {number}"] = await walk(self.rest, "/watchlist", person)
            found[f"sessions of {number}"] = await walk(self.rest, "/auth/sessions", person, by_id=False)
        await self._check_links(found)
        self.rows = {topic: {row["id"]: row for row in rows} for topic, rows in found.items()}

    async def _check_links(self, found: Mapping[str, Sequence[Row]]) -> None:
        """Assert that counts equal the numbers of rows that show a row."""
        shown = Counter(name for movie in found["movies"] for name in movie["genres"])
        assert {row["name"]: row["movies_count"] for row in found["genres"] if row["movies_count"]} == shown
        played = Counter(row["actor_id"] for row in found["characters"] if row["actor_id"] is not None)
        assert {row["id"]: row["characters_count"] for row in found["actors"] if row["characters_count"]} == played
        for row in found["actors"][-3:]:
            movies = await walk(self.rest, f"/actors/{row['id']}/movies", self.people[ADMIN])
            assert row["movies_count"] == len(movies)
            assert all(row["name"] in movie["actors"] for movie in movies)
        languages = await walk(self.rest, "/languages", self.people[ADMIN])
        countries = await walk(self.rest, "/countries", self.people[ADMIN])
        for column, rows in (("actors", found["actors"]), ("languages", languages)):
            assert sum(row["movies_count"] for row in rows) == sum(len(movie[column]) for movie in found["movies"])
        located = Counter(movie["country"] for movie in found["movies"] if movie["country"])
        assert {row["code"]: row["movies_count"] for row in countries if row["movies_count"]} == located

    async def rows_for(self, view: View, user: int | None) -> Rows:
        """Return the rows that match the view's filter, and assert that REST lists exactly these rows."""
        found: Rows = {}
        for topic in view.topics:
            every = self.rows[topic if topic not in PRIVATE else f"{topic} of {user}"]
            found[topic] = {id_: row for id_, row in every.items() if matches(view.wanted, row)}
            if topic in CATALOG and view.wanted:
                parameters = query(view.wanted)
                key = f"{topic} {parameters}"
                if key not in self._listed:
                    rows = await walk(self.rest, f"/{topic}", self.people[ADMIN], parameters)
                    self._listed[key] = {row["id"]: row for row in rows}
                assert self._listed[key] == found[topic], f"GET /{topic} with {view.wanted} lists wrong rows"
        return found
