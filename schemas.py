"""What comes in and what goes out, as pydantic models: the source of validation, OpenAPI and the docs.

Input models refuse unknown fields. A constraint that the code enforces is also in the model's JSON Schema, so that
whatever a client can validate for itself, it can.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import MISSING, AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, RootModel

import filters
import times
from filters import Kind

MAX_ID = 2**63 - 1
MAX_BULK_ROWS = 10_000
MAX_GENERATED_ROWS = 1_000_000
MAX_PAGE = 1_000
DEFAULT_PAGE = 50
MAX_AMOUNT = 2**53 - 1  # the largest integer that every JSON reader holds exactly (RFC 8259, section 6)

# PostgreSQL cannot store NUL in text. The second form asks for something to read besides. Blanks are written out:
# `\s` is another set in Python, in Rust (which checks here) and in ECMAScript (which JSON Schema means).
BLANK = r"\x00-\x20\x7f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
NO_NUL = r"^[^\x00]*$"
VISIBLE = rf"^[^\x00]*[^{BLANK}][^\x00]*$"


_INTEGER = re.compile(r"-?[0-9]{1,19}", re.ASCII)


def _iso_date(value: Any) -> Any:
    if isinstance(value, str):
        if times.parse_date(value) is None:
            raise ValueError("expected a date such as 1999-12-31")
        return value
    raise ValueError("expected a date such as 1999-12-31")


def _written_integer(value: Any) -> Any:
    """Paths and queries are text: one way to write a number, where pydantic takes `1_000`, ` 1 ` and `1.0`, too."""
    if not isinstance(value, str) or not _INTEGER.fullmatch(value):
        raise ValueError("expected an integer")
    return value


def _whole(value: Any) -> Any:
    # In JSON Schema 7.0 is an integer (2020-12, section 4.2.3). Beyond 2**53 a float is not what somebody wrote.
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_AMOUNT else value


def _unique(values: list[str]) -> list[str]:
    if len(set(values)) != len(values):
        raise ValueError("expected each value once")
    return values


Whole = Annotated[int, Field(strict=True)]
WHOLE = BeforeValidator(_whole)
Id = Annotated[int, Field(strict=True, ge=1, le=MAX_ID), WHOLE]
WRITTEN_INTEGER = BeforeValidator(_written_integer)  # after the bounds, which else are lost to the JSON Schema
PathId = Annotated[int, Field(ge=1, le=MAX_ID), WRITTEN_INTEGER]
Line = Annotated[str, Field(min_length=1, max_length=255, pattern=VISIBLE)]
Prose = Annotated[str, Field(max_length=10_000, pattern=NO_NUL)]
Word = Annotated[str, Field(min_length=1, max_length=50, pattern=VISIBLE)]
Words = Annotated[list[Word], Field(max_length=20, json_schema_extra={"uniqueItems": True}), AfterValidator(_unique)]
IsoDate = Annotated[str, BeforeValidator(_iso_date), Field(json_schema_extra={"format": "date"})]
Moment = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Amount = Annotated[int, Field(strict=True, ge=0, le=MAX_AMOUNT), WHOLE]
Rating = Annotated[int, Field(strict=True, ge=1, le=100), WHOLE]
Minutes = Annotated[int, Field(strict=True, ge=1, le=100_000), WHOLE]
Country = Annotated[str, Field(pattern=r"^[A-Z]{2}$", description="ISO 3166-1 alpha-2")]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class Answer(BaseModel):
    # For the documents; nothing is checked against them while the service runs, so building them can wait until then.
    model_config = ConfigDict(extra="forbid", defer_build=True)


# --- movies and characters


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


class CharacterBody(Body):
    """A character as its author writes it. PUT replaces all of it: what is left out takes its default."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "Harry Lime", "description": "Sells penicillin.", "movie_id": 7}]}
    )

    name: Line
    description: Prose | None = None
    movie_id: Id | None = None


