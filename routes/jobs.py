"""Listing, reading and cancelling background jobs."""

from __future__ import annotations

import orjson
from starlette.responses import Response

from core.errors import Forbidden, NotFound
from core.identity import Group
from repository import jobs
from repository.transfers import imports
from resources.jobs import JOB_FIELDS, Job
from routes.http import rendering
from routes.http.operation import Call, Operations, members_of
from routes.http.queries import ByUuid, PageQuery

operations = Operations("jobs")


@operations.listing("/jobs", "List jobs, newest first", list[Job], jobs.ORDERING, filters=JOB_FIELDS)
async def list_jobs(call: Call[None, PageQuery, None]) -> Response:
    query = call.query
    found = await jobs.newest(call.database, call.filter, offset=query.start, limit=query.limit, cursor=call.cursor)
    return rendering.page(call, found)


@operations.get("/jobs/{id}", "Get a job", {200: Job}, members=members_of(Job), errors=(404,))
async def get_job(call: Call[ByUuid, None, None]) -> Response:
    job = await jobs.find(call.database, call.path.id)
    if job is None:
        raise NotFound(f"There is no job {call.path.id}")
    return rendering.JSONResponse(rendering.selected(call, job), headers={"Cache-Control": "no-cache"})


@operations.delete(
    "/jobs/{id}",
    "Cancel a job",
    {200: Job},
    description="Takes effect immediately: no further rows are stored. Rows that are already stored remain.",
    signed_in=True,
    errors=(403, 404, 409),
)
async def cancel(call: Call[ByUuid, None, None]) -> Response:
    return rendering.JSONResponse(await call.write(lambda tx: jobs.cancel(tx, call.me, call.path.id)))


@operations.get(
    "/jobs/{id}/report",
    "Get the report of an import",
    {200: str},
    description="NDJSON: a line for each problem of a row (`line`, `field`, `reason`), in the order of the file, and "
    "as the last line the result of the import so far (`state`, `error`, `dry_run`, `added`, `updated`, `failed`, and "
    "`not_shown`, the number of further problems). Only the user who started the import and admins may read it.",
    media_type="application/x-ndjson",
    signed_in=True,
    errors=(403, 404),
)
async def report(call: Call[ByUuid, None, None]) -> Response:
    job = await jobs.find(call.database, call.path.id)
    if job is None:
        raise NotFound(f"There is no job {call.path.id}")
    if call.me.group is not Group.ADMIN and job["user_id"] != call.me.user_id:
        raise Forbidden(f"Only its owner and admins may read the report of job {call.path.id}")
    found = await imports.report(call.database, call.path.id)
    if found is None:
        raise NotFound(f"Job {call.path.id} is not an import, and has no report")
    body = found.problems + orjson.dumps(found.counts, option=orjson.OPT_APPEND_NEWLINE)
    return Response(body, headers={"Cache-Control": "no-store"}, media_type="application/x-ndjson")
