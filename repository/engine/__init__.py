"""The database: transactions, the event log, leases, migrations."""
