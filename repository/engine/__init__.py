"""The database: transactions with `emit`, the event log, leases, migrations."""
