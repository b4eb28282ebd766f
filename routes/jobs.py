"""Listing, reading and cancelling background jobs."""

from __future__ import annotations

from starlette.responses import Response

from core.errors import NotFound
from repository import jobs
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
