"""The tables, for SQLite and PostgreSQL alike.

Python code sees times and dates as strings in the formats of `core/times.py`. Strings are compared by code point on
both databases (collation "C"), never by locale, so that a filter matches the same rows everywhere.
"""

from __future__ import annotations

from datetime import date, datetime
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy import BigInteger, Column, Dialect, Float, ForeignKey, Index, Integer, SmallInteger, String, Table, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeEngine

from core.times import utc_text

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcTime(sa.TypeDecorator[str]):
    """A time: an RFC 3339 string in Python, TIMESTAMPTZ on PostgreSQL, text on SQLite."""

    impl = String(27)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(sa.DateTime(timezone=True))
        return dialect.type_descriptor(String(27))

    def process_bind_param(self, value: str | None, dialect: Dialect) -> Any:
        if value is None or dialect.name != "postgresql":
            return value
        return datetime.fromisoformat(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        return utc_text(value) if isinstance(value, datetime) else value


class IsoDate(sa.TypeDecorator[str]):
    """A date: a string `YYYY-MM-DD` in Python, DATE on PostgreSQL, text on SQLite."""

    impl = String(10)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(sa.Date())
        return dialect.type_descriptor(String(10))

    def process_bind_param(self, value: str | None, dialect: Dialect) -> Any:
        if value is None or dialect.name != "postgresql":
            return value
        return date.fromisoformat(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        return value.isoformat() if isinstance(value, date) else value


# SQLite generates the values of a primary key only if its type is spelled INTEGER.
Id = BigInteger().with_variant(Integer(), "sqlite")
Strings = sa.JSON().with_variant(JSONB(), "postgresql")


def _text(length: int | None = None) -> TypeEngine[Any]:
    kind = partial(String, length) if length else Text
    return kind().with_variant(kind(collation="C"), "postgresql")


def _numbered(name: str, *columns: Column[Any] | Index) -> Table:
    """Return a table with an `id` that is never reused, so that no client mistakes a new row for a deleted one."""
    key = Column("id", Id, primary_key=True, autoincrement=True)
    return Table(name, metadata, key, *columns, sqlite_autoincrement=True)


def _kept() -> tuple[Column[Any], ...]:
    """Return the columns that the service maintains in every row that clients edit."""
    version = Column("version", Integer, nullable=False)
    return version, Column("created_at", UtcTime, nullable=False), Column("updated_at", UtcTime, nullable=False)


def _only(sqlite: str, postgresql: str | None = None) -> dict[str, Any]:
    """Return the options of an index on only the rows that meet a condition."""
    return {"sqlite_where": sa.text(sqlite), "postgresql_where": sa.text(postgresql or sqlite)}


users = _numbered(
    "users",
    Column("username", _text(50)),
    # The normalised user name, which must be unique.
    Column("username_key", _text(200), unique=True),
    Column("email", _text(320)),
    Column("email_key", _text(320), unique=True),
    # The normalised address of an account that has not been activated yet. Several accounts may wait for one address.
    Column("waiting_key", _text(320)),
    Column("name", _text(100)),
    Column("first_name", _text(100)),
    Column("last_name", _text(100)),
    Column("phone_number", _text(16)),
    Column("password_hash", Text, nullable=False),
    Column("group", _text(20), nullable=False),
    Column("is_active", sa.Boolean, nullable=False),
    *_kept(),
    Column("gender", _text(20)),
    Column("date_of_birth", IsoDate),
    Column("info", _text()),
    # The folder of the account's pictures in the file storage.
    Column("avatar", _text(64)),
    Column("profile_created_at", UtcTime),
    # The account is inactive because it has not been activated yet, not because an admin disabled it.
    Column("awaits_activation", sa.Boolean, nullable=False),
    # The row of a deleted account keeps only its id, because its movies still refer to that id.
    Column("deleted_at", UtcTime),
    Index("ix_users_avatar", "avatar"),
    Index("ix_users_waiting_key", "waiting_key", "id", **_only("waiting_key IS NOT NULL")),
    Index("ix_users_awaiting", "created_at", **_only("awaits_activation = 1", "awaits_activation")),
)

movies = _numbered(
    "movies",
    Column("title", _text(255), nullable=False),
    Column("description", _text()),
    Column("release_date", IsoDate),
    Column("rating", SmallInteger),
    Column("duration_minutes", Integer),
    Column("status", _text(50)),
    Column("budget", BigInteger),
    Column("revenue", BigInteger),
    Column("country", _text(2)),
    Column("languages", Strings, nullable=False),
    Column("genres", Strings, nullable=False),
    Column("user_id", Id, ForeignKey("users.id")),
    Column("characters_count", Integer, nullable=False),
    *_kept(),
    Index("ix_movies_user_id", "user_id", "id"),
)

characters = _numbered(
    "characters",
    Column("name", _text(255), nullable=False),
    Column("description", _text()),
    Column("movie_id", Id, ForeignKey("movies.id")),
    Column("user_id", Id, ForeignKey("users.id")),
    *_kept(),
    Index("ix_characters_user_id", "user_id", "id"),
    Index("ix_characters_movie_id", "movie_id", "id"),
)

genres = _numbered(
    "genres",
    Column("name", _text(100), nullable=False),
    # The normalised name, which must be unique.
    Column("name_key", _text(200), nullable=False, unique=True, info={"key_of": "name"}),
    Column("description", _text()),
    *_kept(),
)

actors = _numbered(
    "actors",
    Column("name", _text(100), nullable=False),
    Column("birth_date", IsoDate),
    Column("country", _text(2)),
    Column("biography", _text()),
    *_kept(),
)

countries = _numbered(
    "countries",
    Column("code", _text(2), nullable=False),
    # The code in lower case, which must be unique.
    Column("code_key", _text(200), nullable=False, unique=True, info={"key_of": "code"}),
    Column("name", _text(100), nullable=False),
    *_kept(),
)

languages = _numbered(
    "languages",
    Column("code", _text(2), nullable=False),
    # The code, which must be unique.
    Column("code_key", _text(200), nullable=False, unique=True, info={"key_of": "code"}),
    Column("name", _text(100), nullable=False),
    *_kept(),
)

sessions = Table(
    "sessions",
    metadata,
    # The claim `sid` of the session's tokens.
    Column("id", _text(36), primary_key=True),
    Column("user_id", Id, ForeignKey("users.id"), nullable=False),
    Column("user_agent", _text(255)),
    Column("address", _text(64)),
    Column("created_at", UtcTime, nullable=False),
    # When the last token of the session expires; the clean-up then ends the session.
    Column("expires_at", UtcTime, nullable=False),
    Column("ended_at", UtcTime),
    Column("last_used_at", UtcTime, nullable=False),
    # The claim `jti` of the only valid refresh token; the session's older refresh tokens are rejected.
    Column("refresh_id", _text(32)),
    Index("ix_sessions_user_id", "user_id", "created_at"),
    Index("ix_sessions_expires_at", "expires_at"),
)

# The one-time tokens in emailed URLs. Only the digest of a token is stored.
one_time_tokens = Table(
    "one_time_tokens",
    metadata,
    Column("digest", _text(64), primary_key=True),
    Column("purpose", _text(16), nullable=False),
    Column("user_id", Id, ForeignKey("users.id"), nullable=False),
    # The address that the URL was mailed to; using the token proves that the user receives emails there.
    Column("email", _text(320)),
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
    Index("ix_one_time_tokens_user_id", "user_id", "purpose"),
    Index("ix_one_time_tokens_expires_at", "expires_at"),
)

# The outbox: emails to be sent, those sent in the last day, and those that failed in the last week. An email is
# composed on delivery, so that the table holds no tokens.
mails = _numbered(
    "mails",
    # Null until the recipient's account has been looked up.
    Column("user_id", Id, ForeignKey("users.id")),
    Column("kind", _text(32), nullable=False),
    Column("recipient", _text(320), nullable=False),
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
audit = _numbered(
    "audit",
    Column("actor_id", Id),
    Column("action", _text(32), nullable=False),
    Column("user_id", Id),
    Column("changes", Strings, nullable=False),
    Column("address", _text(64)),
    Column("created_at", UtcTime, nullable=False),
    Column("resource", _text(32), nullable=False),
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
    Column("username", _text(50)),
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
    Column("first_id", BigInteger, nullable=False),
    Column("last_id", BigInteger, nullable=False),
    Index("ix_event_spans_topic", "topic", "seq", "first_id", "last_id"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", _text(36), primary_key=True),
    Column("kind", _text(32), nullable=False),
    Column("state", _text(16), nullable=False),
    Column("done", Integer, nullable=False),
    Column("total", Integer, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("batch_size", Integer, nullable=False),
    Column("rate", Float),
    Column("user_id", Id, ForeignKey("users.id")),
    Column("created_at", UtcTime, nullable=False),
    Column("started_at", UtcTime),
    Column("finished_at", UtcTime),
    Column("rows_per_second", Integer, nullable=False),
    Column("error", Text),
    Column("attempts", Integer, nullable=False),
    Column("lease_owner", String(64)),
    # Seconds since 1970 by the database's clock, so that differences between the workers' clocks do not matter.
    Column("lease_until", Float),
    # The network of the client that requested the job, as `core.network.addresses.network_of` returns it.
    Column("network", Text),
    Index("ix_jobs_network", "network", "created_at"),
    Index("ix_jobs_state", "state", "lease_until"),
    Index("ix_jobs_user_id", "user_id", "lease_until"),
)

# What a job imports, how far it has come, and what came of it. The places in the file are in bytes.
imports = Table(
    "imports",
    metadata,
    Column("job_id", _text(36), primary_key=True),
    Column("format", _text(8), nullable=False),
    Column("columns", Strings, nullable=False),
    *(Column(name, sa.Boolean, nullable=False) for name in ("is_safe", "is_dry_run", "stops", "is_in_long_line")),
    *(Column(name, BigInteger, nullable=False) for name in ("size", "offset")),
    *(Column(name, Integer, nullable=False) for name in ("added", "updated", "failed", "problems")),
)

# The file of an import (`role` is `file`), in deflated parts, and its report. A file is stored before its job.
import_parts = Table(
    "import_parts",
    metadata,
    Column("job_id", _text(36), primary_key=True),
    Column("role", _text(8), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("content", sa.LargeBinary, nullable=False),
    Column("created_at", UtcTime, nullable=False),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("user_id", Id, ForeignKey("users.id"), primary_key=True, autoincrement=False),
    Column("key", _text(255), primary_key=True),
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
