"""Realistic rows from a seed. Pure: the same seed and position give the same row on any machine.

Rows come in blocks: block n of a job is made from Random(f"{seed}:{n}"), so any slice can be made without the rows
before it, whatever the batch size. Faker fills pools of words once per process; composing rows from these pools is
about thirty times faster than calling Faker for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache
from random import Random
from typing import Any

from faker import Faker

from jobs import people

BLOCK_ROWS = 100
POOL_SIZE = 400
POOL_SEED = 1888  # any constant works; this is the year of the oldest surviving film

GENRES = (
    "Action", "Adventure", "Animation", "Comedy", "Crime", "Documentary", "Drama", "Family", "Fantasy", "History",
    "Horror", "Music", "Mystery", "Noir", "Romance", "Science Fiction", "Thriller", "War", "Western",
)  # fmt: skip
COUNTRIES = ("US", "GB", "FR", "DE", "IT", "ES", "JP", "KR", "IN", "BR", "MX", "SE", "DK", "PL", "CA", "AU", "NG", "IR")
# Each name with its code, by which a language is found after an admin has renamed it.
LANGUAGE_CODES = {
    "English": "en", "French": "fr", "German": "de", "Italian": "it", "Spanish": "es", "Japanese": "ja", "Korean": "ko",
    "Hindi": "hi", "Portuguese": "pt", "Swedish": "sv", "Danish": "da", "Polish": "pl", "Yoruba": "yo", "Persian": "fa",
}  # fmt: skip
LANGUAGES = tuple(LANGUAGE_CODES)
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

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pools:
    people: tuple[str, ...]
    cities: tuple[str, ...]
    titles: tuple[str, ...]
    roles: tuple[str, ...]
    dates: tuple[str, ...]
    genres: tuple[list[str], ...]


@lru_cache(maxsize=1)
def pools() -> Pools:
    """Return the word pools, built by the first call."""
    fake = Faker("en_US")
    fake.seed_instance(POOL_SEED)
    people = tuple(fake.name() for _ in range(POOL_SIZE))
    cities = tuple(fake.city() for _ in range(POOL_SIZE))
    plain = (f"{form}{adjective} {noun}" for form in ("", "The ") for adjective in ADJECTIVES for noun in NOUNS)
    placed = (f"{form.format(noun)} {city}" for form in ("{} of", "The {} at") for noun in NOUNS for city in cities)
    days = (FIRST_DATE + timedelta(days=day) for day in range(DATE_SPAN_DAYS))
    return Pools(
        people=people,
        cities=cities,
        # The repetition makes plain titles about as frequent as titles with a city.
        titles=(*tuple(plain) * 18, *placed),
        roles=tuple(f"{role} {trait}" for role in ROLES for trait in TRAITS),
        dates=tuple(day.isoformat() for day in days),
        genres=tuple([first] if first == second else [first, second] for first in GENRES for second in GENRES),
    )


def _movies(random: Random, pool: Pools, count: int) -> list[Row]:
    # `choices` is called once per column, because a call itself costs much more than the choices it makes.
    choices, uniform = random.choices, random.random
    columns = zip(
        choices(pool.titles, k=count),
        choices(pool.people, k=count),
        choices(pool.roles, k=count),
        choices(pool.cities, k=count),
        choices(pool.dates, k=count),
        choices(STATUSES, k=count),
        choices(COUNTRIES, k=count),
        choices(LANGUAGES, k=count),
        choices(pool.genres, k=count),
        strict=True,
    )
    made = []
    for title, person, role, city, day, status, country, language, genres in columns:
        luck, size = uniform(), uniform()
        budget = int(10 ** (5.5 + 2.8 * size))
        made.append(
            {
                "title": title,
                "description": f"{person}, {role}, comes to {city}.",
                "release_date": day,
                "rating": 1 + int((luck + uniform()) * 50),
                "duration_minutes": 70 + int(size * uniform() * 130),
                "status": status,
                "budget": budget,
                "revenue": int(budget * 4 * luck * uniform()),
                "country": country,
                "languages": [language],
                "genres": genres,
            }
        )
    return made


def _characters(random: Random, pool: Pools, count: int) -> list[Row]:
    choices = random.choices
    columns = zip(
        choices(pool.people, k=count), choices(pool.roles, k=count), choices(pool.cities, k=count), strict=True
    )
    return [{"name": name, "description": f"{role[0].upper()}{role[1:]}, from {city}."} for name, role, city in columns]


def _actors(random: Random, pool: Pools, count: int) -> list[Row]:
    return people.actors(random, pool.roles, count)


MAKERS: dict[str, Callable[[Random, Pools, int], list[Row]]] = {
    "generate_movies": _movies,
    "generate_characters": _characters,
    "generate_actors": _actors,
}


def cast(random: Random, count: int) -> list[Row]:
    """Return `count` characters of one movie."""
    return _characters(random, pools(), count)


def rows(kind: str, seed: int, start: int, count: int) -> Sequence[Row]:
    """Return the rows at positions `start` to `start + count - 1` of the endless list that `seed` defines."""
    make, pool = MAKERS[kind], pools()
    made: list[Row] = []
    for block in range(start // BLOCK_ROWS, (start + count - 1) // BLOCK_ROWS + 1):
        made += make(Random(f"{seed}:{block}"), pool, BLOCK_ROWS)
    skipped = start % BLOCK_ROWS
    return made[skipped : skipped + count]
