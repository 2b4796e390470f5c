"""Benchmarks of kvcore: run `python -m bench` in the repository's root."""
