"""Reads and writes the database; apart from the migrations, the only package with SQL.

Each write appends its events in the same transaction.
"""
