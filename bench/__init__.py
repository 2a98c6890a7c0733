"""Measurements. `python -m bench` is the only door; a number is only ever printed by a run."""
