"""The tables, for SQLite and PostgreSQL alike.

Python code sees times and dates as strings in the formats of `core/times.py`. Strings are compared by code point on
both databases (collation "C"), never by locale, so that a filter matches the same rows everywhere.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Float, ForeignKey, Index, Integer, SmallInteger, String, Table, Text

from core.databases import tables
from core.databases.columns import Id, IsoDate, Strings, UtcTime, text
from core.databases.tables import kept, links, numbered, only, words_of

metadata = tables.metadata

users = numbered(
    "users",
    Column("username", text(50)),
    # The normalised user name, which must be unique.
    Column("username_key", text(200), unique=True),
    Column("email", text(320)),
    Column("email_key", text(320), unique=True),
    # The normalised address of an account that has not been activated yet. Several accounts may wait for one address.
    Column("waiting_key", text(320)),
    *(Column(name, text(100)) for name in ("name", "first_name", "last_name")),
    Column("phone_number", text(16)),
    Column("password_hash", Text, nullable=False),
    Column("group", text(20), nullable=False),
    Column("is_active", sa.Boolean, nullable=False),
    *kept(),
    Column("gender", text(20)),
    Column("date_of_birth", IsoDate),
    Column("info", text()),
    # The folder of the account's pictures in the file storage.
    Column("avatar", text(64)),
    Column("profile_created_at", UtcTime),
    # The account is inactive because it has not been activated yet, not because an admin disabled it.
    Column("awaits_activation", sa.Boolean, nullable=False),
    # The row of a deleted account keeps only its id, to which its movies refer. Invented users have such rows, too.
    Column("deleted_at", UtcTime),
    Index("ix_users_avatar", "avatar"),
    Index("ix_users_waiting_key", "waiting_key", "id", **only("waiting_key IS NOT NULL")),
    Index("ix_users_awaiting", "created_at", **only("awaits_activation = 1", "awaits_activation")),
)

movies = numbered(
    "movies",
    Column("title", text(255), nullable=False),
    Column("description", text()),
    Column("release_date", IsoDate),
    Column("rating", SmallInteger),
    Column("duration_minutes", Integer),
    Column("status", text(50)),
    *(Column(name, BigInteger) for name in ("budget", "revenue")),
    Column("country", text(2)),
    *(Column(name, Strings, nullable=False) for name in ("languages", "genres")),
    Column("actors", Strings, nullable=False, server_default="[]"),
    Column("user_id", Id, ForeignKey("users.id")),
    Column("characters_count", Integer, nullable=False),
    Column("comments_count", Integer, nullable=False, server_default="0"),
    Column("average_rating", Float),
    Column("ratings_count", Integer, nullable=False, server_default="0"),
    # The sum of the scores, from which the average is computed exactly.
    Column("ratings_sum", BigInteger, nullable=False, server_default="0", info={"hidden": True}),
    *kept(),
    Index("ix_movies_user_id", "user_id", "id"),
    Index("ix_movies_country", "country", "id"),
)

characters = numbered(
    "characters",
    Column("name", text(255), nullable=False),
    Column("description", text()),
    Column("movie_id", Id, ForeignKey("movies.id")),
    Column("actor_id", Id, ForeignKey("actors.id")),
    Column("user_id", Id, ForeignKey("users.id")),
    *kept(),
    Index("ix_characters_user_id", "user_id", "id"),
    Index("ix_characters_movie_id", "movie_id", "id"),
    Index("ix_characters_actor_id", "actor_id", "id"),
)

genres = numbered(
    "genres",
    Column("name", text(100), nullable=False),
    # The normalised name, which must be unique.
    Column("name_key", text(200), nullable=False, unique=True, info={"key_of": "name"}),
    Column("description", text()),
    Column("movies_count", Integer, nullable=False, server_default="0"),
    *kept(),
)

actors = numbered(
    "actors",
    Column("name", text(100), nullable=False),
    # The normalised name. Several actors may have the same name.
    Column("name_key", text(200), nullable=False, server_default="", info={"key_of": "name"}),
    Column("birth_date", IsoDate),
    Column("country", text(2)),
    Column("biography", text()),
    *(Column(name, Integer, nullable=False, server_default="0") for name in ("movies_count", "characters_count")),
    *kept(),
    Index("ix_actors_name_key", "name_key", "id"),
)

countries = numbered(
    "countries",
    Column("code", text(2), nullable=False),
    # The code in lower case, which must be unique.
    Column("code_key", text(200), nullable=False, unique=True, info={"key_of": "code"}),
    Column("name", text(100), nullable=False),
    Column("movies_count", Integer, nullable=False, server_default="0"),
    *kept(),
)

languages = numbered(
    "languages",
    # Null for a language that has no code in ISO 639-1.
    Column("code", text(2)),
    # The code, which must be unique.
    Column("code_key", text(200), unique=True, info={"key_of": "code"}),
    Column("name", text(100), nullable=False),
    # The normalised name.
    Column("name_key", text(200), nullable=False, server_default="", info={"key_of": "name"}),
    Column("movies_count", Integer, nullable=False, server_default="0"),
    *kept(),
    Index("ix_languages_name_key", "name_key", "id"),
)

movie_languages = links(languages, movies, "language_id", "movie_id")
movie_genres = links(genres, movies, "genre_id", "movie_id")
movie_actors = links(actors, movies, "actor_id", "movie_id")
# A comment that is deleted while it has replies keeps its row, without its text and author.
comments = numbered(
    "comments",
    Column("text", text()),
    Column("user_id", Id, ForeignKey("users.id")),
    Column("movie_id", Id, ForeignKey("movies.id"), nullable=False),
    # The comment that this one replies to, which is on the same movie and has a lower id.
    Column("parent_id", Id, ForeignKey("comments.id")),
    # The number of comments above this one: 0 for a comment that is not a reply.
    Column("depth", Integer, nullable=False),
    Column("deleted", sa.Boolean, nullable=False),
    Column("edited_at", UtcTime),
    Column("replies_count", Integer, nullable=False),
    *kept(),
    Index("ix_comments_user_id", "user_id", "id"),
    Index("ix_comments_movie_id", "movie_id", "id"),
    Index("ix_comments_parent_id", "parent_id", "id"),
    Index("ix_comments_top", "movie_id", "id", **only("parent_id IS NULL")),
)

# The words of the rows that have an index for searches.
WORDS = {
    "movies": words_of(movies, "title", "actors", "description"),
    "characters": words_of(characters, "name", "description"),
    "genres": words_of(genres, "name", "description"),
    "actors": words_of(actors, "name", "biography"),
    "countries": words_of(countries, "name", "code"),
    "languages": words_of(languages, "name", "code"),
    "comments": words_of(comments, "text"),
}

sessions = Table(
    "sessions",
    metadata,
    # The claim `sid` of the session's tokens.
    Column("id", text(36), primary_key=True),
    Column("user_id", Id, ForeignKey("users.id"), nullable=False),
    Column("user_agent", text(255)),
    Column("address", text(64)),
    Column("created_at", UtcTime, nullable=False),
    # When the last token of the session expires; the clean-up then ends the session.
    Column("expires_at", UtcTime, nullable=False),
    Column("ended_at", UtcTime),
    Column("last_used_at", UtcTime, nullable=False),
    # The claim `jti` of the only valid refresh token; the session's older refresh tokens are rejected.
    Column("refresh_id", text(32)),
    Index("ix_sessions_user_id", "user_id", "created_at"),
    Index("ix_sessions_expires_at", "expires_at"),
)

# The one-time tokens in emailed URLs. Only the digest of a token is stored.
one_time_tokens = Table(
    "one_time_tokens",
    metadata,
    Column("digest", text(64), primary_key=True),
    Column("purpose", text(16), nullable=False),
    Column("user_id", Id, ForeignKey("users.id"), nullable=False),
    # The address that the URL was mailed to; using the token proves that the user receives emails there.
    Column("email", text(320)),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
    Index("ix_one_time_tokens_user_id", "user_id", "purpose"),
    Index("ix_one_time_tokens_expires_at", "expires_at"),
)

# The outbox: emails to be sent, those sent in the last day, and those that failed in the last week. An email is
# composed on delivery, so that the table holds no tokens.
mails = numbered(
    "mails",
    # Null until the recipient's account has been looked up.
    Column("user_id", Id, ForeignKey("users.id")),
    Column("kind", text(32), nullable=False),
    Column("recipient", text(320), nullable=False),
    Column("details", Strings, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    # Seconds since 1970 by the database's clock: when the next attempt is due, or when the lease of the current attempt
    # expires. Null if no further attempt will be made.
    Column("due_at", Float),
    Column("attempts", Integer, nullable=False),
    Column("lease_owner", String(64)),
    Column("sent_at", UtcTime),
    Column("failed_at", UtcTime),
    Index("ix_mails_due_at", "due_at"),
    Index("ix_mails_user_id", "user_id", "kind"),
)

# The audit trail: actions of staff on accounts and on rows of other users. It has no foreign keys, because its entries
# outlive what they are about.
audit = numbered(
    "audit",
    Column("actor_id", Id),
    Column("action", text(32), nullable=False),
    Column("user_id", Id),
    Column("changes", Strings, nullable=False),
    Column("address", text(64)),
    Column("created_at", UtcTime, nullable=False),
    Column("resource", text(32), nullable=False),
    Column("entity_ids", Strings, nullable=False),
    Column("count", Integer, nullable=False),
    Index("ix_audit_user_id", "user_id", "id"),
    Index("ix_audit_actor_id", "actor_id", "id"),
)

# Workers that have rows in `presence`. A worker whose `until` has passed (by the database's clock) counts as dead, and
# another worker deletes its rows.
workers = Table(
    "workers",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("until", Float, nullable=False),
    # Incremented with each change to the worker's rows, so that other workers read them only after a change.
    Column("version", Integer, nullable=False),
)

presence = Table(
    "presence",
    metadata,
    Column("worker", String(32), primary_key=True),
    Column("topic", String(32), primary_key=True),
    # The user id 0 stands for all anonymous clients, so there is no foreign key.
    Column("user_id", Id, primary_key=True, autoincrement=False),
    Column("username", text(50)),
    Column("connections", Integer, nullable=False),
    # Connections that ended so recently that they still count as present.
    Column("lingering", Integer, nullable=False),
)

event_head = Table(
    "event_head",
    metadata,
    Column("id", SmallInteger, primary_key=True, autoincrement=False),
    Column("epoch", String(32), nullable=False),
    Column("seq", BigInteger, nullable=False),
    # The size in bytes of `payload` and `before` of all events. Computing it would mean reading the whole log.
    Column("size", BigInteger, nullable=False, server_default="0"),
)

events = Table(
    "events",
    metadata,
    Column("seq", Id, primary_key=True, autoincrement=False),
    Column("topic", String(32), nullable=False),
    Column("operation", String(16), nullable=False),
    Column("entity_id", String(36)),
    Column("audience", String(64), nullable=False),
    # Encoded JSON: `payload` is the member "data" of the frame. `before` holds the deleted rows, or the former values
    # of updated rows.
    Column("payload", sa.LargeBinary, nullable=False),
    Column("before", sa.LargeBinary),
    Column("changed", Text),
    Column("actor_id", BigInteger),
    Column("created_at", UtcTime, nullable=False),
    Index("ix_events_entity_id", "topic", "entity_id", "seq"),
)

# The lowest and the highest id in each bulk event, so that the history of a row searches few other events.
event_spans = Table(
    "event_spans",
    metadata,
    Column("seq", Id, primary_key=True, autoincrement=False),
    Column("topic", String(32), nullable=False),
    *(Column(name, BigInteger, nullable=False) for name in ("first_id", "last_id")),
    Index("ix_event_spans_topic", "topic", "seq", "first_id", "last_id"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", text(36), primary_key=True),
    Column("kind", text(32), nullable=False),
    Column("state", text(16), nullable=False),
    *(Column(name, Integer, nullable=False) for name in ("done", "total")),
    Column("seed", BigInteger, nullable=False),
    Column("batch_size", Integer, nullable=False),
    Column("rate", Float),
    Column("user_id", Id, ForeignKey("users.id")),
    Column("created_at", UtcTime, nullable=False),
    *(Column(name, UtcTime) for name in ("started_at", "finished_at")),
    Column("rows_per_second", Integer, nullable=False),
    Column("error", Text),
    Column("attempts", Integer, nullable=False),
    Column("lease_owner", String(64)),
    # Seconds since 1970 by the database's clock, so that differences between the workers' clocks do not matter.
    Column("lease_until", Float),
    Column("parts", Strings, nullable=False, server_default="[]"),  # the resources that are generated with each movie
    # The network of the client that requested the job, as `core.network.addresses.network_of` returns it.
    Column("network", Text),
    Index("ix_jobs_network", "network", "created_at"),
    Index("ix_jobs_state", "state", "lease_until"),
    Index("ix_jobs_user_id", "user_id", "lease_until"),
)

# What a job imports, how far it has come, and its result so far. Places in the file are in bytes.
imports = Table(
    "imports",
    metadata,
    Column("job_id", text(36), primary_key=True),
    Column("format", text(8), nullable=False),
    Column("columns", Strings, nullable=False),
    *(Column(name, sa.Boolean, nullable=False) for name in ("is_safe", "is_dry_run", "stops", "is_in_long_line")),
    *(Column(name, BigInteger, nullable=False) for name in ("size", "offset")),
    *(Column(name, Integer, nullable=False) for name in ("added", "updated", "failed", "problems")),
)

# The file of an import (`role` is `file`), in compressed parts, and its report. A file is stored before its job.
import_parts = Table(
    "import_parts",
    metadata,
    Column("job_id", text(36), primary_key=True),
    Column("role", text(8), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("content", sa.LargeBinary, nullable=False),
    Column("created_at", UtcTime, nullable=False),
)

# The row that a job renames or deletes, and, for a rename, the last of the rows that the job has processed.
cascades = Table(
    "cascades",
    metadata,
    Column("job_id", text(36), primary_key=True),
    *(Column(name, Id, nullable=False) for name in ("row_id", "last_id")),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("user_id", Id, ForeignKey("users.id"), primary_key=True, autoincrement=False),
    Column("key", text(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("status", SmallInteger),
    Column("headers", Text),
    Column("body", sa.LargeBinary),
    Column("created_at", UtcTime, nullable=False, index=True),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("owner", String(36), nullable=False),
    Column("until", Float, nullable=False),
)

ratings = numbered(
    "ratings",
    Column("score", SmallInteger, nullable=False),
    Column("user_id", Id, ForeignKey("users.id"), nullable=False),
    Column("movie_id", Id, ForeignKey("movies.id"), nullable=False),
    *kept(),
    sa.UniqueConstraint("movie_id", "user_id"),
    Index("ix_ratings_movie_id", "movie_id", "id", "score"),
    Index("ix_ratings_user_id", "user_id", "id"),
)

watchlist = numbered(
    "watchlist",
    Column("movie_id", Id, ForeignKey("movies.id"), nullable=False),
    Column("status", text(20), nullable=False),
    Column("notes", text()),
    Column("user_id", Id, ForeignKey("users.id"), nullable=False),
    Column("watched_at", UtcTime),
    *kept(),
    sa.UniqueConstraint("user_id", "movie_id"),
    Index("ix_watchlist_movie_id", "movie_id", "id"),
    Index("ix_watchlist_user_id", "user_id", "id"),
)
