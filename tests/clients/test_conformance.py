"""Every client passes the same scenarios, with the scripted server and with the real service. The scenarios can fail.

`python -m clients.conformance` runs the scenarios by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import pytest

from clients.conformance.live import run_live
from clients.conformance.runner import Outcome, run_all, running
from clients.conformance.scenario import Scenario, difference, load
from tests.conftest import Places
from tests.support.node import node_command
from tests.support.pages import chromium
from tests.support.service import Service

ROOT = Path(__file__).resolve().parent.parent.parent
DRIVER = ROOT / "clients" / "javascript" / "conformance_driver.mjs"
# What a client cannot know and so need not report: JavaScript does not see the status of a rejected handshake.
LEFT_OUT = {"python": set[str](), "node": {"handshake_status"}, "chromium": {"handshake_status"}}
SCENARIOS, LIVE = load()


@pytest.fixture(params=LEFT_OUT)
def client(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def command(client: str) -> Sequence[str]:
    """Return the command that starts the client's driver."""
    if client == "python":
        return (sys.executable, "-m", "clients.python.conformance_driver")
    if client == "node":
        return (*node_command(), str(DRIVER))
    return (*chromium("{folder}"), "{page}")  # the runner replaces {folder} and {page}


@pytest.fixture(scope="module")
def open_service(new_places: Callable[[], Places], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that allows pages of all origins, so that the runner's page may connect."""
    places, folder = new_places(), tmp_path_factory.mktemp("service")
    with Service(places.database_url, places.broadcast_url, folder, ALLOWED_ORIGINS="*").running() as service:
        yield service.add_genres("Drama", "Comedy", "Noir")


def problems(outcomes: Sequence[Outcome]) -> list[str]:
    return [f"{outcome.name}: {outcome.problem}" for outcome in outcomes if outcome.problem is not None]


async def test_a_client_passes_every_scenario(client: str, command: Sequence[str]) -> None:
    async with running(command) as runner:
        outcomes = await run_all(runner, SCENARIOS)
    assert problems(outcomes) == []
    left_out = {outcome.name for outcome in outcomes if outcome.is_left_out}
    assert left_out == {each.name for each in SCENARIOS if each.needs in LEFT_OUT[client]}
    assert len(outcomes) == len(SCENARIOS) > 50


# One client on both databases is enough, because a client cannot see which database the service uses.
@pytest.mark.parametrize(
    ("backend", "client"),
    [("sqlite", "python"), ("sqlite", "node"), ("sqlite", "chromium"), ("postgres", "python")],
    scope="session",
)
async def test_a_client_passes_the_live_scenarios(command: Sequence[str], open_service: Service) -> None:
    async with running(command) as runner:
        outcomes = [await run_live(runner, each, open_service.url) for each in LIVE]
    assert problems(outcomes) == []


# --- the scenarios can fail

BROKEN = """
import asyncio, sys
from clients.python import conformance_driver
from clients.python.marquee_client import retry, session, subscription, view

{change}
asyncio.run(conformance_driver.main(sys.argv[1]))
"""
DEFECTS = {
    "it forgets its position": (
        "subscription.Subscription.position = property(lambda self: None, lambda self, value: None)",
        "a cut between events",
    ),
    "it ends a group of frames too early": (
        "receive = subscription.Subscription.receive\n"
        "subscription.Subscription.receive = lambda self, frame, *rest: receive(self, {**frame, 'more': False}, *rest)",
        "a group arrives as a whole",
    ),
    "it shows half a snapshot": (
        "receive = subscription.Subscription.receive\n"
        "def early(self, frame, epoch, size):\n"
        "    receive(self, frame, epoch, size)\n"
        "    if frame.get('operation') == 'snapshot':\n"
        "        self.sink.replaced(self._rows, subscription.Position(epoch, frame['seq']))\n"
        "subscription.Subscription.receive = early",
        "a snapshot in pages",
    ),
    "it resumes from an invalid position": (
        "resync = subscription.Subscription._resync\n"
        "def stubborn(self, data):\n"
        "    before = self.position\n"
        "    resync(self, data)\n"
        "    self.position = before\n"
        "subscription.Subscription._resync = stubborn",
        "the new snapshot is cut as well",
    ),
    "it keeps rows that leave the filter": (
        "apply = view.Rows.apply\n"
        "view.Rows.apply = lambda self, events: apply(self, [each for each in events if each.reason is None])",
        "enter and leave",
    ),
    "it reconnects after a final close code": ("retry._is_final = lambda code: False", "final: 4503"),
    "it sends more requests than allowed": ("session.MAX_REQUESTS_IN_FLIGHT = 17", "sixteen requests at a time"),
    "it repeats requests that may have succeeded": (
        "lost = session.Session.lost\n"
        "def repeat(self):\n"
        "    for call in self._sent.values():\n"
        "        call.is_repeatable = True\n"
        "    lost(self)\n"
        "session.Session.lost = repeat",
        "requests are cut",
    ),
    "it never notices a silent server": (
        "session.Session.beat = lambda self, now: 3600.0",
        "the server falls silent",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
async def test_a_client_with_a_defect_fails(defect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, name = DEFECTS[defect]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("clients.conformance.runner.SCENARIO_SECONDS", 2.0)
    monkeypatch.setattr("clients.conformance.runner.SETTLE_SECONDS", 1.0)
    program = tmp_path / "driver.py"
    program.write_text(BROKEN.format(change=change))
    async with running([sys.executable, str(program)]) as runner:
        [outcome] = await run_all(runner, [each for each in SCENARIOS if each.name == name])
    assert outcome.problem is not None
    assert "driver failed" not in outcome.problem


# --- the scenario file


def test_scenarios_have_unique_names_and_descriptions() -> None:
    assert len({each.name for each in SCENARIOS}) == len(SCENARIOS)
    assert all(about.endswith(".") for about in [each.about for each in SCENARIOS] + [each.about for each in LIVE])


def test_the_readme_explains_every_part_of_a_scenario() -> None:
    """The README must suffice to write a driver or another runner."""
    readme = (ROOT / "clients" / "conformance" / "README.md").read_text()

    def steps(scenario: Scenario) -> Iterator[str]:
        for step in chain(scenario.start, scenario.otherwise or (), *scenario.connections):
            yield f"`{next(iter(step))}`"
            if "do" in step:
                yield f"`{step['do']}`"

    assert {part for scenario in SCENARIOS for part in steps(scenario) if part not in readme} == set()


@pytest.mark.parametrize(
    ("expected", "actual", "problem"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, None),
        ({"a": None}, {}, None),
        ([{"a": 1}], [{"a": 1}, {}], "report: expected 1 items, got 2: "),
        ([1, 2], [1], "report: expected 2 items, got 1: "),
        ({"a": [1]}, {"a": [2]}, "report.a[0]: expected 1, got 2"),
        (1, True, "report: expected 1, got true"),
        ({"a": {}}, {"a": None}, "report.a: expected an object, got null"),
    ],
)
def test_a_difference_is_named(expected: object, actual: object, problem: str | None) -> None:
    found = difference(expected, actual)
    assert (found is None) if problem is None else (found is not None and found.startswith(problem))
