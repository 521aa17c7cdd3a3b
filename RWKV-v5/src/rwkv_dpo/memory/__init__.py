"""The arithmetic of --dry_run: what a step keeps in memory, and when.

May import: kernels, model, objective, optimizer.
Must not enter: anything that allocates.
"""
