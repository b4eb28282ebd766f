"""Private servers for the tests: PostgreSQL, PgBouncer, Redis, nginx, S3-compatible storage and SMTP."""
