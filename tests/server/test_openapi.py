"""The OpenAPI document is complete, matches the service, and is readable at /docs and /redoc."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
from openapi_spec_validator import validate

from core.errors import MAX_PROBLEMS
from main import CORS_RESPONSE_HEADERS
from routes import table
from tests.support.backends import SQLITE_ONLY
from tests.support.pages import assert_self_contained, policy_of
from tests.support.programs import output_of
from tests.support.requests import ok
from tests.support.service import Person, Service

MAX_EXAMPLES = 6
CATALOG = ("movies", "characters", "genres", "actors", "countries", "languages")
CLI = Path(sys.executable).with_name("schemathesis")
# Lists with the same query parameters as another list; they differ only in the response or in the owner of the rows.
LISTS_OF_COMMENTS = (
    *(f"/comments/{part}" for part in ("user", "username/{username}", "count", "{id}/replies")),
    *("/users/{user_id}/comments", "/movies/{id}/comments"),
)
TWINS = (
    {
        twin: f"/{name}"
        for name in ("movies", "characters")
        for twin in (
            *(f"/{name}/{part}" for part in ("user", "username/{username}", "names", "count")),
            f"/users/{{user_id}}/{name}",
        )
    }
    | {f"/{name}/{part}": f"/{name}" for name in ("genres", "countries") for part in ("names", "count")}
    | {f"/{name}/{{id}}/movies": "/movies" for name in ("genres", "actors", "countries", "languages")}
    | dict.fromkeys(("/movies/popular", "/movies/recent"), "/movies")
    | dict.fromkeys(LISTS_OF_COMMENTS, "/comments")
)
# Resources with the same operations as another one; they differ only in their fields.
ALIKE = {"characters": "movies", "actors": "genres", "languages": "countries"}
# Writes with the same body as another write; they differ only in the owner or in the required rights.
BODY_TWINS = {
    ("post", "/users/{user_id}/movies"): "/movies",
    ("post", "/users/{user_id}/characters"): "/characters",
    ("post", "/comments/{id}/replies"): "/movies/{id}/comments",
    ("post", "/users"): "/auth/register",
    ("post", "/users/{id}/profile"): "/users/me/profile",
    ("put", "/users/{id}/profile"): "/users/me/profile",
    ("patch", "/users/{id}/profile"): "/users/me/profile",
    ("put", "/users/{id}/avatar"): "/users/me/avatar",
}
# The lowest and the highest value of each format. They are short, because all conditions of a list go into one URL.
ENDS: Mapping[str, tuple[str, str]] = {
    "date": ("0001-01-01", "9999-12-31"),
    "date-time": ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"),
    "text": ("'", "%_\\🎬\U0010ffff"),
}
REFUSED: Mapping[str, str] = {"integer": "1.5"}  # an invalid integer; for every other type, NUL is invalid

# The schema of a file that is a body or a form field.
FILE = {"type": "string", "format": "binary"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(table.document())
    return found


def operations_in(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(method.upper(), path, each) for path, item in document["paths"].items() for method, each in item.items()]


def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    validate(document)


def test_the_document_holds_exactly_the_operations_of_the_service(document: dict[str, Any]) -> None:
    described = {(method, path) for method, path, _ in operations_in(document)}
    assert described == {(operation.method, operation.path) for operation in table.OPERATIONS}


def test_every_operation_is_described_in_full(document: dict[str, Any]) -> None:
    tags = {tag["name"] for tag in document["tags"]}
    for method, path, operation in operations_in(document):
        where = f"{method} {path}"
        assert operation["summary"], where
        assert set(operation["tags"]) <= tags, where
        statuses = operation["responses"]
        assert any(status.startswith("2") for status in statuses), where
        for status, response in statuses.items():
            assert response["description"], (where, status)
            if status not in ("204", "304"):
                assert all(content["schema"] for content in response["content"].values()), (where, status)
                assert response["content"], (where, status)
        named = {each["name"] for each in operation.get("parameters", []) if each["in"] == "path"}
        assert named == set(re.findall(r"{(\w+)}", path)), where


def test_every_body_has_a_schema_with_an_example(document: dict[str, Any]) -> None:
    models = document["components"]["schemas"]
    for method, path, operation in operations_in(document):
        for content in operation.get("requestBody", {}).get("content", {}).values():
            schema = content["schema"]
            if schema == FILE:
                continue
            model = models[schema.get("items", schema)["$ref"].rpartition("/")[2]]
            assert model["examples"], (method, path)


def test_links_lead_to_operations_and_name_their_parameters(document: dict[str, Any]) -> None:
    by_id = {operation["operationId"]: operation for _, _, operation in operations_in(document)}
    links = [
        link
        for operation in by_id.values()
        for response in operation["responses"].values()
        for link in response.get("links", {}).values()
    ]
    assert links
    for link in links:
        taken = {f"{each['in']}.{each['name']}" for each in by_id[link["operationId"]]["parameters"]}
        assert set(link["parameters"]) <= taken


def test_pages_of_other_origins_may_read_every_documented_header(document: dict[str, Any]) -> None:
    named = {
        name
        for _, _, operation in operations_in(document)
        for response in operation["responses"].values()
        for name in response.get("headers", {})
    }
    assert named - {"WWW-Authenticate"} == set(CORS_RESPONSE_HEADERS)


# --- the queries of lists


def query_of(operation: dict[str, Any]) -> dict[str, Any]:
    """Return the schemas of the query parameters by name."""
    query = [each for each in operation.get("parameters", []) if each["in"] == "query"]
    return {each["name"]: each.get("schema") or each["content"]["application/json"]["schema"] for each in query}


def filters_of(operation: dict[str, Any]) -> dict[str, Any]:
    """Return the schemas of the query parameters that are conditions on fields."""
    query = query_of(operation)
    fields = {name.partition("[")[0] for name in query if "[" in name}
    return {name: schema for name, schema in query.items() if name.partition("[")[0] in fields}


def ends_of(schema: dict[str, Any]) -> tuple[str, str]:
    """Return the lowest and the highest value that the schema allows, or two unusual values."""
    if "items" in schema:
        return ends_of(schema["items"])
    if "enum" in schema:
        return str(schema["enum"][0]), str(schema["enum"][-1])
    if schema["type"] in ("integer", "number"):
        return str(schema["minimum"]), str(schema["maximum"])
    if schema["type"] == "boolean":
        return "false", "true"
    return ENDS[schema.get("format", "text")]


def lists_in(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        path: operation
        for method, path, operation in operations_in(document)
        if method == "GET" and filters_of(operation)
    }


async def test_every_documented_condition_is_accepted_and_checked(service: Service, document: dict[str, Any]) -> None:
    """Send all conditions of a list in one request: valid values are accepted, and the 422 names all invalid ones."""
    lists = lists_in(document)
    assert len(lists) > 10
    async with service.admin() as chief:
        actor, movie = await chief.add("actors"), await chief.add()
        genre = (await ok(chief.http.get("/genres?limit=1")))[0]
        text = {"text": "Splendid"}
        comment = await ok(chief.http.post(f"/movies/{movie['id']}/comments", json=text), 201)
        ids = {"movies": movie["id"], "comments": comment["id"], "actors": actor["id"], "genres": genre["id"]}
        ids |= {"countries": "GB", "languages": "en"}
        for template, operation in lists.items():
            id_ = ids.get(template.split("/")[1])
            path = template.format(user_id=chief.id, username=chief.name, id=id_)
            filters = filters_of(operation)
            ends = {name: ends_of(schema) for name, schema in filters.items()}
            for end in (0, 1):
                answer = await chief.http.get(path, params={name: each[end] for name, each in ends.items()})
                assert answer.status_code == 200, (template, end, answer.text)
            names = list(filters)
            for begin in range(0, len(names), MAX_PROBLEMS):
                some = names[begin : begin + MAX_PROBLEMS]
                invalid = {name: REFUSED.get(filters[name].get("type"), "\0") for name in some}
                answer = await chief.http.get(path, params=invalid)
                assert answer.status_code == 422, template
                assert {each["loc"][1] for each in answer.json()["detail"]} == set(some), template


def test_twins_have_the_query_of_their_list(document: dict[str, Any]) -> None:
    def query(path: str) -> dict[str, Any]:
        return query_of(document["paths"][path]["get"])

    for twin, path in TWINS.items():
        assert query(twin)
        assert query(twin).items() <= query(path).items(), twin


def test_twins_have_the_body_of_their_write(document: dict[str, Any]) -> None:
    paths = document["paths"]
    for (method, twin), path in BODY_TWINS.items():
        assert paths[twin][method]["requestBody"] == paths[path][method]["requestBody"], twin


# --- all operations


def thinned(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with each kind of condition (an operator and a schema) only once across all lists, and each
    kind of member only once across the schemas of `filter`.

    Multipart bodies are left out where a JSON body exists, because random bytes are not a valid picture.
    """
    found: dict[str, Any] = orjson.loads(orjson.dumps(document))
    for _, _, operation in operations_in(found):
        if not takes_only_files(operation):
            content = operation.get("requestBody", {}).get("content", {})
            content.pop("multipart/form-data", None)
    for title, schema in found["components"]["schemas"].items():
        for name, values in BEYOND_SCHEMAS.items():
            if title not in ("User", "Profile", "LoginBody", "TokenForm") and name in schema.get("properties", {}):
                schema["properties"][name] = {"enum": values}
    for title in ("MovieBody", "MovieReplacement", "MoviePatch", "MovieBulkPatch"):
        members = found["components"]["schemas"][title]["properties"]
        members |= {name: {"enum": values} for name, values in LINKED.items()}
    seen: set[bytes] = set()
    for title, schema in found["components"]["schemas"].items():
        if title.endswith("Filter"):
            members = schema["properties"]
            group = members.pop("or")
            for name, member in list(members.items()):
                kind = orjson.dumps(member)
                if kind in seen:
                    del members[name]
                seen.add(kind)
            if title == "MoviesFilter":
                group["items"]["properties"] = {"id": members["id"]}
                members["or"] = group
    for _, _, operation in operations_in(found):
        conditions = filters_of(operation)
        kept = []
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "query" and (parameter["name"] in conditions or parameter["name"] == "filter"):
                schema = parameter.get("schema") or parameter["content"]
                kind = orjson.dumps([parameter["name"].partition("[")[2], schema])
                if kind in seen:
                    continue
                seen.add(kind)
            # The lowest valid rate depends on another parameter, the number of rows, which `with` multiplies.
            # `test_jobs.py` and `test_generated_parts.py` test them.
            if parameter["name"] not in ("rate", "with"):
                kept.append(parameter)
        if kept:
            operation["parameters"] = kept
        else:
            operation.pop("parameters", None)
    return found


