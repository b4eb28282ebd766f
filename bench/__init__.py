"""Measurements. Each module is run by itself and prints what it measured, with the command that repeats it."""
