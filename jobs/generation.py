"""Believable rows from a seed. Pure: the same (seed, position) is the same row, on any machine.

Rows come in blocks: block n of a job is made from Random(f"{seed}:{n}"), so any slice can be made without those before
it, whatever the batch size. Faker fills pools of words once per process; rows are composed from them, which is about
thirty times faster than asking Faker for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache
from random import Random
from typing import Any

from faker import Faker

BLOCK_ROWS = 100
POOL_SIZE = 400
POOL_SEED = 1888  # the year of the oldest film that survives; any constant does

GENRES = (
    "Action", "Adventure", "Animation", "Comedy", "Crime", "Documentary", "Drama", "Family", "Fantasy", "History",
    "Horror", "Music", "Mystery", "Noir", "Romance", "Science Fiction", "Thriller", "War", "Western",
)  # fmt: skip
COUNTRIES = ("US", "GB", "FR", "DE", "IT", "ES", "JP", "KR", "IN", "BR", "MX", "SE", "DK", "PL", "CA", "AU", "NG", "IR")
LANGUAGES = (
    "English", "French", "German", "Italian", "Spanish", "Japanese", "Korean", "Hindi", "Portuguese", "Swedish",
    "Danish", "Polish", "Yoruba", "Persian",
)  # fmt: skip
STATUSES = ("released",) * 8 + ("in_production", "post_production")
ADJECTIVES = (
    "Last", "Silent", "Broken", "Hidden", "Golden", "Crimson", "Endless", "Forgotten", "Burning", "Distant", "Hollow",
    "Electric", "Quiet", "Savage", "Invisible", "Midnight", "Paper", "Winter", "Second", "Impossible", "Tender", "Wild",
)  # fmt: skip
NOUNS = (
    "Harbor", "Garden", "Letter", "Shadow", "River", "Empire", "Promise", "Mirror", "Station", "Orchard", "Witness",
    "Kingdom", "Voyage", "Lantern", "Horizon", "Stranger", "Machine", "Echo", "Summer", "Island", "Carnival", "Road",
)  # fmt: skip
ROLES = (
    "a detective", "a retired dancer", "a young pilot", "the new sheriff", "a forger", "an archivist", "a night nurse",
    "the heir", "a radio host", "a smuggler", "an astronomer", "a failed magician", "the translator",
    "a lighthouse keeper",
)  # fmt: skip
TRAITS = (
    "who never forgets a face", "haunted by an old debt", "with a secret to keep", "loyal to a fault",
    "always one step ahead", "looking for a way home", "who trusts nobody", "in love with the wrong city",
)  # fmt: skip
FIRST_DATE = date(1930, 1, 1)
DATE_SPAN_DAYS = 97 * 365


@dataclass(frozen=True, slots=True)
class Pools:
    people: tuple[str, ...]
    cities: tuple[str, ...]
    sentences: tuple[str, ...]


@lru_cache(maxsize=1)
def pools() -> Pools:
    fake = Faker("en_US")
    fake.seed_instance(POOL_SEED)
    return Pools(
        tuple(fake.name() for _ in range(POOL_SIZE)),
        tuple(fake.city() for _ in range(POOL_SIZE)),
        tuple(fake.sentence(nb_words=9) for _ in range(POOL_SIZE)),
    )


def _movie(random: Random, pool: Pools) -> dict[str, Any]:
    pick = random.random
    adjective, noun = ADJECTIVES[int(pick() * len(ADJECTIVES))], NOUNS[int(pick() * len(NOUNS))]
    city = pool.cities[int(pick() * POOL_SIZE)]
    form = int(pick() * 4)
    if form == 0:
        title = f"The {adjective} {noun}"
    elif form == 1:
        title = f"{noun} of {city}"
    elif form == 2:
        title = f"{adjective} {noun}"
    else:
        title = f"The {noun} at {city}"
    budget = int(10 ** (5.5 + 2.8 * pick()))
    first = int(pick() * len(GENRES))
    second = int(pick() * len(GENRES))
    return {
        "title": title,
        "description": (
            f"{pool.people[int(pick() * POOL_SIZE)]}, {ROLES[int(pick() * len(ROLES))]} "
            f"{TRAITS[int(pick() * len(TRAITS))]}, comes to {city}. {pool.sentences[int(pick() * POOL_SIZE)]}"
        ),
        "release_date": (FIRST_DATE + timedelta(days=int(pick() * DATE_SPAN_DAYS))).isoformat(),
        "rating": 1 + int((pick() + pick()) * 50),
        "duration_minutes": 70 + int(pick() * pick() * 130),
        "status": STATUSES[int(pick() * len(STATUSES))],
        "budget": budget,
        "revenue": int(budget * 4 * pick() * pick()),
        "country": COUNTRIES[int(pick() * len(COUNTRIES))],
        "languages": [LANGUAGES[int(pick() * len(LANGUAGES))]],
        "genres": [GENRES[first]] if first == second else [GENRES[first], GENRES[second]],
    }


def _character(random: Random, pool: Pools) -> dict[str, Any]:
    pick = random.random
    return {
        "name": pool.people[int(pick() * POOL_SIZE)],
        "description": (
            f"{ROLES[int(pick() * len(ROLES))].capitalize()} {TRAITS[int(pick() * len(TRAITS))]}, "
            f"from {pool.cities[int(pick() * POOL_SIZE)]}."
        ),
    }


MAKERS: dict[str, Callable[[Random, Pools], dict[str, Any]]] = {
    "generate_movies": _movie,
    "generate_characters": _character,
}


def rows(kind: str, seed: int, start: int, count: int) -> Sequence[dict[str, Any]]:
    """The rows at positions `start` to `start + count - 1` of the endless list that `seed` stands for."""
    make, pool = MAKERS[kind], pools()
    made: list[dict[str, Any]] = []
    for block in range(start // BLOCK_ROWS, (start + count - 1) // BLOCK_ROWS + 1):
        random = Random(f"{seed}:{block}")
        made.extend(make(random, pool) for _ in range(BLOCK_ROWS))
    skipped = start % BLOCK_ROWS
    return made[skipped : skipped + count]
