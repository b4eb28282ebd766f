"""The databases on which a test runs: both, unless the test says otherwise."""

from __future__ import annotations

import pytest

# For input that is rejected before the database is queried, and for what only the HTTP or the websocket layer decides.
SQLITE_ONLY = pytest.mark.parametrize("backend", ["sqlite"], indirect=True, scope="session")
# For tests of locks, roles and sessions, which SQLite does not have.
POSTGRES_ONLY = pytest.mark.parametrize("backend", ["postgres"], indirect=True, scope="session")
