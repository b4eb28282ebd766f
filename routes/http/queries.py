"""Path, query and body models that several operations share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    ValidationInfo,
    create_model,
    field_validator,
)
from pydantic_core import PydanticCustomError

import schemas
from core import filters
from core.errors import FieldProblem
from core.texts.shortened import shortened
from core.texts.suggestions import Unknown
from repository.generic.lists import ListRequest
from routes.http.operation import Call

Offset = Annotated[int, Field(ge=0, le=schemas.MAX_ID), schemas.WRITTEN_INTEGER]


class Parameters(BaseModel):
    """Parameters of a path or a query. Unknown parameters are rejected."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


# --- paths


class ById(Parameters):
    id: schemas.PathId


class ByIdOrCode(Parameters):
    id: schemas.PathIdOrCode


class ByUserId(Parameters):
    user_id: schemas.PathId


class ByUsername(Parameters):
    username: Annotated[str, Field(min_length=1, max_length=50, pattern=r"^[^/\x00]+$")]


class ByRange(Parameters):
    start_id: schemas.PathId
    end_id: schemas.PathId

    @field_validator("end_id")
    @classmethod
    def _is_a_range(cls, end_id: int, info: ValidationInfo) -> int:
        start_id = info.data.get("start_id", end_id)  # if `start_id` is invalid, `info.data` lacks it
        if not 0 <= end_id - start_id < schemas.MAX_BULK_ROWS:
            message = f"Expected start_id <= end_id and a range of at most {schemas.MAX_BULK_ROWS} ids"
            raise PydanticCustomError("invalid_range", message)
        return end_id


class ByNumber(Parameters):
    number: Annotated[int, Field(ge=1, le=schemas.MAX_GENERATED_ROWS), schemas.WRITTEN_INTEGER]


class ByUuid(Parameters):
    id: schemas.Uuid


# --- queries

Sort = Annotated[
    str | None,
    Field(
        description="Comma-separated fields; a leading minus sorts in descending order. If repeated, the values count "
        "as one list"
    ),
]
After = Annotated[
    Offset | None,
    Field(description="Only rows with a higher id. Without `sort` and `offset`, `Link` continues after the last id"),
]


class PageQuery(Parameters):
    """The query of one page of a list. `skip` is an alias of `offset`."""

    offset: Offset | None = Field(default=None, description="How many rows to skip; 0 by default")
    skip: Offset | None = Field(default=None, description="Alias of `offset`")
    limit: Annotated[int, Field(ge=0, le=schemas.MAX_PAGE), schemas.WRITTEN_INTEGER] = schemas.DEFAULT_PAGE

    @property
    def start(self) -> int:
        return self.offset if self.offset is not None else self.skip or 0


class SearchQuery(PageQuery):
    """The query of a list in a fixed order."""

    q: schemas.Search = ""


class TrailQuery(PageQuery):
    """The query of a list without free-text search."""

    sort: Sort = None
    after: After = None


class ListQuery(TrailQuery):
    q: schemas.Search = ""


def sortable(fields: Mapping[str, filters.Field]) -> list[str]:
    """Return the columns that a list can be sorted by."""
    return sorted(field.column for field in fields.values() if field.kind is not filters.FieldType.STRINGS)


class InvalidNames(ValueError):
    """The message says what was expected. `unknown` is None if all names are known."""

    def __init__(self, message: str, unknown: Unknown | None) -> None:
        super().__init__(message)
        self.unknown = unknown


def sorting(fields: Mapping[str, filters.Field], sort: str | None) -> tuple[tuple[str, bool], ...]:
    """Parse a list such as `-release_date,title` into (column, is_descending) pairs. Raises InvalidNames."""
    if not sort:
        return ()
    columns = sortable(fields)
    wanted: dict[tuple[str, bool], None] = {}
    for part in sort.split(","):
        each = (part.removeprefix("-"), part.startswith("-"))
        if each[0] not in columns or each in wanted:
            message = f"Expected fields from {', '.join(columns)}, each at most once, optionally with a leading minus"
            raise InvalidNames(message, Unknown(each[0], columns) if each[0] not in columns else None)
        wanted[each] = None
    return tuple(wanted)


def both(one: filters.Filter, other: filters.Filter) -> filters.Filter:
    """Return the filter for the rows that match two filters made by `filters.build`."""
    merged = filters.build((*one.all, *other.all), one.any or other.any)
    return replace(merged, also=other.any) if one.any and other.any else merged


def filter_of(text: str, fields: Mapping[str, filters.Field]) -> filters.Parsed:
    """Parse the parameter `filter`: a filter as a JSON object, as in the action `subscribe` of the websocket."""
    loc = ("query", "filter")
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return filters.Parsed(filters.EVERYTHING, [FieldProblem(loc, f"Expected JSON: {error}", "invalid_json")])
    return filters.parse_json(value, fields, loc)


