"""Background jobs as rows: queued, claimed under a lease, advanced chunk by chunk, finished or cancelled.

Rules:
- The rows of a chunk, its event and the job's `done` commit together, and `advance` rejects a worker that has lost the
  lease. So each row is stored exactly once, even when a worker is killed.
- Users take turns: the next job is the oldest one of the user who was served least recently. For this purpose, a job
  that no worker holds keeps in `lease_until` the time at which it was last served or, if it is paced, the earliest
  time at which it may continue.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, case, delete, func, insert, or_, select, update

import models
from core.errors import Conflict, FieldProblem, Forbidden, InvalidInput, Loc, NotFound, TooManyRequests, invalid_token
from core.filters import Filter
from core.identity import Identity
from core.times import utc_now, utc_text
from repository.accounts import audit
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import filter_sql
from repository.generic.cursors import Cursor, Ordering
from repository.generic.lists import Listed, ListRequest, entities_of
from repository.generic.rows import entity, one
from repository.generic.versions import Row, changed_names
from repository.leases import has_expired, now_in_seconds
from resources.jobs import RENAME, Job

LEASE_SECONDS = 5.0
MAX_UNFINISHED_PER_USER = 20
MAX_CLAIMS_WITHOUT_PROGRESS = 5
# The period of the quota of generated rows.
QUOTA_HOURS = 24
# How long a job counts as served when users take turns.
SERVED_SECONDS = 60.0

UNFINISHED = ("queued", "running")
COUNTED = ("generate_", "import_")  # the kinds of jobs whose rows count towards the quota
TABLE = models.jobs
ORDERING = Ordering(TABLE, lambda sort, after: (("created_at", True), ("id", False)))


@dataclass(frozen=True, slots=True)
class JobOrder:
    """What a job does, such as the data to generate. `rate` is in rows per second; None means as fast as possible.
    `parts` are the resources whose rows are generated with each movie; `total` counts these rows, too.
    """

    kind: str
    total: int
    seed: int
    batch_size: int
    rate: float | None
    parts: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A running job whose lease this worker holds."""

    id: str
    kind: str
    done: int
    total: int
    seed: int
    batch_size: int
    rate: float | None
    parts: Sequence[str]
    user_id: int | None
    # The time until a paced job may continue, negative if that time has passed. None for a new job, and for a job
    # whose lease has expired.
    wait_seconds: float | None


@dataclass(frozen=True, slots=True)
class Origin:
    """The network from which a job is requested. Its users together have `users` times the limits of one user."""

    network: str
    users: int


class LeaseLost(Exception):
    """The job was cancelled or taken over: the worker must stop, and the chunk is not stored."""


def public(row: Row) -> dict[str, Any]:
    """Return the job as clients see it."""
    return {name: row[name] for name in Job.model_fields}


async def create(
    tx: Transaction,
    identity: Identity,
    order: JobOrder,
    max_rows_per_day: int | None,
    origin: Origin | None = None,
    *,
    job_id: str | None = None,
    place: Loc = ("path", "number"),
) -> dict[str, Any]:
    """Queue a job. Without `max_rows_per_day`, neither the user's rows nor the user's unfinished jobs are limited;
    without `origin`, neither are those of the network. `place` is where the request contains the number of rows. The
    job has a new id unless `job_id` is given.

    Raises InvalidInput, TooManyRequests, or Unauthenticated when the account was deleted or deactivated meanwhile.
    """
    users = models.users.c
    # Lock the user, so that two concurrent requests cannot both pass a limit that has room for only one, and so that
    # deleting the account cancels this job.
    owner = select(users.id).where(users.id == identity.user_id, users.deleted_at.is_(None), users.is_active)
    if await one(tx.connection, owner.with_for_update()) is None:
        raise invalid_token("access")
    is_counted = order.kind.startswith(COUNTED)
    if max_rows_per_day is not None:
        await _check_unfinished(tx, identity.user_id)
        if is_counted:
            await _check_quota(tx, identity.user_id, order.total, max_rows_per_day, place)
    if origin is not None:
        await _check_network(tx, origin, order.total, max_rows_per_day if is_counted else None)
    values = {
        **asdict(order),
        "id": job_id or str(uuid.uuid4()),
        "state": "queued",
        "done": 0,
        "user_id": identity.user_id,
        "network": origin.network if origin is not None else None,
        "created_at": utc_now(),
        "rows_per_second": 0,
        "attempts": 0,
    }
    stored = await tx.connection.execute(insert(TABLE).values(values).returning(TABLE))
    job = public(entity(stored.one()))
    tx.emit("jobs", "add", job, actor_id=identity.user_id)
    return job


