"""The average rating of a movie and the number of its ratings, kept in the movie's row.

Rules:
- Every transaction that adds, changes or removes ratings calls `follow`, once, after the ratings' own events.
- The row of a movie holds the exact sum of the scores, which clients never see. One statement adds to the sum and
  computes the average from integers, so no concurrent vote is lost and no error accumulates.
- A movie whose average or count changes gets one `update`, however many of its ratings have changed. Its `version`
  stays the same. There is no event about a movie whose average and count stay the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from repository.engine.statement import statement
from repository.engine.transaction import Transaction
from repository.generic import relations, rows
from repository.generic.versions import Row, changed_names
from resources.movies import MOVIES
from resources.ratings import average_of

_SUM, _COUNT = "ratings_sum + vote.score", "ratings_count + vote.number"
# The division of integers rounds down. `resources.ratings.average_of` computes the same in Python.
_TENTHS = f"(20 * ({_SUM}) + {_COUNT}) / (2 * ({_COUNT}))"
_AVERAGE = f"CASE WHEN {_COUNT} > 0 THEN CAST({_TENTHS} AS DOUBLE PRECISION) / 10 END"


_SHOWN = ", ".join(f'"{name}"' for name in MOVIES.columns)
_ADD = statement(
    f"UPDATE movies SET ratings_sum = {_SUM}, ratings_count = {_COUNT}, average_rating = {_AVERAGE} FROM"  # noqa: S608 (names of our own columns)
    " (SELECT $1::bigint AS score, $2::integer AS number, $3::bigint AS movie_id) AS vote"
    f" WHERE id = vote.movie_id RETURNING {_SHOWN}, ratings_sum"
)
Movie = dict[str, Any]


async def follow(tx: Transaction, before: Sequence[Row], after: Sequence[Row], actor_id: int | None) -> None:
    """Update the movies whose ratings were added (`after`), removed (`before`) or changed (both), with their events."""
    scores, numbers = Counter[int](), Counter[int]()
    for sign, ratings in ((-1, before), (1, after)):
        for rating in ratings:
            scores[rating["movie_id"]] += sign * rating["score"]
            numbers[rating["movie_id"]] += sign
    old, new, changed = [], [], dict[str, None]()
    for movie_id in sorted(scores):  # in the order in which every transaction locks rows
        if scores[movie_id] or numbers[movie_id]:
            movie, was = await _change(tx, movie_id, scores[movie_id], numbers[movie_id])
            if names := changed_names(was, movie):
                old.append(was)
                new.append(movie)
                changed |= dict.fromkeys(names)
    if new:
        await relations.emit_updates(tx, MOVIES, old, new, list(changed), actor_id)


async def _change(tx: Transaction, movie_id: int, score: int, number: int) -> tuple[Movie, Movie]:
    """Add to the sum and the count of a movie. Return the movie after and before the change."""
    driver, values = await tx.driver(), (score, number, movie_id)
    if tx.is_sqlite:
        found = list(await driver.execute_fetchall(_ADD.sqlite, values))
    else:
        found = await driver.fetch(_ADD.postgresql, *values)
    *shown, total = found[0]
    (movie,) = rows.from_driver(MOVIES.table, [shown])
    count = movie["ratings_count"] - number
    return movie, {**movie, "average_rating": average_of(total - score, count), "ratings_count": count}
