"""The operations on movies and characters: every one once, for both."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

import schemas
from resources.jobs import Job
from resources.registry import RESOURCES, found_model
from resources.resource import Resource
from routes.generic import handlers
from routes.http import queries
from routes.http.limit_groups import LimitGroup
from routes.http.operation import LIST_HEADERS, Operation


def operations(kind: handlers.Kind) -> list[Operation]:
    resource = kind.resource
    name, one = resource.name, resource.singular
    rows: Any = TypeAdapter(Annotated[list[Any], Field(max_length=schemas.MAX_BULK_ROWS)])

    def of(method: str, path: str, handler: Any, summary: str, answers: dict[int, Any], **more: Any) -> Operation:
        return Operation(method, path, partial(handler, kind), summary, name, answers, **more)

    def listed(path: str, handler: Any, summary: str, **more: Any) -> Operation:
        more = {"query_model": queries.ListQuery, "filters": resource.fields, **more}
        answers = {200: kind.entities}
        return of("GET", path, handler, summary, answers, answer_headers=LIST_HEADERS, **more)

    owned = resource.has_owner
    refused = () if resource.changed_by == "owner" else (403,)
    signed = {"signed_in": True}
    many = {
        "signed_in": True,
        "max_body_bytes": handlers.MAX_BULK_BODY_BYTES,
        "limit_group": LimitGroup.BULK,
    }
    editing = {"path_model": queries.ById, "signed_in": True, "if_match": True, "errors": (403, 404, 412)}
    found = [
        listed(f"/{name}", handlers.list_all, f"List {name}"),
        of(
            "POST",
            f"/{name}",
            handlers.create,
            f"Add a {one}",
            {201: kind.entity},
            body=TypeAdapter(kind.body),
            idempotent=True,
            errors=(*refused, 409),
            answer_headers=("Location", "ETag"),
            **signed,
        ),
        of(
            "GET",
            f"/{name}/count",
            handlers.count,
            f"Count {name}",
            {200: schemas.Count},
            query_model=queries.CountQuery,
            filters=resource.fields,
            answer_headers=("Stream-Position",),
        ),
        of(
            "GET",
            f"/{name}/names",
            handlers.names,
            f"List the {resource.label}s of {name}",
            {200: kind.labels},
            query_model=queries.ListQuery,
            filters=resource.fields,
            answer_headers=LIST_HEADERS,
        ),
        listed(f"/{name}/user", handlers.list_mine, f"List my {name}", **signed),
        listed(
            f"/{name}/username/{{username}}",
            handlers.list_by_username,
            f"List a user's {name}, by user name",
            path_model=queries.ByUsername,
            errors=(404,),
        ),
        listed(
            f"/users/{{user_id}}/{name}",
            handlers.list_by_user,
            f"List a user's {name}",
            path_model=queries.ByUserId,
            errors=(404,),
        ),
        of(
            "POST",
            f"/users/{{user_id}}/{name}",
            handlers.create_for_user,
            f"Add a {one} as this user",
            {201: kind.entity},
            path_model=queries.ByUserId,
            body=TypeAdapter(kind.body),
            idempotent=True,
            errors=(403, 409),
            answer_headers=("Location", "ETag"),
            **signed,
        ),
        of(
            "POST",
            f"/{name}/bulk",
            handlers.add_bulk,
            f"Add many {name}",
            {201: kind.added},
            description="One transaction: all rows or none, unless `on_error=skip`. Watchers get `add_bulk`.",
            query_model=queries.OnErrorQuery,
            body=rows,
            body_schema=kind.bodies,
            idempotent=True,
            errors=(*refused, 409),
            **many,
        ),
        of(
            "PATCH",
            f"/{name}/bulk",
            handlers.edit_bulk,
            f"Change many {name}",
            {200: kind.updated},
            description="One transaction; rows that are not the caller's are a 403 and nothing changes.",
            body=rows,
            body_schema=kind.bulk_patches,
            errors=(403, 409),
            **many,
        ),
        of(
            "DELETE",
            f"/{name}/bulk",
            handlers.delete_bulk,
            f"Delete many {name}",
            {200: schemas.Deleted},
            description="One transaction; rows that are not the caller's are a 403 and nothing changes.",
            body=TypeAdapter(schemas.BulkIds),
            errors=(403,),
            **many,
        ),
        of(
            "DELETE",
            f"/{name}/bulk/{{start_id}}/{{end_id}}",
            handlers.delete_range,
            f"Delete a range of {name}",
            {200: schemas.Deleted},
            description=f"Both ends are included; a range of more than {schemas.MAX_BULK_ROWS:,} ids is a 409.",
            path_model=queries.ByRange,
            errors=(403, 409),
            limit_group=LimitGroup.BULK,
            **signed,
        ),
        of(
            "POST",
            f"/{name}/generate/{{number}}",
            handlers.generate,
            f"Generate {name}",
            {202: Job},
            description="Queues a job that fills in believable rows; watchers see them as they are stored.",
            path_model=queries.ByNumber,
            query_model=queries.GenerateQuery,
            idempotent=True,
            errors=(429,),
            answer_headers=("Location",),
            limit_group=LimitGroup.BULK,
            **signed,
        ),
        of(
            "GET",
            f"/{name}/{{id}}",
            handlers.get_one,
            f"Get a {one}",
            {200: kind.found},
            path_model=queries.ById,
            query_model=queries.IncludeQuery if kind.includes else None,
            if_none_match=True,
            errors=(404,),
            answer_headers=("ETag",),
        ),
        of(
            "PUT",
            f"/{name}/{{id}}",
            handlers.replace,
            f"Replace a {one}",
            {200: kind.entity},
            body=TypeAdapter(kind.body),
            answer_headers=("ETag",),
            **{**editing, "errors": (403, 404, 409, 412)},
        ),
        of(
            "PATCH",
            f"/{name}/{{id}}",
            handlers.patch,
            f"Change a {one}",
            {200: kind.entity},
            body=TypeAdapter(kind.patch),
            answer_headers=("ETag",),
            **{**editing, "errors": (403, 404, 409, 412)},
        ),
        of("DELETE", f"/{name}/{{id}}", handlers.delete, f"Delete a {one}", {204: None}, **editing),
    ]
    # Rows without an owner are nobody's list, and what has no generator cannot be generated.
    left_out = (*(() if owned else ("/user",)), *(() if resource.generated else ("/generate/",)))
    return [each for each in found if not any(part in each.path for part in left_out)]


def _kind(resource: Resource) -> handlers.Kind:
    found = found_model(resource)
    return handlers.Kind(
        resource,
        resource.body,
        resource.patch,
        resource.bulk_patch,
        list[resource.body],  # type: ignore[name-defined]
        list[resource.bulk_patch],  # type: ignore[name-defined]
        resource.entity,
        list[resource.entity],  # type: ignore[name-defined]
        found,
        resource.added,
        resource.updated,
        list[resource.label_model],  # type: ignore[name-defined]
        includes=found is not resource.entity,
    )


OPERATIONS = [operation for resource in RESOURCES for operation in operations(_kind(resource))]
