"""The handlers of the operations that every resource has."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Sequence
from typing import Any

import orjson
from pydantic import BaseModel
from starlette.responses import Response

import schemas
from core.errors import ContentTooLarge, FieldProblem, Forbidden, InvalidInput, NotFound, Suggestions, listed
from core.network.addresses import network_of
from repository import cascades, jobs
from repository.engine.transaction import Transaction
from repository.generic import lists, writes
from repository.generic.dependants import TooManyDependants
from repository.generic.idempotency import StoredResponse
from repository.generic.lists import ListRequest
from repository.generic.writes import Stored
from repository.jobs import JobOrder
from resources.registry import MAX_INCLUDED, included_in, links_to
from resources.resource import Link, Resource
from routes.accounts.access import listed_account
from routes.http import parsing, queries, rendering
from routes.http.operation import AnyCall, Call
from services.movie_parts import Plan

MAX_BULK_BODY_BYTES = 10 * 1024 * 1024  # enough for 10,000 rows of 1,000 bytes each
DEFAULT_BATCH = 1_000
CHUNKS_PER_SECOND_AT_A_RATE = 5
MAX_PACED_SECONDS = 24 * 3600  # The longest duration of a job with a `rate`.
SEED_BITS = 32


# --- reading


async def list_all(
    resource: Resource, call: Call[object, queries.ListQuery, None], user_id: int | None = None
) -> Response:
    request = queries.list_request(call, resource.fields, user_id)
    return rendering.page(call, await lists.page_of(call.database, resource, request))


async def list_mine(resource: Resource, call: Call[None, queries.ListQuery, None]) -> Response:
    return await list_all(resource, call, call.me.user_id)


async def list_by_username(resource: Resource, call: Call[queries.ByUsername, queries.ListQuery, None]) -> Response:
    return await list_all(resource, call, (await listed_account(call.database, call.path.username))["id"])


async def list_by_user(resource: Resource, call: Call[queries.ByUserId, queries.ListQuery, None]) -> Response:
    return await list_all(resource, call, (await listed_account(call.database, call.path.user_id))["id"])


async def list_linked(owner: Resource, link: Link, call: Call[queries.ById, queries.ListQuery, None]) -> Response:
    """Respond with the rows of `owner` that link to a row."""
    return await _linked(owner, link, call)


async def list_linked_by_code(
    owner: Resource, link: Link, call: Call[queries.ByIdOrCode, queries.ListQuery, None]
) -> Response:
    return await _linked(owner, link, call)


async def _linked(
    owner: Resource, link: Link, call: Call[queries.ById | queries.ByIdOrCode, queries.ListQuery, None]
) -> Response:
    found = await _find(link.resource, call)
    linked = found["id"] if link.table is not None else found[link.shown]
    request = dataclasses.replace(queries.list_request(call, owner.fields), link=link, linked=linked)
    return rendering.page(call, await lists.page_of(call.database, owner, request))


async def names(resource: Resource, call: Call[None, queries.ListQuery, None]) -> Response:
    request = queries.list_request(call, resource.fields)
    return rendering.labels_page(call, await lists.labels_of(call.database, resource, request))


async def count(resource: Resource, call: Call[None, queries.CountQuery, None]) -> Response:
    found = await lists.count_of(call.database, resource, ListRequest(filter=call.filter, text=call.query.q))
    headers = {"Cache-Control": "no-cache", **rendering.position(found.head)}
    return rendering.JSONResponse({"count": found.total}, headers=headers)


async def _find(resource: Resource, call: Call[queries.ById | queries.ByIdOrCode, object, None]) -> dict[str, Any]:
    found = await lists.find(call.database, resource, call.path.id)
    if found is None:
        raise NotFound(f"There is no {resource.singular} {call.path.id}")
    return found


async def get_one(resource: Resource, call: Call[queries.ById, None, None]) -> Response:
    found = await _find(resource, call)
    return rendering.entity(call, found["version"], orjson.dumps(rendering.selected(call, found)))


async def get_by_id_or_code(resource: Resource, call: Call[queries.ByIdOrCode, None, None]) -> Response:
    found = await _find(resource, call)
    return rendering.entity(call, found["version"], orjson.dumps(rendering.selected(call, found)))


async def get_including(resource: Resource, call: Call[queries.ById, queries.IncludeQuery, None]) -> Response:
    found = await _find(resource, call)
    shown = dict(rendering.selected(call, found))
    for name, (child, parent) in included_in(resource).items():
        if name in call.query.names:
            shown[name] = await lists.find_by(call.database, child, parent.column, found["id"], MAX_INCLUDED)
    return rendering.entity(call, found["version"], orjson.dumps(shown))


# --- writing one


async def create(resource: Resource, call: Call[queries.ByUserId | None, None, BaseModel]) -> Response:
    if call.path is not None and call.path.user_id != call.me.user_id:
        raise Forbidden("Only the user with this id can do this")
    resource.require_may_create(call.me)  # reject early; the transaction checks again
    fields = call.body.model_dump()

    async def work(tx: Transaction) -> StoredResponse:
        stored = await writes.add(tx, resource, call.me, fields)
        location = f"{call.prefix}/{resource.name}/{stored.id}"
        tag = rendering.tag(stored.version, stored.body)
        return StoredResponse(201, stored.body, {"Location": location, "ETag": tag})

    return await rendering.write_once(call, work)


async def _edit(resource: Resource, call: Call[queries.ById, None, BaseModel], fields: dict[str, Any]) -> Response:
    versions = rendering.if_match(call)
    queued: list[dict[str, Any]] = []

    async def at_once(tx: Transaction) -> Stored:
        return await writes.edit(tx, resource, call.me, call.path.id, fields, versions)

    async def with_job(tx: Transaction) -> Stored:
        queued.clear()

        async def defer(number: int) -> None:
            limits = _job_limits(call)
            queued.append(await cascades.order_renaming(tx, resource, call.me, call.path.id, number, *limits))

        return await writes.edit(tx, resource, call.me, call.path.id, fields, versions, defer)

    try:
        stored = await call.write(at_once)
    except (TooManyDependants, ContentTooLarge):
        if not links_to(resource):
            raise
        stored = await call.write(with_job)
    response = rendering.tagged(stored.version, stored.body)
    if queued:
        response.headers["Link"] = f'<{call.prefix}/jobs/{queued[0]["id"]}>; rel="status"'
    return response


async def replace(resource: Resource, call: Call[queries.ById, None, BaseModel]) -> Response:
    return await _edit(resource, call, call.body.model_dump())


async def patch(resource: Resource, call: Call[queries.ById, None, BaseModel]) -> Response:
    return await _edit(resource, call, call.body.model_dump(exclude_unset=True))


async def delete(resource: Resource, call: Call[queries.ById, None, None]) -> Response:
    versions = rendering.if_match(call)
    try:
        await call.write(lambda tx: writes.remove(tx, resource, call.me, call.path.id, versions))
    except (TooManyDependants, ContentTooLarge):
        limits = _job_limits(call)
        job = await call.write(
            lambda tx: cascades.order_deletion(tx, resource, call.me, call.path.id, versions, *limits)
        )
        return rendering.JSONResponse(job, 202, {"Location": f"{call.prefix}/jobs/{job['id']}"})
    return Response(status_code=204)


# --- writing many


async def add_bulk(resource: Resource, call: Call[None, queries.OnErrorQuery, queries.Rows]) -> Response:
    resource.require_may_create(call.me)  # reject before 10,000 rows are validated; the transaction checks again
    skips = call.query.on_error == "skip"
    rows = await parsing.check_rows(resource.body, call.body.root, skips_invalid=skips)
    if not skips:
        rows.require_all()
    indexes, items = list(rows.valid), list(rows.valid.values())
    slices, suggestions = parsing.Slices(), Suggestions()
    invalid: dict[int, bytes] = {}  # encoded in slices, before the transaction, because there may be 100,000 problems
    for index, problems in rows.invalid.items():
        await slices.pause_when_due()
        invalid[index] = _skipped(index, problems, suggestions)

    async def work(tx: Transaction) -> StoredResponse:
        added = await writes.add_bulk(tx, resource, call.me, items, skip_conflicts=skips)
        skipped = dict(invalid)
        for position, refusals in added.refused.items():
            index = indexes[position]
            skipped[index] = _skipped(index, [each.problem(index) for each in refusals], suggestions)
        reported = b",".join(skipped[index] for index in sorted(skipped))
        return StoredResponse(201, b'{"added":[%s],"skipped":[%s]}' % (b",".join(added.encoded), reported))

    return await rendering.write_once(call, work)


def _skipped(index: int, problems: Sequence[FieldProblem], suggestions: Suggestions) -> bytes:
    return orjson.dumps({"index": index, "detail": listed(problems, suggestions)})


async def edit_bulk(resource: Resource, call: Call[None, None, queries.Rows]) -> Response:
    rows = await parsing.check_rows(resource.bulk_patch, call.body.root, exclude_unset=True)
    rows.require_all()
    edits = [(fields.pop("id"), fields) for fields in rows.valid.values()]
    result = await call.write(lambda tx: writes.edit_bulk(tx, resource, call.me, edits))
    parts = b",".join(result.done), orjson.dumps(result.not_found)
    return rendering.JSONResponse(b'{"updated":[%s],"not_found":%s}' % parts)


async def _delete_many(resource: Resource, call: Call[object, None, object], ids: Sequence[int]) -> Response:
    result = await call.write(lambda tx: writes.remove_bulk(tx, resource, call.me, ids))
    return rendering.JSONResponse({"deleted": result.done, "not_found": result.not_found})


async def delete_bulk(resource: Resource, call: Call[None, None, schemas.BulkIds]) -> Response:
    return await _delete_many(resource, call, call.body.ids)


async def delete_range(resource: Resource, call: Call[queries.ByRange, None, None]) -> Response:
    return await _delete_many(resource, call, range(call.path.start_id, call.path.end_id + 1))


async def generate(resource: Resource, call: Call[queries.ByNumber, queries.GenerateQuery, None]) -> Response:
    resource.require_may_create(call.me)  # reject early; the job checks again
    query, number = call.query, call.path.number
    plan = Plan(query.parts)
    total = plan.rows_of(number)
    if total > schemas.MAX_GENERATED_ROWS:
        most = plan.movies_in(schemas.MAX_GENERATED_ROWS)
        rows = f"{resource.name} with {', '.join(plan.parts)}: a job has at most {schemas.MAX_GENERATED_ROWS} rows"
        raise InvalidInput([FieldProblem(("path", "number"), f"Expected at most {most} {rows}", "too_many_rows")])
    batch_size = query.batch_size or DEFAULT_BATCH
    if query.rate is not None and query.batch_size is None:
        batch_size = min(DEFAULT_BATCH, max(1, int(query.rate / CHUNKS_PER_SECOND_AT_A_RATE)))
    if query.rate is not None and total > query.rate * MAX_PACED_SECONDS:
        least = math.ceil(total / MAX_PACED_SECONDS * 100) / 100
        message = f"Expected at least {least:g} rows per second to store {total} rows within a day"
        raise InvalidInput([FieldProblem(("query", "rate"), message, "too_slow")])
    order = JobOrder(
        kind=f"generate_{resource.name}",
        total=total,
        seed=query.seed if query.seed is not None else secrets.randbits(SEED_BITS),
        batch_size=max(batch_size, plan.most),  # a row is stored together with the rows that belong to it
        rate=query.rate,
        parts=plan.parts,
    )

    async def work(tx: Transaction) -> StoredResponse:
        job = await jobs.create(tx, call.me, order, *_job_limits(call))
        return StoredResponse(202, orjson.dumps(job), {"Location": f"{call.prefix}/jobs/{job['id']}"})

    return await rendering.write_once(call, work)


def _job_limits(call: AnyCall) -> tuple[int | None, jobs.Origin | None]:
    """Return the limit for the generated rows of a user, and the network that the job counts towards."""
    services = call.services
    # An unknown address, such as that of a Unix socket, belongs to no network.
    is_counted = services.limits.is_on and call.address
    origin = jobs.Origin(network_of(call.address or ""), services.users_per_address) if is_counted else None
    return services.generated_rows_per_day, origin
