"""The AsyncAPI document is valid, complete, true to the code, readable at /docs/realtime, and used to check all frames.

The schema of AsyncAPI 3.0.0 beside this file comes from the npm package @asyncapi/specs 6.11.1. It has its own licence.
"""

from __future__ import annotations

import copy
import functools
import json
import operator
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import jsonschema_rs
import orjson
import pytest
from pydantic import ValidationError

from core.errors import CloseCode
from realtime.asyncapi import document as asyncapi
from realtime.asyncapi import frame_models
from realtime.sockets import endpoint
from realtime.sockets.actions import ACTIONS, problems_of
from resources.topics import TOPIC_ENTITIES, TOPICS
from server import serving
from tests.support.backends import SQLITE_ONLY
from tests.support.documents import bare, rows_of, text_of
from tests.support.frames_checked import Checker, FrameMismatch, check_frame
from tests.support.pages import assert_self_contained, chromium, policy_of
from tests.support.programs import output_of
from tests.support.service import Service, Watcher

OFFICIAL = Path(__file__).with_name("asyncapi_schema") / "3.0.0.json"
Document = dict[str, Any]


@pytest.fixture(scope="module")
def official() -> jsonschema_rs.Draft7Validator:
    return jsonschema_rs.Draft7Validator(json.loads(OFFICIAL.read_text()))


@pytest.fixture
def document() -> Document:
    """A copy of the document that a test may change."""
    return copy.deepcopy(asyncapi.document())


@pytest.fixture(scope="module")
def examples() -> dict[str, list[Document]]:
    found: dict[str, list[Document]] = orjson.loads(asyncapi.EXAMPLES.read_bytes())
    return found


# --- the document


def test_the_document_is_valid_asyncapi_3_0(document: Document, official: jsonschema_rs.Draft7Validator) -> None:
    assert document["asyncapi"] == "3.0.0"
    official.validate(document)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("info/version", None),
        ("operations/watch/action", "publish"),
        ("components/messages/add_frame/paylaod", {}),
        ("components/schemas/Job/type", "objekt"),
        ("channels/ws/bindings/ws/method", "FETCH"),
    ],
)
def test_an_invalid_document_is_rejected(
    document: Document, official: jsonschema_rs.Draft7Validator, place: str, value: Any
) -> None:
    *path, name = place.split("/")
    part = functools.reduce(operator.getitem, path, document)
    part[name] = value
    if value is None:
        del part[name]
    assert not official.is_valid(document)


