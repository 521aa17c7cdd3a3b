"""From pairs and windows to micro-batches: which samples come when, forests of segments, and chunks of them.

May import: base, files, settings, data, torch. Must not enter: the model.
"""
