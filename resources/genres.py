"""Genres: a vocabulary that moderators and admins maintain."""

from __future__ import annotations

import models
from resources.resource import Resource
from schemas import Body, Name, Prose, examples


class GenreBody(Body):
    """A genre. Its name is unique, ignoring case. PUT replaces all of it: a missing field takes its default."""

    model_config = examples({"name": "Noir", "description": "Crime, told in shadows."})

    name: Name
    description: Prose | None = None


GENRES = Resource(
    table=models.genres,
    body=GenreBody,
    singular="genre",
    label="name",
    searched=("name", "description"),
    example_change={"description": "Crime, told in shadows and voice-over."},
    changed_by="staff",
    transferred=True,
    has_history=True,
)