class CharacterPatch(Body):
    """Only what is named changes."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"description": "Sold penicillin."}]})

    name: Line | MISSING = MISSING
    description: Prose | None | MISSING = MISSING
    movie_id: Id | None | MISSING = MISSING


class CharacterBulkPatch(CharacterPatch):
    model_config = ConfigDict(json_schema_extra={"examples": [{"id": 7, "description": "Sold penicillin."}]})

    id: Id


class CharacterEntity(Answer):
    id: int
    name: str
    description: str | None
    movie_id: int | None
    user_id: int | None = Field(description="Who added it")
    version: int = Field(description="Counts edits; derived fields do not raise it")
    created_at: Moment
    updated_at: Moment


class MovieWithCharacters(MovieEntity):
    characters: list[CharacterEntity] | MISSING = Field(
        default=MISSING, description="With `include=characters`: the first 1,000 by id"
    )


class BulkIds(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"ids": [5, 6]}]})

    ids: list[Id] = Field(min_length=1, max_length=MAX_BULK_ROWS)


class Skipped(Answer):
    index: int = Field(description="Position in the request, from 0")
    detail: list[FieldError]


class MoviesAdded(Answer):
    added: list[MovieEntity]
    skipped: list[Skipped]


class CharactersAdded(Answer):
    added: list[CharacterEntity]
    skipped: list[Skipped]


class MoviesUpdated(Answer):
    updated: list[MovieEntity]
    not_found: list[int]


class CharactersUpdated(Answer):
    updated: list[CharacterEntity]
    not_found: list[int]


class Deleted(Answer):
    deleted: list[int]
    not_found: list[int]


class MovieTitle(RootModel[str]):
    """The title of a movie."""


class CharacterName(RootModel[str]):
    """The name of a character."""


class Count(Answer):
    count: int


# --- jobs


class Job(Answer):
    id: str
    kind: Literal["generate_movies", "generate_characters"]
    state: Literal["queued", "running", "done", "cancelled", "failed"]
    done: int
    total: int
    rows_per_second: int
    seed: int
    user_id: int | None
    created_at: Moment
    started_at: Moment | None
    finished_at: Moment | None
    error: str | None


# --- around the API


class FieldError(Answer):
    loc: list[str | int]
    msg: str
    type: str


class ErrorAnswer(Answer):
    detail: str | list[FieldError]


class Health(Answer):
    status: Literal["ok"]


class Readiness(Answer):
    status: Literal["ready", "degraded", "not_ready"]
    checks: dict[str, str] = Field(description="One sentence a check; ok when all is well")


# --- what can be filtered, sorted and searched

_COMMON = (("user_id", Kind.INTEGER), ("version", Kind.INTEGER), ("created_at", Kind.TIME), ("updated_at", Kind.TIME))


def _fields(*pairs: tuple[str, Kind]) -> dict[str, filters.Field]:
    return {name: filters.Field(name, name, kind) for name, kind in (*pairs, *_COMMON)}


MOVIE_FIELDS: dict[str, filters.Field] = {
    **_fields(
        ("id", Kind.INTEGER),
        ("title", Kind.TEXT),
        ("description", Kind.TEXT),
        ("release_date", Kind.DATE),
        ("rating", Kind.INTEGER),
        ("duration_minutes", Kind.INTEGER),
        ("status", Kind.TEXT),
        ("budget", Kind.INTEGER),
        ("revenue", Kind.INTEGER),
        ("country", Kind.TEXT),
        ("characters_count", Kind.INTEGER),
    ),
    "genre": filters.Field("genre", "genres", Kind.STRINGS),
    "language": filters.Field("language", "languages", Kind.STRINGS),
}
CHARACTER_FIELDS: dict[str, filters.Field] = _fields(
    ("id", Kind.INTEGER), ("name", Kind.TEXT), ("description", Kind.TEXT), ("movie_id", Kind.INTEGER)
)

JOB_STATES = ("queued", "running", "done", "cancelled", "failed")
JOB_FIELDS: dict[str, filters.Field] = {
    "id": filters.Field("id", "id", Kind.TEXT),
    "kind": filters.Field("kind", "kind", Kind.TEXT, ("generate_movies", "generate_characters")),
    "state": filters.Field("state", "state", Kind.TEXT, JOB_STATES),
    "total": filters.Field("total", "total", Kind.INTEGER),
    "user_id": filters.Field("user_id", "user_id", Kind.INTEGER),
    "created_at": filters.Field("created_at", "created_at", Kind.TIME),
}
USER_FIELDS: dict[str, filters.Field] = {
    "id": filters.Field("id", "id", Kind.INTEGER),
    "username": filters.Field("username", "username", Kind.TEXT),
    "email": filters.Field("email", "email", Kind.TEXT),
    "name": filters.Field("name", "name", Kind.TEXT),
    "first_name": filters.Field("first_name", "first_name", Kind.TEXT),
    "last_name": filters.Field("last_name", "last_name", Kind.TEXT),
    "phone_number": filters.Field("phone_number", "phone_number", Kind.TEXT),
    "is_active": filters.Field("is_active", "is_active", Kind.BOOLEAN),
    "awaits_activation": filters.Field("awaits_activation", "awaits_activation", Kind.BOOLEAN),
    "group": filters.Field("group", "group", Kind.TEXT, ("user", "moderator", "admin")),
    "version": filters.Field("version", "version", Kind.INTEGER),
    "created_at": filters.Field("created_at", "created_at", Kind.TIME),
    "updated_at": filters.Field("updated_at", "updated_at", Kind.TIME),
}
# By which everybody finds people; the rest of them is for admins.
OTHER_USER_FIELDS: dict[str, filters.Field] = {name: USER_FIELDS[name] for name in ("id", "username", "name")}
AUDIT_FIELDS: dict[str, filters.Field] = {
    "id": filters.Field("id", "id", Kind.INTEGER),
    "actor_id": filters.Field("actor_id", "actor_id", Kind.INTEGER),
    "action": filters.Field("action", "action", Kind.TEXT),
    "user_id": filters.Field("user_id", "user_id", Kind.INTEGER),
    "created_at": filters.Field("created_at", "created_at", Kind.TIME),
}
SESSION_FIELDS: dict[str, filters.Field] = {
    "id": filters.Field("id", "id", Kind.TEXT),
    "user_agent": filters.Field("user_agent", "user_agent", Kind.TEXT),
    "address": filters.Field("address", "address", Kind.TEXT),
    "created_at": filters.Field("created_at", "created_at", Kind.TIME),
}
# What a subscription can filter by.
TOPIC_FIELDS: dict[str, dict[str, filters.Field]] = {
    "movies": MOVIE_FIELDS,
    "characters": CHARACTER_FIELDS,
    "jobs": JOB_FIELDS,
    "users": USER_FIELDS,
    "account": USER_FIELDS,
    "sessions": SESSION_FIELDS,
    "audit": AUDIT_FIELDS,
}

# Who may watch: everybody, one group, or (`self`) each who has signed in, of what is theirs.
TOPICS: dict[str, str] = {
    "movies": "public",
    "characters": "public",
    "jobs": "public",
    "users": "admin",
    "account": "self",
    "sessions": "self",
    "audit": "admin",
}
PUBLIC_TOPICS: frozenset[str] = frozenset(name for name, reader in TOPICS.items() if reader == "public")
