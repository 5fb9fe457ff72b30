"""Benchmarks: `python -m capvl.bench step|data`."""
