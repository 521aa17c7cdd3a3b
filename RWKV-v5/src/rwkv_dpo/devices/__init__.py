"""What a run computes on: the device and its arithmetic, processes, the strategy that joins them, what rank 0 tells the others.

May import: base, settings, torch, Lightning, DeepSpeed. Must not enter: what is computed.
"""
