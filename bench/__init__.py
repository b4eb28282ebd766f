"""Benchmarks: programs that print measurements, and the service that they measure."""
