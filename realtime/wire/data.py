"""The `data` member of a frame about rows: one row, several rows, their ids, or a summary. Pure.

Functions take rows as mappings, or as encoded bytes where the caller has to know the size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import orjson


def encode(value: Any) -> bytes:
    return orjson.dumps(value)


def deleted(encoded_id: bytes) -> bytes:
    """Return the data of one deleted row."""
    return b'{"id":%s}' % encoded_id


def summary(ids: Sequence[int | str], job_id: str | None) -> bytes:
    """Return the data of a bulk frame with `bulk=summary`."""
    return orjson.dumps({"count": len(ids), "first_id": min(ids), "last_id": max(ids), "job_id": job_id})


def bulk(operation: str, values: Sequence[Any], job_id: str | None) -> bytes:
    """Return the data of a bulk frame. `values` are the ids of deleted rows, or the added or updated rows."""
    data: dict[str, Any] = {"count": len(values), "ids" if operation == "delete" else "items": values}
    if job_id is not None:
        data["job_id"] = job_id
    return orjson.dumps(data)


def bulk_encoded(operation: str, encoded: Sequence[bytes]) -> bytes:
    """Return the data of a bulk frame, without a job, from values that are already encoded."""
    member = b"ids" if operation == "delete" else b"items"
    return b'{"count":%d,"%s":[%s]}' % (len(encoded), member, b",".join(encoded))


def frame_slices(encoded: Sequence[bytes], *, max_bytes: int, max_items: int) -> Iterator[slice]:
    """Yield slices of `encoded` that each fit into one frame. A single item larger than `max_bytes` has its own slice;
    an empty sequence has one empty slice.
    """
    start, size = 0, 0
    for index, item in enumerate(encoded):
        if index > start and (size + len(item) > max_bytes or index - start >= max_items):
            yield slice(start, index)
            start, size = index, 0
        size += len(item) + 1
    yield slice(start, len(encoded))
