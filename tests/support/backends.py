"""Marks that limit a test to one database. A test without a mark runs on both databases."""

from __future__ import annotations

import pytest

# For tests of input that is rejected before any query, and of behaviour that only the HTTP or websocket layer decides.
SQLITE_ONLY = pytest.mark.parametrize("backend", ["sqlite"], indirect=True, scope="session")
# For tests of locks, roles and sessions, which SQLite does not have.
POSTGRES_ONLY = pytest.mark.parametrize("backend", ["postgres"], indirect=True, scope="session")
