"""The network: a stack that knows no version, the mixes of each version, initial weights, checkpoints.

May import: base, files, settings, batches, kernels, torch.
Must not enter: losses, and what trains.
"""
