"""What is known about databases without connecting to one: columns, what tables have in common, PostgreSQL URLs."""
