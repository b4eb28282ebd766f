"""Runs an import: chunks of a file become rows, each chunk in one transaction with its events and its progress.

Rules:
- A chunk is parsed in a thread while the previous one is stored.
- The rights of the job's user are read and locked in each chunk's transaction. If the user has lost them, the job ends.
- A row that cannot be stored is a problem in the report. If several rows cannot be stored together for a reason that
  names none of them, each half of the rows is tried separately.
- A dry run stores each chunk as an ordinary import does, and then rolls it back to a savepoint.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.errors import ContentTooLarge, Forbidden, InvalidInput, Problem
from core.identity import Identity
from repository import job_users, jobs
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import conflicts, rows, writes
from repository.generic.writes import Prepared
from repository.jobs import ClaimedJob
from repository.transfers import imports
from repository.transfers.imports import KIND, ChunkResult, Progress
from repository.transfers.lines import Format
from resources.registry import RESOURCES
from resources.resource import Resource
from services.transfers.checking import Checker, Row, RowProblem
from services.transfers.reading import Record, records

CHUNK_BYTES = 512 * 1024  # at least the longest record
CHUNK_ROWS = 2_000  # as many as fit into two events
ATTEMPTS = 10  # to store the rows of a chunk; each attempt leaves out the rows that the previous one refused

_RESOURCES = {f"{KIND}{resource.name}": resource for resource in RESOURCES if resource.transferred}


class Stopped(Exception):
    """The import ends as failed; the rows stored before remain. The message says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a file: after `done` lines and `offset` bytes, possibly within a line whose rest is skipped."""

    done: int
    offset: int
    is_in_long_line: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a file: its rows and problems, and the place after it. `new` holds the rows without an id, prepared."""

    rows: Sequence[Row]
    problems: Sequence[RowProblem]
    end: Place
    new: Prepared

    def until(self, line: int) -> Sequence[Row]:
        """Return the rows before a line."""
        return [row for row in self.rows if row.line < line]


@dataclass(frozen=True, slots=True)
class Stored:
    """The result of storing the rows of a chunk."""

    added: int = 0
    updated: int = 0
    problems: tuple[RowProblem, ...] = ()

    def __add__(self, other: Stored) -> Stored:
        return Stored(self.added + other.added, self.updated + other.updated, self.problems + other.problems)


def is_import(kind: str) -> bool:
    return kind.startswith(KIND)


