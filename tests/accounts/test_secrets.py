"""What never stands in a log: that services of tests are held to it, and that this can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.service import PASSWORD, SECRET, Service


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


async def test_requests_with_secrets_in_them_are_logged_without(service: Service) -> None:
    async with service.person() as alice:
        await alice.http.get(f"/movies?token={alice.token}")
        await alice.http.get(f"/nowhere/{alice.id}?token=0123456789abcdef")
        await sign_in(alice.http, alice.name, [PASSWORD])
        await alice.http.post("/auth/login", content=f'{{"password": "{PASSWORD}"'.encode())
        assert f"/nowhere/{alice.id}" in service.log()
    service.check_log()
