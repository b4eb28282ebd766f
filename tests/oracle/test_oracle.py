"""At each quiet point, every watcher's view equals the REST list, despite random writes, cuts and pauses.

ORACLE_EXAMPLES sets the number of plays; a failing play prints its steps.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings, stateful
from hypothesis import strategies as st

from repository.engine.database import Database
from tests.oracle.client import Client
from tests.oracle.filters import filters
from tests.oracle.play import LANES, Wish, World
from tests.oracle.writes import ADMIN, Batch
from tests.support.servers.postgresql import PostgresServer
from tests.support.servers.redis import RedisServer
from tests.support.service import ROOT, Service
from tests.support.words import require_exact_index

EXAMPLES = int(os.environ.get("ORACLE_EXAMPLES", "3"))
STEPS = 24
BETWEEN_QUIETS = 6
MAX_CLIENTS = 6
MAX_VIEWS = 6  # views per client


@dataclass(frozen=True)
class Seat:
    """A watcher: its user, its worker, and its subscriptions."""

    user: int | None
    worker: int
    wishes: tuple[Wish, ...]


ONE_TOPIC = (
    *((("movies",),) * 3),
    *((name,) for name in ("characters", "genres", "actors", "comments", "ratings", "jobs")),
)
PUBLIC_TOPICS = (
    *ONE_TOPIC,
    ("movies", "characters"),
    ("movies", "comments"),
    ("movies", "ratings"),
    ("genres", "movies"),
    ("characters", "movies", "jobs"),
)


def wishes(topics: Sequence[tuple[str, ...]] = PUBLIC_TOPICS) -> st.SearchStrategy[Wish]:
    return st.sampled_from(topics).flatmap(
        lambda chosen: st.builds(
            Wish,
            topics=st.just(chosen),
            filter=filters(chosen),
            latest_every_ms=st.sampled_from((None, None, None, 50, 120, 400)),
            begins=st.sampled_from(("snapshot", "snapshot", "list", "base")),
            asks_snapshot=st.booleans(),
            is_named=st.booleans(),
        )
    )


def private(topic: str) -> st.SearchStrategy[Wish]:
    return wishes([(topic,)])


ANONYMOUS = st.builds(
    Seat, user=st.just(None), worker=st.integers(0, 1), wishes=st.lists(wishes(), min_size=2, max_size=4).map(tuple)
)
USER = st.builds(
    Seat,
    user=st.integers(0, 1),
    worker=st.integers(0, 1),
    wishes=st.tuples(st.one_of(private("sessions"), private("watchlist")), wishes(), wishes()),
)
CHIEF = st.builds(
    Seat, user=st.just(ADMIN), worker=st.integers(0, 1), wishes=st.tuples(private("users"), wishes(), wishes())
)

LANE = st.integers(0, LANES - 1)
NUMBER = st.integers(0, 11)
SEED = st.integers(0, 2**16)


def batches(mix: str) -> st.SearchStrategy[Batch]:
    return st.builds(Batch, st.just(mix), st.integers(6, 16), SEED)


class Oracle(stateful.RuleBasedStateMachine):
    """One play: a random sequence of steps. All plays use the same running workers."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        # The preconditions of rules may depend only on the drawn steps, not on the world.
        self.steps_since_quiet = 0
        self.crowd = 0

    @stateful.initialize(
        seed=SEED,
        first=st.tuples(batches("many"), batches("single")),
        crowd=st.tuples(ANONYMOUS, ANONYMOUS, USER, CHIEF),
        topics=st.sampled_from(
            (("movies", "characters", "jobs"), ("movies", "ratings"), ("genres", "actors", "characters"))
        ),
        paused=NUMBER,
    )
    def open(
        self, seed: int, first: tuple[Batch, Batch], crowd: tuple[Seat, ...], topics: tuple[str, ...], paused: int
    ) -> None:
        world = self.world
        world.do(world.fresh(seed))
        for lane, batch in enumerate(first):  # the first views begin while these writes go on
            world.do(world.write(lane, batch))
        world.do(world.connect(crowd[0].worker, None, topics))
        for seat in crowd:
            self.joins(seat)
        self.pauses_or_goes_on(paused)

    # --- writers

    @stateful.rule(lane=LANE, batch=batches("single"))
    def write(self, lane: int, batch: Batch) -> None:
        self.world.do(self.world.write(lane, batch))

    @stateful.rule(lane=LANE, batch=batches("many"))
    def write_many(self, lane: int, batch: Batch) -> None:
        self.world.do(self.world.write(lane, batch))

    @stateful.rule(lane=LANE, batch=batches("others"))
    def write_others(self, lane: int, batch: Batch) -> None:
        self.world.do(self.world.write(lane, batch))

    # --- watchers

    def client(self, number: int) -> Client:
        return self.world.clients[number % len(self.world.clients)]

    @stateful.precondition(lambda self: self.crowd < MAX_CLIENTS)
    @stateful.rule(seat=st.one_of(ANONYMOUS, USER, CHIEF))
    def joins(self, seat: Seat) -> None:
        self.crowd += 1
        client = self.world.do(self.world.connect(seat.worker, seat.user))
        for wish in seat.wishes:
            self.world.do(self.world.subscribe(client, wish))

    @stateful.rule(number=NUMBER, wish=wishes())
    def subscribes(self, number: int, wish: Wish) -> None:
        client = self.client(number)
        if client.handshake is None and len(client.watched) < MAX_VIEWS:
            self.world.do(self.world.subscribe(client, wish))

    @stateful.rule(number=NUMBER, view=NUMBER, comes_back=st.booleans(), is_bad=st.booleans())
    def unsubscribes(self, number: int, view: int, comes_back: bool, is_bad: bool) -> None:
        client, world = self.client(number), self.world
        if comes_back:
            world.do(world.subscribe_again(client, view, is_bad=is_bad))
        else:
            world.do(world.give_up(client, view))

    @stateful.rule(number=NUMBER)
    def is_cut(self, number: int) -> None:
        self.world.do(self.client(number).cut())

    @stateful.rule(number=NUMBER, worker=st.integers(0, 1))
    def is_cut_and_comes_back(self, number: int, worker: int) -> None:
        """Connect again, whether or not the client was cut before."""
        self.world.do(self.client(number).connect(worker))

    @stateful.rule(number=NUMBER)
    def pauses_or_goes_on(self, number: int) -> None:
        self.world.do(self.world.pause_or_go_on(self.client(number)))

    @stateful.precondition(lambda self: self.crowd > 3)
    @stateful.rule(number=NUMBER)
    def leaves(self, number: int) -> None:
        self.crowd -= 1
        self.world.do(self.world.leave(self.client(number)))

    # --- checks

    @stateful.precondition(lambda self: self.steps_since_quiet >= BETWEEN_QUIETS)
    @stateful.rule()
    def quiet(self) -> None:
        self.steps_since_quiet = 0
        self.world.do(self.world.quiet())

    @stateful.invariant()
    def no_client_got_an_impossible_frame(self) -> None:
        self.steps_since_quiet += 1
        self.world.check()

    def teardown(self) -> None:
        self.world.do(self.world.quiet())


