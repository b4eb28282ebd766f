"""Genres: a vocabulary that moderators and admins maintain."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

import models
from resources.resource import Resource
from schemas import VISIBLE, Body, Prose, examples

GenreName = Annotated[str, Field(min_length=1, max_length=100, pattern=VISIBLE, description="Unique, ignoring case")]


class GenreBody(Body):
    """A genre. PUT replaces all of it: a missing field takes its default."""

    model_config = examples({"name": "Noir", "description": "Crime, told in shadows."})

    name: GenreName
    description: Prose | None = None


GENRES = Resource(
    table=models.genres,
    body=GenreBody,
    singular="genre",
    label="name",
    searched=("name", "description"),
    example_change={"description": "Crime, told in shadows and voice-over."},
    changed_by="staff",
)
