"""Conventions of all routes: paths, request ids, methods, media types and the shape of errors."""

from __future__ import annotations

import re
from collections import defaultdict

import httpx
import pytest

from routes.http.operation import Operation
from routes.table import OPERATIONS
from tests.support.backends import SQLITE_ONLY
from tests.support.resources import nothing_written
from tests.support.service import Service, eventually

EXAMPLES = {
    "id": "1",
    "user_id": "1",
    "username": "chief",
    "start_id": "900000000",
    "end_id": "900000001",
    "number": "0",
    "avatar": "0123456789abcdef" * 2,
    "side": "512",
}
NAMES = [f"{operation.method} {operation.path}" for operation in OPERATIONS]


def example(path: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: EXAMPLES[match[1]], path)


@pytest.mark.parametrize("operation", OPERATIONS, ids=NAMES)
@SQLITE_ONLY
async def test_every_route_has_four_addresses_and_no_redirect(service: Service, operation: Operation) -> None:
    path = example(operation.path)
    async with service.anyone() as client:
        seen = []
        for form in (path, f"{path}/", f"/api/v1{path}", f"/api/v1{path}/"):
            answer = await client.request(operation.method, form, json={})
            seen.append((answer.status_code, answer.headers["content-type"]))
            assert not answer.is_redirect
            if answer.status_code == 404:
                assert answer.json()["detail"] != "Not Found"  # the entity is missing, not the route
            assert answer.status_code < 500
            assert answer.status_code != 405
        assert len(set(seen)) == 1, seen


@SQLITE_ONLY
async def test_missing_authentication_is_reported_first(service: Service) -> None:
    async with service.anyone() as anonymous, nothing_written(service):
        for operation in (each for each in OPERATIONS if each.signed_in):
            answer = await anonymous.request(operation.method, example(operation.path) + "?oops=1", content=b"{")
            assert answer.status_code == 401, operation.path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert isinstance(answer.json()["detail"], str)


def allowed() -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for operation in OPERATIONS:
        found[operation.path] |= {operation.method} | ({"HEAD"} if operation.method == "GET" else set())
    return found


@pytest.mark.parametrize(("path", "methods"), allowed().items(), ids=list(allowed()))
@SQLITE_ONLY
async def test_a_405_lists_the_allowed_methods(service: Service, path: str, methods: set[str]) -> None:
    async with service.anyone() as client, nothing_written(service):
        for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "OPTIONS"} - methods:
            answer = await client.request(method, example(path))
            assert answer.status_code == 405, method
            assert {each.strip() for each in answer.headers["allow"].split(",")} == methods, method
            if method != "HEAD":
                assert answer.json() == {"detail": "Method Not Allowed"}


@SQLITE_ONLY
async def test_only_a_patch_of_one_entity_takes_a_merge_patch(service: Service) -> None:
    async with service.person() as alice, nothing_written(service):
        for operation in (each for each in OPERATIONS if each.method == "PATCH"):
            path, is_bulk = example(operation.path), operation.path.endswith("/bulk")
            statuses, details = [], []
            for media_type in ("application/merge-patch+json; charset=utf-8", "text/plain"):
                answer = await alice.http.patch(path, content=b"true", headers={"Content-Type": media_type})
                statuses.append(answer.status_code)
                details.append(answer.json()["detail"])
            assert statuses == [415 if is_bulk else 422, 415], path
            assert ("application/json or application/merge-patch+json" in details[1]) == (not is_bulk), path


@pytest.mark.parametrize("path", ["/nothing", "/movies/1/2", "/api/v2/movies", "/api/v1/nothing/", "/movies//"])
@SQLITE_ONLY
async def test_an_unknown_path_is_not_found(service: Service, path: str) -> None:
    async with service.anyone() as client:
        answer = await client.get(path)
        assert answer.status_code == 404
        assert answer.json() == {"detail": "Not Found"}
        assert answer.headers["x-request-id"]


@SQLITE_ONLY
async def test_a_valid_request_id_is_kept_and_an_invalid_one_replaced(service: Service) -> None:
    async with service.anyone() as client:
        for valid in ("abc", "A-b_c.9", "x" * 128):
            answer = await client.get("/movies?limit=1", headers={"X-Request-ID": valid})
            assert answer.headers["x-request-id"] == valid
        made = set()
        for invalid in ("", "two words", "x" * 129, "a;b", '{"a":1}'):
            answer = await client.get("/movies?limit=1", headers={"X-Request-ID": invalid})
            made.add(answer.headers["x-request-id"])
        assert all(re.fullmatch(r"[0-9a-f]{32}", each) for each in made)
        assert len(made) == 5


@SQLITE_ONLY
async def test_every_response_has_a_request_id_that_is_logged(service: Service) -> None:
    async with service.person() as alice:
        movie = await alice.add()
        one = f"/movies/{movie['id']}"
        etag = (await alice.http.get(one)).headers["etag"]
        for answer in (
            await alice.http.get(one, headers={"If-None-Match": etag}),
            await alice.http.get("/movies/x"),
            await alice.http.put("/movies"),
            await alice.http.post("/movies", content=b"x"),
            await alice.http.get("/auth/me", headers={"Authorization": "x"}),
            await alice.http.delete(one),
            await alice.http.get("/healthz"),
        ):
            await in_the_log(service, answer)


async def in_the_log(service: Service, answer: httpx.Response) -> None:
    """Wait for a request's log line, which is written after the response."""
    request_id = answer.headers["x-request-id"]
    await eventually(lambda: f'"{request_id}"' in service.log(), f"the log has {request_id}", 5)


@SQLITE_ONLY
async def test_head_is_get_without_the_body(service: Service) -> None:
    async with service.person() as alice:
        movie = await alice.add()
        for path in ("/movies?limit=1", f"/movies/{movie['id']}", "/movies/count", "/readyz"):
            got, headed = await alice.http.get(path), await alice.http.head(path)
            assert headed.status_code == got.status_code
            assert headed.content == b""
            for name in ("content-type", "content-length", "etag", "x-total-count", "link"):
                assert headed.headers.get(name) == got.headers.get(name), (path, name)


async def test_a_running_service_is_healthy_and_ready(service: Service) -> None:
    async with service.anyone() as client:
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        ready = await client.get("/readyz")
        assert ready.json() == {
            "status": "ready",
            "checks": dict.fromkeys(("service", "database", "bus", "feed"), "ok"),
        }
        assert ready.headers["cache-control"] == "no-store"
