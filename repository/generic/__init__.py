"""SQL that every resource shares: rows, lists, filters, writes, relations, conflicts, snapshots, idempotency keys."""
