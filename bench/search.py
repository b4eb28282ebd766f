"""Measure searches on many movies: milliseconds per page with its count, by the number of movies that are found.

python -m bench.search [rows] [URL of an empty database]
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time

from bench.service import argument
from jobs import generation
from repository.engine import migrations
from repository.engine.database import Database
from repository.engine.transaction import Transaction
from repository.generic import lists, writes
from repository.generic.lists import ListRequest
from resources.movies import MOVIES

BATCH_ROWS = 5_000
SEARCHES = (
    "nosuchword", "silent orchard", "the silent river", "jam smi", "silent", "silen", "sil", "johnson", "si",
    "detective", "the", "a",
)  # fmt: skip
REPETITIONS = 20
MAX_SECONDS = 5.0  # for one search with its repetitions


async def _fill(database: Database, rows: int) -> None:
    for start in range(0, rows, BATCH_ROWS):
        made = generation.rows("generate_movies", 1, start, min(BATCH_ROWS, rows - start))
        items = [{**MOVIES.defaults, **row} for row in made]

        async def store(tx: Transaction) -> None:
            await writes.store(tx, MOVIES, items, None)  # noqa: B023 (called before the next iteration)

        await database.write(store)


async def measure(url: str, rows: int) -> None:
    database = Database(url)
    await migrations.migrate(database)
    await _fill(database, rows)
    for text in SEARCHES:
        times: list[float] = []
        while len(times) < REPETITIONS and sum(times) < MAX_SECONDS:
            started = time.perf_counter()
            page = await lists.page_of(database, MOVIES, ListRequest(text=text))
            times.append(time.perf_counter() - started)
        median, longest = statistics.median(times) * 1000, max(times) * 1000
        print(f"{text!r}: {page.total:,} found, median {median:.1f} ms, longest {longest:.1f} ms", flush=True)
    await database.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(sys.argv[2] if len(sys.argv) > 2 else f"sqlite:///{folder}/bench.db", argument(1, 200_000)))
