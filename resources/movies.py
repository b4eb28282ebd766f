"""Movies."""

from __future__ import annotations

from pydantic import Field

import models
from resources.actors import ACTORS
from resources.countries import COUNTRIES
from resources.genres import GENRES
from resources.languages import LANGUAGES
from resources.resource import Link, Resource
from schemas import Amount, Body, Country, IsoDate, Line, Linked, Minutes, Prose, Rating, Word, examples

_CREATED = "Moderators and admins may give new names, which are added"


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
    languages: Linked = Field(default=[], description="Ids, names or codes of languages; names are shown")
    genres: Linked = Field(default=[], description=f"Ids or names of genres; names are shown. {_CREATED}")
    actors: Linked = Field(default=[], description=f"Ids or names of actors; names are shown. {_CREATED}")


MOVIES = Resource(
    table=models.movies,
    body=MovieBody,
    singular="movie",
    label="title",
    searched=("title", "actors", "description"),
    example_change={"rating": 95},
    links=(
        Link("country", COUNTRIES, count="movies_count", shown="code"),
        Link("languages", LANGUAGES, count="movies_count", table=models.movie_languages),
        Link("genres", GENRES, count="movies_count", table=models.movie_genres, adds=True),
        Link("actors", ACTORS, count="movies_count", table=models.movie_actors, adds=True),
    ),
    filter_names={"genres": "genre", "languages": "language", "actors": "actor"},
    created_word="listed",
    generated=True,
    generated_with=("characters", "ratings", "comments"),
    transferred=True,
    has_history=True,
)
