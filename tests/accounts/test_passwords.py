"""Passwords are checked in separate threads, and the number of waiting checks is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from core.errors import TooManyRequests
from services import passwords
from services.passwords import PasswordHasher, Passwords, Verdict
from tests.support.backends import SQLITE_ONLY
from tests.support.requests import sign_in
from tests.support.service import PASSWORD, Service


async def test_checks_beyond_the_bound_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "MAX_WAITING", 3)
    checks = Passwords(PasswordHasher(1024, 1, 1), needs_mix=False)
    answers = await asyncio.gather(*(checks.verify("x", None) for _ in range(5)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [Verdict, Verdict, Verdict, TooManyRequests, TooManyRequests]
    assert await checks.verify(PASSWORD, await checks.hash(PASSWORD)) == Verdict(True)
    checks.close()


@SQLITE_ONLY
async def test_many_sign_ins_do_not_delay_writes(new_service: Callable[..., Service]) -> None:
    service = new_service(PASSWORD_MEMORY_KIB="19456", PASSWORD_TIME_COST="2").start()
    async with service.person() as alice, service.anyone() as crowd:
        attempts = [asyncio.create_task(sign_in(crowd, "nobody", "guess")) for _ in range(100)]
        rows = [{"title": f"m{number}"} for number in range(500)]
        assert (await alice.http.post("/movies/bulk", json=rows)).status_code == 201
        assert not all(attempt.done() for attempt in attempts), "the write did not wait for the sign-ins"
        statuses = {answer.status_code for answer in await asyncio.gather(*attempts)}
        assert statuses <= {401, 429}
