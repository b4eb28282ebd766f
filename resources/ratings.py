"""Ratings: the scores that users give to movies. Each user rates a movie at most once."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

import models
from core.errors import Forbidden
from core.identity import Identity
from resources.movies import MOVIES
from resources.resource import Parent, Resource
from schemas import WHOLE, Answer, Body, examples

LOWEST_SCORE, HIGHEST_SCORE = 1, 10
SCORES = range(LOWEST_SCORE, HIGHEST_SCORE + 1)

Score = Annotated[int, Field(strict=True, ge=LOWEST_SCORE, le=HIGHEST_SCORE), WHOLE]


class RatingBody(Body):
    """A rating of a movie by the caller."""

    model_config = examples({"score": 9})

    score: Score


class AverageRating(Answer):
    """The ratings of a movie, summed up."""

    average: float | None = Field(description="Rounded half up to one decimal; null without ratings")
    count: int
    histogram: dict[str, int] = Field(description="How many ratings have each score, from `1` to `10`")


RATINGS = Resource(
    table=models.ratings,
    body=RatingBody,
    singular="rating",
    label="movie_id",
    searched=(),
    example_change={"score": 10},
    parents=(Parent("movie_id", MOVIES, takes_children=True),),  # repository.community.averages counts them
    created_word="gave",
    generated=True,
    has_own_routes=True,
)


def require_may_generate(identity: Identity) -> None:
    """Raise Forbidden unless the identity may let invented users rate existing movies, which changes their averages."""
    if not identity.is_staff:
        raise Forbidden("Only moderators and admins may generate ratings of existing movies")


def average_of(total: int, count: int) -> float | None:
    """Return the average of `count` scores whose sum is `total`, rounded half up to one decimal; None without scores.

    The tenths are computed from integers, so the result is the double that is nearest to the rounded average.
    `repository.community.averages` computes the same in SQL.
    """
    return (20 * total + count) // (2 * count) / 10 if count else None
