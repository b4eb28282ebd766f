"""The index of the words of rows: how it is written with the rows, and the SQL that searches it.

Rules:
- The words of a row are stored in `models.WORDS`, in the transaction that writes the row. An edit that leaves the
  searched columns as they are does not touch them. Every function that writes rows calls `insert`, `update` or `remove`
  beside it; for a resource without searched columns, they do nothing.
- A query finds the same rows on both databases, and the same rows as the matcher of subscriptions, because both compare
  tokens of `core/texts/tokens.py`. The databases get tokens only, never the text of a client.
- The order by rank is the order of `tokens.rank`, then of the ids. It is total, and the same on both databases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, ColumnElement, FromClause, Integer, String, Table, and_, case, func, select
from sqlalchemy.dialects.postgresql import TSQUERY

import models
from core.texts import tokens
from core.texts.tokens import EXACT, FOLDED, Query
from repository.engine.database import Database
from repository.engine.engines import Lane
from repository.engine.statement import statement
from repository.engine.transaction import Transaction
from repository.generic import rows
from repository.generic.cursors import Ordering
from resources.resource import Resource

# A search that finds more rows takes too long for a light read: all of them are ranked and counted.
MAX_LIGHT_MATCHES = 2_000
# A word that is shorter may be the beginning of a large part of all words.
MIN_LIGHT_LENGTH = 3
ROWS_PER_REBUILD = 1_000
RANK = "rank"
_COLUMNS = ("label", "words", "exact_label", "exact_words")
# The columns of `models.WORDS` with the exact and the folded tokens of each source, the most important source first.
SOURCES = (("exact_label", "label"), ("exact_words", "words"))

Row = Mapping[str, Any]
Indexed = tuple[str, str, str | None, str | None]


# --- writing


def index_row(resource: Resource, row: Row) -> Indexed:
    """Return the values of `_COLUMNS` for a row. Pure."""
    label, words = tokens.label_and_words(row, resource.search.searched)
    if label.isascii() and words.isascii():
        return label, words, None, None
    plain_label, plain_words = tokens.folded(label), tokens.folded(words)
    return plain_label, plain_words, _unless(label, plain_label), _unless(words, plain_words)


def _unless(exact: str, folded: str) -> str | None:
    return exact if exact != folded else None


def index_rows(resource: Resource, found: Iterable[Row]) -> list[Indexed]:
    """Return what `insert` takes for rows. Pure."""
    return [index_row(resource, row) for row in found] if resource.searched else []


async def insert(tx: Transaction, resource: Resource, ids: Sequence[int], indexed: Iterable[Indexed]) -> None:
    """Index new rows with these ids; `indexed` comes from `index_rows`."""
    if resource.searched:
        await rows.insert_records(tx, models.WORDS[resource.name], ("id", *_COLUMNS), _with_ids(ids, indexed))


def _with_ids(ids: Iterable[int], indexed: Iterable[Indexed]) -> list[tuple[Any, ...]]:
    return [(entity_id, *values) for entity_id, values in zip(ids, indexed, strict=True)]


async def update(tx: Transaction, resource: Resource, before: Sequence[Row], after: Sequence[Row]) -> None:
    """Index edited rows anew, as far as their searched columns have changed."""
    if not resource.searched:
        return
    columns = resource.search.searched
    changed = [new for old, new in zip(before, after, strict=True) if any(old[name] != new[name] for name in columns)]
    if changed:
        made = await rows.off_the_loop(len(changed), _index_all, resource, changed)
        places = ", ".join(f"{name} = ${number}" for number, name in enumerate(_COLUMNS, 1))
        query = f'UPDATE "{resource.name}_search" SET {places} WHERE id = $5'  # noqa: S608 (names of our own tables)
        await tx.execute_many(statement(query), [(*record[1:], record[0]) for record in made])


def _index_all(resource: Resource, found: Sequence[Row]) -> list[tuple[Any, ...]]:
    return _with_ids([row["id"] for row in found], (index_row(resource, row) for row in found))


async def remove(tx: Transaction, resource: Resource, ids: Sequence[int]) -> None:
    """Remove deleted rows from the index."""
    if not resource.searched:
        return
    words = models.WORDS[resource.name]
    await tx.connection.execute(sa.delete(words).where(rows.one_of(tx.is_sqlite, words.c.id, ids)))


async def rebuild(database: Database, resource: Resource) -> int:
    """Index all rows of a resource anew, and return their number. The service may run meanwhile. Raises Unavailable."""
    table, words = resource.table, models.WORDS[resource.name]
    last, total = 0, 0
    if database.is_sqlite:
        # First make FTS5 hold the stored words, whatever it holds now: it rejects the removal of words that it lacks.
        await database.write(lambda tx: _rebuild_fts(tx, resource))

    async def work(tx: Transaction) -> tuple[int | None, int]:
        page = select(table.c.id).where(table.c.id > last).order_by(table.c.id).limit(ROWS_PER_REBUILD)
        ids = list((await tx.connection.execute(page)).scalars())
        end = ids[-1] if len(ids) == ROWS_PER_REBUILD else None
        orphans = sa.delete(words).where(words.c.id > last, words.c.id.not_in(select(table.c.id)))
        await tx.connection.execute(orphans.where(words.c.id <= end) if end is not None else orphans)
        found = await rows.fetch_locked(tx, table, ids)
        made = await rows.off_the_loop(len(found), _index_all, resource, found)
        await tx.execute_many(_upsert(resource), made)
        return end, len(found)

    while True:
        end, count = await database.write(work)
        total += count
        if end is None:
            break
        last = end
    return total


async def _rebuild_fts(tx: Transaction, resource: Resource) -> None:
    await tx.connection.exec_driver_sql(f"INSERT INTO {resource.name}_fts({resource.name}_fts) VALUES ('rebuild')")  # noqa: S608 (names of our own tables)


def _upsert(resource: Resource) -> Any:
    listed = ", ".join(_COLUMNS)
    places = ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS)
    return statement(
        f'INSERT INTO "{resource.name}_search" (id, {listed}) VALUES ($1, $2, $3, $4, $5)'  # noqa: S608 (names of our own tables)
        f" ON CONFLICT (id) DO UPDATE SET {places}"
    )


# --- searching

# The expression of the index on PostgreSQL. The columns begin with a space or are empty, so empty words are removed.
_TSVECTOR = "array_to_tsvector(array_remove(string_to_array({0}.label || {0}.words, ' '), ''))"


def _match(name: str, query: Query, is_sqlite: bool) -> ColumnElement[bool]:
    """Return the condition that a row of `<name>_fts` on SQLite, or of `<name>_search` on PostgreSQL, has the words."""
    if is_sqlite:
        wanted = " AND ".join(f'"{token}"*' for token in query.folded.tokens)
        return sa.literal_column(f"{name}_fts", String()).op("MATCH", is_comparison=True)(wanted)
    wanted = " & ".join(f"'{token}':*" for token in query.folded.tokens)
    indexed: ColumnElement[Any] = sa.literal_column(_TSVECTOR.format(f"{name}_search"))
    return indexed.op("@@", is_comparison=True)(sa.cast(sa.cast(wanted, sa.Text), TSQUERY))


def _matching(name: str, query: Query, is_sqlite: bool) -> tuple[FromClause, ColumnElement[Any], ColumnElement[bool]]:
    """Return the table in which the rows are found, its column with the ids, and the condition."""
    found: FromClause = models.WORDS[name]
    if is_sqlite:
        found = sa.table(f"{name}_fts", sa.column("rowid"))
    return found, found.c.rowid if is_sqlite else found.c.id, _match(name, query, is_sqlite)


def matches(table: Table, text: str, *, is_sqlite: bool) -> ColumnElement[bool]:
    """Return the condition that a row has every word of the text."""
    query = tokens.query_of(text)
    if not query:
        return sa.true()
    found, id_, condition = _matching(str(table.name), query, is_sqlite)
    return table.c.id.in_(select(id_).select_from(found).where(condition))


async def lane_of(database: Database, table: Table, text: str) -> Lane | None:
    """Return COSTLY for a search that finds many rows, otherwise LIST; None without words. Raises Unavailable."""
    query = tokens.query_of(text)
    if not query:
        return None
    if all(len(token) < MIN_LIGHT_LENGTH and token.isascii() for token in query.folded.tokens):
        return Lane.COSTLY
    found, id_, condition = _matching(str(table.name), query, database.is_sqlite)
    some = select(id_).select_from(found).where(condition).limit(MAX_LIGHT_MATCHES + 1).subquery()
    counted = await database.select(select(func.count()).select_from(some), Lane.LIST)
    return Lane.COSTLY if counted[0][0] > MAX_LIGHT_MATCHES else Lane.LIST


@cache
def ranked_table(table: Table) -> Table:
    """Return a table with the columns of `table` and `rank`. It exists only in statements, as a common table
    expression.
    """
    columns = [Column(each.name, each.type, nullable=bool(each.nullable)) for each in table.columns]
    return Table(f"{table.name}_ranked", sa.MetaData(), *columns, Column(RANK, Integer, nullable=False))


@cache
def ranked_ordering(table: Table) -> Ordering:
    """Return what decides the order of the rows that a search finds."""
    often_rated = (("ratings_count", True),) if "ratings_count" in table.c else ()
    order = ((RANK, False), *often_rated, ("id", False))
    return Ordering(ranked_table(table), lambda sort, after: order)


@dataclass(frozen=True, slots=True)
class Ranking:
    """The rows of a table that have the words of a text, with their ranks: the content of `ranked_table`."""

    table: Table
    text: str
    is_sqlite: bool

    @property
    def _found(self) -> tuple[FromClause, ColumnElement[Any], ColumnElement[bool]]:
        return _matching(str(self.table.name), tokens.query_of(self.text), self.is_sqlite)

    @property
    def total(self) -> sa.Select[Any]:
        """The number of all rows that are found."""
        found, _, condition = self._found
        return select(func.count()).select_from(found).where(condition)

    @property
    def content(self) -> sa.CTE:
        """The rows, to be read by the name of `ranked_table`."""
        found, id_, condition = self._found
        words = models.WORDS[str(self.table.name)]
        joined = found if found is words else found.join(words, words.c.id == id_)
        joined = joined.join(self.table, self.table.c.id == words.c.id)
        listed = sa.text(f'"{self.table.name}".*')
        rank = _rank(words, tokens.query_of(self.text), self.is_sqlite).label(RANK)
        found_rows = select(listed, rank).select_from(joined).where(condition)
        return found_rows.cte(ranked_table(self.table).name).prefix_with("NOT MATERIALIZED")

    def of_page(self, ids: sa.Select[Any]) -> FromClause:
        """Return the rows with these ids and ranks, by the name of `ranked_table`. The other rows are read in part."""
        page = ids.subquery("ids")
        read = select(sa.text(f'"{self.table.name}".*'), page.c[RANK])
        return read.select_from(page.join(self.table, self.table.c.id == page.c.id)).subquery(
            ranked_table(self.table).name
        )


def _rank(words: Table, query: Query, is_sqlite: bool) -> ColumnElement[int]:
    """Return the SQL of `tokens.rank` for a row that matches the query."""
    place = func.instr if is_sqlite else func.strpos
    forms = (query.exact, query.folded)
    sources = [(func.coalesce(words.c[exact], words.c[plain]), words.c[plain]) for exact, plain in SOURCES]
    label = sources[0]
    ranks = [(label[form] == forms[form].whole, form) for form in (EXACT, FOLDED)]
    ranks += [(place(label[form], forms[form].start) == 1, 2 + form) for form in (EXACT, FOLDED)]
    for number in range(1, len(sources) + 1):
        for form in (EXACT, FOLDED):
            text: ColumnElement[str] = sources[0][form]
            for source in sources[1:number]:
                text = text.concat(source[form])
            has_words = and_(*(place(text, f" {token}") > 0 for token in forms[form].tokens))
            ranks.append((has_words, 2 + 2 * number + form))
    # The last condition is met by every row that matches.
    return case(*ranks[:-1], else_=ranks[-1][1])
