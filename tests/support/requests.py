"""Send requests and check their responses, over HTTP and over a websocket."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

import httpx

from tests.support.resources import locations
from tests.support.service import PASSWORD, Person, Watcher


async def ok(request: Awaitable[httpx.Response], status: int = 200) -> Any:
    """Await a request, assert the status of the response, and return its JSON body."""
    response = await request
    assert response.status_code == status, response.text
    return response.json()


def assert_problem(response: httpx.Response, status: int, *wanted: Sequence[Any]) -> None:
    """Assert that a request was rejected with this status and, if given, with problems at the `wanted` locations."""
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"] == "application/json"
    if wanted:
        assert locations(response) == [list(each) for each in wanted]


def values_by_field(table: Mapping[str, Sequence[Any]]) -> list[tuple[str, Any]]:
    """Return the (field, value) pairs of a mapping from fields to lists of values, for `parametrize`."""
    return [(field, value) for field, values in table.items() for value in values]


async def sign_in(client: httpx.AsyncClient, username: str, password: str = PASSWORD) -> httpx.Response:
    return await client.post("/auth/login", json={"username": username, "password": password})


async def change_group(admin: Person, person: Person, group: str) -> dict[str, Any]:
    """Let an admin move a user to another group, and return the account."""
    account: dict[str, Any] = await ok(admin.http.post(f"/admin/users/{person.id}/change-group", json={"group": group}))
    return account


async def over_socket(watcher: Watcher, method: str, path: str, body: Any = None, request_id: int = 1) -> Any:
    """Send a request over a websocket and return its reply."""
    message = {"action": "request", "id": request_id, "method": method, "path": path}
    await watcher.send(message | ({"body": body} if body is not None else {}))
    return await watcher.until(lambda frame: frame.get("reply_to") == request_id)
