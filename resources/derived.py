"""The models and filter fields that are derived from a resource's table and body. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import MISSING, BaseModel, RootModel, create_model
from pydantic import Field as ModelField
from sqlalchemy import JSON, Boolean, Column, Float, Integer, String, Table
from sqlalchemy.types import TypeEngine

from core.databases import columns
from core.filters import Field, FieldType
from schemas import READ_ONLY, WHOLE, Answer, Body, Id, IsoDate, Moment, Whole, examples


def visible_columns(table: Table) -> tuple[str, ...]:
    """Return the columns that clients see, in the order of the table."""
    return tuple(str(column.name) for column in table.columns if not column.info.keys() & {"key_of", "hidden"})


def keys_of(table: Table) -> Mapping[str, str]:
    """Return the columns that hold keys, each with the column that its key is made from."""
    return {str(column.name): column.info["key_of"] for column in table.columns if "key_of" in column.info}


def _field_type(column: Column[Any]) -> FieldType:
    found = next((kind for sql, kind in _FIELD_TYPES.items() if isinstance(column.type, sql)), None)
    assert found is not None, f"{column}: clients cannot filter by {column.type!r}"
    return found


_FIELD_TYPES: Mapping[type[TypeEngine[Any]], FieldType] = {
    JSON: FieldType.STRINGS,
    columns.IsoDate: FieldType.DATE,
    columns.UtcTime: FieldType.TIME,
    Boolean: FieldType.BOOLEAN,
    Integer: FieldType.INTEGER,
    Float: FieldType.DECIMAL,
    String: FieldType.TEXT,
}
_SHOWN: Mapping[FieldType, Any] = {
    FieldType.STRINGS: list[str],
    FieldType.DATE: IsoDate,
    FieldType.TIME: Moment,
    FieldType.BOOLEAN: bool,
    FieldType.INTEGER: int,
    FieldType.DECIMAL: float,
    FieldType.TEXT: str,
}
# The types of members that clients may send, but not change.
_EXACT: Mapping[FieldType, Any] = {
    FieldType.TIME: str,
    FieldType.BOOLEAN: Annotated[bool, ModelField(strict=True)],
    FieldType.INTEGER: Annotated[Whole, WHOLE],
    FieldType.DECIMAL: Annotated[float, ModelField(strict=True, allow_inf_nan=False)],
}


def filter_fields(table: Table, names: Mapping[str, str], body: type[Body]) -> Mapping[str, Field]:
    """Return a filter field for each visible column; `names` renames some of them. A column whose member of `body` is a
    `Literal` has the values of the literal as choices.
    """
    columns = {names.get(column, column): column for column in visible_columns(table)}
    choices = {name: get_args(kind) for name, kind in _literals(body).items()}
    return {
        name: Field(name, column, _field_type(table.c[column]), choices.get(column, ()))
        for name, column in columns.items()
    }


def _literals(body: type[Body]) -> Mapping[str, Any]:
    """Return the members of a body whose type is a `Literal`."""
    return {name: kind for name, kind in get_type_hints(body).items() if get_origin(kind) is Literal}


def chosen_fields(table: Table, *columns: str, **choices: tuple[str, ...]) -> Mapping[str, Field]:
    """Return a filter field for each of the columns; `choices` holds the possible values of some of them."""
    return {name: Field(name, name, _field_type(table.c[name]), choices.get(name, ())) for name in columns}


def _class_name(singular: str) -> str:
    return singular.title().replace(" ", "")


def entity_model(table: Table, singular: str, created_word: str, body: type[Body]) -> type[BaseModel]:
    """Return the model of an entity as GET returns it."""
    descriptions = {
        "user_id": f"The user who {created_word} the {singular}",
        "version": "Incremented by each edit, but not when only derived fields change",
    }
    members: dict[str, Any] = {}
    literals = _literals(body)
    for name in visible_columns(table):
        column = table.c[name]
        shown = literals.get(name, _SHOWN[_field_type(column)])
        members[name] = (shown | None if column.nullable else shown, ModelField(description=descriptions.get(name)))
    return create_model(f"{_class_name(singular)}Entity", __base__=Answer, **members)


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


def _maintained_members(table: Table, body: type[Body]) -> dict[str, Any]:
    """Return the members that clients may send, but not change: with their current values, as GET returns them."""
    members: dict[str, Any] = {}
    for name in visible_columns(table):
        if name not in body.model_fields:
            kind = _EXACT[_field_type(table.c[name])]
            members[name] = (kind | None | MISSING if table.c[name].nullable else kind | MISSING, READ_ONLY)
    return members


def replacement_model(table: Table, body: type[Body], singular: str) -> type[BaseModel]:
    """Return the model of a PUT body."""
    name = f"{_class_name(singular)}Replacement"
    return create_model(name, __base__=body, __doc__=body.__doc__, **_maintained_members(table, body))


def patch_model(table: Table, body: type[Body], singular: str, example: Mapping[str, Any]) -> type[BaseModel]:
    """Return the model of a PATCH body: every member is optional and has no default."""
    members: dict[str, Any] = {
        name: (annotation | MISSING, MISSING)
        for name, annotation in get_type_hints(body, include_extras=True).items()
        if name in body.model_fields
    }
    members |= _maintained_members(table, body)
    return create_model(
        f"{_class_name(singular)}Patch",
        __base__=Body,
        __doc__="Only the fields in the body change.",
        __cls_kwargs__=dict(examples(dict(example))),
        **members,
    )


def bulk_patch_model(patch: type[BaseModel], singular: str, example: Mapping[str, Any]) -> type[BaseModel]:
    """Return the model of one row of a bulk PATCH."""
    name = f"{_class_name(singular)}BulkPatch"
    return create_model(name, __base__=patch, __cls_kwargs__=dict(examples({"id": 7, **example})), id=(Id, ...))


def bulk_answer(name: str, **members: Any) -> type[BaseModel]:
    """Return the model of the response to a bulk write; `members` are types, all of them required."""
    required: dict[str, Any] = {each: (kind, ...) for each, kind in members.items()}
    return create_model(name, __base__=Answer, **required)


def label_model(singular: str, label: str) -> type[BaseModel]:
    """Return the model of one item of the `/names` response: a row's label."""
    name = f"{_class_name(singular)}{label.title()}"
    return create_model(name, __base__=RootModel[str], __doc__=f"The {label} of a {singular}.")
