"""The HTTP edge: parse, authorise, one repository call, render. `table` lists every operation."""
