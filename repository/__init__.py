"""The only place with SQL. Each write appends its event in the same transaction."""
