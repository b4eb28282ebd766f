"""What is known of databases without connecting to one: types of columns, and URLs of PostgreSQL."""
