"""SQL that every resource shares: rows, lists, filters, writes, relations, links, conflicts, snapshots, idempotency."""
