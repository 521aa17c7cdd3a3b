"""From pairs and windows to micro-batches: which samples come when, forests of segments, and chunks of them.

May import: base, settings, data, numpy, torch.
Must not enter: the model.
"""