async def _check_unfinished(tx: Transaction, user_id: int) -> None:
    unfinished = TABLE.c.state.in_(UNFINISHED) & (TABLE.c.user_id == user_id)
    waiting = await tx.connection.execute(select(func.count()).select_from(TABLE).where(unfinished))
    if waiting.scalar_one() >= MAX_UNFINISHED_PER_USER:
        raise TooManyRequests(
            f"You have {MAX_UNFINISHED_PER_USER} unfinished jobs; wait for one to finish, or cancel one", 10
        )


async def _check_quota(tx: Transaction, user_id: int, total: int, max_rows: int, place: Loc) -> None:
    if total > max_rows:
        message = (
            f"Expected at most {max_rows} rows, the quota of generated and imported rows per user in {QUOTA_HOURS} "
            f"hours; this job has {total}"
        )
        raise InvalidInput([FieldProblem(place, message, "over_quota")])
    await _check_rows(tx, TABLE.c.user_id == user_id, total, max_rows, "you have")


async def _check_network(tx: Transaction, origin: Origin, total: int, max_rows_per_day: int | None) -> None:
    if not tx.is_sqlite:
        # Lock the network, so that two concurrent requests cannot both pass a limit that has room for only one. SQLite
        # needs no lock, because it has only one writer.
        await tx.connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(origin.network, 0))))
    ours = TABLE.c.network == origin.network
    unfinished = select(func.count()).select_from(TABLE).where(ours, TABLE.c.state.in_(UNFINISHED))
    most = MAX_UNFINISHED_PER_USER * origin.users
    if (await tx.connection.execute(unfinished)).scalar_one() >= most:
        raise TooManyRequests(f"The users of {origin.network} have {most} unfinished jobs; wait for one to finish", 10)
    if max_rows_per_day is not None:
        whose = f"the users of {origin.network} have"
        await _check_rows(tx, ours, total, max_rows_per_day * origin.users, whose)


async def _check_rows(tx: Transaction, which: ColumnElement[bool], total: int, max_rows: int, whose: str) -> None:
    now = datetime.now(UTC)
    begin = utc_text(now - timedelta(hours=QUOTA_HOURS))
    # For a job that has ended, count only the rows that it has stored.
    counted = case((TABLE.c.state.in_(UNFINISHED), TABLE.c.total), else_=TABLE.c.done)
    is_counted = or_(*(TABLE.c.kind.startswith(kind, autoescape=True) for kind in COUNTED))
    recent = and_(which, is_counted, TABLE.c.created_at > begin)
    sums = select(func.coalesce(func.sum(counted), 0), func.min(TABLE.c.created_at)).where(recent, counted > 0)
    used, oldest = (await tx.connection.execute(sums)).one()
    if used + total > max_rows:
        since = (now - datetime.fromisoformat(oldest)).total_seconds()
        raise TooManyRequests(
            f"Expected at most {max_rows} generated and imported rows in {QUOTA_HOURS} hours; "
            f"{whose} already requested {used}",
            max(1, math.ceil(QUOTA_HOURS * 3600 - since)),
        )


async def find(database: Database, job_id: str) -> dict[str, Any] | None:
    found = await database.select(select(TABLE).where(TABLE.c.id == job_id))
    return public(entity(found[0])) if found else None


async def newest(
    database: Database, wanted: Filter, *, offset: int, limit: int, cursor: Cursor | None = None
) -> Listed[dict[str, Any]]:
    """Return a page of the jobs, newest first."""
    where = filter_sql.where(TABLE, wanted, is_sqlite=database.is_sqlite)
    page = ListRequest(offset=offset, limit=limit, cursor=cursor)
    return await entities_of(database, ORDERING, where, public, page)


