"""The parameters of an operation, as OpenAPI describes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

import schemas
from core import filters
from core.filters import OPERATORS, Field, FieldType, Op
from core.texts import listed, numbers
from repository.generic import cursors
from routes.http import queries
from routes.http.operation import Operation


def _header(name: str, description: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string"}, **more}


# No schema can express these five parameters: the effect of the two headers depends on what was sent and stored before,
# a cursor is valid only with the `sort` that it was made for, `fields` removes members that the schema of the response
# requires, and `on_error=skip` accepts rows that the body's schema rejects. Plain parameters promise that whatever fits
# the schemas is accepted, and that the response fits its schema. So operations list these five under
# `x-conditional-parameters` and in their descriptions.
CONDITIONAL: Mapping[str, dict[str, Any]] = {
    "Idempotency-Key": _header(
        "Idempotency-Key",
        "For a day, repeating the same request with the same key returns the first response, with the header "
        "`Idempotency-Replayed: true`; a different request with the same key is rejected with a 422",
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
    "fields": {
        "name": "fields",
        "in": "query",
        "description": "only these members of each entity, in the order of the entity, separated by commas",
        "schema": {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True},
        "style": "form",
        "explode": False,
        "example": ["id", "version"],
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
    FieldType.DECIMAL: {"type": "number", "minimum": -numbers.MAX_DECIMAL, "maximum": numbers.MAX_DECIMAL},
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
        "fields": bool(operation.members),
        "on_error": operation.query_model is queries.OnErrorQuery,
    }
    return {name: CONDITIONAL[name] for name, is_taken in named.items() if is_taken}


def plain(operation: Operation, filter_schema: str | None) -> list[dict[str, Any]]:
    """Return the parameters that are not in `CONDITIONAL`: those of the path, the query and the headers.

    `filter_schema` is the reference to the schema of `filter`, if the operation has filters.
    """
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
    if filter_schema is not None:
        parameters.append(
            {
                "name": "filter",
                "in": "query",
                "required": False,
                "description": "A filter as a JSON object, as in the action `subscribe` of the websocket; rows must "
                "match it in addition to the other filters",
                "content": {"application/json": {"schema": {"$ref": filter_schema}}},
            }
        )
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
        if choices:
            each |= choices[0] if len(choices) == 1 else {"anyOf": choices}
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


def json_filter(fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return the schema of the parameter `filter`."""
    members = {field.name: _condition(field) for field in fields.values()}
    group = {"type": "object", "properties": members, "additionalProperties": False, "minProperties": 1}
    alternatives = {
        "type": "array",
        "items": group,
        "minItems": 1,
        "maxItems": filters.MAX_GROUPS,
        "description": "At least one of these groups must match",
    }
    return {
        "type": "object",
        "properties": {**members, filters.OR: alternatives},
        "additionalProperties": False,
        "description": f"All fields must match; at most {filters.MAX_CONDITIONS} conditions",
    }


def _condition(field: Field) -> dict[str, Any]:
    """Return the schema of a member of a JSON filter: a value, or an object of operators."""
    operators: dict[str, Any] = {}
    for op in OPERATORS[field.kind]:
        is_choice = field.choices and op in (Op.EQ, Op.NE, Op.IN)
        schema: dict[str, Any] = {"enum": list(field.choices)} if is_choice else dict(_FILTER_SCHEMAS[field.kind])
        if op is Op.IN:
            if "maxLength" in schema:
                schema["maxLength"] = filters.MAX_LISTED_TEXT_LENGTH
            schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": filters.MAX_VALUES_IN_LIST}
        operators[op.value] = schema
    by_operator = {"type": "object", "properties": operators, "additionalProperties": False, "minProperties": 1}
    return {"anyOf": [operators[Op.EQ.value], by_operator]}
