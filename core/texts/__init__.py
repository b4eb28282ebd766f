"""Text: the form in which it is stored and compared, and lists of values in a query."""
