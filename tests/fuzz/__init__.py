"""Hostile files and flags: seeds, mutations, the readers they are given to, and a guarded process that runs them.

`tests/test_fuzz.py` runs a slice of it, `benchmarks/fuzz_readers.py` the whole campaign.
"""