async def _transition(tx: Transaction, before: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Write `values`, and emit an event when the public form changes. Return the public form."""
    await _write(tx, TABLE.c.id == before["id"], values)
    old = public(before)
    new = public({**before, **values})
    changed = changed_names(old, new)
    if changed:
        tx.emit("jobs", "update", new, actor_id=before["user_id"], before=old, changed=changed)
    return new


async def _write(tx: Transaction, which: ColumnElement[bool], values: dict[str, Any]) -> int:
    return int((await tx.connection.execute(update(TABLE).where(which).values(values))).rowcount)


def _ended(tx: Transaction, state: str, **values: Any) -> dict[str, Any]:
    served = now_in_seconds(is_sqlite=tx.is_sqlite)
    return {"state": state, "finished_at": utc_now(), "lease_owner": None, "lease_until": served, **values}


async def cancel(tx: Transaction, identity: Identity, job_id: str) -> dict[str, Any]:
    """Cancel a job and return it; no chunk is stored after the COMMIT. Cancelling twice is not an error.

    Raises NotFound, Forbidden, or Conflict when the job has finished.
    """
    job = await one(tx.connection, select(TABLE).where(TABLE.c.id == job_id).with_for_update())
    if job is None:
        raise NotFound(f"There is no job {job_id}")
    if not identity.may_change(job["user_id"]):
        raise Forbidden(f"Only the owner, moderators and admins may cancel job {job_id}")
    if job["kind"].startswith(RENAME) and job["state"] in UNFINISHED:
        raise Conflict(f"Job {job_id} cannot be cancelled, because the new name is stored already; rename the row back")
    if job["state"] == "cancelled":
        return public(job)
    if job["state"] not in UNFINISHED:
        raise Conflict(f"Job {job_id} is already {job['state']}")
    cancelled = await _transition(tx, job, _ended(tx, "cancelled"))
    if job["user_id"] != identity.user_id:
        await audit.record_for_rows(tx, "cancel", "jobs", identity, [job])
    return cancelled


async def cancel_all(tx: Transaction, user_id: int) -> None:
    """Cancel the unfinished jobs of a user, but complete what is renamed. The caller holds the user's lock, so no other
    job is queued meanwhile.
    """
    others = ~TABLE.c.kind.startswith(RENAME, autoescape=True)
    unfinished = select(TABLE).where(TABLE.c.user_id == user_id, TABLE.c.state.in_(UNFINISHED), others)
    for row in (await tx.connection.execute(unfinished.order_by(TABLE.c.id).with_for_update())).all():
        await _transition(tx, entity(row), _ended(tx, "cancelled"))


def _is_free(*, is_sqlite: bool) -> ColumnElement[bool]:
    # A running job without a lease owner pauses until its next chunk, possibly for longer than a lease lasts.
    pause = func.coalesce(TABLE.c.batch_size / TABLE.c.rate, 0.0)
    longest = case((TABLE.c.lease_owner.is_(None), pause), else_=LEASE_SECONDS)
    is_over = has_expired(TABLE.c.lease_until, longest, is_sqlite=is_sqlite)
    return or_(TABLE.c.state == "queued", and_(TABLE.c.state == "running", is_over))


def _is_held(job_id: str, owner: str) -> ColumnElement[bool]:
    return and_(TABLE.c.id == job_id, TABLE.c.lease_owner == owner, TABLE.c.state == "running")


def _served_at(*, is_sqlite: bool) -> ColumnElement[Any]:
    """Return the SQL expression for the time at which the user of a job was last served; 0 if that is long ago."""
    other, now = TABLE.alias(), now_in_seconds(is_sqlite=is_sqlite)
    # A job that pauses because of its rate does not count as served.
    has_waited = or_(other.c.lease_owner.is_not(None), other.c.lease_until <= now)
    served = and_(other.c.user_id == TABLE.c.user_id, other.c.lease_until > now - SERVED_SECONDS, has_waited)
    latest = select(func.max(other.c.lease_until)).where(served)
    return func.coalesce(latest.correlate(TABLE).scalar_subquery(), 0.0)


async def others_wait(database: Database, user_id: int | None) -> bool:
    """Return whether another user's job could begin or continue now."""
    free = (
        select(TABLE.c.id)
        .where(_is_free(is_sqlite=database.is_sqlite), TABLE.c.user_id.is_distinct_from(user_id))
        .limit(1)
    )
    return bool(await database.select(free))


async def claim(database: Database, owner: str) -> ClaimedJob | None:
    """Lease and return a job that is queued, whose pause between chunks is over, or whose lease has expired.

    The job is the oldest one of the user who was served least recently. Return None when there is none, or when the
    chosen job had too many attempts and was marked as failed instead.
    """
    free = select(TABLE.c.id).where(_is_free(is_sqlite=database.is_sqlite)).limit(1)
    # Check without a lock first: an idle worker must not take SQLite's write lock once a second.
    if not await database.select(free):
        return None

    async def work(tx: Transaction) -> ClaimedJob | None:
        now = now_in_seconds(is_sqlite=tx.is_sqlite)
        wait = case((TABLE.c.lease_owner.is_(None), TABLE.c.lease_until - now)).label("wait_seconds")
        free = select(TABLE, wait).where(_is_free(is_sqlite=tx.is_sqlite))
        next_one = free.order_by(_served_at(is_sqlite=tx.is_sqlite), TABLE.c.created_at, TABLE.c.id).limit(1)
        job = await one(tx.connection, next_one.with_for_update(skip_locked=True, of=TABLE))
        if job is None:
            return None
        if job["attempts"] >= MAX_CLAIMS_WITHOUT_PROGRESS:
            error = f"abandoned after {job['attempts']} attempts that stored no rows"
            await _transition(tx, job, _ended(tx, "failed", error=error))
            return None
        values = {
            "state": "running",
            "started_at": job["started_at"] or utc_now(),
            "lease_owner": owner,
            "lease_until": now + LEASE_SECONDS,
            "attempts": job["attempts"] + 1,
        }
        await _transition(tx, job, values)
        return ClaimedJob(*(job[name] for name in ClaimedJob.__slots__))

    return await database.write(work)


async def advance(
    tx: Transaction,
    job: ClaimedJob,
    owner: str,
    done: int,
    count: int,
    rows_per_second: int,
    *,
    error: str | None = None,
) -> None:
    """Record that `count` rows after the first `done` are stored. The last row finishes the job; with `error`, the job
    fails after these rows. Raises LeaseLost.
    """
    held = await one(tx.connection, select(TABLE).where(_is_held(job.id, owner)).with_for_update())
    if held is None or held["done"] != done:
        raise LeaseLost(job.id)
    moved: dict[str, Any] = {"done": done + count, "rows_per_second": rows_per_second}
    if error is not None:
        await _transition(tx, held, _ended(tx, "failed", error=error, **moved))
        return
    if done + count >= job.total:
        await _transition(tx, held, _ended(tx, "done", **moved))
        return
    # No event is emitted here: the chunk's own event names the job and counts the rows.
    lease_until = now_in_seconds(is_sqlite=tx.is_sqlite) + LEASE_SECONDS
    await _write(tx, TABLE.c.id == job.id, {**moved, "attempts": 0, "lease_until": lease_until})


async def fail(database: Database, job_id: str, owner: str, error: str) -> None:
    """Mark a job as failed, if this worker still holds its lease."""

    async def work(tx: Transaction) -> None:
        held = await one(tx.connection, select(TABLE).where(_is_held(job_id, owner)).with_for_update())
        if held is not None:
            await _transition(tx, held, _ended(tx, "failed", error=error))

    await database.write(work)


async def release(database: Database, job_id: str, owner: str, wait_seconds: float = 0.0) -> None:
    """Release the lease of a running job, so that any worker can claim the job after `wait_seconds`."""

    async def work(tx: Transaction) -> None:
        until = now_in_seconds(is_sqlite=tx.is_sqlite) + wait_seconds
        await _write(tx, _is_held(job_id, owner), {"lease_owner": None, "lease_until": until, "attempts": 0})

    await database.write(work)


async def forget(database: Database, ended_before: datetime, *, max_rows: int) -> int:
    """Delete up to `max_rows` jobs that ended before `ended_before`, each with an event. Return the number deleted."""
    old = select(TABLE).where(TABLE.c.state.notin_(UNFINISHED), TABLE.c.finished_at < utc_text(ended_before))
    if not await database.select(old.limit(1)):
        return 0  # there is nothing to delete, so do not take the write lock

    async def work(tx: Transaction) -> int:
        found = await tx.connection.execute(old.order_by(TABLE.c.finished_at).limit(max_rows).with_for_update())
        gone = [public(entity(row)) for row in found.all()]
        ids = [job["id"] for job in gone]
        for table in (models.import_parts, models.imports, models.cascades):
            await tx.connection.execute(delete(table).where(table.c.job_id.in_(ids)))
        await tx.connection.execute(delete(TABLE).where(TABLE.c.id.in_(ids)))
        for job in gone:
            tx.emit("jobs", "delete", job, actor_id=None, before=job)
        return len(gone)

    return await database.write(work)
