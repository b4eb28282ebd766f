"""Databases, transactions with `emit`, the event log, leases, migrations."""
