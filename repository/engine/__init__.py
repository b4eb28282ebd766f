"""The database: transactions with `emit`, the event log, the check of the tables, migrations."""
