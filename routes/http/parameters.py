"""The parameters of an operation, as OpenAPI describes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

import schemas
from core import filters
from core.filters import OPERATORS, Field, FieldType, Op
from core.texts import listed
from repository.generic import cursors
from routes.http import queries
from routes.http.operation import Operation


def _header(name: str, description: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string"}, **more}


# No schema can express these four parameters: the effect of the two headers depends on what was sent and stored before,
# a cursor is valid only with the `sort` that it was made for, and `on_error=skip` accepts rows that the body's schema
# rejects. Plain parameters promise that whatever fits the schemas is accepted. So operations list these four under
# `x-conditional-parameters` and in their descriptions.
CONDITIONAL: Mapping[str, dict[str, Any]] = {
    "Idempotency-Key": _header(
        "Idempotency-Key",
        "For a day, repeating the same request with the same key returns the first response; a different request with "
        "the same key is rejected with a 422",
        example="5f8b3a52-0a3d-4b8e-9f6e-6c1d2a7b9e10",
        schema={"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]{1,255}$"},
    ),
    "If-Match": _header(
        "If-Match",
        "Proceed only if these tags (or `*`) match the entity's current version; otherwise respond with a 412",
        example='"3-0f1e2d3c4b5a6978"',
    ),
    "cursor": {
        "name": "after",
        "in": "query",
        "description": "a cursor continues after the last row of a page, in the same order; follow the `next` URL in "
        "`Link`, which contains it, and change nothing but `limit`",
        "schema": {"type": "string", "maxLength": cursors.MAX_CURSOR_BYTES, "pattern": "^[A-Za-z0-9_-]+$"},
    },
    "on_error": {
        "name": "on_error",
        "in": "query",
        "description": "`skip` stores the valid rows and lists the others; with `fail`, any invalid row means a 422, "
        "and nothing is stored",
        "schema": {"enum": ["fail", "skip"], "default": "fail"},
    },
}
_TEXT_SCHEMA = {"type": "string", "maxLength": filters.MAX_TEXT_LENGTH, "pattern": schemas.NO_NUL}
# The pattern of a value in a comma-separated list. A value that contains a comma must be in double quotes
# (`core/texts/listed.py`).
_LENGTH = filters.MAX_LISTED_TEXT_LENGTH
_LISTED = rf'^(?:[^\x00,"][^\x00,]{{0,{_LENGTH - 1}}}|"(?:[^\x00"]|""){{0,{_LENGTH}}}")?$'
_FILTER_SCHEMAS: Mapping[FieldType, dict[str, Any]] = {
    FieldType.INTEGER: {"type": "integer", "minimum": -(2**63) + 1, "maximum": 2**63 - 1},
    **dict.fromkeys((FieldType.TEXT, FieldType.STRINGS), _TEXT_SCHEMA),
    FieldType.DATE: {"type": "string", "format": "date"},
    FieldType.TIME: {"type": "string", "format": "date-time"},
    FieldType.BOOLEAN: {"type": "boolean"},
}
_OPERATOR_TEXTS: Mapping[Op, str] = {
    Op.EQ: "is this value",
    Op.NE: "is not this value",
    Op.GT: "is greater than this value",
    Op.GTE: "is at least this value",
    Op.LT: "is less than this value",
    Op.LTE: "is at most this value",
    Op.IN: "is one of these values",
    Op.CONTAINS: "contains this value, ignoring case",
    Op.PREFIX: "begins with this value, ignoring case",
}
_LIST_OPERATOR_TEXTS: Mapping[Op, str] = {
    Op.EQ: "contains this value",
    Op.NE: "does not contain this value",
    Op.IN: "contains one of these values",
}


def conditional(operation: Operation) -> Mapping[str, dict[str, Any]]:
    """Return the parameters of `CONDITIONAL` that the operation honours, under the same names."""
    named = {
        "Idempotency-Key": operation.idempotent,
        "If-Match": operation.if_match,
        "cursor": operation.ordering is not None,
        "on_error": operation.query_model is queries.OnErrorQuery,
    }
    return {name: CONDITIONAL[name] for name, is_taken in named.items() if is_taken}


def plain(operation: Operation) -> list[dict[str, Any]]:
    """Return the parameters that are not in `CONDITIONAL`: those of the path, the query and the headers."""
    parameters = [*_of_model(operation.path_model, "path"), *_of_model(operation.query_model, "query")]
    parameters = [each for each in parameters if each["name"] not in CONDITIONAL]
    for parameter in parameters:
        if parameter["name"] == "sort":
            columns = queries.sortable(operation.filters)
            names = [*columns, *(f"-{name}" for name in columns)]
            parameter["schema"] = {"type": "array", "items": {"enum": names}, "uniqueItems": True}
            parameter |= {"style": "form", "explode": False, "example": ["-updated_at", "id"]}
    for field in operation.filters.values():
        parameters.extend(_of_filter(field))
    parameters.extend(_header(name, description) for name, description in operation.headers.items())
    if operation.if_none_match:
        description = "Respond with a 304 if the representation has one of these tags"
        parameters.append(_header("If-None-Match", description))
    return parameters


def _of_model(model: type[BaseModel] | None, where: str) -> list[dict[str, Any]]:
    if model is None:
        return []
    schema = model.model_json_schema()
    built = []
    for name, each in schema["properties"].items():
        choices = [choice for choice in each.pop("anyOf", []) if choice != {"type": "null"}]
        description = each.pop("description", None)
        if each.get("default", 0) is None:
            del each["default"]
        each.pop("title", None)
        if len(choices) == 1:
            each |= choices[0]
        required = name in schema.get("required", ())
        parameter: dict[str, Any] = {"name": name, "in": where, "required": required, "schema": each}
        if description:
            parameter["description"] = description
        if each.get("type") == "array":
            parameter |= {"style": "form", "explode": False}
        built.append(parameter)
    return built


def _of_filter(field: Field) -> list[dict[str, Any]]:
    built = []
    texts = _LIST_OPERATOR_TEXTS if field.kind is FieldType.STRINGS else _OPERATOR_TEXTS
    for op in OPERATORS[field.kind]:
        schema = dict(_FILTER_SCHEMAS[field.kind])
        parameter: dict[str, Any] = {
            "name": field.name if op is Op.EQ else f"{field.name}[{op}]",
            "in": "query",
            "required": False,
            "description": f"{field.name} {texts[op]}",
            "schema": schema,
        }
        if field.choices and op in (Op.EQ, Op.NE, Op.IN):
            schema = parameter["schema"] = {"enum": list(field.choices)}
        if op is Op.IN:
            if "pattern" in schema:
                schema = parameter["schema"] = {"type": "string", "pattern": _LISTED}
                parameter["description"] += f": {listed.EXPECTED}"
            array = {"type": "array", "items": schema, "minItems": 1, "maxItems": filters.MAX_VALUES_IN_LIST}
            parameter |= {"style": "form", "explode": False, "schema": array}
        built.append(parameter)
    return built
