"""Imports: a file is stored in parts while it arrives, then a job stores its rows."""

from __future__ import annotations

import asyncio
import uuid
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Literal

import orjson
import structlog
from pydantic import Field
from starlette.responses import Response

from core.errors import FieldProblem, InvalidInput, Problem, Unavailable
from core.network.addresses import network_of
from repository import jobs
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import idempotency
from repository.generic.idempotency import StoredResponse
from repository.jobs import JobOrder
from repository.transfers import imports
from repository.transfers.imports import ImportOrder
from repository.transfers.lines import Format
from resources.jobs import Job
from resources.resource import Resource
from routes.http import queries, rendering
from routes.http.limit_groups import LimitGroup
from routes.http.operation import Call, Operations
from services.limits.in_progress import Uploader
from services.transfers import checking
from services.transfers.formats import MEDIA_TYPES
from services.transfers.reading import MAX_RECORD_BYTES, records

OCTETS = "application/octet-stream"
LEVEL = 1  # the fastest level of zlib; CSV shrinks to a third

log = structlog.get_logger("transfers")
Flag = Literal["true", "false"]


class ImportQuery(queries.Parameters):
    format: Literal["csv", "ndjson"] | None = Field(
        default=None, description="By default, the format of `Content-Type`; required with `application/octet-stream`"
    )
    dry_run: Flag = Field(default="false", description="Only report what would be stored, and the problems")
    on_error: Literal["skip", "stop"] = Field(
        default="skip", description="Skip rows with problems, or stop at the first one and keep the rows before it"
    )
    safe: Flag = Field(default="false", description="CSV: the file was exported with `safe=true`")


def declare(made: Operations, resource: Resource) -> None:
    """Declare the operation that imports rows."""
    only = f" ({resource.writers} only)" if resource.writers else ""
    made.post(
        f"/{resource.name}/import",
        f"Import {resource.name}{only}",
        {202: Job},
        description="Stores a file of up to 100 MiB and queues a job that adds its rows. A row with an `id` changes "
        "the entity with this id instead. `GET /jobs/{id}/report` lists the rows that could not be stored.",
        file_media_types=(MEDIA_TYPES[Format.CSV], MEDIA_TYPES[Format.NDJSON], OCTETS),
        max_body_bytes=imports.MAX_FILE_BYTES,
        signed_in=True,
        idempotent=True,
        errors=(403, 429) if resource.writers else (429,),
        answer_headers=("Location",),
        limit_group=LimitGroup.UPLOAD,
    )(partial(import_, resource))


@dataclass(slots=True)
class _File:
    """What is known about the part of a file that has arrived."""

    size: int = 0
    lines: int = 0
    columns: tuple[str, ...] = ()
    ends_in_line: bool = False
    digest: blake2b = field(default_factory=partial(blake2b, digest_size=32))

    @property
    def all_lines(self) -> int:
        return self.lines + self.ends_in_line


async def import_(resource: Resource, call: Call[None, ImportQuery, None]) -> Response:
    resource.require_may_create(call.me)  # reject early; each chunk of rows is checked again
    format_ = _format_of(call)
    services = call.services
    max_rows = services.generated_rows_per_day
    job_id = str(uuid.uuid4())
    is_counted = services.limits.is_on and call.address
    origin = jobs.Origin(network_of(call.address or ""), services.users_per_address) if is_counted else None
    with services.transfers.uploads.take(Uploader(call.me.user_id, call.address)):
        claim = rendering.claim_of(call, b"")
        # The file of a repeated request is not stored again, but only compared with the file of the first request.
        is_repeated = claim is not None and await idempotency.is_taken(call.database, claim)
        if not is_repeated:
            user_id = call.me.user_id if max_rows is not None else None
            await imports.require_room(call.database, user_id, origin.network if origin is not None else None)
        try:
            file = await _read(call, None if is_repeated else _Storing(resource, call.database, job_id, format_))
            order = JobOrder(f"{imports.KIND}{resource.name}", file.all_lines, seed=0, batch_size=1, rate=None)
            query = call.query
            details = ImportOrder(
                format_,
                file.columns,
                query.safe == "true",
                query.dry_run == "true",
                query.on_error == "stop",
                file.size,
                0,
            )

            async def work(tx: Transaction) -> StoredResponse:
                if is_repeated:
                    raise Unavailable("The first response to this key was deleted meanwhile; send the request again")
                job = await jobs.create(tx, call.me, order, max_rows, origin, job_id=job_id, place=("body",))
                await imports.create(tx, job_id, details)
                return StoredResponse(202, orjson.dumps(job), {"Location": f"{call.prefix}/jobs/{job_id}"})

            response = await rendering.write_once(call, work, file.digest.digest())
        except Unavailable:
            # The job may have been stored although the response of the database was lost. If not, the clean-up deletes
            # the file.
            raise
        except BaseException:
            await _discard(call, job_id)
            raise
        if rendering.REPLAYED in response.headers:
            await _discard(call, job_id)
    return response


