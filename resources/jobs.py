"""Jobs as clients see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import models
from core.filters import Field
from resources.derived import chosen_fields
from schemas import Answer, Moment

Kind = Literal[
    "generate_movies",
    "generate_characters",
    "generate_actors",
    "generate_ratings",
    "import_movies",
    "import_characters",
    "import_genres",
    "import_actors",
    "delete_movies",
    "delete_genres",
    "delete_actors",
    "delete_countries",
    "delete_languages",
    "rename_genres",
    "rename_actors",
    "rename_languages",
]
# The jobs that delete one row with its many dependants, and those that change the many rows that show a renamed row.
DELETE, RENAME = "delete_", "rename_"
State = Literal["queued", "running", "done", "cancelled", "failed"]


class Job(Answer):
    id: str
    kind: Kind
    state: State
    done: int
    total: int
    rows_per_second: int
    seed: int
    user_id: int | None
    created_at: Moment
    started_at: Moment | None
    finished_at: Moment | None
    error: str | None


JOB_FIELDS: Mapping[str, Field] = chosen_fields(
    models.jobs, *("id", "kind", "state", "total", "user_id", "created_at"), kind=get_args(Kind), state=get_args(State)
)
