"""The OpenAPI 3.1 document, built from the operations that are served."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode, JsonSchemaValue, models_json_schema

import schemas
from core import filters
from core.filters import OPERATORS, Field, FieldType, Op
from core.version import VERSION
from resources.accounts import credentials
from resources.characters import CharacterEntity, CharactersAdded
from resources.jobs import Job
from resources.movies import MovieEntity, MoviesAdded
from routes.http import queries, uploads
from routes.http.operation import Operation

REF_TEMPLATE = "#/components/schemas/{model}"

DESCRIPTION = """A real-time movie catalog: every write below reaches every watcher of `/ws`, in order, exactly once.

Every path also answers under `/api/v1`, with and without a trailing slash. Lists take filters `field=value` and
`field[operator]=value`."""

ERRORS: Mapping[int, str] = {
    401: "No access token, or one that is not good",
    403: "Not yours to do",
    404: "There is no such thing",
    406: "There is no such form of it here",
    408: "The body took too long",
    409: "In conflict with what is stored",
    412: "If-Match names another version",
    413: "The body is too large",
    415: "The body is of another media type",
    422: "Something in the request is wrong: every problem at once",
    429: "Too many; Retry-After says when to come back",
    503: "The database or the storage of files is away; nothing was written",
}
HEADERS: Mapping[str, dict[str, Any]] = {
    "X-Total-Count": {
        "description": "Rows in the whole list",
        "required": True,
        "schema": {"type": "integer", "minimum": 0},
    },
    "Stream-Position": {
        "description": "`<epoch>:<seq>`: the number of the event log that the answer shows. Watching from there "
        "(`since` and `epoch` of the websocket) misses nothing and repeats nothing",
        "required": True,
        "schema": {"type": "string", "pattern": "^[!-9;-~]+:[0-9]+$"},
    },
    "Link": {"description": "RFC 8288: first, prev, next, last", "schema": {"type": "string"}},
    "Location": {
        "description": "Where the new thing is",
        "required": True,
        "schema": {"type": "string", "pattern": "^/[!-~]+$"},
    },
    "ETag": {
        "description": '`"<version>-<digest>"`',
        "required": True,
        "schema": {"type": "string", "pattern": '^"[0-9]+-[0-9a-f]{16}"$'},
    },
    "RateLimit-Limit": {
        "description": "How many requests the caller may send in the window; without limits there are no such headers",
        "schema": {"type": "integer", "minimum": 1},
    },
    "RateLimit-Remaining": {
        "description": "How many of them are left",
        "schema": {"type": "integer", "minimum": 0},
    },
    "RateLimit-Reset": {
        "description": "Seconds until there is more room",
        "schema": {"type": "integer", "minimum": 1},
    },
    "X-Request-ID": {
        "description": "Names the request in the logs",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
    },
    "Retry-After": {"description": "Seconds", "required": True, "schema": {"type": "integer", "minimum": 0}},
    "WWW-Authenticate": {"description": "RFC 6750", "required": True, "schema": {"type": "string", "const": "Bearer"}},
}
# No schema can say what these three mean: whether the headers are met depends on what was sent and stored before, and
# `on_error=skip` takes rows that the body's schema refuses. So an operation names them under
# `x-conditional-parameters` and in its description; its plain parameters promise that what fits the schemas is taken.
CONDITIONAL_PARAMETERS: Mapping[str, dict[str, Any]] = {
    "Idempotency-Key": {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "The same key with the same request gets the first answer again, for a day; with another "
        "request it is a 422",
        "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]{1,255}$"},
        "example": "5f8b3a52-0a3d-4b8e-9f6e-6c1d2a7b9e10",
    },
    "If-Match": {
        "name": "If-Match",
        "in": "header",
        "description": "Do it only if the entity is at the version of one of these tags (or `*`), else it is a 412",
        "schema": {"type": "string"},
        "example": '"3-0f1e2d3c4b5a6978"',
    },
    "on_error": {
        "name": "on_error",
        "in": "query",
        "description": "`skip` stores the good rows and lists the others, where `fail` stores nothing and is a 422",
        "schema": {"enum": ["fail", "skip"], "default": "fail"},
    },
}
_FILTER_SCHEMAS: Mapping[FieldType, dict[str, Any]] = {
    FieldType.INTEGER: {"type": "integer", "minimum": -(2**63) + 1, "maximum": 2**63 - 1},
    FieldType.TEXT: {"type": "string", "maxLength": filters.MAX_TEXT_LENGTH, "pattern": schemas.NO_NUL},
    FieldType.STRINGS: {"type": "string", "maxLength": filters.MAX_TEXT_LENGTH, "pattern": schemas.NO_NUL},
    FieldType.DATE: {"type": "string", "format": "date"},
    FieldType.TIME: {"type": "string", "format": "date-time"},
    FieldType.BOOLEAN: {"type": "boolean"},
}
_OPERATOR_WORDS: Mapping[Op, str] = {
    Op.EQ: "is",
    Op.NE: "is not",
    Op.GT: "is greater than",
    Op.GTE: "is at least",
    Op.LT: "is less than",
    Op.LTE: "is at most",
    Op.IN: "is one of",
    Op.CONTAINS: "contains, without case",
    Op.PREFIX: "begins with, without case",
}


def document(operations: Sequence[Operation]) -> bytes:
    """The document, encoded."""
    inputs, outputs = _models(operations)
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        *((model, "validation") for model in inputs),
        *((model, "serialization") for model in outputs),
    ]
    _, definitions = models_json_schema(models, ref_template=REF_TEMPLATE)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        built = paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
        _link(operation, built, operations)
    return orjson.dumps(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "Marquee",
                "version": VERSION,
                "summary": "A real-time, websocket-first catalog service",
                "description": DESCRIPTION,
                "license": {"name": "MIT", "identifier": "MIT"},
            },
            "servers": [{"url": "/"}, {"url": "/api/v1"}],
            "tags": [{"name": name} for name in dict.fromkeys(operation.tag for operation in operations)],
            "paths": paths,
            "components": {
                "schemas": definitions["$defs"],
                "parameters": CONDITIONAL_PARAMETERS,
                "securitySchemes": {
                    "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
                    "password": {"type": "oauth2", "flows": {"password": {"tokenUrl": "/token", "scopes": {}}}},
                },
            },
        }
    )


def _models(operations: Iterable[Operation]) -> tuple[list[type[BaseModel]], list[type[BaseModel]]]:
    inputs: dict[type[BaseModel], None] = {}
    outputs: dict[type[BaseModel], None] = {schemas.ErrorAnswer: None}
    for operation in operations:
        inputs.update(dict.fromkeys(_models_in(_body_type(operation))))
        if operation.form is not None:
            inputs.update(dict.fromkeys(_models_in(operation.form._type)))
        for answer in operation.answers.values():
            outputs.update(dict.fromkeys(_models_in(answer)))
    return list(inputs), list(outputs)


def _models_in(kind: Any) -> list[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [model for part in getattr(kind, "__args__", ()) for model in _models_in(part)]


def _body_type(operation: Operation) -> Any:
    if operation.body_schema is not None:
        return operation.body_schema
    return operation.body._type if operation.body is not None else None


def _schema(kind: Any, mode: JsonSchemaMode) -> JsonSchemaValue:
    schema = TypeAdapter(kind).json_schema(ref_template=REF_TEMPLATE, mode=mode)
    definitions = schema.pop("$defs", {})
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        assert kind.__name__ not in definitions
        return {"$ref": REF_TEMPLATE.format(model=kind.__name__)}
    return schema


def _operation(operation: Operation) -> dict[str, Any]:
    built: dict[str, Any] = {
        "operationId": _operation_id(operation),
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": _responses(operation),
    }
    conditional = _conditional_parameters(operation)
    words = [f"Honours `{each['name']}` ({each['in']}): {each['description']}." for each in conditional]
    if operation.filters:
        words.append("Filters AND together; of groups `or[0][field]`, `or[1][field][operator]`, … one must match.")
    if description := "\n\n".join([*filter(None, [operation.description]), *words]):
        built["description"] = description
    if conditional:
        references = [{"$ref": f"#/components/parameters/{each['name']}"} for each in conditional]
        built["x-conditional-parameters"] = references
    parameters = _parameters(operation)
    if parameters:
        built["parameters"] = parameters
    if operation.body is not None:
        schema = _schema(_body_type(operation), "validation")
        if schema.get("type") == "array":
            schema["maxItems"] = schemas.MAX_BULK_ROWS
        content = {media_type: {"schema": schema} for media_type in operation.body_media_types}
        built["requestBody"] = {"required": True, "content": content}
    if operation.form is not None:
        content = built.setdefault("requestBody", {"required": True, "content": {}})["content"]
        content.update(_content_with_file(operation.form))
    if operation.signed_in:
        built["security"] = [{"bearer": []}, {"password": []}]
    return built


def _content_with_file(form: TypeAdapter[Any]) -> dict[str, Any]:
    content: dict[str, Any] = {uploads.MULTIPART_MEDIA_TYPE: {"schema": _schema(form._type, "validation")}}
    if form._type.model_fields[uploads.FILE_FIELD].is_required():
        alone = {"schema": {"type": "string", "format": "binary"}}
        content |= dict.fromkeys(uploads.FILE_MEDIA_TYPES, alone)
    return content


def _conditional_parameters(operation: Operation) -> list[dict[str, Any]]:
    named = {
        "Idempotency-Key": operation.idempotent,
        "If-Match": operation.if_match,
        "on_error": operation.query_model is queries.OnErrorQuery,
    }
    return [CONDITIONAL_PARAMETERS[name] for name, is_taken in named.items() if is_taken]


def _link(operation: Operation, built: dict[str, Any], operations: Sequence[Operation]) -> None:
    """Say where to go on from here: what an answer's id is good for."""
    for status, answer in operation.answers.items():
        source = _LINKS.get(answer) if isinstance(answer, type) else None
        if source is None or operation.method != "POST":
            continue
        parameter, pointer, path = source
        built["responses"][str(status)]["links"] = {
            _operation_id(target): {
                "operationId": _operation_id(target),
                "parameters": {f"path.{parameter}": f"$response.body#/{pointer}"},
                "description": target.summary,
            }
            for target in operations
            if target.path == path
        }


