"""Strings: the form in which they are stored and compared, and lists of them in a query."""
