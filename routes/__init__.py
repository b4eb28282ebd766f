"""The HTTP edge: parse, authorise, one repository call, render. `table` is the list of everything there is."""
