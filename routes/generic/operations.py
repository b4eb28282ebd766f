"""The operations of every resource: each one declared once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypedDict

import schemas
from resources.jobs import Job
from resources.registry import RESOURCES, children_of, found_model
from resources.resource import Resource
from routes.generic import handlers
from routes.http import queries
from routes.http.limit_groups import LimitGroup
from routes.http.operation import Operations

ALL_OR_NONE = "One transaction. If the caller may not change every row, the response is a 403 and nothing changes."


class _Bulk(TypedDict):
    """What the operations on many rows have in common."""

    signed_in: bool
    max_body_bytes: int
    limit_group: LimitGroup


class _Create(TypedDict):
    """What the operations that create one row have in common."""

    body: Any
    idempotent: bool
    answer_headers: tuple[str, ...]
    signed_in: bool


class _Edit(TypedDict):
    """What PUT and PATCH have in common."""

    answer_headers: tuple[str, ...]
    signed_in: bool
    if_match: bool
    errors: tuple[int, ...]


def operations_of(resource: Resource) -> Operations:
    """Return the operations of a resource, tagged with its name."""
    made = Operations(resource.name)
    _declare_lists(made, resource)
    if resource.has_owner:
        _declare_lists_of_users(made, resource)
    _declare_bulk(made, resource)
    if resource.generated:
        _declare_generation(made, resource)
    _declare_single(made, resource)
    return made


def _rows(model: Any) -> Any:
    return list[model]


def _create(resource: Resource) -> _Create:
    return _Create(body=resource.body, idempotent=True, answer_headers=("Location", "ETag"), signed_in=True)


def _create_errors(resource: Resource) -> tuple[int, ...]:
    return (409,) if resource.changed_by == "owner" else (403, 409)


def _declare_lists(made: Operations, resource: Resource) -> None:
    name, fields = resource.name, resource.fields
    made.listing(f"/{name}", f"List {name}", _rows(resource.entity), filters=fields)(
        partial(handlers.list_all, resource)
    )
    made.post(
        f"/{name}",
        f"Add {resource.a_singular}",
        {201: resource.entity},
        errors=_create_errors(resource),
        **_create(resource),
    )(partial(handlers.create, resource))
    made.get(
        f"/{name}/count",
        f"Count {name}",
        {200: schemas.Count},
        filters=fields,
        answer_headers=("Stream-Position",),
    )(partial(handlers.count, resource))
    made.listing(
        f"/{name}/names", f"List the {resource.label}s of {name}", _rows(resource.label_model), filters=fields
    )(partial(handlers.names, resource))


def _declare_lists_of_users(made: Operations, resource: Resource) -> None:
    name, fields, entities = resource.name, resource.fields, _rows(resource.entity)
    made.listing(f"/{name}/user", f"List my {name}", entities, filters=fields, signed_in=True)(
        partial(handlers.list_mine, resource)
    )
    made.listing(
        f"/{name}/username/{{username}}",
        f"List a user's {name}, by user name",
        entities,
        filters=fields,
        errors=(404,),
    )(partial(handlers.list_by_username, resource))
    made.listing(f"/users/{{user_id}}/{name}", f"List a user's {name}", entities, filters=fields, errors=(404,))(
        partial(handlers.list_by_user, resource)
    )
    made.post(
        f"/users/{{user_id}}/{name}",
        f"Add {resource.a_singular} as this user",
        {201: resource.entity},
        errors=(403, 409),
        **_create(resource),
    )(partial(handlers.create, resource))


def _declare_bulk(made: Operations, resource: Resource) -> None:
    name = resource.name
    bulk = _Bulk(signed_in=True, max_body_bytes=handlers.MAX_BULK_BODY_BYTES, limit_group=LimitGroup.BULK)
    made.post(
        f"/{name}/bulk",
        f"Add many {name}",
        {201: resource.added},
        description="One transaction: all rows or none, unless `on_error=skip`. Subscribers get one `add_bulk` event.",
        body_schema=_rows(resource.body),
        idempotent=True,
        errors=_create_errors(resource),
        **bulk,
    )(partial(handlers.add_bulk, resource))
    made.patch(
        f"/{name}/bulk",
        f"Change many {name}",
        {200: resource.updated},
        description=ALL_OR_NONE,
        body_schema=_rows(resource.bulk_patch),
        errors=(403, 409),
        **bulk,
    )(partial(handlers.edit_bulk, resource))
    made.delete(
        f"/{name}/bulk",
        f"Delete many {name}",
        {200: schemas.Deleted},
        description=ALL_OR_NONE,
        errors=(403,),
        **bulk,
    )(partial(handlers.delete_bulk, resource))
    made.delete(
        f"/{name}/bulk/{{start_id}}/{{end_id}}",
        f"Delete a range of {name}",
        {200: schemas.Deleted},
        description=f"Both ends are included; a range of more than {schemas.MAX_BULK_ROWS:,} ids is a 409.",
        errors=(403, 409),
        limit_group=LimitGroup.BULK,
        signed_in=True,
    )(partial(handlers.delete_range, resource))


def _declare_generation(made: Operations, resource: Resource) -> None:
    made.post(
        f"/{resource.name}/generate/{{number}}",
        f"Generate {resource.name}",
        {202: Job},
        description="Queues a job that adds realistic rows; subscribers see each batch when it is stored.",
        idempotent=True,
        errors=(429,),
        answer_headers=("Location",),
        limit_group=LimitGroup.BULK,
        signed_in=True,
    )(partial(handlers.generate, resource))


def _declare_single(made: Operations, resource: Resource) -> None:
    path, one = f"/{resource.name}/{{id}}", resource.a_singular
    included = [child.name for child, _ in children_of(resource)]
    found = {200: found_model(resource)}
    if included:
        query = queries.include_query(resource.singular, included)
        made.get(path, f"Get {one}", found, query=query, if_none_match=True, errors=(404,))(
            partial(handlers.get_including, resource)
        )
    else:
        made.get(path, f"Get {one}", found, if_none_match=True, errors=(404,))(partial(handlers.get_one, resource))
    edit = _Edit(answer_headers=("ETag",), signed_in=True, if_match=True, errors=(403, 404, 409, 412))
    made.put(path, f"Replace {one}", {200: resource.entity}, body=resource.body, **edit)(
        partial(handlers.replace, resource)
    )
    made.patch(path, f"Change {one}", {200: resource.entity}, body=resource.patch, **edit)(
        partial(handlers.patch, resource)
    )
    made.delete(path, f"Delete {one}", signed_in=True, if_match=True, errors=(403, 404, 412))(
        partial(handlers.delete, resource)
    )


RESOURCE_OPERATIONS: Sequence[Operations] = [operations_of(resource) for resource in RESOURCES]
