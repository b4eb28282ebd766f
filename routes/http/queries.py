"""The paths and queries that operations share, as models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from core import filters
from core.errors import FieldProblem, InvalidInput
from schemas import DEFAULT_PAGE, MAX_GENERATED_ROWS, MAX_ID, MAX_PAGE, NO_NUL, WRITTEN_INTEGER, PathId, Uuid

Offset = Annotated[int, Field(ge=0, le=MAX_ID), WRITTEN_INTEGER]


def sortable(fields: Mapping[str, filters.Field]) -> list[str]:
    """The columns that a list can be sorted by."""
    return sorted(field.column for field in fields.values() if field.kind is not filters.FieldType.STRINGS)


def sorting(fields: Mapping[str, filters.Field], sort: str | None) -> tuple[tuple[str, bool], ...]:
    """`-release_date,title` as (column, descending) pairs. Raises InvalidInput."""
    if not sort:
        return ()
    columns = sortable(fields)
    wanted: dict[tuple[str, bool], None] = {}
    for part in sort.split(","):
        each = (part.removeprefix("-"), part.startswith("-"))
        if each[0] not in columns or each in wanted:
            message = f"Expected fields, each once, with or without a minus, of {', '.join(columns)}"
            raise InvalidInput([FieldProblem(("query", "sort"), message, "invalid_sort")])
        wanted[each] = None
    return tuple(wanted)


class Query(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class ById(Query):
    id: PathId


class ByUserId(Query):
    user_id: PathId


class ByUsername(Query):
    username: Annotated[str, Field(min_length=1, max_length=50, pattern=r"^[^/\x00]+$")]


class ByRange(Query):
    start_id: PathId
    end_id: PathId


class ByNumber(Query):
    number: Annotated[int, Field(ge=1, le=MAX_GENERATED_ROWS), WRITTEN_INTEGER]


class ByJobId(Query):
    id: Uuid


class PageQuery(Query):
    """`skip` is another name for `offset`."""

    offset: Offset | None = Field(default=None, description="How many to pass over; 0 by default")
    skip: Offset | None = Field(default=None, description="Another name for offset")
    limit: Annotated[int, Field(ge=0, le=MAX_PAGE), WRITTEN_INTEGER] = DEFAULT_PAGE

    @property
    def start(self) -> int:
        return self.offset if self.offset is not None else self.skip or 0


class ListQuery(PageQuery):
    q: Annotated[str, Field(max_length=200, pattern=NO_NUL)] = Field(
        default="", description="Free text: rows that hold every word, without case"
    )
    sort: str | None = Field(default=None, description="Fields, comma separated; a minus sorts from high to low")
    after: Offset | None = Field(
        default=None, description="Only rows with a higher id; without sort and offset, Link walks on by id"
    )


class TrailQuery(PageQuery):
    """Of a list without texts."""

    sort: str | None = Field(default=None, description="Fields, comma separated; a minus sorts from high to low")
    after: Offset | None = Field(
        default=None, description="Only rows with a higher id; without sort and offset, Link walks on by id"
    )


class CountQuery(Query):
    q: Annotated[str, Field(max_length=200, pattern=NO_NUL)] = Field(
        default="", description="Free text: rows that hold every word, without case"
    )


class OnErrorQuery(Query):
    on_error: Literal["fail", "skip"] = Field(
        default="fail", description="skip: store the good rows and list the others"
    )


class GenerateQuery(Query):
    seed: Annotated[int, Field(ge=0, le=2**53 - 1), WRITTEN_INTEGER] | None = Field(
        default=None, description="The same seed makes the same rows; random when left out"
    )
    rate: Annotated[float, Field(ge=0.01, le=1_000_000, allow_inf_nan=False)] | None = Field(
        default=None, description="Rows per second at most; as fast as it goes when left out"
    )
    batch_size: Annotated[int, Field(ge=1, le=10_000), WRITTEN_INTEGER] | None = Field(
        default=None, description="Rows per transaction; 1,000 when left out, fewer at a low rate"
    )


class IncludeQuery(Query):
    include: Literal["characters"] | None = Field(default=None, description="Adds the movie's characters")
