"""The only package with SQL. Each write appends its events in the same transaction."""
