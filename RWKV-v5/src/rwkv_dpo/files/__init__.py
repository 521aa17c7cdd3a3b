"""Reading and writing files safely: atomic writes, hashes, locks, logs, pickles that execute nothing, tensors of other programs.

May import: base, torch, safetensors, huggingface_hub.
Must not enter: what the files mean: pairs, corpora and checkpoints have rooms of their own.
"""
