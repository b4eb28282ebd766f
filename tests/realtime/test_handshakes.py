"""Handshakes that cannot be: refused over HTTP with a reason, and nothing for the log of errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.support.backends import SQLITE_ONLY
from tests.support.service import Service


async def refusal(service: Service, path: str, headers: dict[str, str]) -> tuple[int, Any]:
    with pytest.raises(InvalidStatus) as refused:
        async with connect(f"{service.ws_url.removesuffix('/ws')}{path}", additional_headers=headers):
            pass
    response = refused.value.response
    return response.status_code, json.loads(response.body or b"null")


@pytest.mark.parametrize(
    ("path", "headers", "status", "detail"),
    [
        ("/ws?since=-1", {}, 422, "0 or more"),
        ("/ws", {"Authorization": "Bearer x"}, 401, "not valid"),
        ("/ws", {"Authorization": "x"}, 401, "Bearer <token>"),
        ("/ws", {"Authorization": "Basic eDp5"}, 401, "Bearer <token>"),
        ("/ws", {"Origin": "https://elsewhere.example"}, 403, "ALLOWED_ORIGINS"),
        ("/websocket", {}, 404, "/ws"),
        ("/movies", {}, 404, "/ws"),
    ],
)
@SQLITE_ONLY
async def test_a_refusal_says_why_and_is_no_error_of_ours(
    service: Service, path: str, headers: dict[str, str], status: int, detail: str
) -> None:
    got, body = await refusal(service, path, headers)
    assert got == status
    assert detail in str(body["detail"])
    async with service.anyone() as client:
        assert (await client.get("/healthz")).status_code == 200
    assert "without completing handshake" not in service.log()


@SQLITE_ONLY
async def test_a_request_that_is_no_websocket_is_told_what_is_missing(service: Service) -> None:
    async with service.anyone() as client:
        answer = await client.get("/ws")
        assert answer.status_code == 426
        assert answer.headers["upgrade"] == "websocket"
        assert "Upgrade" in answer.json()["detail"]
        assert (await client.get("/nowhere")).status_code == 404
