"""SQL that every resource shares: rows, lists, filters, relations, snapshots, idempotency keys."""
