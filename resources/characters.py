"""Characters: each has at most one movie and one actor, and stays when these are deleted."""

from __future__ import annotations

import models
from resources.actors import ACTORS
from resources.movies import MOVIES
from resources.resource import Parent, Resource
from schemas import Body, Id, Line, Prose, examples


class CharacterBody(Body):
    """A character as clients write it. PUT replaces all of it: a missing field takes its default."""

    model_config = examples({"name": "Harry Lime", "description": "Sells penicillin.", "movie_id": 7})

    name: Line
    description: Prose | None = None
    movie_id: Id | None = None
    actor_id: Id | None = None


CHARACTERS = Resource(
    table=models.characters,
    body=CharacterBody,
    singular="character",
    label="name",
    searched=("name", "description"),
    example_change={"description": "Sold penicillin."},
    parents=(
        Parent("movie_id", MOVIES, count="characters_count"),
        Parent("actor_id", ACTORS, count="characters_count"),
    ),
    generated=True,
    transferred=True,
    has_history=True,
)
