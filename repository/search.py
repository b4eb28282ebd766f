"""The search index: the words of rows, which are written together with the rows, and the SQL that searches them.

Rules:
- The words of a row are stored in `models.WORDS`, in the transaction that writes the row. An edit that leaves the
  searched columns as they are does not touch them. Every function that writes rows calls `insert`, `update` or `remove`
  beside it; for a resource without searched columns, they do nothing.
- A query finds the same rows on both databases, and the same rows as the matcher of subscriptions, because both compare
  tokens of `core/texts/tokens.py`. The databases get tokens only, never the text of a client.
- The order by rank is the order of `tokens.rank`, then of the ids. It is total, and the same on both databases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy import Column, ColumnElement, FromClause, Integer, String, Table, and_, case, func, select
from sqlalchemy.dialects.postgresql import TSQUERY

import models
from core.databases.tables import EXACT_PREFIX
from core.texts import tokens
from core.texts.tokens import EXACT, FOLDED, Query
from repository.engine.database import Database
from repository.engine.engines import Lane
from repository.engine.transaction import Transaction
from repository.generic import rows
from repository.generic.cursors import Ordering
from resources.resource import Resource

# A search that finds more rows takes too long for a light read, because all of them are ranked and counted.
MAX_LIGHT_MATCHES = 2_000
# Many words may begin with a shorter word.
MIN_LIGHT_LENGTH = 3
ROWS_PER_REBUILD = 1_000
RANK = "rank"

Row = Mapping[str, Any]
# The folded tokens of each searched column of a row, and after them the exact tokens, or None where they are the same.
Indexed = tuple[str | None, ...]


# --- writing


def index_row(resource: Resource, row: Row) -> Indexed:
    """Return the values of the columns of `models.WORDS` for a row, except for the id. Pure."""
    exact = tokens.sources_of(row, resource.searched)
    folded = [tokens.folded(each) for each in exact]
    return (*folded, *(None if each == plain else each for each, plain in zip(exact, folded, strict=True)))


def index_rows(resource: Resource, found: Iterable[Row]) -> list[Indexed]:
    """Return the argument `indexed` of `insert` for these rows. Pure."""
    return [index_row(resource, row) for row in found] if resource.searched else []


async def insert(tx: Transaction, resource: Resource, ids: Sequence[int], indexed: Iterable[Indexed]) -> None:
    """Index new rows with these ids; `indexed` comes from `index_rows`."""
    if resource.searched:
        words = models.WORDS[resource.name]
        await rows.insert_records(tx, words, words.columns.keys(), _with_ids(ids, indexed))
        await _store(tx, words, ids)


def _with_ids(ids: Iterable[int], indexed: Iterable[Indexed]) -> list[tuple[Any, ...]]:
    return [(entity_id, *values) for entity_id, values in zip(ids, indexed, strict=True)]


async def update(tx: Transaction, resource: Resource, before: Sequence[Row], after: Sequence[Row]) -> None:
    """Update the index for those edited rows whose searched columns have changed."""
    if not resource.searched:
        return
    columns = resource.searched
    changed = [new for old, new in zip(before, after, strict=True) if any(old[name] != new[name] for name in columns)]
    if changed:
        made = await rows.off_the_loop(len(changed), _index_all, resource, changed)
        await (_update_sqlite if tx.is_sqlite else _update_postgresql)(tx, models.WORDS[resource.name], made)


async def _update_sqlite(tx: Transaction, words: Table, made: Sequence[tuple[Any, ...]]) -> None:
    id_, *names = words.columns.keys()
    places = ", ".join(f"{name} = ?" for name in names)
    query = f'UPDATE "{words.name}" SET {places} WHERE {id_} = ?'  # noqa: S608 (names of our own tables)
    ids = [record[0] for record in made]
    await _forget(tx, words, ids)
    await (await tx.driver()).executemany(query, [(*record[1:], record[0]) for record in made])
    await _store(tx, words, ids)


async def _update_postgresql(tx: Transaction, words: Table, made: Sequence[tuple[Any, ...]]) -> None:
    # One statement for each row would take several times as long as one for all rows.
    id_, *names = words.columns.keys()
    places = ", ".join(f"{name} = made.{name}" for name in names)
    values = ", ".join(["$1::bigint[]", *(f"${number}::text[]" for number in range(2, len(names) + 2))])
    query = (
        f'UPDATE "{words.name}" AS changed SET {places} FROM unnest({values})'  # noqa: S608 (names of our own tables)
        f" AS made ({', '.join((id_, *names))}) WHERE changed.id = made.id"
    )
    await (await tx.driver()).execute(query, *map(list, zip(*made, strict=True)))


def _index_all(resource: Resource, found: Sequence[Row]) -> list[tuple[Any, ...]]:
    return _with_ids([row["id"] for row in found], (index_row(resource, row) for row in found))


async def remove(tx: Transaction, resource: Resource, ids: Sequence[int]) -> None:
    """Remove deleted rows from the index."""
    if not resource.searched:
        return
    words = models.WORDS[resource.name]
    await _forget(tx, words, ids)
    await tx.connection.execute(sa.delete(words).where(rows.one_of(tx.is_sqlite, words.c.id, ids)))


async def _store(tx: Transaction, words: Table, ids: Sequence[int]) -> None:
    """Add stored words to the index of FTS5 on SQLite. PostgreSQL maintains its index itself."""
    if tx.is_sqlite:
        await _change_fts(tx, words, ids, "", "")


async def _forget(tx: Transaction, words: Table, ids: Sequence[int]) -> None:
    """Remove words that are still stored from the index of FTS5 on SQLite."""
    if tx.is_sqlite:
        await _change_fts(tx, words, ids, f"{_fts_of(words)}, ", "'delete', ")


async def _change_fts(tx: Transaction, words: Table, ids: Sequence[int], columns: str, values: str) -> None:
    # One statement for all rows takes a tenth of the time of a trigger: for each row that a trigger changes, SQLite
    # begins a savepoint, before which FTS5 writes out its changes. FTS5 also writes them out when an id is lower than
    # the previous one, so the rows are in order of id.
    listed = ", ".join(_searched(words))
    query = (
        f"INSERT INTO {_fts_of(words)} ({columns}rowid, {listed}) SELECT {values}id, {listed} FROM {words.name}"  # noqa: S608 (names of our own tables)
        " WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id"
    )
    await (await tx.driver()).execute_fetchall(query, (orjson.dumps(list(ids)).decode(),))


def _fts_of(words: Table) -> str:
    return str(words.name).removesuffix("_search") + "_fts"


async def rebuild(database: Database, resource: Resource) -> int:
    """Rebuild the index of a resource, and return the number of rows. The service may run meanwhile.

    Raises Unavailable.
    """
    table, words = resource.table, models.WORDS[resource.name]
    last, total = 0, 0
    if database.is_sqlite:
        # First make FTS5 hold exactly the stored words, because it rejects the removal of words that it does not hold.
        await database.write(lambda tx: _rebuild_fts(tx, resource))

    async def work(tx: Transaction) -> tuple[int | None, int]:
        page = select(table.c.id).where(table.c.id > last).order_by(table.c.id).limit(ROWS_PER_REBUILD)
        ids = list((await tx.connection.execute(page)).scalars())
        end = ids[-1] if len(ids) == ROWS_PER_REBUILD else None
        orphans = select(words.c.id).where(words.c.id > last, words.c.id.not_in(select(table.c.id)))
        orphans = orphans.where(words.c.id <= end) if end is not None else orphans
        found = await rows.fetch_locked(tx, table, ids)
        await remove(tx, resource, [*ids, *(await tx.connection.execute(orphans)).scalars()])
        made = await rows.off_the_loop(len(found), index_rows, resource, found)
        await insert(tx, resource, [row["id"] for row in found], made)
        return end, len(found)

    while True:
        end, count = await database.write(work)
        total += count
        if end is None:
            break
        last = end
    return total


async def _rebuild_fts(tx: Transaction, resource: Resource) -> None:
    fts = _fts_of(models.WORDS[resource.name])
    await tx.connection.exec_driver_sql(f"INSERT INTO {fts}({fts}) VALUES ('rebuild')")  # noqa: S608 (names of our own tables)


# --- searching


@cache
def _searched(words: Table) -> list[str]:
    """Return the columns with folded tokens, the most important one first."""
    return [name for name in words.columns.keys()[1:] if not name.startswith(EXACT_PREFIX)]


def _match(name: str, query: Query, is_sqlite: bool) -> ColumnElement[bool]:
    """Return the condition that a row of `<name>_fts` on SQLite, or of `<name>_search` on PostgreSQL, has the words."""
    if is_sqlite:
        wanted = " AND ".join(f'"{token}"*' for token in query.folded.tokens)
        return sa.literal_column(f"{name}_fts", String()).op("MATCH", is_comparison=True)(wanted)
    wanted = " & ".join(f"'{token}':*" for token in query.folded.tokens)
    indexed: ColumnElement[Any] = sa.literal_column(f"{name}_search.tokens")
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
    """Return COSTLY for a search that finds many rows, otherwise LIST, or None if the text has no words.

    Raises Unavailable.
    """
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
        """The rows, as a common table expression with the name of `ranked_table`."""
        found, id_, condition = self._found
        words = models.WORDS[str(self.table.name)]
        joined = found if found is words else found.join(words, words.c.id == id_)
        joined = joined.join(self.table, self.table.c.id == words.c.id)
        listed = sa.text(f'"{self.table.name}".*')
        rank = _rank(words, tokens.query_of(self.text), self.is_sqlite).label(RANK)
        found_rows = select(listed, rank).select_from(joined).where(condition)
        return found_rows.cte(ranked_table(self.table).name).prefix_with("NOT MATERIALIZED")

    def of_page(self, ids: sa.Select[Any]) -> FromClause:
        """Return the rows with these ids and ranks, under the name of `ranked_table`. Only these are read in full."""
        page = ids.subquery("ids")
        read = select(sa.text(f'"{self.table.name}".*'), page.c[RANK])
        return read.select_from(page.join(self.table, self.table.c.id == page.c.id)).subquery(
            ranked_table(self.table).name
        )


def _rank(words: Table, query: Query, is_sqlite: bool) -> ColumnElement[int]:
    """Return the SQL of `tokens.rank` for a row that matches the query.

    The exact tokens are compared only if the folded ones are equal, which they are if the exact ones are. Of most rows,
    no exact tokens are stored, because they are the same; then the query decides.
    """
    place = func.instr if is_sqlite else func.strpos
    forms = (query.exact, query.folded)
    columns = [(words.c[EXACT_PREFIX + name], words.c[name]) for name in _searched(words)]
    sources = [(func.coalesce(exact, plain), plain) for exact, plain in columns]
    ranks: list[tuple[ColumnElement[bool], ColumnElement[int]]] = []

    def add(number: int, holds: Callable[[int], ColumnElement[bool]], has_same: bool) -> None:
        """Add the two ranks of a condition on the first `number` sources, which takes one of the two forms."""
        rank = 2 * len(ranks)
        has_plain = and_(*(exact.is_(None) for exact, _ in columns[:number]))
        by_form = case((has_plain, rank + (EXACT if has_same else FOLDED)), (holds(EXACT), rank), else_=rank + FOLDED)
        ranks.append((holds(FOLDED), by_form))

    def has_words(number: int, form: int) -> ColumnElement[bool]:
        text: ColumnElement[str] = sources[0][form]
        for source in sources[1:number]:
            text = text.concat(source[form])
        return and_(*(place(text, f" {token}") > 0 for token in forms[form].tokens))

    label = sources[0]
    add(1, lambda form: label[form] == forms[form].whole, query.exact.whole == query.folded.whole)
    add(1, lambda form: place(label[form], forms[form].start) == 1, query.exact.start == query.folded.start)
    for number in range(1, len(sources) + 1):
        add(number, partial(has_words, number), query.exact.tokens == query.folded.tokens)
    # The last condition is met by every row that matches.
    return case(*ranks[:-1], else_=ranks[-1][1])
