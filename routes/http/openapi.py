"""The OpenAPI 3.1 document, built from the operations that are served."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode, JsonSchemaValue, models_json_schema

import schemas
from core.error_bodies import JSON, PROBLEM_JSON
from core.version import VERSION
from resources.accounts import credentials
from resources.jobs import Job
from resources.registry import RESOURCES
from routes.http import parameters, uploads
from routes.http.operation import Operation
from routes.http.rendering import POSITION, REPLAYED

REF_TEMPLATE = "#/components/schemas/{model}"
PROBLEM_DETAILS = {PROBLEM_JSON: {"schema": {"$ref": REF_TEMPLATE.format(model=schemas.ProblemDetails.__name__)}}}

DESCRIPTION = """A real-time movie catalog: every write reaches every subscriber of `/ws`, in order, exactly once.

Every path is also available under `/api/v1`, with and without a trailing slash. Lists can be filtered with
`field=value` and `field[operator]=value`."""

ERRORS: Mapping[int, str] = {
    401: "Missing or invalid access token",
    403: "Not allowed",
    404: "Not found",
    406: "Not available in this media type",
    408: "The body was sent too slowly",
    409: "Conflict with stored data",
    412: "If-Match does not name the current version",
    413: "The body, or the rows that the request would change, are too large",
    415: "Unsupported media type",
    422: "Invalid request; every problem is listed",
    429: "Too many requests; Retry-After says when to retry",
    503: "The service cannot handle the request now; the message says whether anything may have been written",
}


def _header(about: str, *, required: bool = True, **schema: Any) -> dict[str, Any]:
    return {"description": about, "schema": schema} | ({"required": True} if required else {})


HEADERS: Mapping[str, dict[str, Any]] = {
    "X-Total-Count": _header("Number of rows in the whole list", type="integer", minimum=0),
    "Stream-Position": _header(
        "`<epoch>:<seq>`: the position in the event log that the response reflects. A client that watches from there "
        "(`since` of the websocket) misses nothing and receives nothing twice. After a write, the position of its last "
        "event: a stream that has reached this position has shown the write",
        type="string",
        pattern="^[!-9;-~]+:[0-9]+$",
    ),
    "Link": _header(
        "URLs (RFC 8288): of a list, the first, prev, next and last page; of a renamed row that very many rows show, "
        "the job that changes these rows (`status`)",
        required=False,
        type="string",
    ),
    "Location": _header("Path of the new resource, or of the job", type="string", pattern="^/[!-~]+$"),
    "ETag": _header(
        '`"<version>-<digest>"`; with a leading `W/` if the response is compressed',
        type="string",
        pattern='^(W/)?"[0-9]+-[0-9a-f]{16}"$',
    ),
    "Content-Disposition": _header("The name of the file", type="string", pattern='^attachment; filename="[a-z.]+"$'),
    REPLAYED: _header(
        "Present if this is the stored response to an earlier request with the same `Idempotency-Key`",
        required=False,
        type="string",
        const="true",
    ),
    "X-Request-ID": _header("Identifies the request in the logs", type="string", pattern="^[A-Za-z0-9._-]{1,128}$"),
    "Retry-After": _header("Seconds to wait", type="integer", minimum=0),
    "WWW-Authenticate": _header("RFC 6750", type="string", const="Bearer"),
}
_NAME = '"[ !#-\\[\\]-~]+"'
_POLICY = f"{_NAME};q=[0-9]+;w=[0-9]+"
_count = partial(_header, required=False, type="integer")
RATE_LIMIT_HEADERS: Mapping[str, dict[str, Any]] = {
    "RateLimit-Limit": _count("Requests allowed in the current window; absent when rate limits are off", minimum=1),
    "RateLimit-Remaining": _count("Requests left in the current window", minimum=0),
    "RateLimit-Reset": _count("Seconds until more requests are allowed", minimum=1),
    "RateLimit-Policy": _header(
        "The rate limits that apply to the request, each with its quota `q` in a window of `w` seconds; a list of "
        "structured fields",
        required=False,
        type="string",
        pattern=f"^{_POLICY}(, {_POLICY})*$",
    ),
    "RateLimit": _header(
        "One of these rate limits: the requests that remain (`r`), and the seconds until more are allowed (`t`)",
        required=False,
        type="string",
        pattern=f"^{_NAME};r=[0-9]+;t=[0-9]+$",
    ),
}


def document(operations: Sequence[Operation], root: str) -> bytes:
    """Return the encoded document. `root` is the path under which clients reach the service, or an empty string."""
    _, definitions = models_json_schema(_models(operations), ref_template=REF_TEMPLATE)
    paths: dict[str, dict[str, Any]] = {}
    filter_names = _filter_names(operations)
    for operation in operations:
        filter_name = filter_names.get(id(operation.filters))
        built = paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, filter_name)
        _add_operation_links(operation, built, operations)
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
            "servers": [{"url": root or "/"}, {"url": f"{root}/api/v1"}],
            "tags": [{"name": name} for name in dict.fromkeys(operation.tag for operation in operations)],
            "paths": paths,
            "components": {
                "schemas": definitions["$defs"] | _filter_schemas(operations),
                "parameters": parameters.CONDITIONAL,
                "securitySchemes": {
                    "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
                    "password": {"type": "oauth2", "flows": {"password": {"tokenUrl": f"{root}/token", "scopes": {}}}},
                },
            },
        }
    )


def _filter_names(operations: Iterable[Operation]) -> Mapping[int, str]:
    """Return the name of the schema of `filter` by the identity of the fields, which several lists share."""
    names: dict[int, str] = {}
    for operation in operations:
        if operation.filters:
            # The first list with these fields is at a path without parameters, such as `/admin/audit`.
            names.setdefault(id(operation.filters), f"{operation.path.title().replace('/', '')}Filter")
    return names


def _filter_schemas(operations: Sequence[Operation]) -> dict[str, Any]:
    names = _filter_names(operations)
    return {names[id(each.filters)]: parameters.json_filter(each.filters) for each in operations if each.filters}


def _models(operations: Iterable[Operation]) -> list[tuple[type[BaseModel], JsonSchemaMode]]:
    bodies = [body for each in operations for body in (_body_type(each), each.form)]
    answers = [
        schemas.ErrorAnswer,
        schemas.ProblemDetails,
        *(answer for each in operations for answer in each.answers.values()),
    ]
    inputs = dict.fromkeys(model for body in bodies for model in _models_in(body))
    outputs = dict.fromkeys(model for answer in answers for model in _models_in(answer))
    return [*((model, "validation") for model in inputs), *((model, "serialization") for model in outputs)]


def _models_in(kind: Any) -> list[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [model for part in getattr(kind, "__args__", ()) for model in _models_in(part)]


def _body_type(operation: Operation) -> Any:
    return operation.body if operation.body_schema is None else operation.body_schema


def _schema(kind: Any, mode: JsonSchemaMode) -> JsonSchemaValue:
    schema = TypeAdapter(kind).json_schema(ref_template=REF_TEMPLATE, mode=mode)
    definitions = schema.pop("$defs", {})
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        assert kind.__name__ not in definitions
        return {"$ref": REF_TEMPLATE.format(model=kind.__name__)}
    return schema


def _operation(operation: Operation, filter_name: str | None) -> dict[str, Any]:
    built: dict[str, Any] = {
        "operationId": _operation_id(operation),
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": _responses(operation),
    }
    conditional = parameters.conditional(operation)
    notes = [f"Honours `{each['name']}` ({each['in']}): {each['description']}." for each in conditional.values()]
    if operation.filters:
        notes.append(
            "All filters must match. If there are groups `or[0][field]`, `or[1][field][operator]`, …, at least one of "
            "the groups must match as well."
        )
    if description := "\n\n".join([*filter(None, [operation.description]), *notes]):
        built["description"] = description
    if conditional:
        references = [{"$ref": f"#/components/parameters/{name}"} for name in conditional]
        built["x-conditional-parameters"] = references
    reference = REF_TEMPLATE.format(model=filter_name) if filter_name is not None else None
    if plain := parameters.plain(operation, reference):
        built["parameters"] = plain
    if operation.body is not None:
        schema = _schema(_body_type(operation), "validation")
        if schema.get("type") == "array":
            schema["maxItems"] = schemas.MAX_BULK_ROWS
        content = {media_type: {"schema": schema} for media_type in operation.body_media_types}
        built["requestBody"] = {"required": True, "content": content}
    if operation.file_media_types:
        file = {"schema": {"type": "string", "format": "binary"}}
        built["requestBody"] = {"required": True, "content": dict.fromkeys(operation.file_media_types, file)}
    if operation.form is not None:
        content = built.setdefault("requestBody", {"required": True, "content": {}})["content"]
        content.update(_content_with_file(operation.form))
    if operation.signed_in:
        built["security"] = [{"bearer": []}, {"password": []}]
    return built


def _content_with_file(form: type[BaseModel]) -> dict[str, Any]:
    content: dict[str, Any] = {uploads.MULTIPART_MEDIA_TYPE: {"schema": _schema(form, "validation")}}
    if form.model_fields[uploads.FILE_FIELD].is_required():
        alone = {"schema": {"type": "string", "format": "binary"}}
        content |= dict.fromkeys(uploads.FILE_MEDIA_TYPES, alone)
    return content


def _add_operation_links(operation: Operation, built: dict[str, Any], operations: Sequence[Operation]) -> None:
    """Add OpenAPI links to the operations that take an id from the response of this operation."""
    for status, answer in operation.answers.items():
        source = _ID_SOURCES.get(answer) if isinstance(answer, type) else None
        if source is None or operation.method != "POST":
            continue
        built["responses"][str(status)]["links"] = {
            _operation_id(target): {
                "operationId": _operation_id(target),
                "parameters": {f"path.{source.parameter}": f"$response.body#/{source.pointer}"},
                "description": target.summary,
            }
            for target in operations
            if target.path == source.path
        }


def _operation_id(operation: Operation) -> str:
    words = operation.path.replace("{", "by_").replace("}", "").strip("/").replace("/", "_")
    return f"{operation.method.lower()}_{words}"


def _responses(operation: Operation) -> dict[str, Any]:
    common = {"X-Request-ID": HEADERS["X-Request-ID"]}
    if operation.is_limited:
        common |= RATE_LIMIT_HEADERS
    built: dict[str, Any] = {}
    for status, answer in operation.answers.items():
        names = operation.answer_headers if operation.method == "GET" else (*operation.answer_headers, POSITION)
        if operation.idempotent:
            names = (*names, REPLAYED)
        headers = common | {name: HEADERS[name] for name in names if name != "Location" or answer is not None}
        response: dict[str, Any] = {"description": _SUCCESSES.get(status, "Success"), "headers": headers}
        if answer is not None:
            content = {operation.media_type: {"schema": _schema(answer, "serialization")}}
            response["content"] = {**content, **operation.other_content, **(PROBLEM_DETAILS if status >= 400 else {})}
        built[str(status)] = response
    if operation.if_none_match:
        built["304"] = {
            "description": "The client has the current representation",
            "headers": common | {"ETag": HEADERS["ETag"]},
        }
    for status in sorted(_errors_of(operation)):
        if str(status) not in built:
            content = {JSON: {"schema": _schema(schemas.ErrorAnswer, "serialization")}, **PROBLEM_DETAILS}
            if operation.problem_page is not None:
                content |= operation.other_content
            headers = dict(common)
            if (name := _ERROR_HEADERS.get(status)) is not None:
                headers[name] = HEADERS[name]
            built[str(status)] = {"description": ERRORS[status], "headers": headers, "content": content}
    return built


@dataclass(frozen=True, slots=True)
class _IdSource:
    """The location of the id in a response, and the path and the parameter that take the id."""

    pointer: str
    path: str
    parameter: str = "id"


_ID_SOURCES: Mapping[type, _IdSource] = {
    **{each.entity: _IdSource("id", f"/{each.name}/{{id}}") for each in RESOURCES},
    **{each.added: _IdSource("added/0/id", f"/{each.name}/{{id}}") for each in RESOURCES},
    Job: _IdSource("id", "/jobs/{id}"),
    credentials.User: _IdSource("id", "/users/{user_id}/movies", "user_id"),
    credentials.Token: _IdSource("user_id", "/users/{user_id}/movies", "user_id"),
}
_ERROR_HEADERS = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}
_SUCCESSES = {200: "Done", 201: "Added", 202: "Accepted", 204: "Deleted", 503: "Not ready"}


def _errors_of(operation: Operation) -> set[int]:
    # Nearly every operation rejects an invalid token (401), and any query can be invalid (422).
    found = {401, 422, 503, *operation.errors}
    if operation.is_limited:
        found.add(429)
    if operation.if_match:
        found.add(412)
    if operation.body is not None or operation.form is not None or operation.file_media_types:
        found |= {408, 413, 415}
    return found
