"""The OpenAPI document: whole, true to the service, and readable at /docs and /redoc."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from openapi_spec_validator import validate

from routes import table
from tests.service import Service

MAX_EXAMPLES = 6
CLI = Path(sys.executable).with_name("schemathesis")
# Lists with the same query as another one: they differ only in what they answer, or for whom.
TWINS = {
    "/movies/user": "/movies",
    "/movies/username/{username}": "/movies",
    "/movies/names": "/movies",
    "/movies/count": "/movies",
    "/users/{user_id}/movies": "/movies",
    "/characters/user": "/characters",
    "/characters/username/{username}": "/characters",
    "/characters/names": "/characters",
    "/characters/count": "/characters",
    "/users/{user_id}/characters": "/characters",
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(table.document())
    return found


def operations_in(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(method.upper(), path, each) for path, item in document["paths"].items() for method, each in item.items()]


def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    validate(document)


def test_it_holds_exactly_what_is_served(document: dict[str, Any]) -> None:
    told = {(method, path) for method, path, _ in operations_in(document)}
    assert told == {(operation.method, operation.path) for operation in table.OPERATIONS}


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
            model = models[schema.get("items", schema)["$ref"].rpartition("/")[2]]
            assert model["examples"], (method, path)


def test_no_two_operations_share_an_id(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for _, _, operation in operations_in(document)]
    assert len(set(ids)) == len(ids)


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


def test_twins_take_the_query_of_the_list_that_they_are_twins_of(document: dict[str, Any]) -> None:
    def query(path: str) -> dict[str, Any]:
        parameters = document["paths"][path]["get"]["parameters"]
        return {each["name"]: each for each in parameters if each["in"] == "query"}

    for twin, path in TWINS.items():
        assert query(twin)
        assert query(twin).items() <= query(path).items(), twin


async def test_schemathesis_finds_nothing(
    backend: str, new_service: Callable[..., Service], document: dict[str, Any], tmp_path: Path
) -> None:
    """All checks against a service of its own: what it queues would slow down others.

    The coverage phase tries every parameter at its edges, a thousand requests a list: that is about the edge, which
    knows no database, so it is done once, and for one list of those that take the same query. Fuzzing and the stateful
    phase are about what is stored, so they run on PostgreSQL, which refuses more of it than SQLite does.
    """
    phases = "examples,coverage" if backend == "sqlite" else "examples,fuzzing,stateful"
    twins = [document["paths"][path]["get"]["operationId"] for path in TWINS] if backend == "sqlite" else []
    with new_service(ACCESS_TOKEN_EXPIRE_MINUTES="60").running() as service:
        async with service.person() as alice:
            process = await asyncio.create_subprocess_exec(
                CLI,
                "run",
                f"{service.url}/openapi.json",
                *("--header", f"Authorization: Bearer {alice.token}"),
                *("--checks", "all", "--phases", phases),
                # They would end the session that all the other requests need.
                *("--exclude-path", "/auth/logout", "--exclude-path", "/auth/sessions/{id}"),
                *(part for twin in twins for part in ("--exclude-operation-id", twin)),
                *("--max-examples", str(MAX_EXAMPLES)),
                *("--seed", "1", "--generation-database", "none", "--workers", "1", "--no-color"),
                cwd=tmp_path,
                env={**os.environ, "COLUMNS": "200"},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            try:
                output, _ = await process.communicate()
            finally:
                if process.returncode is None:
                    process.kill()
            assert (await alice.http.get("/auth/me")).status_code == 200, "its requests were refused from some time on"
        assert process.returncode == 0, output.decode()[-20_000:]
        assert '"status": 500' not in service.log()


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_the_pages_load_nothing_from_elsewhere(service: Service, path: str) -> None:
    async with service.anyone() as nobody:
        page = await nobody.get(path)
        assert page.status_code == 200
        policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == "'self'"
        assert "http" not in page.headers["content-security-policy"]
        references = re.findall(r'(?:src|href|spec-url)="([^"]+)"', page.text)
        own = [reference for reference in references if reference != "data:,"]
        assert len(own) >= 2
        for reference in own:
            assert re.match(r"/[^/]", reference)
            answer = await nobody.get(reference)
            assert answer.status_code == 200
            assert answer.content
        assert not re.search(r"<script(?![^>]*\ssrc=)", page.text)