class Small(Service):
    """A worker with the small bounds of `tests/oracle/worker.py`."""

    command = ("-m", "tests.oracle.worker")


def play(services: Sequence[Service], examples: int) -> None:
    with ExitStack() as stack:
        for service in services:
            stack.enter_context(service.running())
        opened = stack.enter_context(World(services).running())

        class Play(Oracle):
            world = opened

        stateful.run_state_machine_as_test(
            Play,
            settings=settings(
                max_examples=examples,
                stateful_step_count=STEPS,
                deadline=None,
                # Shrinking takes minutes and finds little, because failures depend on timing.
                phases=(Phase.generate,),
                database=None,
                print_blob=True,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
        for service in services:
            assert '"level":"error"' not in service.log()
        asyncio.run(index_is_exact(services[0].database_url))


async def index_is_exact(database_url: str) -> None:
    database = Database(database_url)
    await require_exact_index(database)
    await database.close()


SETTINGS = {"LOG_LEVEL": "warning", "ACCESS_TOKEN_EXPIRE_MINUTES": "1000", "PYTHONPATH": str(ROOT)}


def test_two_workers_on_postgresql_and_redis(postgres: PostgresServer, redis: RedisServer, tmp_path: Path) -> None:
    url = postgres.create_database()
    play([Service(url, redis.url, tmp_path, **SETTINGS), Small(url, redis.url, tmp_path, **SETTINGS)], EXAMPLES)


@pytest.mark.slow
def test_one_worker_on_sqlite(tmp_path: Path) -> None:
    play([Small(f"sqlite:///{tmp_path}/marquee.db", "memory://", tmp_path, **SETTINGS)], EXAMPLES)


@pytest.mark.slow
def test_two_workers_on_one_sqlite_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/marquee.db"
    play([kind(url, "memory://", tmp_path, **SETTINGS) for kind in (Service, Small)], EXAMPLES)