# Whether these values are valid depends on what a schema cannot express: the current date, existing domains, and common
# passwords.
BEYOND_SCHEMAS = {
    "date_of_birth": ["1949-09-01", "2000-02-29", None],
    "email": ["holly@example.org", "anna@example.org"],
    "password": ["third man 1949", "\u00e9\u4e2d of 16 letters"],
}
# In the bodies of movies, only rows that exist are valid.
LINKED = {
    "country": ["AT", "GB", None],
    "languages": [["English", "de"], [1], []],
    "genres": [["Noir", "noir"], [1], []],
    "actors": [["Alida Valli"], [1], []],
}
# A range is valid only if its second id is not below the first. No schema can express this for two parameters, so the
# 422 for a reversed range would count as the rejection of a valid request. `tests/catalog/test_bulk.py` tests ranges.
RANGES = tuple(f"delete_{name}_bulk_by_start_id_by_end_id" for name in (*CATALOG, "comments"))
# These operations would end the session that all other requests need.
ENDS_THE_SESSION = (
    "post_auth_logout", "delete_auth_sessions", "delete_auth_sessions_by_id", "delete_users_me", "delete_users_by_id",
)  # fmt: skip


def takes_only_files(operation: dict[str, Any]) -> bool:
    content = operation.get("requestBody", {}).get("content", {})
    return bool(content) and "application/json" not in content


