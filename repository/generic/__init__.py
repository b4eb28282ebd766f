"""What every resource shares: lists, writes, relations, conflicts, snapshots, idempotency."""