def _operation_id(operation: Operation) -> str:
    words = operation.path.replace("{", "by_").replace("}", "").strip("/").replace("/", "_")
    return f"{operation.method.lower()}_{words}"


def _responses(operation: Operation) -> dict[str, Any]:
    common = {"X-Request-ID": HEADERS["X-Request-ID"]}
    if operation.is_limited:
        common |= {name: HEADERS[name] for name in ("RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset")}
    built: dict[str, Any] = {}
    for status, answer in operation.answers.items():
        headers = common | {name: HEADERS[name] for name in operation.answer_headers}
        response: dict[str, Any] = {"description": _SUCCESSES.get(status, "As asked"), "headers": headers}
        if answer is not None:
            content = {operation.media_type: {"schema": _schema(answer, "serialization")}}
            response["content"] = {**content, **operation.other_content}
        built[str(status)] = response
    if operation.if_none_match:
        built["304"] = {"description": "The client has this one", "headers": common | {"ETag": HEADERS["ETag"]}}
    for status in sorted(_errors_of(operation)):
        if str(status) not in built:
            content = {"application/json": {"schema": _schema(schemas.ErrorAnswer, "serialization")}}
            if operation.problem_page is not None:
                content |= operation.other_content
            headers = dict(common)
            if status in (429, 503):
                headers["Retry-After"] = HEADERS["Retry-After"]
            if status == 401:
                headers["WWW-Authenticate"] = HEADERS["WWW-Authenticate"]
            built[str(status)] = {"description": ERRORS[status], "headers": headers, "content": content}
    return built


