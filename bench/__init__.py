"""Benchmarks, run by `python -m bench`. Every published number was printed by a run."""
