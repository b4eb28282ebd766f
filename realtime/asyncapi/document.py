"""The AsyncAPI 3.0 document of the websocket at `/asyncapi.json`, built from the models of its messages and frames.

The document takes the service's view: the service receives what clients send, and sends what clients receive.
`/docs/realtime` renders the document, and the tests validate every frame they receive against it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from core import filters, scope_keys
from core.errors import CLOSE_REASONS, CloseCode
from core.version import VERSION
from realtime.asyncapi.frame_models import frames
from realtime.fanout.subscription import MAX_UNSENT_BYTES, SLOW_CLIENT_SECONDS
from realtime.sockets import actions
from realtime.sockets.actions import ACTIONS, REPLIES, ErrorReply
from realtime.sockets.connection import AUTH_SECONDS, MAX_SUBSCRIPTIONS
from realtime.sockets.endpoint import HEARTBEAT_SECONDS
from realtime.sockets.parsing import MESSAGES_PER_SECOND
from realtime.sockets.rest_calls import MAX_REQUESTS_IN_FLIGHT
from repository.engine.positions import POSITION
from repository.engine.transaction import MAX_EVENT_BYTES, MAX_EVENT_ITEMS
from resources.topics import PUBLIC_TOPICS, TOPIC_FIELDS, TOPICS
from schemas import MAX_BODY_BYTES, MAX_ID

REF_TEMPLATE = "#/components/schemas/{model}"
# Recorded frames, by message name.
EXAMPLES = Path(__file__).with_name("examples.json")

DESCRIPTION = """A real-time movie catalog. Every write is an event in one ordered log, and every client receives the \
events that it may see, each exactly once and in order, across reconnects, crashes and restarts.

Both sides send text frames that contain one JSON object each. A client that sends nothing receives every public topic \
live, from the moment it connects: try `wscat -c ws://127.0.0.1:8000/ws`. The socket is also available at `/api/v1/ws`.

The schemas of the service's frames forbid additional members, so that tests find members that a schema lacks. \
**Clients must ignore operations, topics and members that they do not know**: later versions add new ones."""

SERVER_DESCRIPTION = """Public topics require no credentials. Credentials are accepted, in order of preference, as the \
header `Authorization: Bearer <token>`, as the subprotocols `bearer, <token>`, or in an initial `auth` message, but \
never in the query."""

REFUSALS: Mapping[int, str] = {
    401: "Invalid token",
    403: "The origin or one of the topics is not allowed",
    422: "Invalid query; the body lists every problem",
    429: "Too many connections from this address; try again after the time given in Retry-After",
    503: "Too many connections, the service is stopping, or the database is unavailable; try again after the time "
    "given in Retry-After",
}
_RECONNECT, _WAIT, _FIX = "reconnect and resume", "do not reconnect until the cause is resolved", "fix the client"