# What a POST answers: its id's parameter, where the id is, and the path that takes it.
_LINKS: Mapping[type, tuple[str, str, str]] = {
    MovieEntity: ("id", "id", "/movies/{id}"),
    MoviesAdded: ("id", "added/0/id", "/movies/{id}"),
    CharacterEntity: ("id", "id", "/characters/{id}"),
    CharactersAdded: ("id", "added/0/id", "/characters/{id}"),
    Job: ("id", "id", "/jobs/{id}"),
    credentials.User: ("user_id", "id", "/users/{user_id}/movies"),
    credentials.Token: ("user_id", "user_id", "/users/{user_id}/movies"),
}
_SUCCESSES = {200: "Done", 201: "Added", 202: "Accepted", 204: "Deleted", 503: "Not ready"}


def _errors_of(operation: Operation) -> set[int]:
    # A bad token is refused everywhere, and any query can be wrong.
    found = {401, 422, 503, *operation.errors}
    if operation.is_limited:
        found.add(429)
    if operation.body is not None or operation.form is not None:
        found |= {408, 413, 415}
    return found


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    parameters = [*_of_model(operation.path_model, "path"), *_of_model(operation.query_model, "query")]
    parameters = [each for each in parameters if each["name"] not in CONDITIONAL_PARAMETERS]
    for parameter in parameters:
        if parameter["name"] == "sort":
            columns = queries.sortable(operation.filters)
            names = [*columns, *(f"-{name}" for name in columns)]
            parameter["schema"] = {"type": "array", "items": {"enum": names}, "uniqueItems": True}
            parameter |= {"style": "form", "explode": False, "example": ["-updated_at", "id"]}
    for field in operation.filters.values():
        parameters.extend(_of_filter(field))
    for name, words in operation.headers.items():
        parameters.append({"name": name, "in": "header", "description": words, "schema": {"type": "string"}})
    if operation.if_none_match:
        words = "Answer 304 if the representation has one of these tags"
        parameters.append({"name": "If-None-Match", "in": "header", "description": words, "schema": {"type": "string"}})
    return parameters


