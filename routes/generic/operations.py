"""Declarations of the operations that every resource has."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from starlette.responses import Response

import schemas
from repository.generic.lists import ordering_of
from resources.jobs import Job
from resources.registry import RESOURCES, children_of, found_model, included_in, links_to
from resources.resource import Resource
from routes.generic import handlers, history, imports, transfers
from routes.http import queries
from routes.http.limit_groups import LimitGroup
from routes.http.operation import DELETED, Details, Handler, Operations

ALL_OR_NONE = (
    "Runs in one transaction. If the caller may not change one of the rows, the response is a 403 and nothing changes."
)
CREATE = Details(idempotent=True, answer_headers=("Location", "ETag"), signed_in=True)
EDIT = Details(answer_headers=("ETag",), signed_in=True, if_match=True, errors=(403, 404, 409))
BULK = Details(signed_in=True, is_bulk=True, max_body_bytes=handlers.MAX_BULK_BODY_BYTES, limit_group=LimitGroup.BULK)

GENERATE = Details(
    description="Queues a job that adds realistic rows. Subscribers receive each batch as soon as it is stored.",
    idempotent=True,
    answer_headers=("Location",),
    limit_group=LimitGroup.BULK,
    signed_in=True,
)


def operations_of(resource: Resource) -> Operations:
    """Return the operations of a resource, tagged with its name."""
    made = Operations(resource.name)
    _declare_lists(made, resource)
    if resource.has_owner:
        _declare_lists_of_users(made, resource)
    if not resource.has_own_writes:
        _declare_bulk(made, resource)
    if resource.generated:
        _declare_generation(made, resource)
    if resource.transferred:
        transfers.declare(made, resource)
        imports.declare(made, resource)
    _declare_single(made, resource)
    _declare_linked(made, resource)
    if resource.has_history:
        history.declare(made, resource)
    return made


def _by_writers(resource: Resource) -> str:
    """Return the suffix of a summary. The suffix is empty unless only some groups may write the resource."""
    return f" ({resource.writers} only)" if resource.writers else ""


def _bound_to(resource: Resource) -> Callable[[Callable[..., Awaitable[Response]]], Handler]:
    return lambda handler: partial(handler, resource)


def _rows(model: Any) -> Any:
    return list[model]


def _create_errors(resource: Resource) -> tuple[int, ...]:
    return (403, 409) if resource.writers else (409,)


def _declare_lists(made: Operations, resource: Resource) -> None:
    by, only = _bound_to(resource), _by_writers(resource)
    name, path, filtered = resource.name, f"/{resource.name}", Details(filters=resource.fields)
    entities = _rows(resource.entity)
    order = ordering_of(resource)
    made.listing(path, f"List {name}", entities, order, filtered)(by(handlers.list_all))
    if not resource.has_own_writes:
        added, errors = {201: resource.entity}, _create_errors(resource)
        made.post(path, f"Add {resource.a_singular}{only}", added, CREATE, body=resource.body, errors=errors)(
            by(handlers.create)
        )
    counted = {200: schemas.Count}
    made.get(f"{path}/count", f"Count {name}", counted, filtered, answer_headers=("Stream-Position",))(
        by(handlers.count)
    )
    if resource.label:
        labels, summary = _rows(resource.label_model), f"List the {resource.label}s of {name}"
        made.listing(f"{path}/names", summary, labels, order, filtered)(by(handlers.names))


def _declare_lists_of_users(made: Operations, resource: Resource) -> None:
    by = _bound_to(resource)
    name, entities, filtered = resource.name, _rows(resource.entity), Details(filters=resource.fields)
    of_user, by_username = f"/users/{{user_id}}/{name}", f"/{name}/username/{{username}}"
    order = ordering_of(resource)
    made.listing(f"/{name}/user", f"List my {name}", entities, order, filtered, signed_in=True)(by(handlers.list_mine))
    made.listing(by_username, f"List a user's {name}, by user name", entities, order, filtered, errors=(404,))(
        by(handlers.list_by_username)
    )
    made.listing(of_user, f"List a user's {name}", entities, order, filtered, errors=(404,))(by(handlers.list_by_user))
    if not resource.has_own_writes:
        added, summary = {201: resource.entity}, f"Add {resource.a_singular} as this user"
        made.post(of_user, summary, added, CREATE, body=resource.body, errors=(403, 409))(by(handlers.create))


def _declare_bulk(made: Operations, resource: Resource) -> None:
    by, only = _bound_to(resource), _by_writers(resource)
    name, path = resource.name, f"/{resource.name}/bulk"
    made.post(
        path,
        f"Add many {name}{only}",
        {201: resource.added},
        BULK,
        description="Adds all rows in one transaction, or none, unless `on_error=skip`. Subscribers receive `add_bulk` "
        "events.",
        body_schema=_rows(resource.body),
        idempotent=True,
        errors=_create_errors(resource),
    )(by(handlers.add_bulk))
    edits, changed = _rows(resource.bulk_patch), {200: resource.updated}
    made.patch(
        path,
        f"Change many {name}{only}",
        changed,
        BULK,
        description=ALL_OR_NONE,
        body_schema=edits,
        errors=(403, 409),
    )(by(handlers.edit_bulk))
    deleted = {200: schemas.Deleted}
    errors = (403, 409) if children_of(resource) or links_to(resource) else (403,)
    made.delete(path, f"Delete many {name}{only}", deleted, BULK, description=ALL_OR_NONE, errors=errors)(
        by(handlers.delete_bulk)
    )
    about = (
        f"Both ends are included. A range that is reversed or has more than {schemas.MAX_BULK_ROWS:,} ids is rejected "
        "with a 422."
    )
    made.delete(
        f"{path}/{{start_id}}/{{end_id}}",
        f"Delete a range of {name}{only}",
        deleted,
        BULK,
        description=about,
        errors=(403, 409, 413),
    )(by(handlers.delete_range))


def _declare_generation(made: Operations, resource: Resource) -> None:
    names = resource.generated_with
    query = queries.generate_query(resource.singular, names) if names else queries.GenerateQuery
    errors = (403, 429) if resource.writers else (429,)
    summary = f"Generate {resource.name}{_by_writers(resource)}"
    path = f"/{resource.name}/generate/{{number}}"
    made.post(path, summary, {202: Job}, GENERATE, query_model=query, errors=errors)(
        partial(handlers.generate, resource)
    )


def _declare_single(made: Operations, resource: Resource) -> None:
    by, only = _bound_to(resource), _by_writers(resource)
    path, one, changed = f"/{resource.name}/{{id}}", resource.a_singular, {200: resource.entity}
    included = list(included_in(resource))
    get = Details(if_none_match=True, errors=(404,), members=resource.columns)
    if included:
        query = queries.include_query(resource.singular, included)
        made.get(path, f"Get {one}", {200: found_model(resource)}, get, query_model=query)(by(handlers.get_including))
    elif resource.code is not None:
        made.get(path, f"Get {one}, by id or code", changed, get)(by(handlers.get_by_id_or_code))
    else:
        made.get(path, f"Get {one}", changed, get)(by(handlers.get_one))
    if resource.has_own_writes:
        return
    # The name of a linked row is also in the rows that show it.
    is_shown = bool(links_to(resource))
    renamed = Details(errors=(403, 404, 409, 413, 429), answer_headers=("ETag", "Link"))
    edit = EDIT | renamed if is_shown else EDIT
    made.put(path, f"Replace {one}{only}", changed, edit, body=resource.replacement)(by(handlers.replace))
    made.patch(path, f"Change {one}{only}", changed, edit, body=resource.patch)(by(handlers.patch))
    delete = Details(signed_in=True, if_match=True, errors=(403, 404, 413))
    answers = DELETED
    if is_shown or children_of(resource):
        answers = {204: None, 202: Job}
        delete |= Details(
            description=f"If very many rows depend on the {resource.singular}, the response is a 202: a job deletes or "
            f"releases these rows first, and then deletes the {resource.singular}.",
            answer_headers=("Location",),
            errors=(403, 404, 429),
        )
    made.delete(path, f"Delete {one}{only}", answers, delete)(by(handlers.delete))


def _declare_linked(made: Operations, resource: Resource) -> None:
    one = resource.a_singular
    for owner, link in links_to(resource):
        path, summary = f"/{resource.name}/{{id}}/{owner.name}", f"List the {owner.name} of {one}"
        details = Details(filters=owner.fields, errors=(404,))
        handler = partial(handlers.list_linked if resource.code is None else handlers.list_linked_by_code, owner, link)
        made.listing(path, summary, _rows(owner.entity), ordering_of(owner), details)(handler)


RESOURCE_OPERATIONS: Sequence[Operations] = [
    operations_of(resource) for resource in RESOURCES if not resource.has_own_routes
]
