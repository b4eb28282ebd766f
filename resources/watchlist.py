"""Watchlists: the movies that a user plans to watch or has watched. Only their owner sees them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

import models
from resources.movies import MOVIES
from resources.resource import Parent, Resource
from schemas import NO_NUL, Body, Id, examples, normal

MAX_NOTES_LENGTH = 1_000  # short enough that the entries about a popular movie can be deleted together with the movie
WATCHED = "watched"

Status = Literal["planned", "watching", "watched", "dropped"]
Notes = Annotated[str, Field(max_length=MAX_NOTES_LENGTH, pattern=NO_NUL), normal(MAX_NOTES_LENGTH)]


class WatchlistBody(Body):
    """A watchlist entry as its owner writes it. PUT replaces all of it: a missing field takes its default."""

    model_config = examples({"movie_id": 7, "status": "planned", "notes": "With Anna, on a big screen."})

    movie_id: Id
    status: Status = "planned"
    notes: Notes | None = None


WATCHLIST = Resource(
    table=models.watchlist,
    body=WatchlistBody,
    singular="watchlist entry",
    label="movie_id",
    searched=(),
    example_change={"status": "watched"},
    audience="self",
    parents=(Parent("movie_id", MOVIES, takes_children=True),),
    has_own_routes=True,
)
