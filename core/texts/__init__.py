"""Strings: their normal forms, lists of strings in a query, and excerpts."""
