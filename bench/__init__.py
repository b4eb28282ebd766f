"""Benchmarks. Each module is a program that prints its measurements."""
