"""Renaming and deleting rows that too many other rows depend on: jobs that change these dependants chunk by chunk.

Rules:
- Each chunk is one transaction, with its events and the progress of the job. So what a watcher knows always equals what
  the service shows, and a killed job continues after its last stored chunk.
- A renamed row has its new name from the start, and the rename is not undone. So the job cannot be cancelled, and does
  not depend on the rights of its user. The job writes the current name into the rows that link to the renamed row, in
  order of their ids. If the row is renamed again meanwhile, the job starts from the first of these rows again.
- A row to delete goes last, together with its last dependants, like any row with few dependants. Until then, it loses
  dependants, and may get new ones. The rights of the job's user are checked in each chunk.
- Every chunk first locks the row, as does every other write that changes the row's name, links or children.
"""

from __future__ import annotations

from typing import Any, get_args

from sqlalchemy import insert, select, update

import models
from core.identity import Identity
from repository import job_users, jobs
from repository.community import averages, comments
from repository.engine.transaction import Transaction
from repository.generic import dependants, linked_rows, relations, rows, writes
from repository.generic.rows import entity
from repository.generic.versions import IfMatch
from repository.jobs import UNFINISHED, ClaimedJob, JobOrder, Origin
from resources.comments import COMMENTS
from resources.jobs import DELETE, RENAME, Kind
from resources.ratings import RATINGS
from resources.registry import RESOURCES, children_of, links_to
from resources.resource import Parent, Resource

CHUNK_ROWS = 1_000  # as many as fit into one event

TABLE, JOBS = models.cascades, models.jobs
_DELETED = {f"{DELETE}{each.name}": each for each in RESOURCES if children_of(each) or links_to(each)}
_RENAMED = {
    f"{RENAME}{each.name}": each for each in RESOURCES if any(link.table is not None for _, link in links_to(each))
}
assert {*_DELETED, *_RENAMED} <= {*get_args(Kind)}, "expected Kind to have every job of this module"


def is_cascade(kind: str) -> bool:
    return kind.startswith((DELETE, RENAME))


# --- ordering a job


async def order_deletion(
    tx: Transaction,
    resource: Resource,
    identity: Identity,
    entity_id: int,
    if_match: IfMatch,
    max_rows_per_day: int | None,
    origin: Origin | None,
) -> dict[str, Any]:
    """Queue a job that deletes a row with its dependants, or find the unfinished one. Return the job.

    Raises NotFound, Forbidden, PreconditionFailed or TooManyRequests.
    """
    row = await writes.locked(tx, resource, identity, entity_id, if_match)
    kind = f"{DELETE}{resource.name}"
    if (job := await _unfinished(tx, kind, entity_id)) is not None:
        return job
    number = await dependants.count(tx, resource, row) + 1
    return await _order(tx, identity, kind, entity_id, number, max_rows_per_day, origin)


async def order_renaming(
    tx: Transaction,
    resource: Resource,
    identity: Identity,
    entity_id: int,
    number: int,
    max_rows_per_day: int | None,
    origin: Origin | None,
) -> dict[str, Any]:
    """Queue a job that changes the `number` rows that show a renamed row, or restart the unfinished one. Return the
    job. The caller has locked the row.

    Raises TooManyRequests.
    """
    kind = f"{RENAME}{resource.name}"
    if (job := await _unfinished(tx, kind, entity_id)) is not None:
        await _move_to(tx, job["id"], 0)
        return job
    return await _order(tx, identity, kind, entity_id, number, max_rows_per_day, origin)


async def _unfinished(tx: Transaction, kind: str, row_id: int) -> dict[str, Any] | None:
    query = select(JOBS).join(TABLE, TABLE.c.job_id == JOBS.c.id)
    query = query.where(TABLE.c.row_id == row_id, JOBS.c.kind == kind, JOBS.c.state.in_(UNFINISHED))
    found = (await tx.connection.execute(query)).first()
    return jobs.public(entity(found)) if found is not None else None


async def _order(
    tx: Transaction,
    identity: Identity,
    kind: str,
    row_id: int,
    number: int,
    max_rows_per_day: int | None,
    origin: Origin | None,
) -> dict[str, Any]:
    order = JobOrder(kind, total=number, seed=0, batch_size=CHUNK_ROWS, rate=None)
    job = await jobs.create(tx, identity, order, max_rows_per_day, origin)
    await tx.connection.execute(insert(TABLE).values(job_id=job["id"], row_id=row_id, last_id=0))
    return job


async def _move_to(tx: Transaction, job_id: str, last_id: int) -> None:
    await tx.connection.execute(update(TABLE).where(TABLE.c.job_id == job_id).values(last_id=last_id))


# --- the work of a job


async def store_chunk(tx: Transaction, job: ClaimedJob, size: int) -> int | None:
    """Change about `size` dependants. Return how many, or None if the work is complete.

    Raises ContentTooLarge if a smaller `size` may help, or Forbidden.
    """
    tx.job_id = job.id
    ((row_id,),) = (await tx.connection.execute(select(TABLE.c.row_id).where(TABLE.c.job_id == job.id))).all()
    if job.kind in _RENAMED:
        return await _rename_some(tx, job, _RENAMED[job.kind], row_id, size)
    return await _delete_some(tx, job, _DELETED[job.kind], row_id, size)


async def _rename_some(tx: Transaction, job: ClaimedJob, resource: Resource, row_id: int, size: int) -> int | None:
    found = await rows.fetch_locked(tx, resource.table, [row_id])
    if not found:
        return None
    # Only the transaction that holds the lock of the row changes this place.
    place = select(TABLE.c.last_id).where(TABLE.c.job_id == job.id)
    last_id: int = (await tx.connection.execute(place)).scalar_one()
    ((owner, link),) = links_to(resource)
    ids = await linked_rows.show_next(tx, owner, link, found[0], after=last_id, size=size, actor_id=job.user_id)
    if len(ids) < size:
        return None
    await _move_to(tx, job.id, ids[-1])
    return len(ids)


async def _delete_some(tx: Transaction, job: ClaimedJob, resource: Resource, row_id: int, size: int) -> int | None:
    identity = await job_users.identity_of(tx, job.user_id)
    found = await rows.fetch_locked(tx, resource.table, [row_id])
    if not found:
        return None
    resource.require_may_change(identity, found)
    # If the rows are so long that chunks are smaller, so is the last chunk.
    if await dependants.count(tx, resource, found[0]) <= dependants.MAX_DEPENDANTS * size // CHUNK_ROWS:
        await writes.remove(tx, resource, identity, row_id, None)
        return None
    for child, parent in children_of(resource):
        if number := await _release_children(tx, child, parent, row_id, size, identity.user_id):
            return number
    for owner, link in links_to(resource):
        if number := await linked_rows.release_some(tx, owner, link, found[0], size, identity.user_id):
            return number
    raise AssertionError("expected a row with dependants to have children or to be shown")


async def _release_children(
    tx: Transaction, child: Resource, parent: Parent, row_id: int, size: int, actor_id: int
) -> int:
    if child is COMMENTS:
        return await comments.remove_newest(tx, row_id, size, actor_id)
    released = await relations.release_some(tx, child, parent, row_id, size, actor_id)
    if child is RATINGS:
        await averages.follow(tx, released, (), actor_id)
    return len(released)
