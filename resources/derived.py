"""The models and filter fields that are derived from a resource's table and body. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_type_hints

from pydantic import MISSING, BaseModel, RootModel, create_model
from pydantic import Field as ModelField
from sqlalchemy import JSON, Boolean, Column, Integer, String, Table
from sqlalchemy.types import TypeEngine

import models
from core.filters import Field, FieldType
from schemas import Answer, Body, Id, IsoDate, Moment, examples


def visible_columns(table: Table) -> tuple[str, ...]:
    """Return the columns that clients see, in the order of the table."""
    return tuple(str(column.name) for column in table.columns if "key_of" not in column.info)


def keys_of(table: Table) -> Mapping[str, str]:
    """Return the columns that hold unique keys, each with the column that its key is made from."""
    return {str(column.name): column.info["key_of"] for column in table.columns if "key_of" in column.info}


def _field_type(column: Column[Any]) -> FieldType:
    found = next((kind for sql, kind in _FIELD_TYPES.items() if isinstance(column.type, sql)), None)
    assert found is not None, f"{column}: clients cannot filter by {column.type!r}"
    return found


_FIELD_TYPES: Mapping[type[TypeEngine[Any]], FieldType] = {
    JSON: FieldType.STRINGS,
    models.IsoDate: FieldType.DATE,
    models.UtcTime: FieldType.TIME,
    Boolean: FieldType.BOOLEAN,
    Integer: FieldType.INTEGER,
    String: FieldType.TEXT,
}
_SHOWN: Mapping[FieldType, Any] = {
    FieldType.STRINGS: list[str],
    FieldType.DATE: IsoDate,
    FieldType.TIME: Moment,
    FieldType.BOOLEAN: bool,
    FieldType.INTEGER: int,
    FieldType.TEXT: str,
}


def filter_fields(table: Table, names: Mapping[str, str]) -> Mapping[str, Field]:
    """Return a filter field for each visible column; `names` renames some of them."""
    columns = {names.get(column, column): column for column in visible_columns(table)}
    return {name: Field(name, column, _field_type(table.c[column])) for name, column in columns.items()}


def chosen_fields(table: Table, *columns: str, **choices: tuple[str, ...]) -> Mapping[str, Field]:
    """Return a filter field for each of the columns; `choices` holds the possible values of some of them."""
    return {name: Field(name, name, _field_type(table.c[name]), choices.get(name, ())) for name in columns}


def entity_model(table: Table, singular: str, created_word: str) -> type[BaseModel]:
    """Return the model of an entity as GET returns it."""
    descriptions = {
        "user_id": f"The user who {created_word} the {singular}",
        "version": "Incremented by each edit, but not when only derived fields change",
    }
    members: dict[str, Any] = {}
    for name in visible_columns(table):
        column = table.c[name]
        shown = _SHOWN[_field_type(column)]
        members[name] = (shown | None if column.nullable else shown, ModelField(description=descriptions.get(name)))
    return create_model(f"{singular.title()}Entity", __base__=Answer, **members)


def change_model(entity: type[BaseModel], singular: str) -> type[BaseModel]:
    """Return the model of a change in the history of an entity."""
    shown: Any = entity | None
    members: dict[str, Any] = {
        "seq": (int, ModelField(description="The number of the event")),
        "operation": (Literal["add", "update", "delete"], ...),
        "at": (Moment, ...),
        "actor_id": (int | None, ModelField(description="The user who made the change")),
        "changed": (list[str], ModelField(description="The members that an update has changed")),
        "before": (shown, ModelField(description=f"The {singular} before the change, null if it was added")),
        "after": (shown, ModelField(description=f"The {singular} after the change, null if it was deleted")),
    }
    return create_model(f"{singular.title()}Change", __base__=Answer, **members)


def patch_model(body: type[Body], singular: str, example: Mapping[str, Any]) -> type[BaseModel]:
    """Return the model of a PATCH body: every member is optional and has no default."""
    members: dict[str, Any] = {
        name: (annotation | MISSING, MISSING)
        for name, annotation in get_type_hints(body, include_extras=True).items()
        if name in body.model_fields
    }
    return create_model(
        f"{singular.title()}Patch",
        __base__=Body,
        __doc__="Only the fields in the body change.",
        __cls_kwargs__=dict(examples(dict(example))),
        **members,
    )


def bulk_patch_model(patch: type[BaseModel], singular: str, example: Mapping[str, Any]) -> type[BaseModel]:
    """Return the model of one row of a bulk PATCH."""
    name = f"{singular.title()}BulkPatch"
    return create_model(name, __base__=patch, __cls_kwargs__=dict(examples({"id": 7, **example})), id=(Id, ...))


def bulk_answer(name: str, **members: Any) -> type[BaseModel]:
    """Return the model of the response to a bulk write; `members` are types, all of them required."""
    required: dict[str, Any] = {each: (kind, ...) for each, kind in members.items()}
    return create_model(name, __base__=Answer, **required)


def label_model(singular: str, label: str) -> type[BaseModel]:
    """Return the model of one item of the `/names` response: a row's label."""
    name = f"{singular.title()}{label.title()}"
    return create_model(name, __base__=RootModel[str], __doc__=f"The {label} of a {singular}.")