class _Schemas(GenerateJsonSchema):
    """A schema generator that omits the titles that pydantic derives from the names of members."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@cache
def document(root: str = "") -> dict[str, Any]:
    """Return the document. All callers share it, so they must not change it.

    `root` is the path under which clients reach the service, or an empty string.
    """
    schemas = _schemas()
    received = {action: _received(action, schemas) for action in ACTIONS}
    sent = {operation: _sent(operation) for operation in frames()}
    replies = {f"{action}_reply": _reply(action, model) for action, model in REPLIES.items()} | {"error": _error()}
    examples: Mapping[str, Sequence[Any]] = orjson.loads(EXAMPLES.read_bytes())
    for name, message in [*sent.items(), *replies.items()]:
        message["examples"] = [{"payload": payload} for payload in examples[name]]
    everything = received | {f"{name}_frame": each for name, each in sent.items()} | replies
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Marquee", "version": VERSION, "description": DESCRIPTION, "license": {"name": "MIT"}},
        "defaultContentType": "application/json",
        "servers": {"plain": _server("ws", root), "secure": _server("wss", root)},
        "channels": {"ws": _channel(everything)},
        "operations": _operations(received, sent),
        "components": {
            "messages": everything,
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
                "subprotocol": {
                    "type": "httpApiKey",
                    "in": "header",
                    "name": "Sec-WebSocket-Protocol",
                    "description": "`bearer, <token>`, for browsers, which cannot set headers: "
                    '`new WebSocket(url, ["bearer", token])`. The response selects `bearer`.',
                },
            },
        },
        "x-close-codes": [
            {"code": code.value, "name": code.name, "reason": CLOSE_REASONS[code], "then": _after(code)}
            for code in sorted(CloseCode)
        ],
        "x-refusals": [{"status": status, "when": when} for status, when in REFUSALS.items()],
        "x-limits": _limits(),
        "x-topics": {topic: _topic(topic) for topic in TOPICS},
    }


# --- schemas


def _schemas() -> dict[str, Any]:
    published: list[type[BaseModel]] = [*ACTIONS.values(), *REPLIES.values(), ErrorReply]
    for models in frames().values():
        published += models
    inputs: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in published]
    _, made = models_json_schema(inputs, ref_template=REF_TEMPLATE, schema_generator=_Schemas)
    # The schemas are named after the models' titles, because pydantic's own names contain all type parameters.
    names = {name: schema["title"] for name, schema in made["$defs"].items()}
    assert len(set(names.values())) == len(names), "expected a different title for each model"
    renamed: dict[str, Any] = _with_references(made["$defs"], names)
    return {names[name]: schema for name, schema in sorted(renamed.items(), key=lambda item: names[item[0]])}


def _with_references(schema: Any, names: Mapping[str, str]) -> Any:
    if isinstance(schema, list):
        return [_with_references(each, names) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: REF_TEMPLATE.format(model=names[value.rpartition("/")[2]])
        if key == "$ref"
        else _with_references(value, names)
        for key, value in schema.items()
    }


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF_TEMPLATE.format(model=model.__name__)}


# --- messages


def _received(action: str, schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the AsyncAPI message of an action. Add `id` and `action` to the schema of the action's model."""
    model = ACTIONS[action]
    body = schemas[model.__name__]
    del body["examples"]
    # The examples are taken from the model, because pydantic's schema sorts their members by name.
    own: Any = model.model_config["json_schema_extra"]
    examples = [{"id": number, "action": action, **each} for number, each in enumerate(own["examples"], 1)]
    around = {
        "id": {**TypeAdapter(actions.MessageId).json_schema(), "description": "Repeated in the reply, as `reply_to`"},
        "action": {"const": action},
    }
    body["properties"] = around | body.get("properties", {})
    body["required"] = ["action", *body.get("required", [])]
    return {
        "name": action,
        "title": model.__name__,
        "summary": _text_of(model),
        "payload": _reference(model),
        "correlationId": {"location": "$message.payload#/id"},
        "examples": [{"payload": each} for each in examples],
    }


def _sent(operation: str) -> dict[str, Any]:
    models = frames()[operation]
    references = [_reference(model) for model in models]
    return {
        "name": operation,
        "title": "Progress of a job" if operation == "progress" else operation.replace("_bulk", " many").capitalize(),
        "summary": _text_of(models[0]),
        "payload": references[0] if len(references) == 1 else {"oneOf": references},
    }


def _text_of(model: type[BaseModel]) -> str:
    """Return the docstring of the model or, if the model is parametrised, of its generic model."""
    origin = model.__pydantic_generic_metadata__["origin"] or model
    return " ".join((origin.__doc__ or "").split())


def _reply(action: str, model: type[BaseModel]) -> dict[str, Any]:
    parameters = model.__pydantic_generic_metadata__["args"]
    return {
        "name": f"{action}_reply",
        "title": f"Reply to {action}",
        "summary": _text_of(parameters[0] if parameters else model),
        "payload": _reference(model),
        "correlationId": {"location": "$message.payload#/reply_to"},
    }


def _error() -> dict[str, Any]:
    return {**_reply("error", ErrorReply), "name": "error", "title": "Error"}


# --- the channel and its operations


def _server(protocol: str, root: str) -> dict[str, Any]:
    return {
        "host": "{host}",
        **({"pathname": root} if root else {}),
        "protocol": protocol,
        "protocolVersion": "13",
        "description": SERVER_DESCRIPTION,
        "variables": {"host": {"default": "127.0.0.1:8000", "description": "The service's host and port"}},
        # There is no member `security`, because it would make one of these schemes mandatory.
        "x-optional-security": [
            {"$ref": "#/components/securitySchemes/bearer"},
            {"$ref": "#/components/securitySchemes/subprotocol"},
        ],
    }


def _channel(everything: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "address": "/ws",
        "title": "The websocket",
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in everything},
        "bindings": {"ws": {"method": "GET", "query": _query(), "headers": _headers(), "bindingVersion": "0.1.0"}},
    }