def _of_model(model: type[BaseModel] | None, where: str) -> list[dict[str, Any]]:
    if model is None:
        return []
    schema = model.model_json_schema(ref_template=REF_TEMPLATE)
    built = []
    for name, each in schema["properties"].items():
        choices = [choice for choice in each.pop("anyOf", []) if choice != {"type": "null"}]
        description = each.pop("description", None)
        if each.get("default", 0) is None:
            del each["default"]
        for key in ("title",):
            each.pop(key, None)
        if len(choices) == 1:
            each |= choices[0]
        parameter: dict[str, Any] = {
            "name": name,
            "in": where,
            "required": name in schema.get("required", ()),
            "schema": each,
        }
        if description:
            parameter["description"] = description
        if each.get("type") == "array":
            parameter |= {"style": "form", "explode": False}
        built.append(parameter)
    return built


def _of_filter(field: Field) -> list[dict[str, Any]]:
    built = []
    for op in OPERATORS[field.kind]:
        schema = dict(_FILTER_SCHEMAS[field.kind])
        parameter: dict[str, Any] = {
            "name": field.name if op is Op.EQ else f"{field.name}[{op}]",
            "in": "query",
            "required": False,
            "description": f"{field.name} {_OPERATOR_WORDS[op]}",
            "schema": schema,
        }
        if field.choices and op in (Op.EQ, Op.NE, Op.IN):
            schema = parameter["schema"] = {"enum": list(field.choices)}
        if op is Op.IN:
            if "pattern" in schema:
                # A comma parts two values.
                schema |= {"pattern": r"^[^\x00,]*$", "maxLength": filters.MAX_LISTED_TEXT_LENGTH}
            parameter |= {"style": "form", "explode": False}
            parameter["schema"] = {
                "type": "array",
                "items": schema,
                "minItems": 1,
                "maxItems": filters.MAX_VALUES_IN_LIST,
            }
        built.append(parameter)
    return built