async def cancel_all_jobs(chief: Person) -> None:
    """Cancel every job soon after it is queued: the jobs generate millions of rows, which no check looks at."""
    while True:
        for job in await ok(chief.http.get("/jobs?state[in]=queued,running&fields=id")):
            await chief.http.delete(f"/jobs/{job['id']}")  # a 409 if it has ended meanwhile
        await asyncio.sleep(0.1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("backend", "phases"),
    [("sqlite", "examples,coverage"), ("postgres", "examples,fuzzing"), ("postgres", "stateful")],
    indirect=["backend"],
    scope="session",
)
async def test_schemathesis_finds_nothing(
    phases: str, new_service: Callable[..., Service], document: dict[str, Any], tmp_path: Path
) -> None:
    """Run all checks against a separate service, because the jobs that they queue would slow down other tests.

    The coverage phase tries every parameter at its bounds. The results do not depend on the database, so this phase
    runs on SQLite only, and for only one of the operations or resources that are alike. Fuzzing and the stateful phase
    store rows, so they run on PostgreSQL, which rejects more values than SQLite. A list has a hundred conditions, so
    this test tries only one of each kind.
    """
    same = []
    if "coverage" in phases:
        twins = [*(("get", path) for path in TWINS), *BODY_TWINS]
        same = [document["paths"][path][method]["operationId"] for method, path in twins]
        same += [each["operationId"] for _, path, each in operations_in(document) if path.split("/")[1] in ALIKE]
    files = [each["operationId"] for _, _, each in operations_in(document) if takes_only_files(each)]
    left_out = {*same, *files, *RANGES, *ENDS_THE_SESSION}
    thin = tmp_path / "openapi.json"
    thin.write_bytes(orjson.dumps(thinned(document)))
    with new_service(ACCESS_TOKEN_EXPIRE_MINUTES="60").running() as service:
        service.add_genres("Noir")
        async with service.person() as alice, service.admin() as chief:
            await chief.add("actors", name="Alida Valli")
            assert (await alice.http.get("/openapi.json")).json() == document
            cancelling = asyncio.create_task(cancel_all_jobs(chief))
            await output_of(
                *(CLI, "run", thin),
                *("--url", service.url),
                *("--header", f"Authorization: Bearer {alice.token}"),
                *("--checks", "all", "--phases", phases),
                # This operation also rejects requests that match the schema: all that lack the correct password.
                *("--exclude-path", "/auth/password/change"),
                *(part for name in left_out for part in ("--exclude-operation-id", name)),
                *("--max-examples", str(MAX_EXAMPLES)),
                # On a busy machine, generating data takes longer than this check of the test tool itself allows.
                *("--suppress-health-check", "too_slow"),
                *("--seed", "1", "--generation-database", "none", "--workers", "1", "--no-color"),
                seconds=900,
                cwd=tmp_path,
                env={**os.environ, "COLUMNS": "200"},
            )
            cancelling.cancel()
            assert (await alice.http.get("/auth/me")).status_code == 200, "a request has ended the test's session"
        assert '"status": 500' not in service.log()


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
@SQLITE_ONLY
async def test_the_pages_load_nothing_from_elsewhere(service: Service, path: str) -> None:
    async with service.anyone() as anonymous:
        page = await assert_self_contained(anonymous, path)
        assert policy_of(page)["connect-src"] == "'self'"
        assert "http" not in page.headers["content-security-policy"]