def selection(members: Sequence[str], text: str) -> tuple[str, ...]:
    """Parse a list of members such as `title,id`, and return the members in the order of the entity.

    Raises InvalidNames.
    """
    wanted = text.split(",")
    strange = next((name for name in wanted if name not in members), None)
    if strange is not None or len(set(wanted)) != len(wanted):
        unknown = Unknown(strange, members) if strange is not None else None
        raise InvalidNames(f"Expected one or more of {', '.join(members)}, each at most once", unknown)
    return tuple(name for name in members if name in wanted)


def list_request(
    call: Call[object, TrailQuery, object], fields: Mapping[str, filters.Field], user_id: int | None = None
) -> ListRequest:
    """Return the part of a list that the call requests. With `user_id`, the list has only that user's rows."""
    query = call.query
    return ListRequest(
        filter=call.filter,
        text=query.q if isinstance(query, ListQuery) else "",
        sort=sorting(fields, query.sort),
        offset=query.start,
        limit=query.limit,
        after=call.cursor.after if call.cursor is not None else query.after,
        cursor=call.cursor,
        user_id=user_id,
        columns=call.fields,
    )


class CountQuery(Parameters):
    q: schemas.Search = ""


class OnErrorQuery(Parameters):
    on_error: Literal["fail", "skip"] = Field(
        default="fail", description="`skip`: store the valid rows and list the others"
    )


class GenerateQuery(Parameters):
    seed: Annotated[int, Field(ge=0, le=2**53 - 1), schemas.WRITTEN_INTEGER] | None = Field(
        default=None, description="The same seed generates the same rows; a random seed when omitted"
    )
    rate: Annotated[float, Field(ge=0.01, le=1_000_000, allow_inf_nan=False)] | None = Field(
        default=None, description="The maximum number of rows per second; unlimited when omitted"
    )
    batch_size: Annotated[int, Field(ge=1, le=10_000), schemas.WRITTEN_INTEGER] | None = Field(
        default=None, description="How many rows to store per transaction; 1,000 when omitted, fewer at a low rate"
    )

    @property
    def parts(self) -> Sequence[str]:
        """The resources whose rows are generated with each row, if `generate_query` has derived this query."""
        text: str | None = getattr(self, "with", None)
        return text.split(",") if text is not None else ()


def generate_query(singular: str, names: Sequence[str]) -> type[GenerateQuery]:
    """Return the query model for generating entities, each with rows of the resources `names` if the client likes."""
    expected = f"Expected one or more of {', '.join(names)}, separated by commas"

    def check(text: str) -> str:
        for name in text.split(","):
            if name not in names:
                nearest = Unknown(name, names).nearest()
                hint = f'; did you mean "{nearest}"?' if nearest is not None else ""
                raise PydanticCustomError("unknown_name", f'{expected}; got "{shortened(name)}"{hint}')
        return text

    described = Field(
        default=None,
        description=f"What to generate with each {singular}: one or more of {', '.join(names)}, separated by commas",
        json_schema_extra={"pattern": _pattern(names)},
    )
    choice: Any = Annotated[str, AfterValidator(check)] | None
    members: dict[str, Any] = {"with": (choice, described)}  # a keyword of Python
    return create_model(f"Generate{singular.title()}Query", __base__=GenerateQuery, **members)


def _pattern(names: Sequence[str]) -> str:
    """Return the regular expression of a list of these names."""
    one = f"(?:{'|'.join(names)})"
    return f"^{one}(?:,{one})*$"


class IncludeQuery(Parameters):
    """The base class of queries that add related rows to an entity. `include_query` derives one for each resource."""

    include: str | None = None

    @property
    def names(self) -> Sequence[str]:
        return self.include.split(",") if self.include is not None else ()


def include_query(singular: str, names: Sequence[str]) -> type[IncludeQuery]:
    """Return the query model of an entity whose related rows `names` can be included."""
    expected = f"expected one or more of {', '.join(names)}, separated by commas"

    def check(text: str) -> str:
        if not set(text.split(",")) <= set(names):
            raise ValueError(expected)
        return text

    described = Field(
        default=None,
        description=f"Adds rows that refer to the {singular}: {expected}",
        json_schema_extra={"pattern": _pattern(names)},
    )
    choice: Any = Annotated[str, AfterValidator(check)] | None
    return create_model(f"{singular.title()}IncludeQuery", __base__=IncludeQuery, include=(choice, described))


# --- bodies


class Rows(RootModel[Annotated[list[Any], Field(max_length=schemas.MAX_BULK_ROWS)]]):
    """The rows of a bulk body, not validated yet: see `parsing.check_rows`."""