def references_in(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "$ref":
                yield value
            elif key != "examples":
                yield from references_in(value)
    elif isinstance(part, list):
        for each in part:
            yield from references_in(each)


def test_every_reference_resolves_and_no_schema_is_unused(document: Document) -> None:
    references = set(references_in(document))
    for reference in references:
        part: Any = document
        for name in reference.removeprefix("#/").split("/"):
            part = part[name]
    assert {f"#/components/schemas/{name}" for name in document["components"]["schemas"]} <= references
    assert {f"#/components/messages/{name}" for name in document["components"]["messages"]} <= references


def test_every_action_and_frame_is_an_operation_with_its_messages(document: Document) -> None:
    operations = document["operations"]
    assert operations.keys() == {"watch", *ACTIONS}
    assert operations["watch"]["messages"] == [
        {"$ref": f"#/channels/ws/messages/{name}_frame"} for name in frame_models.frames()
    ]
    for action in ACTIONS:
        assert operations[action]["messages"] == [{"$ref": f"#/channels/ws/messages/{action}"}]
        replies = [reference["$ref"].rpartition("/")[2] for reference in operations[action]["reply"]["messages"]]
        assert replies == [f"{action}_reply", "error"]


def test_every_topic_has_its_frames(document: Document) -> None:
    assert TOPIC_ENTITIES.keys() == TOPICS.keys() == document["x-topics"].keys()
    for name in ("add", "update", "delete", "add_bulk", "update_bulk", "delete_bulk", "snapshot"):
        payload = document["components"]["messages"][f"{name}_frame"]["payload"]
        schemas = [document["components"]["schemas"][each["$ref"].rpartition("/")[2]] for each in payload["oneOf"]]
        assert [schema["properties"]["topic"]["const"] for schema in schemas] == list(TOPICS)


def test_every_object_from_the_service_forbids_unknown_members(document: Document) -> None:
    for name, schema in document["components"]["schemas"].items():
        if "properties" in schema:
            assert schema["additionalProperties"] is False, name
            assert "must ignore" in document["info"]["description"]


def test_every_message_has_examples_that_fit_its_schema(document: Document) -> None:
    components = {"components": {"schemas": document["components"]["schemas"]}}
    for name, message in document["components"]["messages"].items():
        validator = jsonschema_rs.Draft7Validator(message["payload"] | components, validate_formats=True)
        assert message["examples"], name
        for example in message["examples"]:
            validator.validate(example["payload"])


def test_every_example_from_a_client_is_accepted_by_the_code(document: Document) -> None:
    for action, model in ACTIONS.items():
        for example in document["components"]["messages"][action]["examples"]:
            members = {name: each for name, each in example["payload"].items() if name not in ("id", "action")}
            model.model_validate(members)


INVALID_MESSAGES: dict[str, list[tuple[Document, list[str]]]] = {
    "subscribe": [
        ({"topics": []}, ["topics"]), ({"topics": ["movies", "movies"]}, ["topics"]),
        ({"topics": ["movies", "films"]}, ["topics.1"]), ({"as": "a b"}, ["as"]), ({"as": "x" * 65}, ["as"]),
        ({"since": -1}, ["since"]), ({"since": 2**63}, ["since"]), ({"since": True}, ["since"]),
        ({"epoch": "229344c6ffb9e111"}, ["since"]), ({"since": 1, "epoch": "x" * 65}, ["epoch"]),
        ({"since": 1}, ["since"]), ({"since": "41", "epoch": "x"}, ["since"]),
        ({"since": "x:1", "epoch": "x"}, ["since"]),
        ({"since": ":1"}, ["since"]), ({"since": "x:-1"}, ["since"]), ({"since": "x" * 65 + ":1"}, ["since"]),
        ({"filter": []}, ["filter"]), ({"snapshot": 1, "bulk": "all"}, ["snapshot", "bulk"]),
        ({"deliver": "latest"}, ["deliver"]), ({"deliver": {"latest_every_ms": 49}}, ["deliver.latest_every_ms"]),
        ({"deliver": {"latest_every_ms": 60_001}}, ["deliver.latest_every_ms"]),
        ({"deliver": {"latest_every_ms": 200, "latest": 1}}, ["deliver.latest"]), ({"topic": "movies"}, ["topic"]),
        ({"topics": "movies"}, ["topics"]),
    ],
    "unsubscribe": [({}, ["subscription"])],
    "auth": [
        ({}, ["token"]), ({"token": 5}, ["token"]), ({"token": ""}, ["token"]), ({"token": "x" * 4097}, ["token"]),
    ],
    "request": [
        ({}, ["method", "path"]), ({"method": "get", "path": "/movies"}, ["method"]),
        ({"method": "TRACE", "path": "/movies"}, ["method"]),
        ({"method": "GET", "path": "http://elsewhere/movies"}, ["path"]),
        ({"method": "GET", "path": "/movies\r\nX: y"}, ["path"]),
        ({"method": "GET", "path": "/", "cookies": {}}, ["cookies"]),
        ({"method": "GET", "path": "/", "headers": {"a": 1}}, ["headers.a"]),
        ({"method": "GET", "path": "movies"}, ["path"]), ({"method": "GET", "path": "/mo vies"}, ["path"]),
        ({"method": "GET", "path": "/" * 8193}, ["path"]),
        ({"method": "GET", "path": "/", "headers": {"a b": "1"}}, ["headers.a b"]),
        ({"method": "GET", "path": "/", "headers": {"a": "1\r\nb: 2"}}, ["headers.a"]),
        ({"method": "GET", "path": "/", "headers": {f"h{n}": "" for n in range(21)}}, ["headers"]),
    ],
    "presence": [({}, ["topics"])],
    "ping": [({"pong": 1}, ["pong"])],
}  # fmt: skip


@pytest.mark.parametrize(
    ("action", "members", "places"),
    [(action, *case) for action, cases in INVALID_MESSAGES.items() for case in cases],
)
def test_a_message_that_the_document_forbids_is_refused_with_its_place(
    document: Document, action: str, members: Document, places: list[str]
) -> None:
    schemas = document["components"]["schemas"]
    schema = document["components"]["messages"][action]["payload"] | {"components": {"schemas": schemas}}
    assert not jsonschema_rs.Draft7Validator(schema).is_valid({"action": action, **members})
    with pytest.raises(ValidationError) as caught:
        ACTIONS[action].model_validate(members)
    assert [".".join(map(str, problem.loc)) for problem in problems_of(caught.value, ACTIONS[action])] == places


def test_the_handshake_is_that_of_the_endpoint(document: Document) -> None:
    assert tuple(document["channels"]["ws"]["bindings"]["ws"]["query"]["properties"]) == endpoint.PARAMETERS
    assert document["channels"]["ws"]["address"] in {getattr(route, "path", None) for route in endpoint.ROUTES}


def test_close_codes_and_limits_are_those_of_the_code(document: Document) -> None:
    assert {(each["code"], each["name"]) for each in document["x-close-codes"]} == {
        (code.value, code.name) for code in CloseCode
    }
    for each in document["x-close-codes"]:
        if 4000 <= each["code"] < 4500 or each["code"] == 1012:
            assert each["then"].startswith("reconnect")
        else:
            assert not each["then"].startswith("reconnect")
    limits = {each["name"]: each["value"] for each in document["x-limits"]}
    assert limits["message_bytes"] == serving.MAX_FRAME_BYTES


def test_every_error_code_in_the_documentation_is_in_the_document(document: Document) -> None:
    documented = {bare(cells[0]) for cells in rows_of(text_of("docs/protocol.md"), "error code")}
    codes = set(document["components"]["schemas"]["Error"]["properties"]["code"]["enum"])
    assert documented <= codes | {document["components"]["schemas"]["Shortened"]["properties"]["code"]["const"]}


# --- the page of the document


@SQLITE_ONLY
async def test_the_document_and_its_page_are_served_and_load_nothing_from_elsewhere(service: Service) -> None:
    async with service.anyone() as anonymous:
        found = await anonymous.get("/asyncapi.json")
        assert (found.status_code, found.headers["content-type"]) == (200, "application/json")
        assert found.json() == orjson.loads(orjson.dumps(asyncapi.document()))
        page = await assert_self_contained(anonymous, "/docs/realtime")
        assert policy_of(page)["style-src"] == "'self'"
        assert not re.search(r"<style|\son\w+=|\sstyle=", page.text)
        for reference in ("/asyncapi.json", "/static/websocket-reference.css", "/static/websocket-reference.js"):
            assert f'="{reference}"' in page.text


@SQLITE_ONLY
async def test_a_browser_shows_every_message_of_the_page(service: Service, tmp_path: Path) -> None:
    page = await output_of(
        *chromium(tmp_path), "--virtual-time-budget=10000", "--dump-dom", f"{service.url}/docs/realtime"
    )
    sections = set(re.findall(r'<section id="([^"]+)"', page))
    messages = {name for name in asyncapi.document()["components"]["messages"] if not name.endswith("_reply")}
    assert {name.replace("_", "-") for name in messages} <= sections
    assert {"handshake", "topics", "close-codes", "limits"} <= sections
    assert 'role="alert" hidden' in page
    for code in CloseCode:
        assert code.name in page


# --- checking every frame


def action_of(name: str) -> str | None:
    return name.removesuffix("_reply") if name.endswith("_reply") else None


def test_every_example_passes_the_check(examples: Mapping[str, list[Document]]) -> None:
    for name, frames in examples.items():
        for frame in frames:
            check_frame(frame, action_of(name))
            check_frame(frame)


def test_an_extra_or_missing_member_fails_the_check(examples: Mapping[str, list[Document]]) -> None:
    optional = {"subscription", "more", "reason", "job_id"}
    tried = 0
    for name, frames in examples.items():
        for frame in frames:
            with pytest.raises(FrameMismatch):
                check_frame(frame | {"beside": 1})
            for part in [frame, *(each for each in frame.values() if isinstance(each, dict))]:
                for member in list(part):
                    if member in optional or part is frame.get("headers") or part is frame.get("body"):
                        continue
                    if "movies" in part:
                        continue  # in a presence reply, any topic may be missing
                    changed = copy.deepcopy(frame)
                    inner = changed if part is frame else next(changed[k] for k, v in frame.items() if v is part)
                    del inner[member]
                    with pytest.raises(FrameMismatch):
                        check_frame(changed, action_of(name))
                    tried += 1
    assert tried > 200


@pytest.mark.parametrize("schema", ["MoviesAdd", "MovieEntity", "MoviesItems", "Progress", "ErrorReply", "Welcome"])
def test_valid_frames_fail_against_a_schema_without_one_of_their_fields(
    document: Document, examples: Mapping[str, list[Document]], schema: str
) -> None:
    frames = [frame for each in examples.values() for frame in each]
    for member in list(document["components"]["schemas"][schema]["properties"]):
        if member in ("topic", "job_id", "subscription", "more"):
            continue  # `topic` selects the schema, and the other members are not in every frame
        changed = copy.deepcopy(document)
        del changed["components"]["schemas"][schema]["properties"][member]
        checker = Checker(changed)
        failed = 0
        for frame in frames:
            try:
                checker.check(frame)
            except FrameMismatch as mismatch:
                assert member in str(mismatch)
                failed += 1
        assert failed > 0, member


def test_the_failure_names_the_frame_and_the_first_problem(examples: Mapping[str, list[Document]]) -> None:
    frame = copy.deepcopy(examples["add_bulk"][0])
    frame["data"]["items"][0]["rating"] = "high"
    with pytest.raises(FrameMismatch, match=r"MoviesAddBulk: data\.items\.0\.rating: \"high\" is not of type"):
        check_frame(frame)
    with pytest.raises(FrameMismatch, match="no schema for"):
        check_frame({"operation": "rename", "topic": "movies"})
    with pytest.raises(FrameMismatch, match="no schema for"):
        check_frame({"operation": "add", "topic": "films"})


def test_a_reply_is_checked_against_the_schema_of_its_action(examples: Mapping[str, list[Document]]) -> None:
    for action in ACTIONS:
        # The reply to ping is empty, and so is the reply to presence without topics.
        for other in set(ACTIONS) - {action} - ({"presence"} if action == "ping" else set()):
            with pytest.raises(FrameMismatch):
                check_frame(examples[f"{action}_reply"][0], other)


def test_an_invalid_time_fails_the_check(examples: Mapping[str, list[Document]]) -> None:
    with pytest.raises(FrameMismatch, match="ts"):
        check_frame(examples["delete"][0] | {"ts": "yesterday"})


def test_checking_a_thousand_rows_is_cheaper_than_parsing_them(examples: Mapping[str, list[Document]]) -> None:
    """Checking must be cheap, because tests check every frame. Of several runs, the fastest counts."""
    [movie] = examples["add_bulk"][0]["data"]["items"]
    frame = examples["add_bulk"][0] | {"data": {"count": 1000, "items": [dict(movie) for _ in range(1000)]}}
    text = json.dumps(frame)
    checking, parsing = [], []
    for _ in range(10):
        started = time.perf_counter()
        check_frame(frame)
        checked = time.perf_counter()
        json.loads(text)
        checking.append(checked - started)
        parsing.append(time.perf_counter() - checked)
    assert min(checking) < min(parsing)
    frame["data"]["items"][999] = dict(movie) | {"rating": "high"}
    with pytest.raises(FrameMismatch, match=r"data\.items\.999\.rating"):
        check_frame(frame)


async def test_a_watcher_checks_what_it_receives(examples: Mapping[str, list[Document]]) -> None:
    good = examples["update"][0]
    socket = AsyncMock()
    socket.recv.return_value = json.dumps(good)
    assert await Watcher(socket).next() == good
    socket.recv.return_value = json.dumps(good | {"beside": 1})
    with pytest.raises(FrameMismatch, match="beside"):
        await Watcher(socket).next()
