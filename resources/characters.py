"""Characters: what a client sends, what it gets, and how the resource is stored."""

from __future__ import annotations

from pydantic import MISSING, ConfigDict, Field, RootModel

import models
from core import filters
from core.filters import FieldType
from resources.fields import _fields
from resources.resource import Resource
from schemas import Answer, Body, Id, Line, Moment, Prose, Skipped


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


class CharactersAdded(Answer):
    added: list[CharacterEntity]
    skipped: list[Skipped]


class CharactersUpdated(Answer):
    updated: list[CharacterEntity]
    not_found: list[int]


class CharacterName(RootModel[str]):
    """The name of a character."""


CHARACTER_FIELDS: dict[str, filters.Field] = _fields(
    ("id", FieldType.INTEGER),
    ("name", FieldType.TEXT),
    ("description", FieldType.TEXT),
    ("movie_id", FieldType.INTEGER),
)


CHARACTERS = Resource(
    name="characters",
    singular="character",
    table=models.characters,
    label="name",
    searched=("name", "description"),
    fields=CHARACTER_FIELDS,
    defaults={"name": None, "description": None, "movie_id": None},
    derived={},
)
