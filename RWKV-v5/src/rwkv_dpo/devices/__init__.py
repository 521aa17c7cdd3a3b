"""What a run computes on: the device and its arithmetic, processes, the strategy that joins them, what rank 0 tells the others.

May import: base, settings, torch, pytorch_lightning, deepspeed, typing_extensions.
Must not enter: what is computed.
"""
