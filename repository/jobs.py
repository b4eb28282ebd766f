"""Background jobs as rows: queued, claimed under a lease, advanced chunk by chunk, finished or cancelled.

The rows of a chunk, its event and the job's `done` commit together, and `advance` rejects a worker that has lost the
lease. So each row is stored exactly once, even when a worker is killed.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, func, insert, or_, select, update

import models
from core.errors import Conflict, Forbidden, NotFound, TooManyRequests
from core.filters import Filter
from core.identity import Identity
from core.times import utc_now
from repository.engine.database import Database
from repository.engine.leases import now_in_seconds
from repository.engine.transaction import Transaction
from repository.generic import filter_sql
from repository.generic.lists import Listed, entities_of, entity
from repository.generic.versions import changed_names

LEASE_SECONDS = 5.0
MAX_UNFINISHED_PER_USER = 20
MAX_CLAIMS_WITHOUT_PROGRESS = 5

UNFINISHED = ("queued", "running")
_PUBLIC = (
    "id",
    "kind",
    "state",
    "done",
    "total",
    "rows_per_second",
    "seed",
    "user_id",
    "created_at",
    "started_at",
    "finished_at",
    "error",
)


@dataclass(frozen=True, slots=True)
class JobOrder:
    """The data to generate. `rate` is in rows per second; None is as fast as possible."""

    kind: str
    total: int
    seed: int
    batch_size: int
    rate: float | None


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A running job that this worker holds the lease of."""

    id: str
    kind: str
    done: int
    total: int
    seed: int
    batch_size: int
    rate: float | None
    user_id: int | None


class LeaseLost(Exception):
    """The job was cancelled or taken over: the worker must stop, and the chunk is not stored."""


