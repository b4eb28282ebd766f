"""The HTTP edge: parse, authorise, call the repository once, render. `table` lists every operation."""
