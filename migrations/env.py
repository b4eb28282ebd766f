"""Runs the migrations on the connection that `repository.engine.migrations` provides."""

from __future__ import annotations

from alembic import context

import models

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("Run migrations with: marquee migrate")

context.configure(
    connection=connection,
    target_metadata=models.metadata,
    render_as_batch=connection.dialect.name == "sqlite",
    transactional_ddl=True,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
