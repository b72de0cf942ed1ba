"""Golden vectors: the same numbers in float64 for every backend; `python -m tests.golden`."""
