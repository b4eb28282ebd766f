"""What is known of databases without connecting to one: columns, what tables have in common, URLs of PostgreSQL."""
