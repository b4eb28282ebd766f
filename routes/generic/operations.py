"""The operations of every generic resource: each one declared once."""

from __future__ import annotations

from functools import partial
from typing import TypedDict

import schemas
from resources.characters import (
    CHARACTERS,
    CharacterBody,
    CharacterBulkPatch,
    CharacterEntity,
    CharacterName,
    CharacterPatch,
    CharactersAdded,
    CharactersUpdated,
)
from resources.jobs import Job
from resources.movies import (
    MOVIES,
    MovieBody,
    MovieBulkPatch,
    MovieEntity,
    MoviePatch,
    MoviesAdded,
    MoviesUpdated,
    MovieTitle,
    MovieWithCharacters,
)
from routes.generic import handlers
from routes.http.limit_groups import LimitGroup
from routes.http.operation import Operations

ALL_OR_NONE = "One transaction. If the caller may not change every row, the response is a 403 and nothing changes."


class _Bulk(TypedDict):
    """What the operations on many rows declare alike."""

    signed_in: bool
    max_body_bytes: int
    limit_group: LimitGroup


def operations_of(kind: handlers.Kind) -> Operations:
    """Return the operations of a resource, tagged with its name."""
    resource = kind.resource
    name, one = resource.name, resource.singular
    made = Operations(name)
    bulk = _Bulk(signed_in=True, max_body_bytes=handlers.MAX_BULK_BODY_BYTES, limit_group=LimitGroup.BULK)

    made.listing(f"/{name}", f"List {name}", kind.entities, filters=resource.fields)(partial(handlers.list_all, kind))
    made.post(
        f"/{name}",
        f"Add a {one}",
        {201: kind.entity},
        body=kind.body,
        idempotent=True,
        errors=(409,),
        answer_headers=("Location", "ETag"),
        signed_in=True,
    )(partial(handlers.create, kind))
    made.get(
        f"/{name}/count",
        f"Count {name}",
        {200: schemas.Count},
        filters=resource.fields,
        answer_headers=("Stream-Position",),
    )(partial(handlers.count, kind))
    made.listing(f"/{name}/names", f"List the {resource.label}s of {name}", kind.labels, filters=resource.fields)(
        partial(handlers.names, kind)
    )
    made.listing(f"/{name}/user", f"List my {name}", kind.entities, filters=resource.fields, signed_in=True)(
        partial(handlers.list_mine, kind)
    )
    made.listing(
        f"/{name}/username/{{username}}",
        f"List a user's {name}, by user name",
        kind.entities,
        filters=resource.fields,
        errors=(404,),
    )(partial(handlers.list_by_username, kind))
    made.listing(
        f"/users/{{user_id}}/{name}", f"List a user's {name}", kind.entities, filters=resource.fields, errors=(404,)
    )(partial(handlers.list_by_user, kind))
    made.post(
        f"/users/{{user_id}}/{name}",
        f"Add a {one} as this user",
        {201: kind.entity},
        body=kind.body,
        idempotent=True,
        errors=(403, 409),
        answer_headers=("Location", "ETag"),
        signed_in=True,
    )(partial(handlers.create, kind))
    made.post(
        f"/{name}/bulk",
        f"Add many {name}",
        {201: kind.added},
        description="One transaction: all rows or none, unless `on_error=skip`. Subscribers get one `add_bulk` event.",
        body_schema=kind.bodies,
        idempotent=True,
        errors=(409,),
        **bulk,
    )(partial(handlers.add_bulk, kind))
    made.patch(
        f"/{name}/bulk",
        f"Change many {name}",
        {200: kind.updated},
        description=ALL_OR_NONE,
        body_schema=kind.bulk_patches,
        errors=(403, 409),
        **bulk,
    )(partial(handlers.edit_bulk, kind))
    made.delete(
        f"/{name}/bulk",
        f"Delete many {name}",
        {200: schemas.Deleted},
        description=ALL_OR_NONE,
        errors=(403,),
        **bulk,
    )(partial(handlers.delete_bulk, kind))
    made.delete(
        f"/{name}/bulk/{{start_id}}/{{end_id}}",
        f"Delete a range of {name}",
        {200: schemas.Deleted},
        description=f"Both ends are included; a range of more than {schemas.MAX_BULK_ROWS:,} ids is a 409.",
        errors=(403, 409),
        limit_group=LimitGroup.BULK,
        signed_in=True,
    )(partial(handlers.delete_range, kind))
    made.post(
        f"/{name}/generate/{{number}}",
        f"Generate {name}",
        {202: Job},
        description="Queues a job that adds realistic rows; subscribers see each batch when it is stored.",
        idempotent=True,
        errors=(429,),
        answer_headers=("Location",),
        limit_group=LimitGroup.BULK,
        signed_in=True,
    )(partial(handlers.generate, kind))
    get = made.get(f"/{name}/{{id}}", f"Get a {one}", {200: kind.found}, if_none_match=True, errors=(404,))
    if kind.includes:
        get(partial(handlers.get_including, kind))
    else:
        get(partial(handlers.get_one, kind))
    made.put(
        f"/{name}/{{id}}",
        f"Replace a {one}",
        {200: kind.entity},
        body=kind.body,
        answer_headers=("ETag",),
        signed_in=True,
        if_match=True,
        errors=(403, 404, 409, 412),
    )(partial(handlers.replace, kind))
    made.patch(
        f"/{name}/{{id}}",
        f"Change a {one}",
        {200: kind.entity},
        body=kind.patch,
        answer_headers=("ETag",),
        signed_in=True,
        if_match=True,
        errors=(403, 404, 409, 412),
    )(partial(handlers.patch, kind))
    made.delete(f"/{name}/{{id}}", f"Delete a {one}", signed_in=True, if_match=True, errors=(403, 404, 412))(
        partial(handlers.delete, kind)
    )
    return made


MOVIE_KIND = handlers.Kind(
    MOVIES,
    MovieBody,
    MoviePatch,
    MovieBulkPatch,
    list[MovieBody],
    list[MovieBulkPatch],
    MovieEntity,
    list[MovieEntity],
    MovieWithCharacters,
    MoviesAdded,
    MoviesUpdated,
    list[MovieTitle],
    includes=True,
)
CHARACTER_KIND = handlers.Kind(
    CHARACTERS,
    CharacterBody,
    CharacterPatch,
    CharacterBulkPatch,
    list[CharacterBody],
    list[CharacterBulkPatch],
    CharacterEntity,
    list[CharacterEntity],
    CharacterEntity,
    CharactersAdded,
    CharactersUpdated,
    list[CharacterName],
    includes=False,
)
movies = operations_of(MOVIE_KIND)
characters = operations_of(CHARACTER_KIND)