def _query() -> dict[str, Any]:
    names = "|".join(TOPICS)
    return {
        "type": "object",
        "additionalProperties": False,
        "dependencies": {"epoch": {"properties": {"since": {"type": "integer"}}, "required": ["since"]}},
        "if": {"properties": {"since": {"type": "integer"}}, "required": ["since"]},
        "then": {"required": ["epoch"]},
        "properties": {
            "topics": {
                "type": "string",
                "pattern": f"^({names})(,({names}))*$",
                "default": ",".join(topic for topic in TOPICS if topic in PUBLIC_TOPICS),
                "description": f"Comma-separated topics: any of {', '.join(f'`{topic}`' for topic in TOPICS)}",
            },
            "since": {
                "anyOf": [
                    {"type": "string", "pattern": f"^{POSITION}$"},
                    {"type": "integer", "minimum": 0, "maximum": MAX_ID},
                ],
                "description": "Resume after this position, the last one that the client has processed: "
                "`<epoch>:<seq>`, or only the number if `epoch` is given",
            },
            "epoch": {"type": "string", "description": "The epoch that `since` belongs to, if `since` is a number"},
            "bulk": {
                "type": "string",
                "enum": ["items", "summary"],
                "default": "items",
                "description": "Whether bulk events carry their rows, or only a count and the lowest and highest id",
            },
        },
    }


def _headers() -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "Authorization": {"type": "string", "pattern": "^Bearer .+$"},
            "Sec-WebSocket-Protocol": {"type": "string", "description": "`bearer, <token>`"},
            "Origin": {
                "type": "string",
                "description": "Sent by browsers only. The service's own origin and ALLOWED_ORIGINS are accepted",
            },
        },
    }


def _operations(received: Mapping[str, Any], sent: Mapping[str, Any]) -> dict[str, Any]:
    channel = {"$ref": "#/channels/ws"}
    asked = {
        action: {
            "action": "receive",
            "channel": channel,
            "title": message["title"],
            "summary": message["summary"],
            "messages": [_in_channel(action)],
            "reply": {"channel": channel, "messages": [_in_channel(f"{action}_reply"), _in_channel("error")]},
        }
        for action, message in received.items()
    }
    watch = {
        "action": "send",
        "channel": channel,
        "title": "Watch",
        "summary": "The `welcome` frame, the frames of the socket's subscriptions, and `presence` frames.",
        "messages": [_in_channel(f"{name}_frame") for name in sent],
    }
    return {"watch": watch, **asked}


def _in_channel(name: str) -> dict[str, str]:
    return {"$ref": f"#/channels/ws/messages/{name}"}


# --- extensions, for what AsyncAPI cannot express


def _after(code: CloseCode) -> str:
    if code is CloseCode.SERVICE_RESTART or 4000 <= code < 4500:
        return _RECONNECT
    return _FIX if code < 4000 or code is CloseCode.PROTOCOL_ERROR else _WAIT


def _limits() -> list[dict[str, Any]]:
    numbers = (
        ("message_bytes", MAX_BODY_BYTES, "Bytes of a client's message; a longer message closes the socket with 1009"),
        ("frame_bytes", 1024 * 1024, "Bytes of the largest frame that the service sends"),
        ("event_bytes", MAX_EVENT_BYTES, "Bytes of rows in one frame; a larger event is split into several frames"),
        ("event_items", MAX_EVENT_ITEMS, "Rows in one frame; a larger event is split into several frames"),
        ("subscriptions", MAX_SUBSCRIPTIONS, "Subscriptions of one socket"),
        ("requests", MAX_REQUESTS_IN_FLIGHT, "Concurrent requests of one socket"),
        ("messages_per_second", MESSAGES_PER_SECOND, "Messages per second from one client"),
        ("auth_seconds", AUTH_SECONDS, "Seconds within which a client must sign in, if sign-in is required"),
        ("heartbeat_seconds", HEARTBEAT_SECONDS, "Seconds between two pings from the service"),
        ("unsent_bytes", MAX_UNSENT_BYTES, "Unsent bytes above which a socket catches up from the log"),
        ("slow_seconds", SLOW_CLIENT_SECONDS, "Seconds after which a socket that reads nothing is closed with 4008"),
    )
    return [{"name": name, "value": value, "what": what} for name, value, what in numbers]


def _topic(topic: str) -> dict[str, Any]:
    readers = {"public": "everyone", "self": "every user, limited to what is their own"}
    return {
        "for": readers.get(TOPICS[topic], f"{TOPICS[topic]}s"),
        "default": topic in PUBLIC_TOPICS,
        "filters": {
            name: {"kind": field.kind.value, "operators": [op.value for op in filters.OPERATORS[field.kind]]}
            for name, field in TOPIC_FIELDS[topic].items()
        },
    }


@cache
def _encoded(root: str) -> bytes:
    return orjson.dumps(document(root))


async def asyncapi(request: Request) -> Response:
    request.scope[scope_keys.DOCUMENT] = "/asyncapi.json"
    # The first call takes a third of a second to build the document, which is too long for the event loop.
    body = await asyncio.to_thread(_encoded, request.scope[scope_keys.ROOT])
    return Response(body, headers={"Cache-Control": "no-cache"}, media_type="application/json")


ROUTES: list[BaseRoute] = [Route("/asyncapi.json", asyncapi)]
