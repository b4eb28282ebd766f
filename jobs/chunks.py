"""The rows that a job generates in one transaction: making them in a thread, and storing them.

Rules:
- Making a chunk is pure: it depends on the job and on how many of its rows are stored, not on the database.
- What a chunk takes from the catalog (movies to rate, actors for a cast) is chosen when it is stored, by a random
  generator that depends on the same two things.
- The rights of the job's user are read and locked in each transaction that writes what only some groups may write. A
  user who has lost them ends the job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from jobs import generation, opinions
from repository import job_users
from repository.catalog import generated
from repository.catalog.generated import Movie, Source
from repository.community import generated_ratings
from repository.engine.transaction import Transaction
from repository.generic import rows, writes
from repository.generic.writes import Prepared
from repository.jobs import ClaimedJob
from resources.actors import ACTORS
from resources.characters import CHARACTERS
from resources.movies import MOVIES
from resources.ratings import RATINGS, require_may_generate
from resources.registry import RESOURCES
from services.movie_parts import Plan

MOVIES_OF_CHARACTERS = 20  # The characters of one chunk are distributed among this many movies, and actors.
RATINGS_KIND = f"generate_{RATINGS.name}"
KINDS = {*generation.MAKERS, RATINGS_KIND}
assert {f"generate_{resource.name}" for resource in RESOURCES if resource.generated} == KINDS, (
    "expected a maker for each"
)
TOO_FEW_MOVIES = "There are too few movies that invented users can still rate"


class Stopped(Exception):
    """The job ends as failed, after what it has stored. The message says why."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that are stored together: `prepared` movies; or `movies` with the rows that belong to them; or other rows.

    `size` counts all rows. There are no rows yet if they depend on the rows that are chosen when the chunk is stored.
    """

    size: int
    prepared: Prepared | None = None
    movies: Sequence[Movie] = ()
    rows: Sequence[dict[str, Any]] = ()


def size_after(job: ClaimedJob, done: int) -> int:
    """Return the number of rows of the chunk after the first `done` rows of a job."""
    if not job.parts:
        return min(job.batch_size, job.total - done)
    plan = Plan(job.parts)
    return plan.rows_of(plan.movies_in(min(done + job.batch_size, job.total))) - done


def make(job: ClaimedJob, done: int, *, is_sqlite: bool) -> Chunk:
    """Return the chunk after the first `done` rows of a job."""
    size = size_after(job, done)
    if job.parts:
        plan = Plan(job.parts)
        first, end = plan.movies_in(done), plan.movies_in(done + size)
        found = enumerate(generation.rows(job.kind, job.seed, first, end - first), first)
        return Chunk(size, movies=[_with_parts(row, job.seed, plan, position) for position, row in found])
    if job.kind == RATINGS_KIND:
        return Chunk(size)
    made = generation.rows(job.kind, job.seed, done, size)
    if job.kind == "generate_movies":
        # These rows are prepared here, while the previous chunk is stored. Other rows refer to rows chosen later.
        return Chunk(size, prepared=writes.prepare(MOVIES, made, job.user_id, is_sqlite=is_sqlite))
    return Chunk(size, rows=made)


def _with_parts(row: dict[str, Any], seed: int, plan: Plan, position: int) -> Movie:
    """Add to a movie what belongs to it. A part is the same with and without the other parts."""
    characters = generation.cast(Random(f"{seed}:{position}:characters"), plan.count("characters", position))
    scores = opinions.ratings(Random(f"{seed}:{position}:ratings"), row, opinions.MOST_OF_MOVIE)
    comments = opinions.comments(Random(f"{seed}:{position}:comments"), scores, plan.count("comments", position))
    return Movie(row, characters, scores[: plan.count("ratings", position)], comments)


async def store(tx: Transaction, job: ClaimedJob, done: int, chunk: Chunk) -> int:
    """Store a chunk with its events. Return how many rows were stored.

    These are fewer than the chunk's size if too few movies can be rated. Raises Forbidden.
    """
    source = Source(job.id, job.user_id, generation.LANGUAGE_CODES)
    random = Random(f"{job.seed}:{done}:cast")
    if chunk.prepared is not None:
        await generated.store(tx, chunk.prepared, source)
    elif chunk.movies:
        await generated.store_with_parts(tx, chunk.movies, source, random)
    elif job.kind == "generate_characters":
        await _store_characters(tx, job, chunk.rows, random)
    else:
        identity = await job_users.identity_of(tx, job.user_id)
        if job.kind == RATINGS_KIND:
            require_may_generate(identity)
            return await generated_ratings.add(tx, identity, chunk.size, random, opinions.score, job.id)
        await writes.add_bulk(tx, ACTORS, identity, chunk.rows, skip_conflicts=False, job_id=job.id)
    return chunk.size


async def _store_characters(tx: Transaction, job: ClaimedJob, made: Sequence[dict[str, Any]], random: Random) -> None:
    """Store characters of existing movies, played by existing actors, as far as there are any."""
    movies = await rows.pick(tx, MOVIES.table, random, MOVIES_OF_CHARACTERS, locked=True)
    actors = await rows.pick(tx, ACTORS.table, random, MOVIES_OF_CHARACTERS, locked=True)
    items = [
        {
            **row,
            "movie_id": movies[index * len(movies) // len(made)] if movies else None,
            "actor_id": actors[index % len(actors)] if actors else None,
        }
        for index, row in enumerate(made)
    ]
    await writes.store(tx, CHARACTERS, items, job.user_id, job.id)
