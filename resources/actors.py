"""Actors: people whom moderators and admins describe. Several may have the same name."""

from __future__ import annotations

import models
from resources.countries import CountryCode
from resources.resource import Resource
from schemas import Body, IsoDate, Name, Prose, examples


class ActorBody(Body):
    """An actor. PUT replaces all of it: a missing field takes its default."""

    model_config = examples(
        {
            "name": "Alida Valli",
            "birth_date": "1921-05-31",
            "country": "IT",
            "biography": "Played in more than a hundred films.",
        }
    )

    name: Name
    birth_date: IsoDate | None = None
    country: CountryCode | None = None
    biography: Prose | None = None


ACTORS = Resource(
    table=models.actors,
    body=ActorBody,
    singular="actor",
    label="name",
    searched=("name", "biography"),
    example_change={"biography": "Played in more than a hundred films, and on the stage."},
    changed_by="staff",
    generated=True,
    transferred=True,
    has_history=True,
)
