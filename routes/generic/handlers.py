"""What the operations on movies and characters do: every handler once, for both."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import BaseModel, TypeAdapter
from starlette.responses import Response

import schemas
from core.errors import Conflict, FieldProblem, Forbidden, InvalidInput, NotFound
from repository import jobs
from repository.accounts import users
from repository.engine.transaction import Transaction
from repository.generic import idempotency, lists, writes
from repository.generic.idempotency import StoredResponse
from repository.generic.lists import ListRequest
from repository.jobs import JobOrder
from resources.characters import CHARACTERS
from resources.resource import Resource
from routes.http import parsing, queries, rendering
from routes.http.operation import Call

MAX_INCLUDED = 1_000
MAX_BULK_BODY_BYTES = 10 * 1024 * 1024  # ten thousand rows of a thousand bytes
DEFAULT_BATCH = 1_000
CHUNKS_PER_SECOND_AT_A_RATE = 5
SEED_BITS = 32


@dataclass(frozen=True, slots=True)
class Kind:
    """A resource as this edge sees it: its models."""

    resource: Resource
    body: type[BaseModel]
    patch: type[BaseModel]
    bulk_patch: type[BaseModel]
    bodies: Any
    bulk_patches: Any
    entity: Any
    entities: Any
    found: Any
    added: Any
    updated: Any
    labels: Any
    includes: bool


def _page(kind: Kind, call: Call, user_id: int | None = None) -> ListRequest:
    query = call.query
    return ListRequest(
        filter=call.filter,
        text=query.q,
        sort=queries.sorting(kind.resource.fields, query.sort),
        offset=query.start,
        limit=query.limit,
        after=query.after,
        user_id=user_id,
    )


# --- reading


async def _list(kind: Kind, call: Call, user_id: int | None = None) -> Response:
    found = await lists.page_of(call.database, kind.resource, _page(kind, call, user_id))
    return rendering.page(call, found, last_id=found.rows[-1]["id"] if found.rows else None)


async def list_all(kind: Kind, call: Call) -> Response:
    return await _list(kind, call)


async def list_mine(kind: Kind, call: Call) -> Response:
    return await _list(kind, call, call.me.user_id)


async def list_by_username(kind: Kind, call: Call) -> Response:
    user = await users.find_by_username(call.database, call.path.username)
    if user is None or user["awaits_activation"]:
        raise NotFound(f"There is no user {call.path.username}")
    return await _list(kind, call, user["id"])


async def list_by_user(kind: Kind, call: Call) -> Response:
    user = await users.find(call.database, call.path.user_id)
    # Who has not followed the link yet is shown to nobody, as on /users.
    if user is None or user["awaits_activation"]:
        raise NotFound(f"There is no user {call.path.user_id}")
    return await _list(kind, call, call.path.user_id)


async def names(kind: Kind, call: Call) -> Response:
    found = await lists.labels_of(call.database, kind.resource, _page(kind, call))
    last_id = found.rows[-1][0] if found.rows else None
    return rendering.page(call, found, [label for _, label in found.rows], last_id=last_id)


async def count(kind: Kind, call: Call) -> Response:
    found = await lists.count_of(call.database, kind.resource, ListRequest(filter=call.filter, text=call.query.q))
    headers = {"Cache-Control": "no-cache", **rendering.position(found.head)}
    return rendering.JSONResponse({"count": found.total}, headers=headers)


async def get_one(kind: Kind, call: Call) -> Response:
    found = await lists.find(call.database, kind.resource, call.path.id)
    if found is None:
        raise NotFound(f"There is no {kind.resource.singular} {call.path.id}")
    if kind.includes and call.query.include == "characters":
        found["characters"] = await lists.find_by(call.database, CHARACTERS, "movie_id", found["id"], MAX_INCLUDED)
    return rendering.entity(call, found["version"], orjson.dumps(found))


# --- writing one


async def _create(kind: Kind, call: Call) -> Response:
    resource = kind.resource
    fields = call.body.model_dump()

    async def work(tx: Transaction) -> StoredResponse:
        async def add() -> StoredResponse:
            body = await writes.add(tx, resource, call.me, fields)
            location = f"{call.prefix}/{resource.name}/{orjson.loads(body)['id']}"
            return StoredResponse(201, body, {"Location": location, "ETag": rendering.tag(1, body)})

        return await idempotency.once(tx, key, add)

    key = rendering.claim(call)
    return rendering.answer(await call.database.write(work))


async def create(kind: Kind, call: Call) -> Response:
    return await _create(kind, call)


async def create_for_user(kind: Kind, call: Call) -> Response:
    if call.path.user_id != call.me.user_id:
        raise Forbidden("Only the user can do this")
    return await _create(kind, call)


async def _edit(kind: Kind, call: Call, fields: dict[str, Any]) -> Response:
    versions = rendering.if_match(call)

    async def work(tx: Transaction) -> bytes:
        return await writes.edit(tx, kind.resource, call.me, call.path.id, fields, versions)

    body = await call.database.write(work)
    return Response(body, 200, {"ETag": rendering.tag(orjson.loads(body)["version"], body)}, "application/json")


async def replace(kind: Kind, call: Call) -> Response:
    return await _edit(kind, call, call.body.model_dump())


async def patch(kind: Kind, call: Call) -> Response:
    return await _edit(kind, call, call.body.model_dump(exclude_unset=True))


async def delete(kind: Kind, call: Call) -> Response:
    versions = rendering.if_match(call)

    async def work(tx: Transaction) -> None:
        await writes.remove(tx, kind.resource, call.me, call.path.id, versions)

    await call.database.write(work)
    return Response(status_code=204)


# --- writing many


async def add_bulk(kind: Kind, call: Call) -> Response:
    good, bad = await parsing.validate_rows(TypeAdapter(kind.body), call.body)
    skips = call.query.on_error == "skip"
    if bad and not skips:
        problems = [problem for _, found in bad for problem in found]
        raise InvalidInput(problems[: parsing.MAX_PROBLEMS])
    items = [fields for _, fields in good]
    key = rendering.claim(call)

    async def work(tx: Transaction) -> StoredResponse:
        async def add() -> StoredResponse:
            added = await writes.add_bulk(tx, kind.resource, call.me, items, skip_conflicts=skips)
            skipped = list(bad)
            for position, refusal in added.refused.items():
                index = good[position][0]
                skipped.append((index, [refusal.problem(index)]))
            skipped.sort(key=lambda each: each[0])
            told = [{"index": index, "detail": [each.as_dict() for each in found]} for index, found in skipped]
            return StoredResponse(201, b'{"added":[%s],"skipped":%s}' % (b",".join(added.encoded), orjson.dumps(told)))

        return await idempotency.once(tx, key, add)

    return rendering.answer(await call.database.write(work))


async def edit_bulk(kind: Kind, call: Call) -> Response:
    good, bad = await parsing.validate_rows(TypeAdapter(kind.bulk_patch), call.body, exclude_unset=True)
    if bad:
        problems = [problem for _, found in bad for problem in found]
        raise InvalidInput(problems[: parsing.MAX_PROBLEMS])
    edits = [(fields.pop("id"), fields) for _, fields in good]

    async def work(tx: Transaction) -> bytes:
        updated, missing = await writes.edit_bulk(tx, kind.resource, call.me, edits)
        return b'{"updated":[%s],"not_found":%s}' % (b",".join(updated), orjson.dumps(missing))

    return rendering.JSONResponse(await call.database.write(work))


async def _remove_many(kind: Kind, call: Call, ids: Sequence[int]) -> Response:
    async def work(tx: Transaction) -> dict[str, list[int]]:
        deleted, missing = await writes.remove_bulk(tx, kind.resource, call.me, ids)
        return {"deleted": deleted, "not_found": missing}

    return rendering.JSONResponse(await call.database.write(work))


async def delete_bulk(kind: Kind, call: Call) -> Response:
    return await _remove_many(kind, call, call.body.ids)


async def delete_range(kind: Kind, call: Call) -> Response:
    start, end = call.path.start_id, call.path.end_id
    if not 0 <= end - start < schemas.MAX_BULK_ROWS:
        message = f"Expected a range of 1 to {schemas.MAX_BULK_ROWS} ids, start_id first"
        # Each id is a good one, and no schema can say how two of them must stand: so not a 422.
        raise Conflict([FieldProblem(("path", "end_id"), message, "invalid_range")])
    return await _remove_many(kind, call, range(start, end + 1))


async def generate(kind: Kind, call: Call) -> Response:
    query = call.query
    batch_size = query.batch_size or DEFAULT_BATCH
    if query.rate is not None and query.batch_size is None:
        batch_size = min(DEFAULT_BATCH, max(1, int(query.rate / CHUNKS_PER_SECOND_AT_A_RATE)))
    order = JobOrder(
        kind=f"generate_{kind.resource.name}",
        total=call.path.number,
        seed=query.seed if query.seed is not None else secrets.randbits(SEED_BITS),
        batch_size=batch_size,
        rate=query.rate,
    )
    key = rendering.claim(call)

    async def work(tx: Transaction) -> StoredResponse:
        async def queue() -> StoredResponse:
            job = await jobs.create(tx, call.me, order)
            return StoredResponse(202, orjson.dumps(job), {"Location": f"{call.prefix}/jobs/{job['id']}"})

        return await idempotency.once(tx, key, queue)

    return rendering.answer(await call.database.write(work))