def public(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the job as clients see it."""
    return {name: row[name] for name in _PUBLIC}


async def create(tx: Transaction, identity: Identity, order: JobOrder) -> dict[str, Any]:
    """Queue a job. Raises TooManyRequests when the user has as many unfinished ones as allowed."""
    table = models.jobs
    # Lock the user, so that two concurrent orders cannot both take the last place.
    await tx.connection.execute(
        select(models.users.c.id).where(models.users.c.id == identity.user_id).with_for_update()
    )
    unfinished = select(func.count()).select_from(table)
    waiting = await tx.connection.execute(
        unfinished.where(table.c.user_id == identity.user_id, table.c.state.in_(UNFINISHED))
    )
    if waiting.scalar_one() >= MAX_UNFINISHED_PER_USER:
        raise TooManyRequests(
            f"You have {MAX_UNFINISHED_PER_USER} unfinished jobs; wait for one to finish, or cancel one", 10
        )
    values = {
        "id": str(uuid.uuid4()),
        "kind": order.kind,
        "state": "queued",
        "done": 0,
        "total": order.total,
        "seed": order.seed,
        "batch_size": order.batch_size,
        "rate": order.rate,
        "user_id": identity.user_id,
        "created_at": utc_now(),
        "rows_per_second": 0,
        "attempts": 0,
    }
    stored = await tx.connection.execute(insert(table).values(values).returning(table))
    job = public(entity(stored.one()))
    tx.emit("jobs", "add", job, actor_id=identity.user_id)
    return job


async def find(database: Database, job_id: str) -> dict[str, Any] | None:
    async with database.read() as connection:
        found = await connection.execute(select(models.jobs).where(models.jobs.c.id == job_id))
        row = found.one_or_none()
        return public(entity(row)) if row is not None else None


async def newest(database: Database, wanted: Filter, *, offset: int, limit: int) -> Listed[dict[str, Any]]:
    """Return a page of the jobs, newest first."""
    table = models.jobs
    where = filter_sql.where(table, wanted, is_sqlite=database.is_sqlite)
    order = (("created_at", True), ("id", False))
    return await entities_of(database, table, where, order, public, offset=offset, limit=limit)


async def _transition(tx: Transaction, before: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Write `values`, and emit an event when the public form changes. Return the public form."""
    table = models.jobs
    await tx.connection.execute(update(table).where(table.c.id == before["id"]).values(values))
    old = public(before)
    new = public({**before, **values})
    changed = changed_names(old, new)
    if changed:
        tx.emit("jobs", "update", new, actor_id=before["user_id"], before=old, changed=changed)
    return new


async def cancel(tx: Transaction, identity: Identity, job_id: str) -> dict[str, Any]:
    """Cancel a job and return it; no chunk is stored after this commits. Cancelling twice is no error.

    Raises NotFound, Forbidden, and Conflict when the job has finished.
    """
    table = models.jobs
    found = await tx.connection.execute(select(table).where(table.c.id == job_id).with_for_update())
    row = found.one_or_none()
    if row is None:
        raise NotFound(f"There is no job {job_id}")
    job = entity(row)
    if not identity.may_change(job["user_id"]):
        raise Forbidden(f"Only its owner, moderators and admins may cancel job {job_id}")
    if job["state"] == "cancelled":
        return public(job)
    if job["state"] not in UNFINISHED:
        raise Conflict(f"Job {job_id} is already {job['state']}")
    return await _transition(tx, job, _cancelled())


def _cancelled() -> dict[str, Any]:
    return {"state": "cancelled", "finished_at": utc_now(), "lease_owner": None, "lease_until": None}


async def cancel_all(tx: Transaction, user_id: int) -> None:
    """Cancel every unfinished job of a user. The caller holds the user's lock, so no other job is queued meanwhile."""
    table = models.jobs
    found = await tx.connection.execute(
        select(table)
        .where(table.c.user_id == user_id, table.c.state.in_(UNFINISHED))
        .order_by(table.c.id)
        .with_for_update()
    )
    for row in found.all():
        await _transition(tx, entity(row), _cancelled())


async def claim(database: Database, owner: str) -> ClaimedJob | None:
    """Lease the oldest job that is queued or whose lease has expired, and return it; None when there is none."""
    table = models.jobs
    async with database.read() as connection:
        now = now_in_seconds(is_sqlite=database.is_sqlite)
        free = or_(table.c.state == "queued", and_(table.c.state == "running", table.c.lease_until < now))
        # Check without a lock first: an idle worker must not take SQLite's write lock once a second.
        if (await connection.execute(select(table.c.id).where(free).limit(1))).first() is None:
            return None

    async def work(tx: Transaction) -> ClaimedJob | None:
        now = now_in_seconds(is_sqlite=tx.is_sqlite)
        free = or_(table.c.state == "queued", and_(table.c.state == "running", table.c.lease_until < now))
        oldest = select(table).where(free).order_by(table.c.created_at).limit(1).with_for_update(skip_locked=True)
        row = (await tx.connection.execute(oldest)).one_or_none()
        if row is None:
            return None
        job = entity(row)
        if job["attempts"] >= MAX_CLAIMS_WITHOUT_PROGRESS:
            error = f"abandoned: {job['attempts']} workers stopped before they stored the next chunk"
            await _transition(tx, job, {"state": "failed", "error": error, "finished_at": utc_now()})
            return None
        values = {
            "state": "running",
            "started_at": job["started_at"] or utc_now(),
            "lease_owner": owner,
            "attempts": job["attempts"] + 1,
        }
        await _transition(tx, job, values)
        await tx.connection.execute(
            update(table).where(table.c.id == job["id"]).values(lease_until=now + LEASE_SECONDS)
        )
        return ClaimedJob(*(job[name] for name in ClaimedJob.__slots__))

    return await database.write(work)


async def renew(database: Database, job_id: str, owner: str) -> None:
    """Extend the lease. Raises LeaseLost."""

    async def work(tx: Transaction) -> None:
        table = models.jobs
        held = await tx.connection.execute(
            update(table)
            .where(table.c.id == job_id, table.c.lease_owner == owner, table.c.state == "running")
            .values(lease_until=now_in_seconds(is_sqlite=tx.is_sqlite) + LEASE_SECONDS)
        )
        if held.rowcount != 1:
            raise LeaseLost(job_id)

    await database.write(work)


async def advance(tx: Transaction, job: ClaimedJob, owner: str, done: int, count: int, rows_per_second: int) -> None:
    """Record `count` stored rows after the first `done`, and finish the job with the last one. Raises LeaseLost."""
    table = models.jobs
    found = await tx.connection.execute(select(table).where(table.c.id == job.id).with_for_update())
    row = found.one_or_none()
    if row is None or (row.lease_owner, row.state, row.done) != (owner, "running", done):
        raise LeaseLost(job.id)
    moved: dict[str, Any] = {"done": done + count, "rows_per_second": rows_per_second}
    if done + count >= job.total:
        ended = {"state": "done", "finished_at": utc_now(), "lease_owner": None, "lease_until": None}
        await _transition(tx, entity(row), {**moved, **ended})
        return
    # No event here: the chunk's own event names the job and counts the rows.
    lease_until = now_in_seconds(is_sqlite=tx.is_sqlite) + LEASE_SECONDS
    values = {**moved, "attempts": 0, "lease_until": lease_until}
    await tx.connection.execute(update(table).where(table.c.id == job.id).values(values))


async def fail(database: Database, job_id: str, owner: str, error: str) -> None:
    """Mark a job as failed, if this worker still holds its lease."""

    async def work(tx: Transaction) -> None:
        table = models.jobs
        held = await tx.connection.execute(
            select(table).where(table.c.id == job_id, table.c.lease_owner == owner).with_for_update()
        )
        row = held.one_or_none()
        if row is not None and row.state == "running":
            values = {"state": "failed", "error": error, "finished_at": utc_now(), "lease_owner": None}
            await _transition(tx, entity(row), values)

    await database.write(work)


async def release(database: Database, job_id: str, owner: str) -> None:
    """Give back a running job, so that another worker can claim it at once."""

    async def work(tx: Transaction) -> None:
        table = models.jobs
        await tx.connection.execute(
            update(table)
            .where(table.c.id == job_id, table.c.lease_owner == owner, table.c.state == "running")
            .values(lease_until=0.0, attempts=0)
        )

    await database.write(work)
