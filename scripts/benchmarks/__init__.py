"""The rows of `scripts/bench.py`, a module for each kind."""
