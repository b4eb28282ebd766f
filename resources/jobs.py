"""Jobs as clients see them."""

from __future__ import annotations

from typing import Literal

from core import filters
from core.filters import FieldType
from schemas import Answer, Moment


class Job(Answer):
    id: str
    kind: Literal["generate_movies", "generate_characters"]
    state: Literal["queued", "running", "done", "cancelled", "failed"]
    done: int
    total: int
    rows_per_second: int
    seed: int
    user_id: int | None
    created_at: Moment
    started_at: Moment | None
    finished_at: Moment | None
    error: str | None


JOB_STATES = ("queued", "running", "done", "cancelled", "failed")


JOB_FIELDS: dict[str, filters.Field] = {
    "id": filters.Field("id", "id", FieldType.TEXT),
    "kind": filters.Field("kind", "kind", FieldType.TEXT, ("generate_movies", "generate_characters")),
    "state": filters.Field("state", "state", FieldType.TEXT, JOB_STATES),
    "total": filters.Field("total", "total", FieldType.INTEGER),
    "user_id": filters.Field("user_id", "user_id", FieldType.INTEGER),
    "created_at": filters.Field("created_at", "created_at", FieldType.TIME),
}
