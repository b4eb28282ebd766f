"""Search finds and ranks the same rows on both databases as the functions of `core/texts/tokens.py` do."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from alembic import command
from sqlalchemy import delete, insert, inspect, update
from sqlalchemy.ext.asyncio import AsyncConnection

import models
from core import filters
from core.databases.tables import EXACT_PREFIX
from core.filters import Condition, Op
from core.identity import Group, Identity
from core.texts import tokens
from repository import search
from repository.accounts import users
from repository.community import comments, ratings
from repository.engine import migrations
from repository.engine.database import Database
from repository.engine.engines import Lane
from repository.engine.transaction import Transaction
from repository.generic import cursors, lists, snapshots, writes
from repository.generic.lists import ListRequest
from repository.transfers import exports
from repository.transfers.lines import FileOptions, Format
from resources.actors import ACTORS
from resources.comments import COMMENTS
from resources.countries import COUNTRIES
from resources.genres import GENRES
from resources.movies import MOVIES
from resources.registry import RESOURCES
from resources.resource import Resource
from tests.conftest import Places
from tests.support.words import INTEGRITY, indexed, require_exact_index

ADMIN = Identity(1, Group.ADMIN, 2**40, "session", "chief")
# Words of ten scripts. Each list holds spellings that differ in accents, case or width.
SCRIPTS = {
    "latin": "café Cafe CAFÉ ﬁlm naïve Łódź Ångström Straße ŒUVRE Été İstanbul",
    "greek": "Ὀδυσσεύς ΟΔΥΣΣΕΑΣ λόγος ΛΟΓΟΣ φως Φῶς ταξίδι",
    "cyrillic": "Ёлки елки Сталкер СТАЛКЕР йод Війна и мир",
    "arabic": "فِيلم فيلم أفلام افلام مدينة المدينة ســلام",
    "hebrew": "שָׁלוֹם שלום סרט הסרט עיר",
    "devanagari": "फ़िल्म फिल्म दिल दिल्ली से हिन्दी मदर",
    "thai": "องค์บาก ภาพยนตร์ไทย หนัง รัก",
    "han": "東京物語 千と千尋 英雄 霸王別姬 東京",
    "kana": "となりのトトロ ﾄﾄﾛ ナウシカ かぐや姫 がま",
    "hangul": "기생충 기생 살인의추억 올드보이 영화",
}
HOSTILE = ('"a" OR "b"', "caf*", "NEAR(cafe film)", "title:cafe", "-cafe", "cafe'", "a\\", "' OR 1=1 --", "café & |")
WITHOUT_WORDS = ("", " ", '"', "*", "()", ":-'\\", "\u0301", "\u0301 \u200d", "!!! …", "\u00ad", "💡")


def made_rows() -> list[dict[str, Any]]:
    chance = random.Random(7)
    every = [word for words in SCRIPTS.values() for word in words.split()]
    rows = []
    for words in SCRIPTS.values():
        own = words.split()
        for _ in range(30):
            title = chance.choice((" ", "-", ": ")).join(chance.choices(own, k=chance.randint(1, 3)))
            described = " ".join(chance.choices([*own, *every], k=chance.randint(0, 6)))
            actors = [" ".join(chance.choices(own, k=2)) for _ in range(chance.choice((0, 0, 1, 2)))]
            rows.append({"title": title, "description": described or None, "actors": actors})
    rows += [{"title": "NEAR the OR-AND title", "description": "a b"}, {"title": "!!!", "description": None}]
    rows.append({"title": "x" * 200, "description": "long " * 500 + "y" * 3_000})
    return rows


def queries() -> Iterator[str]:
    """Yield 100 queries in ten scripts: whole words, prefixes, several words, and titles."""
    chance = random.Random(11)
    for words in SCRIPTS.values():
        own = words.split()
        for number in range(10):
            chosen = chance.choice(own)
            if number % 3 == 1:
                chosen = chosen[: chance.randint(1, len(chosen))]
            if number % 3 == 2:
                chosen += " " + chance.choice(own)
            yield chosen.swapcase() if number % 2 else chosen


def expected(query: str, rows: Sequence[dict[str, Any]]) -> list[int]:
    """Return the ids of the rows that match, in the order of their ranks."""
    wanted = tokens.query_of(query)
    matches = filters.matcher_of(filters.build([Condition(MOVIES.search, Op.SEARCH, query)]))
    found = []
    for row in rows:
        if matches(row):
            exact = tokens.sources_of(row, MOVIES.searched)
            sources = [(each, tokens.folded(each)) for each in exact]
            found.append((tokens.rank(wanted, sources) if wanted else 0, row["id"]))
    return [entity_id for _, entity_id in sorted(found)]


async def stored(database: Database) -> list[dict[str, Any]]:
    items = [{**MOVIES.defaults, **row} for row in made_rows()]
    await database.write(lambda tx: writes.store(tx, MOVIES, items, None))
    return (await lists.page_of(database, MOVIES, ListRequest(limit=1_000))).rows


async def ids_of(database: Database, **request: Any) -> list[int]:
    found = await lists.page_of(database, MOVIES, ListRequest(**{"limit": 1_000, **request}))
    assert found.total == len(found.rows) or {"limit", "offset", "cursor", "after"} & request.keys()
    return [row["id"] for row in found.rows]


async def test_a_search_finds_the_same_rows_in_the_same_order_everywhere(database: Database) -> None:
    rows = await stored(database)
    asked = [*queries(), *HOSTILE, "x" * 80, "yyyy long", "NEAR", "or and"]
    assert len(asked) > 100
    numbers = []
    for query in asked:
        wanted = expected(query, rows)
        assert await ids_of(database, text=query) == wanted, query
        assert await ids_of(database, text=query, sort=(("id", False),)) == sorted(wanted), query
        assert (await lists.count_of(database, MOVIES, ListRequest(text=query))).total == len(wanted)
        condition = filters.build([Condition(MOVIES.search, Op.SEARCH, query)])
        page = await snapshots.read_page(
            database, "movies", condition, owner_id=None, after=None, until=None, max_rows=1_000
        )
        assert [row["id"] for row in page.rows] == sorted(wanted), query
        assert expected(query, page.rows) == wanted, f"{query}: expected a subscription's rows to have the same ranks"
        numbers.append(len(wanted))
    assert sum(number > 0 for number in numbers) > 95, "expected most queries to find rows"
    for query in WITHOUT_WORDS:
        assert await ids_of(database, text=query) == [row["id"] for row in rows], query


async def test_pages_under_a_rank_continue_by_offset_and_by_cursor(database: Database) -> None:
    rows = await stored(database)
    ordering = lists.ordering_of(MOVIES)
    for query in ("c", "ста", "東", "cafe"):
        wanted = expected(query, rows)
        assert len(wanted) > 5, query
        by_offset = [await ids_of(database, text=query, limit=4, offset=start) for start in range(0, len(wanted), 4)]
        assert [each for page in by_offset for each in page] == wanted
        for condition in ({}, {"id": {"gte": 0}}):
            request = ListRequest(text=query, limit=4, filter=filters.parse_json(condition, MOVIES.fields).filter)
            page, walked = await lists.page_of(database, MOVIES, request), []
            while page.rows:
                walked += [row["id"] for row in page.rows]
                assert page.end is not None
                written = cursors.encode(page.end)
                assert written is not None
                cursor = cursors.decode(written)
                cursors.check(cursor, ordering, (), f" {query} ")
                page = await lists.page_of(database, MOVIES, replace(request, cursor=cursor))
            assert walked == wanted, query
        for other, sort in ((f"{query}x", ()), ("", ()), (query, (("title", False),))):
            with pytest.raises(ValueError, match="Expected a cursor"):
                cursors.check(cursor, ordering, sort, other)
        # A walk by id is in the order of the ids.
        assert await ids_of(database, text=query, after=20) == sorted(each for each in wanted if each > 20)


async def test_the_index_follows_every_write(database: Database) -> None:
    fresh = [{"title": title, "description": "common"} for title in ("one", "two", "three")]
    items = [{**MOVIES.defaults, **row} for row in fresh]

    async def finds(query: str, *ids: int) -> None:
        assert await ids_of(database, text=query) == list(ids), query
        if database.is_sqlite:
            await database.write(lambda tx: tx.connection.exec_driver_sql(INTEGRITY.format("movies")))

    await database.write(lambda tx: users.create_admin(tx, {"username": "chief"}, "no hash"))
    await database.write(lambda tx: writes.add_bulk(tx, MOVIES, ADMIN, items, skip_conflicts=False))
    await database.write(lambda tx: writes.add(tx, MOVIES, ADMIN, {**items[0], "title": "fóur"}))
    await finds("common", 1, 2, 3, 4)
    await finds("four", 4)

    edits: list[tuple[int, dict[str, Any]]] = [
        (1, {"title": "first"}),
        (2, {"rating": 7}),
        (3, {"description": "ráre"}),
    ]
    before = await indexed(database, MOVIES)
    await database.write(lambda tx: writes.edit_bulk(tx, MOVIES, ADMIN, edits))
    after = await indexed(database, MOVIES)
    assert {entity_id for entity_id in before if before[entity_id] != after[entity_id]} == {1, 3}
    await finds("one")
    await finds("first", 1)
    await finds("rare", 3)
    await database.write(lambda tx: writes.edit(tx, MOVIES, ADMIN, 4, {"title": "four"}, None))
    assert (await indexed(database, MOVIES))[4][3:] == (None, None, None), "expected exact words only where they differ"

    async def fail(tx: Transaction) -> None:
        await writes.edit(tx, MOVIES, ADMIN, 1, {"title": "never"}, None)
        raise LookupError

    with pytest.raises(LookupError):
        await database.write(fail)
    await finds("never")
    await database.write(lambda tx: writes.remove(tx, MOVIES, ADMIN, 1, None))
    await database.write(lambda tx: writes.remove_bulk(tx, MOVIES, ADMIN, [2, 4]))
    await finds("common")
    await finds("three", 3)
    assert list(await indexed(database, MOVIES)) == [3]


def test_every_resource_with_searched_columns_has_an_index() -> None:
    found = {name: tuple(words.columns.keys()) for name, words in models.WORDS.items()}
    searched = {each.name: each.searched for each in RESOURCES if each.searched}
    exact = {name: tuple(EXACT_PREFIX + each for each in columns) for name, columns in searched.items()}
    assert found == {name: ("id", *columns, *exact[name]) for name, columns in searched.items()}
    assert all(each.label in ("", each.searched[0]) for each in RESOURCES if each.searched)


async def test_the_index_follows_writes_of_related_rows(database: Database) -> None:
    """Rows that are added by naming them, comments, and rows that are deleted with another one."""
    await database.write(lambda tx: users.create_admin(tx, {"username": "chief"}, "no hash"))
    named = {**MOVIES.defaults, "title": "Heist", "genres": ["Giallo", "Krimi"], "actors": ["Zoë"]}
    items = [named, {**named, "title": "Loot"}]
    await database.write(lambda tx: writes.add_bulk(tx, MOVIES, ADMIN, items, skip_conflicts=False))
    await database.write(lambda tx: writes.edit(tx, MOVIES, ADMIN, 1, {"genres": ["Noir"]}, None))
    top = await database.write(lambda tx: comments.add(tx, ADMIN, 1, "Très bien"))
    for number in range(3):
        await database.write(partial(comments.reply, identity=ADMIN, comment_id=top.id, text=f"bien {number}"))
    await database.write(lambda tx: comments.add(tx, ADMIN, 2, "bien fait"))

    async def finds(resource: Resource, query: str, *ids: int) -> None:
        found = await lists.page_of(database, resource, ListRequest(text=query))
        assert [row["id"] for row in found.rows] == list(ids), query
        await require_exact_index(database)

    await finds(GENRES, "gial", 1)
    await finds(GENRES, "noir", 3)
    await finds(ACTORS, "zoe", 1)
    await finds(MOVIES, "loot zoe", 2)
    await database.write(lambda tx: writes.edit(tx, ACTORS, ADMIN, 1, {"name": "Chloë"}, None))
    await finds(MOVIES, "zoe")
    await finds(MOVIES, "chloe", 1, 2)
    await database.write(lambda tx: writes.edit(tx, MOVIES, ADMIN, 2, {"actors": ["Max", "Chloë"]}, None))
    await finds(MOVIES, "max", 2)
    await database.write(lambda tx: writes.remove(tx, ACTORS, ADMIN, 1, None))
    await finds(MOVIES, "chloe")
    await finds(MOVIES, "max", 2)
    await finds(COMMENTS, "bien", 2, 3, 4, 5, 1)
    await database.write(lambda tx: comments.edit(tx, ADMIN, 3, {"text": "mal"}, None))
    await database.write(lambda tx: comments.remove(tx, ADMIN, 1, None))  # it keeps its place
    await finds(COMMENTS, "bien", 2, 4, 5)
    await finds(COMMENTS, "mal", 3)
    await database.write(lambda tx: comments.remove_bulk(tx, ADMIN, [2]))
    await database.write(lambda tx: writes.remove(tx, GENRES, ADMIN, 1, None))
    await finds(COMMENTS, "bien", 4, 5)
    await database.write(lambda tx: writes.remove(tx, MOVIES, ADMIN, 1, None))
    await finds(COMMENTS, "bien", 5)
    await database.write(lambda tx: writes.remove_bulk(tx, MOVIES, ADMIN, [2]))
    await finds(COMMENTS, "bien")


async def test_a_movie_is_found_by_its_cast_between_its_title_and_its_description(database: Database) -> None:
    cast: list[dict[str, Any]] = [
        {"title": "a", "description": "orson"},
        {"title": "b", "actors": ["Max", "Orson Welles"]},
        {"title": "orson"},
    ]
    items = [{**MOVIES.defaults, **row} for row in (*cast, {"title": "orson b", "description": "c"})]
    await database.write(lambda tx: writes.store(tx, MOVIES, items, None))
    assert await ids_of(database, text="orson") == [3, 4, 2, 1]
    assert await ids_of(database, text="b orson") == [4, 2]


async def test_among_equal_matches_movies_with_more_ratings_come_first(database: Database) -> None:
    items = [{**MOVIES.defaults, "title": title} for title in ("a lime", "b lime", "lime", "c lime", "d lime")]
    await database.write(lambda tx: writes.store(tx, MOVIES, items, None))
    await database.write(lambda tx: users.create_admin(tx, {"username": "chief"}, "no hash"))
    before = await indexed(database, MOVIES)
    for movie_id in (2, 5):
        await database.write(partial(ratings.vote, identity=ADMIN, movie_id=movie_id, score=7, requires_watched=False))
    wanted = [3, 2, 5, 1, 4]
    assert await ids_of(database, text="lime") == wanted
    request = ListRequest(text="lime", columns=("id",))
    async with exports.opened(database, MOVIES, request, FileOptions(Format.CSV)) as export:
        assert [int(line) async for batch in export.batches for line in batch] == wanted
    page, walked = await lists.page_of(database, MOVIES, replace(request, limit=1)), []
    while page.rows:
        walked += [row["id"] for row in page.rows]
        page = await lists.page_of(database, MOVIES, replace(request, limit=1, cursor=page.end))
    assert walked == wanted
    assert await indexed(database, MOVIES) == before


async def test_a_rebuild_restores_the_index(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "ROWS_PER_REBUILD", 40)
    rows = await stored(database)
    right = await indexed(database, MOVIES)
    words = models.WORDS["movies"]

    async def damage(tx: Transaction) -> None:
        await tx.connection.execute(delete(words).where(words.c.id % 3 == 0))
        await tx.connection.execute(update(words).where(words.c.id % 3 == 1).values(title=" wrong", exact_title=None))
        await tx.connection.execute(insert(words).values(id=9_999, title=" orphan", actors="", description=""))
        if database.is_sqlite:
            await tx.connection.exec_driver_sql("INSERT INTO movies_fts(movies_fts) VALUES ('delete-all')")

    await database.write(damage)
    assert await search.rebuild(database, MOVIES) == len(rows)
    assert await indexed(database, MOVIES) == right
    for query in ("cafe", "東京", "orphan", "wrong"):
        assert await ids_of(database, text=query) == expected(query, rows)


async def test_a_migration_indexes_the_rows_of_the_version_before(new_places: Callable[[], Places]) -> None:
    database = Database(new_places().database_url)
    await migrations.migrate(database)
    rows = await stored(database)
    right = await indexed(database, MOVIES)
    async with database.begin() as (connection, _):
        await connection.run_sync(lambda sync: command.downgrade(migrations._config(sync), "0018"))
        await connection.run_sync(lambda sync: command.downgrade(migrations._config(sync), "-1"))
        assert not await connection.run_sync(lambda sync: inspect(sync).has_table("movies_search"))
    await migrations.migrate(database)
    assert await indexed(database, MOVIES) == right
    assert await ids_of(database, text="cafe") == expected("cafe", rows)
    found = await lists.page_of(database, COUNTRIES, ListRequest(text="cote d ivo"))
    assert [row["code"] for row in found.rows] == ["CI"]
    await database.close()


async def test_a_search_uses_the_index_and_the_lane_of_its_cost(database: Database) -> None:
    items = [{**MOVIES.defaults, "title": f"frequent {number:05}"} for number in range(search.MAX_LIGHT_MATCHES + 1)]
    await database.write(lambda tx: writes.store(tx, MOVIES, items, None))
    lanes = {text: await search.lane_of(database, models.movies, text) for text in ("frequ", "00007", "fr", "!", "東")}
    assert lanes == {"frequ": Lane.COSTLY, "00007": Lane.LIST, "fr": Lane.COSTLY, "!": None, "東": Lane.LIST}
    ranking = search.Ranking(models.movies, "frequent 00007", database.is_sqlite)
    explained = "EXPLAIN QUERY PLAN " if database.is_sqlite else "EXPLAIN "

    async def plan(connection: AsyncConnection) -> str:
        if not database.is_sqlite:
            await connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        query = ranking.total.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
        return str((await connection.exec_driver_sql(explained + str(query))).all())

    async with database.begin() as (connection, _):
        found = await plan(connection)
    assert ("VIRTUAL TABLE INDEX" if database.is_sqlite else "ix_movies_search_words") in found
