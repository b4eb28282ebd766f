"""The HTTP edge: parse, authorise, call the repository, render. `table` lists every operation."""
