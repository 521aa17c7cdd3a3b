"""The arithmetic of --dry_run: what a step keeps in memory, and when.

May import: constants of kernels, objective and optimizer. Must not enter: anything that allocates.
"""
