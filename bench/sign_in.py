"""Measure whether response times of sign-in and of requests for emailed links reveal which accounts exist.

python -m bench.sign_in [rounds]

Each round sends every request once, in random order, so that load on the machine affects all of them equally.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable

import httpx

from bench.service import PASSWORD, Service, argument, client_of, running

ADMIN = ("chief", "the chief of bench")
STRANGER = "the password of a stranger"
PAUSE_SECONDS = 0.05  # the pause after each request, so that sending an email does not slow down the next request

Question = Callable[[int], Awaitable[httpx.Response]]


class People:
    """The test accounts, and the requests that name existing or missing accounts. `client` is not signed in."""

    def __init__(self, client: httpx.AsyncClient, rounds: int) -> None:
        self._client = client
        self._rounds = rounds

    async def register(self) -> None:
        """Register all accounts.

        Each round has two accounts of its own, because an account receives at most one email a minute.
        """
        login = await self._login(*ADMIN)
        admin = {"Authorization": f"Bearer {login.raise_for_status().json()['access_token']}"}
        actions = {"anna": "activate", "disabled": "deactivate", "waiting": None, "bella": "activate", "carla": None}
        for number in range(self._rounds):
            actions |= {f"forgetful{number}": "activate", f"waiting{number}": None}
        for name, action in actions.items():
            body = {"username": name, "email": f"{name}@example.org", "password": PASSWORD}
            user = (await self._client.post("/auth/register", json=body)).raise_for_status().json()
            if action is not None:
                path = f"/admin/users/{user['id']}/{action}"
                (await self._client.post(path, headers=admin)).raise_for_status()
        for name in ("free", "bella", "carla"):
            body = {"username": f"stranger-{name}", "email": f"{name}@example.org", "password": STRANGER}
            (await self._client.post("/auth/register", json=body)).raise_for_status()

    async def _login(self, name: str, password: str) -> httpx.Response:
        return await self._client.post("/auth/login", json={"username": name, "password": password})

    async def _ask_mail(self, path: str, name: str) -> httpx.Response:
        return await self._client.post(path, json={"email": f"{name}@example.org"})

    def questions(self) -> dict[str, dict[str, Question]]:
        """Return the requests by group. The first request of a group is the baseline for the others."""
        wrong = "not the password"
        forgot, resend = "/auth/password/forgot", "/auth/activate/resend"
        return {
            "login by name, wrong password": {
                "an account": lambda _: self._login("anna", wrong),
                "a disabled account": lambda _: self._login("disabled", wrong),
                "an account not activated": lambda _: self._login("waiting", wrong),
                "an unknown name": lambda n: self._login(f"nobody{n}", wrong),
            },
            "login by address, wrong password": {
                "an account": lambda _: self._login("anna@example.org", wrong),
                "a disabled account": lambda _: self._login("disabled@example.org", wrong),
                "an account not activated": lambda _: self._login("waiting@example.org", wrong),
                "an account whose address was registered again": lambda _: self._login("bella@example.org", wrong),
                "an unknown address": lambda n: self._login(f"nobody{n}@example.org", wrong),
            },
            "login by address, just registered": {
                "an unknown address": lambda _: self._login("free@example.org", STRANGER),
                "an account": lambda _: self._login("bella@example.org", STRANGER),
                "an account not activated": lambda _: self._login("carla@example.org", STRANGER),
            },
            "forgot": {
                "an account": lambda n: self._ask_mail(forgot, f"forgetful{n}"),
                "a recently emailed account": lambda _: self._ask_mail(forgot, "anna"),
                "a disabled account": lambda _: self._ask_mail(forgot, "disabled"),
                "an unknown address": lambda n: self._ask_mail(forgot, f"nobody{n}"),
            },
            "resend": {
                "an account not activated": lambda n: self._ask_mail(resend, f"waiting{n}"),
                "an active account": lambda _: self._ask_mail(resend, "anna"),
                "an unknown address": lambda n: self._ask_mail(resend, f"nobody{n}"),
            },
        }


async def measure(service: Service, rounds: int) -> None:
    async with client_of(service) as client:
        people = People(client, rounds)
        await people.register()
        groups = people.questions()
        took: dict[tuple[str, str], list[float]] = {(g, q): [] for g, questions in groups.items() for q in questions}
        answers: dict[str, set[tuple[int, str]]] = {group: set() for group in groups}
        for number in range(rounds):
            asked = list(took)
            random.shuffle(asked)
            for group, question in asked:
                await asyncio.sleep(PAUSE_SECONDS)
                started = time.perf_counter()
                answer = await groups[group][question](number)
                took[group, question].append((time.perf_counter() - started) * 1000)
                answers[group].add((answer.status_code, answer.text))
    for group, questions in groups.items():
        assert len(answers[group]) == 1, f"{group}: the responses differ: {answers[group]}"
        first = statistics.median(took[group, next(iter(questions))])
        print(f"\n{group}: {rounds} requests of each kind; status {next(iter(answers[group]))[0]}, identical bodies")
        print(f"{'':32}{'median':>8}{'5 %':>8}{'95 %':>8}{'ratio':>8}")
        for question in questions:
            times = took[group, question]
            middle, cuts = statistics.median(times), statistics.quantiles(times, n=20)
            print(f"{question:32}{middle:8.2f}{cuts[0]:8.2f}{cuts[-1]:8.2f}{middle / first:8.3f}")


if __name__ == "__main__":
    settings = {
        "ACCOUNT_ACTIVATION": "email",
        "RATE_LIMITS": "off",
        "FIRST_ADMIN_USERNAME": ADMIN[0],
        "FIRST_ADMIN_PASSWORD": ADMIN[1],
        "LOG_LEVEL": "error",
    }
    if "DATABASE_URL" in os.environ:
        settings["DATABASE_URL"] = os.environ["DATABASE_URL"]
    with running("main", settings) as service:
        asyncio.run(measure(service, argument(1, 200)))
