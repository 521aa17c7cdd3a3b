"""The network: a stack that knows no version, the mixes of each version, initial weights, checkpoints.

May import: base, files, settings, kernels, batches (forests), torch. Must not enter: losses, and what trains.
"""
