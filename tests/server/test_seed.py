"""The command `seed`: a newcomer sees real films at once, and watchers see them arrive like any write."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from statistics import mean

from tests.support.requests import ok
from tests.support.resources import nothing_written, sql, watching
from tests.support.service import ROOT, Service


async def seed(service: Service, *arguments: str) -> tuple[int, str, str]:
    """Run the command on the database of the service, and return its exit status and what it has written."""
    environment = {name: value for name, value in os.environ.items() if name not in service.settings}
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, str(ROOT / "cli.py"), "seed", *arguments],
        env=environment | service.settings,
        cwd=service.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


async def test_the_films_arrive_as_one_write_and_only_once(new_service: Callable[..., Service]) -> None:
    with new_service().running() as service:
        async with service.anyone() as reader, watching(service) as watcher:
            status, output, errors = await seed(service)
            assert status == 0, errors
            added = await watcher.until(lambda event: (event["topic"], event["operation"]) == ("movies", "add_bulk"))
            films = await ok(reader.get("/movies?limit=1000"))
            assert [film["title"] for film in added["data"]["items"]] == [film["title"] for film in films]
            assert output.startswith(f"Added {len(films)} movies, ")
            assert len(films) >= 30
            assert len({film["country"] for film in films}) > 10
            assert len({film["release_date"][:3] for film in films}) >= 8, "from many decades"

            third = next(film for film in films if film["title"] == "The Third Man")
            assert (third["genres"], third["languages"]) == (["Noir", "Thriller"], ["English", "German"])
            path = f"/movies/{third['id']}"
            cast = (await ok(reader.get(f"{path}?include=characters")))["characters"]
            assert [row["name"] for row in cast] == ["Holly Martins", "Harry Lime", "Anna Schmidt", "Major Calloway"]
            (comment,) = await ok(reader.get(f"{path}/comments"))
            assert len(comment["replies"]) == 1
            for route in ("/movies/popular", f"{path}/similar"):
                assert await ok(reader.get(route)), route

            # Counts and averages are those of the rows.
            scores: dict[int, list[int]] = {}
            for movie_id, score in await sql(service, "SELECT movie_id, score FROM ratings"):
                scores.setdefault(movie_id, []).append(score)
            for film in films:
                given = scores[film["id"]]
                assert film["ratings_count"] == len(given)
                assert abs(film["average_rating"] - mean(given)) <= 0.05 + 1e-9
            genres = Counter(genre for film in films for genre in film["genres"])
            found = await ok(reader.get("/genres?fields=name,movies_count"))
            assert {row["name"]: row["movies_count"] for row in found} == genres

            async with nothing_written(service):
                status, output, errors = await seed(service)
            assert (status, output) == (1, "")
            assert errors.startswith("Error: Expected a database without movies")
            assert errors.count("\n") == 1

            assert (await seed(service, "--force"))[0] == 0
            assert len(await ok(reader.get("/movies?limit=1000"))) == 2 * len(films)
            again = await ok(reader.get("/actors?name=Orson%20Welles"))
            assert [(row["movies_count"], row["characters_count"]) for row in again] == [(2, 2)]