def _format_of(call: Call[None, ImportQuery, None]) -> Format:
    if call.query.format is not None:
        return Format(call.query.format)
    media_type = call.headers.get("content-type", "").partition(";")[0].strip().lower()
    found = next((each for each, name in MEDIA_TYPES.items() if name == media_type), None)
    if found is None:
        message = f"Expected csv or ndjson, because Content-Type is {OCTETS}"
        raise InvalidInput([FieldProblem(("query", "format"), message, "missing")])
    return found


@dataclass(frozen=True, slots=True)
class _Storing:
    """Where the parts of a file are stored, and what they should contain."""

    resource: Resource
    database: Database
    job_id: str
    format: Format


async def _read(call: Call[None, ImportQuery, None], storing: _Storing | None) -> _File:
    """Read the body and return its facts. With `storing`, store its parts.

    Raises InvalidInput and the exceptions of `uploads.stream`.
    """
    file = _File()
    number = 0
    async for part in _parts(call):
        if number == 0 and storing is not None and storing.format is Format.CSV:
            file.columns = _header(storing.resource, part, is_last=len(part) < imports.PART_BYTES)
        file.size += len(part)
        file.lines += part.count(b"\n")
        file.ends_in_line = not part.endswith(b"\n")
        await asyncio.to_thread(file.digest.update, part)
        if storing is not None:
            deflated = await asyncio.to_thread(zlib.compress, part, LEVEL)
            await imports.store_part(storing.database, storing.job_id, number, deflated)
        number += 1
    if not file.size and storing is not None:
        raise InvalidInput([FieldProblem(("body",), "Expected a file with rows, got an empty one", "empty_file")])
    return file


async def _parts(call: Call[None, ImportQuery, None]) -> AsyncIterator[bytes]:
    """Yield the body in parts of PART_BYTES, the last of which may be shorter."""
    assert call.stream is not None, "expected the operation to have file_media_types"
    rest = bytearray()
    async for piece in call.stream():
        rest += piece
        while len(rest) >= imports.PART_BYTES:
            yield bytes(rest[: imports.PART_BYTES])
            del rest[: imports.PART_BYTES]
    if rest:
        yield bytes(rest)


def _header(resource: Resource, part: bytes, *, is_last: bool) -> tuple[str, ...]:
    """Return the columns of a CSV file. Raises InvalidInput."""
    first = next(records(Format.CSV, part[: 2 * MAX_RECORD_BYTES], 1, is_last=is_last), None)
    if first is None or first.values is None:
        reason = first.problem if first is not None and first.problem is not None else "Expected the names of columns"
        raise InvalidInput([FieldProblem(("body",), f"Line 1: {reason}", "invalid_header")])
    if problems := checking.columns_of(resource, first.values):
        raise InvalidInput(problems)
    return tuple(first.values)


async def _discard(call: Call[None, ImportQuery, None], job_id: str) -> None:
    try:
        await imports.discard(call.database, job_id)
    except Problem:
        log.info("file of an import left for a later clean-up", job=job_id)
