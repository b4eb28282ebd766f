"""No log contains a secret. The tests check every service's log, and these tests prove that the check can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.backends import SQLITE_ONLY
from tests.support.service import PASSWORD, SECRET, Service, eventually


@pytest.mark.parametrize(
    "line",
    [
        f'{{"event": "login", "password": "{PASSWORD}"}}',
        f"key {SECRET}",
        "Authorization: Bearer 0123456789abcdef",
        "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJpc3MiOiJtYXJxdWVlIn0.c2ln",
        'GET "/auth/activate?token=0123456789abcdef"',
        "$argon2id$v=19$m=19456,t=2,p=1$c2FsdA$aGFzaA",
    ],
)
def test_a_secret_in_a_log_is_found(tmp_path: Path, line: str) -> None:
    service = Service("sqlite:///unused.db", "memory://", tmp_path)
    service.log_path.write_text(f"all is well\n{line}\n")
    with pytest.raises(AssertionError, match="a secret in the log"):
        service.check_log()


@SQLITE_ONLY
async def test_requests_are_logged_without_their_secrets(service: Service) -> None:
    async with service.person() as alice:
        await alice.http.get(f"/movies?token={alice.token}")
        await alice.http.get("/movies?q=a+secret+search", headers={"Authorization": "Bearer a-token-of-mine"})
        await alice.http.post("/auth/login", json={"username": alice.name, "password": [PASSWORD]})
        await alice.http.post("/auth/login", content=f'{{"password": "{PASSWORD}"'.encode())
        await alice.http.get(f"/nowhere/{alice.id}?token=0123456789abcdef")
        await eventually(lambda: f"/nowhere/{alice.id}" in service.log(), "the last request is in the log")
    assert [secret in service.log() for secret in ("secret+search", "a-token-of-mine")] == [False, False]
    service.check_log()
