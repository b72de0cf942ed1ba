"""The proof on the user's own cluster: `python -m syncbn.selftest` as every worker of a TF_CONFIG.

What it compares with is `reference`, NumPy in float64, which shares no code with the library.
"""
