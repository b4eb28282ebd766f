"""Invented actors from a random generator. Pure.

Faker makes names of many countries, once per process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache
from random import Random
from typing import Any

from faker import Faker

NAMES = 150  # of each kind; together, they make 22,500 names of people
NAMES_SEED = 1888
# The country of an actor, and the Faker locale of names that are common there.
LOCALES = {
    "US": "en_US", "GB": "en_GB", "FR": "fr_FR", "DE": "de_DE", "IT": "it_IT", "ES": "es_ES", "SE": "sv_SE",
    "DK": "da_DK", "PL": "pl_PL", "BR": "pt_BR", "MX": "es_MX", "IN": "en_IN",
}  # fmt: skip
BEGINNINGS = (
    "Began on the stage of a small town theatre.", "Trained as a dancer before the first film.",
    "Discovered while still at school.", "Came to acting late, after years at sea.",
    "Grew up in a family of musicians.", "Studied law, and left it for the cinema.",
    "Made a first short film with friends.", "Worked in radio plays for many years.",
)  # fmt: skip
FIRST_BIRTH = date(1925, 1, 1)
BIRTH_SPAN_DAYS = 80 * 365


@dataclass(frozen=True, slots=True)
class _Names:
    """First and last names that fit together: in some languages, a last name has a form for each gender."""

    first: Sequence[str]
    last: Sequence[str]


def actors(random: Random, roles: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Return `count` actors, each known for one of the `roles`."""
    known = _names()
    made = []
    for country in random.choices(tuple(LOCALES), k=count):
        names = random.choice(known[country])
        birth_date = FIRST_BIRTH + timedelta(days=random.randrange(BIRTH_SPAN_DAYS))
        made.append(
            {
                "name": f"{random.choice(names.first)} {random.choice(names.last)}",
                "birth_date": birth_date.isoformat(),
                "country": country,
                "biography": f"{random.choice(BEGINNINGS)} Known for playing {random.choice(roles)}.",
            }
        )
    return made


@lru_cache(maxsize=1)
def _names() -> Mapping[str, Sequence[_Names]]:
    """Return the names of women and of men by country, made by the first call."""
    made = {}
    for country, locale in LOCALES.items():
        fake = Faker(locale)
        fake.seed_instance(NAMES_SEED)
        made[country] = [
            _Names([first() for _ in range(NAMES)], [last() for _ in range(NAMES)])
            for first, last in (
                (fake.first_name_female, fake.last_name_female),
                (fake.first_name_male, fake.last_name_male),
            )
        ]
    return made
