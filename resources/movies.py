"""Movies: what a client sends, what it gets, and how the resource is stored."""

from __future__ import annotations

from pydantic import MISSING, ConfigDict, Field, RootModel

import models
from core import filters
from core.filters import FieldType
from resources.characters import CharacterEntity
from resources.fields import _fields
from resources.resource import Resource
from schemas import (
    Amount,
    Answer,
    Body,
    Country,
    Id,
    IsoDate,
    Line,
    Minutes,
    Moment,
    Prose,
    Rating,
    Skipped,
    Word,
    Words,
)


class MovieBody(Body):
    """A movie as its lister writes it. PUT replaces all of it: what is left out takes its default."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
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
            ]
        }
    )

    title: Line
    description: Prose | None = None
    release_date: IsoDate | None = None
    rating: Rating | None = Field(default=None, description="The lister's own score")
    duration_minutes: Minutes | None = None
    status: Word | None = Field(default=None, description="Such as released or in_production")
    budget: Amount | None = None
    revenue: Amount | None = None
    country: Country | None = None
    languages: Words = []
    genres: Words = []


class MoviePatch(Body):
    """Only what is named changes."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"rating": 95}]})

    title: Line | MISSING = MISSING
    description: Prose | None | MISSING = MISSING
    release_date: IsoDate | None | MISSING = MISSING
    rating: Rating | None | MISSING = MISSING
    duration_minutes: Minutes | None | MISSING = MISSING
    status: Word | None | MISSING = MISSING
    budget: Amount | None | MISSING = MISSING
    revenue: Amount | None | MISSING = MISSING
    country: Country | None | MISSING = MISSING
    languages: Words | MISSING = MISSING
    genres: Words | MISSING = MISSING


class MovieBulkPatch(MoviePatch):
    model_config = ConfigDict(json_schema_extra={"examples": [{"id": 7, "rating": 95}]})

    id: Id


class MovieEntity(Answer):
    id: int
    title: str
    description: str | None
    release_date: IsoDate | None
    rating: int | None
    duration_minutes: int | None
    status: str | None
    budget: int | None
    revenue: int | None
    country: str | None
    languages: list[str]
    genres: list[str]
    user_id: int | None = Field(description="Who listed it")
    characters_count: int
    version: int = Field(description="Counts edits; derived fields do not raise it")
    created_at: Moment
    updated_at: Moment


class MovieWithCharacters(MovieEntity):
    characters: list[CharacterEntity] | MISSING = Field(
        default=MISSING, description="With `include=characters`: the first 1,000 by id"
    )


class MoviesAdded(Answer):
    added: list[MovieEntity]
    skipped: list[Skipped]


class MoviesUpdated(Answer):
    updated: list[MovieEntity]
    not_found: list[int]


class MovieTitle(RootModel[str]):
    """The title of a movie."""


MOVIE_FIELDS: dict[str, filters.Field] = {
    **_fields(
        ("id", FieldType.INTEGER),
        ("title", FieldType.TEXT),
        ("description", FieldType.TEXT),
        ("release_date", FieldType.DATE),
        ("rating", FieldType.INTEGER),
        ("duration_minutes", FieldType.INTEGER),
        ("status", FieldType.TEXT),
        ("budget", FieldType.INTEGER),
        ("revenue", FieldType.INTEGER),
        ("country", FieldType.TEXT),
        ("characters_count", FieldType.INTEGER),
    ),
    "genre": filters.Field("genre", "genres", FieldType.STRINGS),
    "language": filters.Field("language", "languages", FieldType.STRINGS),
}


MOVIES = Resource(
    name="movies",
    singular="movie",
    table=models.movies,
    label="title",
    searched=("title", "description"),
    fields=MOVIE_FIELDS,
    defaults={
        "title": None,
        "description": None,
        "release_date": None,
        "rating": None,
        "duration_minutes": None,
        "status": None,
        "budget": None,
        "revenue": None,
        "country": None,
        "languages": [],
        "genres": [],
    },
    derived={"characters_count": 0},
)
