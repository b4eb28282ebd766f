"""Imports: the file in parts, how far the import has come, and the problems of its rows.

Rules:
- A file is stored in parts before its job exists, under the id of the job. So any worker can run and resume the import.
- The rows of a chunk, their events, the place after the chunk and the chunk's problems commit together.
- The first MAX_STORED_PROBLEMS problems of an import are stored; the others are only counted.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

import orjson
from sqlalchemy import and_, delete, exists, func, insert, select, update

import models
from core.errors import TooManyRequests, Unavailable
from core.times import utc_now, utc_text
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic.rows import entity
from repository.jobs import UNFINISHED

PART_BYTES = 1024 * 1024
MAX_FILE_BYTES = 100 * 1024 * 1024
MAX_STORED_PROBLEMS = 10_000
MAX_UNFINISHED_PER_USER = 2
# The parts of all files together: enough for twenty of the largest files.
MAX_STORED_PARTS = 20 * MAX_FILE_BYTES // PART_BYTES
# A quarter of them, so that no network can keep the others from importing.
MAX_STORED_PARTS_PER_NETWORK = MAX_STORED_PARTS // 4
PARTS_PER_TRANSACTION = 20
KIND = "import_"

TABLE, PARTS, JOBS = models.imports, models.import_parts, models.jobs
FILE, REPORT = "file", "report"


@dataclass(frozen=True, slots=True)
class ImportOrder:
    """What to import. `columns` is the header of a CSV file; the rows begin at `offset` of `size` bytes."""

    format: str
    columns: Sequence[str]
    is_safe: bool
    is_dry_run: bool
    stops: bool
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Progress(ImportOrder):
    """The state of an import between two chunks: what is left to import, from `offset` on."""

    is_in_long_line: bool
    problems: int


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """The result of a chunk. `problems` holds the line, the field and the reason of each; `failed` counts rows."""

    offset: int
    is_in_long_line: bool
    added: int
    updated: int
    failed: int
    problems: Sequence[tuple[int, str, str]]


# --- the file


async def require_room(database: Database, user_id: int | None, network: str | None) -> None:
    """Raise TooManyRequests if too many files are stored: of the user, unless `user_id` is None; of all users of the
    network, unless it is None; or of all users. A file belongs to a network once its job has been created.
    """
    if user_id is not None:
        mine = and_(JOBS.c.user_id == user_id, JOBS.c.state.in_(UNFINISHED), JOBS.c.kind.startswith(KIND))
        ((unfinished,),) = await database.select(select(func.count()).select_from(JOBS).where(mine))
        if unfinished >= MAX_UNFINISHED_PER_USER:
            expected = f"You have {unfinished} unfinished imports; wait for one to finish, or cancel one"
            raise TooManyRequests(expected, 10)
    count = select(func.count()).select_from(PARTS).where(PARTS.c.role == FILE)
    if network is not None:
        ours = select(JOBS.c.id).where(JOBS.c.network == network, JOBS.c.state.in_(UNFINISHED))
        ((parts,),) = await database.select(count.where(PARTS.c.job_id.in_(ours)))
        if parts >= MAX_STORED_PARTS_PER_NETWORK:
            expected = f"The files of unfinished imports from {network} take too much space"
            raise TooManyRequests(f"{expected}; wait for one to finish, or cancel one", 60)
    ((parts,),) = await database.select(count)
    if parts >= MAX_STORED_PARTS:
        raise TooManyRequests("The files of unfinished imports take too much space; try again later", 60)


async def store_part(database: Database, job_id: str, number: int, deflated: bytes) -> None:
    await database.write(lambda tx: _insert_part(tx, job_id, FILE, number, deflated))


async def _insert_part(tx: Transaction, job_id: str, role: str, number: int, content: bytes) -> None:
    values = {"job_id": job_id, "role": role, "number": number, "content": content, "created_at": utc_now()}
    await tx.connection.execute(insert(PARTS).values(values))


class StoredFile:
    """The file of an import, to be read from front to back. It keeps the parts that the last call has read."""

    def __init__(self, database: Database, job_id: str, size: int) -> None:
        self._database = database
        self._job_id = job_id
        self._size = size
        self._parts: dict[int, bytes] = {}

    async def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, or fewer at the end. Raises Unavailable if a part is missing."""
        first, end = offset // PART_BYTES, min(offset + size, self._size)
        wanted = range(first, (end - 1) // PART_BYTES + 1)
        missing = [number for number in wanted if number not in self._parts]
        if missing:
            of_file = and_(PARTS.c.job_id == self._job_id, PARTS.c.role == FILE, PARTS.c.number.in_(missing))
            found = await self._database.select(select(PARTS.c.number, PARTS.c.content).where(of_file))
            if len(found) < len(missing):
                raise Unavailable("A part of the file is missing")
            self._parts |= {number: zlib.decompress(content) for number, content in found}
        self._parts = {number: self._parts[number] for number in wanted}
        content = b"".join(self._parts.values()) if len(wanted) > 1 else self._parts[first]
        begin = offset - first * PART_BYTES
        return content[begin : begin + end - offset]


async def discard(database: Database, job_id: str) -> None:
    """Delete the file of an import. Raises Unavailable."""
    await _delete_parts(database, PARTS.c.job_id == job_id)


async def discard_unused(database: Database, stored_before: datetime) -> int:
    """Delete the files whose import has ended, and those without a job that were stored before `stored_before`
    (timezone-aware). Return the number of deleted parts. Raises Unavailable.
    """
    of_part = JOBS.c.id == PARTS.c.job_id
    is_needed = exists(select(JOBS.c.id).where(of_part, JOBS.c.state.in_(UNFINISHED)))
    has_job = exists(select(JOBS.c.id).where(of_part))
    return await _delete_parts(database, ~is_needed & (has_job | (PARTS.c.created_at < utc_text(stored_before))))


async def _delete_parts(database: Database, which: Any) -> int:
    some = select(PARTS.c.job_id, PARTS.c.number).where(PARTS.c.role == FILE, which).limit(PARTS_PER_TRANSACTION)
    total = 0
    while found := await database.select(some):
        keys = [tuple(row) for row in found]

        async def work(tx: Transaction, keys: Sequence[Any] = keys) -> None:
            for job_id, number in keys:
                one_part = and_(PARTS.c.job_id == job_id, PARTS.c.role == FILE, PARTS.c.number == number)
                await tx.connection.execute(delete(PARTS).where(one_part))

        await database.write(work)
        total += len(keys)
    return total


# --- the import


async def create(tx: Transaction, job_id: str, order: ImportOrder) -> None:
    """Store what a new job is to import."""
    values = {name: getattr(order, name) for name in ImportOrder.__slots__}
    counters = dict.fromkeys(("added", "updated", "failed", "problems"), 0)
    await tx.connection.execute(insert(TABLE).values(job_id=job_id, is_in_long_line=False, **values, **counters))


async def progress(database: Database, job_id: str) -> Progress:
    """Return the state of an import. Raises Unavailable if it has been deleted."""
    found = await database.select(select(TABLE).where(TABLE.c.job_id == job_id))
    if not found:
        raise Unavailable("The import has been deleted")
    row = entity(found[0])
    return Progress(**{field.name: row[field.name] for field in fields(Progress)})


async def record(tx: Transaction, job_id: str, known: int, result: ChunkResult) -> None:
    """Record the result of a chunk. `known` is the number of problems before the chunk."""
    room = max(0, MAX_STORED_PROBLEMS - known)
    lines = [
        orjson.dumps({"line": line, "field": field, "reason": reason}, option=orjson.OPT_APPEND_NEWLINE)
        for line, field, reason in result.problems[:room]
    ]
    if lines:
        await _insert_part(tx, job_id, REPORT, known, b"".join(lines))
    changes = {
        "offset": result.offset,
        "is_in_long_line": result.is_in_long_line,
        "added": TABLE.c.added + result.added,
        "updated": TABLE.c.updated + result.updated,
        "failed": TABLE.c.failed + result.failed,
        "problems": known + len(result.problems),
    }
    await tx.connection.execute(update(TABLE).where(TABLE.c.job_id == job_id).values(changes))


@dataclass(frozen=True, slots=True)
class Report:
    """The result of an import so far. `problems` is NDJSON; `not_shown` counts the problems that are not stored."""

    counts: dict[str, Any]
    problems: bytes


async def report(database: Database, job_id: str) -> Report | None:
    """Return the report of an import, or None if the job is not an import."""
    columns = (JOBS.c.state, JOBS.c.error, TABLE.c.is_dry_run, TABLE.c.added, TABLE.c.updated, TABLE.c.failed)
    of_report = and_(PARTS.c.job_id == TABLE.c.job_id, PARTS.c.role == REPORT)
    joined = TABLE.join(JOBS, JOBS.c.id == TABLE.c.job_id).outerjoin(PARTS, of_report)
    query = select(*columns, TABLE.c.problems, PARTS.c.content).select_from(joined).where(TABLE.c.job_id == job_id)
    found = await database.select(query.order_by(PARTS.c.number))
    if not found:
        return None
    first = found[0]
    counts = {
        "state": first.state,
        "error": first.error,
        "dry_run": bool(first.is_dry_run),
        "added": first.added,
        "updated": first.updated,
        "failed": first.failed,
        "not_shown": max(0, first.problems - MAX_STORED_PROBLEMS),
    }
    return Report(counts, b"".join([row.content for row in found if row.content is not None]))
