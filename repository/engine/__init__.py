"""The database: transactions with `emit`, the event log, schema checks, migrations."""
