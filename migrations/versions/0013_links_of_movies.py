"""links between movies and genres, languages, actors and countries

The names in the movies' arrays become links, and so do the codes of their countries. Names that differ only in case
become one: a genre that exists, or else the first spelling. Unknown genres, languages and countries become new rows: a
language without a code, and a country whose name is its code.

Rows have new members afterwards, and earlier events lack them, so the log is emptied and gets a new epoch.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from core.identity import unique_key
from core.times import utc_text

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

ROWS_AT_A_TIME = 2_000
KEPT_NAMES = 100_000  # how many names stay in memory
ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
LISTS = {"genres": "genre_id", "languages": "language_id", "actors": "actor_id"}


def _text(length: int) -> sa.types.TypeEngine[Any]:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def _is_sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def upgrade() -> None:
    empty = sa.text("'[]'") if _is_sqlite() else sa.text("'[]'::jsonb")
    strings = sa.JSON() if _is_sqlite() else JSONB()
    op.add_column("movies", sa.Column("actors", strings, nullable=False, server_default=empty))
    op.execute(
        f"ALTER TABLE characters ADD COLUMN actor_id {'INTEGER' if _is_sqlite() else 'BIGINT'}"
        " CONSTRAINT fk_characters_actor_id_actors REFERENCES actors (id)"
    )
    op.create_index("ix_characters_actor_id", "characters", ["actor_id", "id"])
    op.create_index("ix_movies_country", "movies", ["country", "id"])
    with _rebuilt("languages") as batch:
        batch.alter_column("code", existing_type=_text(2), nullable=True)
        batch.alter_column("code_key", existing_type=_text(200), nullable=True)
    for name in ("actors", "languages"):
        op.add_column(name, sa.Column("name_key", _text(200), nullable=False, server_default=""))
        op.create_index(f"ix_{name}_name_key", name, ["name_key", "id"])
        _write_keys(name)
    for name, count in (*((name, "movies_count") for name in (*LISTS, "countries")), ("actors", "characters_count")):
        op.add_column(name, sa.Column(count, sa.Integer(), nullable=False, server_default="0"))
    for name, linked in LISTS.items():
        _create_links(f"movie_{name}", linked, name)
    _link_movies()
    _empty_the_log()


@contextmanager
def _rebuilt(name: str) -> Iterator[Any]:
    """Yield a batch of changes to a table. SQLite copies the table, but no id may be used again."""
    last = sa.text("SELECT seq FROM sqlite_sequence WHERE name = :name")
    seq = op.get_bind().execute(last, {"name": name}).scalar() if _is_sqlite() else None
    with op.batch_alter_table(name, table_kwargs={"sqlite_autoincrement": True}) as batch:
        yield batch
    if seq is not None:
        change = sa.text("UPDATE sqlite_sequence SET seq = :seq WHERE name = :name")
        op.get_bind().execute(change, {"seq": seq, "name": name})


def _create_links(name: str, linked: str, table: str) -> None:
    op.create_table(
        name,
        sa.Column(linked, ID, nullable=False),
        sa.Column("movie_id", ID, nullable=False),
        sa.Column("position", sa.SmallInteger(), nullable=False),
        sa.PrimaryKeyConstraint(linked, "movie_id", name=op.f(f"pk_{name}")),
        sa.ForeignKeyConstraint([linked], [f"{table}.id"], name=op.f(f"fk_{name}_{linked}_{table}")),
        sa.ForeignKeyConstraint(["movie_id"], ["movies.id"], name=op.f(f"fk_{name}_movie_id_movies")),
        sqlite_with_rowid=False,
    )
    op.create_index(f"ix_{name}_movie_id", name, ["movie_id", "position"])


def _table(name: str) -> sa.Table:
    return sa.Table(name, sa.MetaData(), autoload_with=op.get_bind(), resolve_fks=False)


def _pages(table: sa.Table, *columns: str) -> Iterator[Sequence[Any]]:
    """Yield the rows of a table in pages, in order of id."""
    bind, last = op.get_bind(), 0
    read = sa.select(table.c.id, *(table.c[name] for name in columns)).order_by(table.c.id).limit(ROWS_AT_A_TIME)
    while found := bind.execute(read.where(table.c.id > last)).all():
        last = found[-1].id
        yield found


def _write_keys(name: str) -> None:
    table = _table(name)
    change = sa.update(table).where(table.c.id == sa.bindparam("_id")).values(name_key=sa.bindparam("_key"))
    for page in _pages(table, "name"):
        op.get_bind().execute(change, [{"_id": row.id, "_key": unique_key(row.name)} for row in page])


def _link_movies() -> None:
    bind, movies = op.get_bind(), _table("movies")
    names = {name: _Names(name) for name in ("genres", "languages")}
    links = {name: _table(f"movie_{name}") for name in names}
    countries = _Names("countries")
    for page in _pages(movies, "country", "genres", "languages"):
        changes = []
        countries.find(row.country for row in page if row.country is not None)
        for column, known in names.items():
            known.find(name for row in page for name in getattr(row, column))
            made = []
            for row in page:
                old = list(getattr(row, column))
                linked = dict(map(known.of, old))
                shown = list(linked.values())
                if shown != old:
                    changes.append((row.id, column, shown))
                made += [
                    {LISTS[column]: id_, "movie_id": row.id, "position": place} for place, id_ in enumerate(linked)
                ]
            if made:
                bind.execute(links[column].insert(), made)
        for id_, column, shown in changes:
            bind.execute(movies.update().where(movies.c.id == id_).values({column: shown}))
    for column, link in links.items():
        _count(column, sa.select(link.c[LISTS[column]].label("key"), sa.func.count().label("number")), "id")
    _count("countries", sa.select(movies.c.country.label("key"), sa.func.count().label("number")), "code")


def _count(name: str, counted: sa.Select[Any], key: str) -> None:
    table = _table(name)
    numbers = counted.group_by("key").subquery()
    number = sa.select(numbers.c.number).where(numbers.c.key == table.c[key]).scalar_subquery()
    op.get_bind().execute(table.update().values(movies_count=sa.func.coalesce(number, 0)))


class _Names:
    """The rows of a table by their keys: `of` returns the id and the shown form of a name that `find` has found."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._table = _table(name)
        self._known: dict[str, tuple[int, str]] = {}

    def of(self, name: str) -> tuple[int, str]:
        return self._known[unique_key(name.strip())]

    def find(self, names: Iterable[str]) -> None:
        """Find the rows with these names or codes, and add those that do not exist in their first spelling."""
        wanted: dict[str, str] = {}
        for name in dict.fromkeys(names):
            wanted.setdefault(unique_key(name.strip()), name.strip())
        if len(self._known) > KEPT_NAMES:
            self._known.clear()
        missing = [key for key in wanted if key not in self._known]
        columns = {"genres": ("name_key",), "languages": ("name_key", "code_key"), "countries": ("code_key",)}
        for column in columns[self._name]:
            missing = [key for key in missing if key not in self._known]
            self._read(column, missing)
        for key in missing:
            if key not in self._known:
                self._add(key, wanted[key])

    def _read(self, column: str, keys: Sequence[str]) -> None:
        table, shown = self._table, "code" if self._name == "countries" else "name"
        for start in range(0, len(keys), ROWS_AT_A_TIME):
            some = keys[start : start + ROWS_AT_A_TIME]
            found = sa.select(table.c[column], table.c.id, table.c[shown]).where(table.c[column].in_(some))
            for key, id_, name in op.get_bind().execute(found.order_by(table.c.id.desc())):
                self._known[key] = (id_, name)

    def _add(self, key: str, name: str) -> None:
        now = datetime.now(UTC)
        times = dict.fromkeys(("created_at", "updated_at"), utc_text(now) if _is_sqlite() else now)
        forms = {
            "genres": {"name": name, "name_key": key},
            "languages": {"name": name, "name_key": key},
            "countries": {"code": name, "code_key": key, "name": name},
        }
        values = {**forms[self._name], "version": 1, "movies_count": 0, **times}
        added = self._table.insert().values(values).returning(self._table.c.id)
        self._known[key] = (op.get_bind().execute(added).scalar_one(), name)


def _empty_the_log() -> None:
    op.execute("DELETE FROM events")
    op.execute(sa.text("UPDATE event_head SET size = 0, epoch = :epoch").bindparams(epoch=secrets.token_hex(8)))


def downgrade() -> None:
    for name in LISTS:
        op.drop_table(f"movie_{name}")
    op.execute("DELETE FROM languages WHERE code IS NULL")
    for name in ("actors", "languages"):
        op.drop_index(f"ix_{name}_name_key", name)
        op.drop_column(name, "name_key")
    for name, count in (*((name, "movies_count") for name in (*LISTS, "countries")), ("actors", "characters_count")):
        op.drop_column(name, count)
    with _rebuilt("languages") as batch:
        batch.alter_column("code", existing_type=_text(2), nullable=False)
        batch.alter_column("code_key", existing_type=_text(200), nullable=False)
    op.drop_index("ix_movies_country", "movies")
    op.drop_column("movies", "actors")
    op.drop_index("ix_characters_actor_id", "characters")
    with _rebuilt("characters") as batch:
        batch.drop_column("actor_id")
    _empty_the_log()