class ImportJob:
    """A claimed import. `chunk_at` and `store` alternate until `is_done`."""

    def __init__(self, database: Database, job: ClaimedJob, owner: str, progress: Progress) -> None:
        self._database = database
        self._job = job
        self._owner = owner
        self._progress = progress
        self._resource: Resource = _RESOURCES[job.kind]
        self._format = Format(progress.format)
        self._checker = Checker(self._resource, self._format, progress.columns, is_safe=progress.is_safe)
        self.done = job.done
        self._file = imports.StoredFile(database, job.id, progress.size)
        self._started = time.monotonic()
        self._max_rows = CHUNK_ROWS

    @property
    def is_done(self) -> bool:
        return self.done >= self._job.total

    @property
    def place(self) -> Place:
        """The place after the stored chunks."""
        return Place(self.done, self._progress.offset, self._progress.is_in_long_line)

    async def chunk_at(self, place: Place) -> Chunk:
        """Read and check the rows of a chunk. Raises Unavailable."""
        piece = await self._file.read(place.offset, CHUNK_BYTES)
        return await asyncio.to_thread(self._parsed, piece, place)

    def _parsed(self, piece: bytes, place: Place) -> Chunk:
        is_last = place.offset + len(piece) >= self._progress.size
        first = last = Record(0, place.done + 1, 0)
        good: list[Row] = []
        problems: list[RowProblem] = []
        for last in records(
            self._format, piece, first.next_line, is_last=is_last, is_in_long_line=place.is_in_long_line
        ):
            if place.offset == 0 and last.line == 1 and self._format is Format.CSV:
                continue  # the header
            found = self._checker.check(last)
            if isinstance(found, Row):
                good.append(found)
            elif found is not None:
                problems += found
            if len(good) + len(problems) >= self._max_rows:
                break
        assert last.end > 0, "expected a piece of the file to be longer than the longest record"
        # Preparing the rows here takes less time than in the transaction, which stores another chunk meanwhile.
        new = [row.fields for row in good if row.id is None]
        prepared = writes.prepare(self._resource, new, self._job.user_id, is_sqlite=self._database.is_sqlite)
        end = Place(last.next_line - 1, place.offset + last.end, last.is_in_long_line)
        return Chunk(good, problems, end, prepared)

    async def store(self, chunk: Chunk) -> bool:
        """Store a chunk. Return False if it is too large for one transaction: `chunk_at` then returns a smaller one.

        Raises LeaseLost, Stopped or Unavailable.
        """

        async def work(tx: Transaction) -> tuple[ChunkResult, str | None]:
            identity = await job_users.identity_of(tx, self._job.user_id)
            self._resource.require_may_create(identity)
            stored, error = await self._stored(tx, identity, chunk)
            failed = len({problem.line for problem in stored.problems})
            end = chunk.end
            result = ChunkResult(
                end.offset, end.is_in_long_line, stored.added, stored.updated, failed, sorted(stored.problems)
            )
            # If the import stops at a problem, only the lines before it are done.
            done = end.done if error is None else stored.problems[0].line - 1
            seconds = max(time.monotonic() - self._started, 1e-3)
            rate = int((done - self._job.done) / seconds)
            await jobs.advance(tx, self._job, self._owner, self.done, done - self.done, rate, error=error)
            await imports.record(tx, self._job.id, self._progress.problems, result)
            return result, error

        try:
            result, error = await self._database.write(work)
        except ContentTooLarge:
            self._max_rows = max(1, len(chunk.rows) // 2)
            return False
        except Forbidden as lost:
            raise Stopped(str(lost)) from lost
        self._max_rows = min(CHUNK_ROWS, 2 * self._max_rows)
        self.done = self._job.total if error is not None else chunk.end.done
        self._progress = replace(
            self._progress,
            offset=result.offset,
            is_in_long_line=result.is_in_long_line,
            problems=self._progress.problems + len(result.problems),
        )
        return True

    async def discard_file(self) -> None:
        """Delete the file of the import, which has ended. Raises Unavailable."""
        await imports.discard(self._database, self._job.id)

    async def _stored(self, tx: Transaction, identity: Identity, chunk: Chunk) -> tuple[Stored, str | None]:
        """Store the rows of a chunk. Return the result and, if the import ends here, the reason."""
        progress = self._progress
        if not progress.stops:
            stored = await self._apply(tx, identity, chunk.rows, chunk.new)
            return replace(stored, problems=(*chunk.problems, *stored.problems)), None
        problem = min(chunk.problems, default=None)
        while True:
            good = chunk.rows if problem is None else chunk.until(problem.line)
            try:
                async with tx.savepoint():
                    stored = await self._apply(tx, identity, good, chunk.new)
                    if stored.problems:
                        raise _Undone(stored)
            except _Undone as undone:
                problem = min(undone.stored.problems)
                continue
            if problem is None:
                return stored, None
            # Everyone can see the job, but not its report, so the reason is only in the report.
            return replace(stored, problems=(problem,)), f"Stopped at line {problem.line}; the report says why"

    async def _apply(self, tx: Transaction, identity: Identity, given: Sequence[Row], new: Prepared) -> Stored:
        if not self._progress.is_dry_run:
            return await self._all(tx, identity, given, new)
        try:
            async with tx.savepoint():
                raise _Undone(await self._all(tx, identity, given, new))
        except _Undone as undone:
            return undone.stored

    async def _all(self, tx: Transaction, identity: Identity, given: Sequence[Row], new: Prepared) -> Stored:
        added, edited = [row for row in given if row.id is None], [row for row in given if row.id is not None]
        return await self._tried(tx, identity, added, new) + await self._tried(tx, identity, edited, new)

    async def _tried(self, tx: Transaction, identity: Identity, given: Sequence[Row], new: Prepared) -> Stored:
        """Store rows, of which either all are new or all change existing rows."""
        if not given:
            return Stored()
        try:
            async with tx.savepoint():
                if given[0].id is not None:
                    return await self._edited(tx, identity, given)
                return await self._added(tx, identity, given, new if len(new) == len(given) else None)
        except ContentTooLarge:
            if len(given) > 1 or len(tx.drafts):
                raise
            return Stored(problems=(RowProblem(given[0].line, "", "The row is too large"),))
        except Problem as problem:
            if problem.status >= 500:
                raise
            if len(given) == 1:
                return Stored(problems=tuple(_problems_of(given[0], problem)))
            half = len(given) // 2
            first = await self._tried(tx, identity, given[:half], new)
            return first + await self._tried(tx, identity, given[half:], new)

    async def _added(
        self, tx: Transaction, identity: Identity, given: Sequence[Row], prepared: Prepared | None
    ) -> Stored:
        items = [row.fields for row in given]
        added = await writes.add_bulk(
            tx, self._resource, identity, items, skip_conflicts=True, job_id=self._job.id, prepared=prepared
        )
        refused = [
            RowProblem(given[place].line, each.column, each.message)
            for place, found in added.refused.items()
            for each in found
        ]
        return Stored(added=len(added.encoded), problems=tuple(refused))

    async def _edited(self, tx: Transaction, identity: Identity, given: Sequence[Row]) -> Stored:
        resource = self._resource
        ids = sorted({row.id for row in given if row.id is not None})
        found = {row["id"]: row for row in await rows.fetch_locked(tx, resource.table, ids)}
        problems: list[RowProblem] = []
        allowed: list[Row] = []
        for row in given:
            before = found.get(row.id)
            if before is None:
                problems.append(RowProblem(row.line, "id", f"There is no {resource.singular} {row.id}"))
            elif not (resource.has_all_rights(identity) or resource.is_own(identity, before)):
                problems.append(RowProblem(row.line, "id", f"You may not change {resource.singular} {row.id}"))
            else:
                allowed.append(row)
        refused = await conflicts.find(
            tx, resource, [row.fields for row in allowed], edits=[found[row.id] for row in allowed]
        )
        problems += [RowProblem(allowed[place].line, each.column, each.message) for place, each in refused.items()]
        good = [row for place, row in enumerate(allowed) if place not in refused]
        edited, unlinkable = await self._edited_if_linked(tx, identity, good, found)
        return Stored(updated=len(edited), problems=(*problems, *unlinkable))

    async def _edited_if_linked(
        self, tx: Transaction, identity: Identity, given: Sequence[Row], found: Mapping[int, Any]
    ) -> tuple[Sequence[Row], Sequence[RowProblem]]:
        """Edit the rows whose links name existing rows. Return these rows, and the problems of the others."""
        good, problems = given, list[RowProblem]()
        # If several rows have the same id, only the last one is checked, so there may be several attempts.
        for _ in range(ATTEMPTS):
            edits = [(row.id, row.fields) for row in good if row.id is not None]
            if not edits:
                return good, problems
            try:
                async with tx.savepoint():
                    await writes.edit_bulk(tx, self._resource, identity, edits)
                return good, problems
            except InvalidInput:
                fields = [row.fields for row in good]
                before = [found[id_] for id_, _ in edits]
                refused = await writes.unlinkable(tx, self._resource, identity, fields, before)
                if not refused:
                    raise
                problems += [
                    RowProblem(good[place].line, each.column, each.message)
                    for place, reasons in refused.items()
                    for each in reasons
                ]
                good = [row for place, row in enumerate(good) if place not in refused]
        raise ContentTooLarge("Expected fewer rows")  # the next chunk is smaller


class _Undone(Exception):
    """Rolls back a savepoint, and carries the result of storing its rows."""

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.stored = stored


def _problems_of(row: Row, problem: Problem) -> list[RowProblem]:
    if isinstance(problem.detail, str):
        return [RowProblem(row.line, "", problem.detail)]
    return [
        RowProblem(row.line, ".".join(str(part) for part in each["loc"][1:] if part != 0), each["msg"])
        for each in problem.detail
    ]


async def opened(database: Database, job: ClaimedJob, owner: str) -> ImportJob:
    """Return a claimed import, which continues after its last stored chunk. Raises Unavailable."""
    return ImportJob(database, job, owner, await imports.progress(database, job.id))
