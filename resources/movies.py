"""Movies."""

from __future__ import annotations

from pydantic import Field

import models
from resources.resource import Resource
from schemas import Amount, Body, Country, IsoDate, Line, Minutes, Prose, Rating, Word, Words, examples


class MovieBody(Body):
    """A movie as clients write it. PUT replaces all of it: a missing field takes its default."""

    model_config = examples(
        {
            "title": "The Third Man",
            "description": "A writer looks for a friend in post-war Vienna.",
            "release_date": "1949-09-01",
            "rating": 93,
            "duration_minutes": 104,
            "status": "released",
            "country": "GB",
            "languages": ["English", "German"],
            "genres": ["Noir", "Thriller"],
        }
    )

    title: Line
    description: Prose | None = None
    release_date: IsoDate | None = None
    rating: Rating | None = Field(default=None, description="Score given by the user who listed the movie")
    duration_minutes: Minutes | None = None
    status: Word | None = Field(default=None, description="For example `released` or `in_production`")
    budget: Amount | None = None
    revenue: Amount | None = None
    country: Country | None = None
    languages: Words = []
    genres: Words = []


MOVIES = Resource(
    table=models.movies,
    body=MovieBody,
    singular="movie",
    label="title",
    searched=("title", "description"),
    example_change={"rating": 95},
    filter_names={"genres": "genre", "languages": "language"},
    created_word="listed",
    generated=True,
    transferred=True,
    has_history=True,
)
