"""Looking at background jobs, and cancelling them."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from core.errors import NotFound
from repository import jobs
from repository.engine.transaction import Transaction
from resources.jobs import JOB_FIELDS, Job
from routes.http import queries, rendering
from routes.http.operation import LIST_HEADERS, Call, Operation


async def list_jobs(call: Call) -> Response:
    query = call.query
    found = await jobs.newest(call.database, call.filter, offset=query.start, limit=query.limit)
    return rendering.page(call, found)


async def get_job(call: Call) -> Response:
    job = await jobs.find(call.database, call.path.id)
    if job is None:
        raise NotFound(f"There is no job {call.path.id}")
    return rendering.JSONResponse(job, headers={"Cache-Control": "no-cache"})


async def cancel(call: Call) -> Response:
    async def work(tx: Transaction) -> dict[str, Any]:
        return await jobs.cancel(tx, call.me, call.path.id)

    return rendering.JSONResponse(await call.database.write(work))


OPERATIONS = [
    Operation(
        "GET",
        "/jobs",
        list_jobs,
        "List jobs, newest first",
        "jobs",
        {200: list[Job]},
        query_model=queries.PageQuery,
        filters=JOB_FIELDS,
        answer_headers=LIST_HEADERS,
    ),
    Operation(
        "GET",
        "/jobs/{id}",
        get_job,
        "Get a job",
        "jobs",
        {200: Job},
        path_model=queries.ByJobId,
        errors=(404,),
    ),
    Operation(
        "DELETE",
        "/jobs/{id}",
        cancel,
        "Cancel a job",
        "jobs",
        {200: Job},
        description="Takes effect at once: nothing more is stored. What was stored stays.",
        path_model=queries.ByJobId,
        signed_in=True,
        errors=(403, 404, 409),
    ),
]
